"""Checkpoints of a run. Each is complete or does not exist; the last few and the best are kept.

`FOLDER/checkpoints/step-00000100/` is a saved adapter, which `lorafamily.load` reads, with the rest of the run's state
in `state.json` and `state.safetensors`. It is written under another name and then renamed.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lorafamily.deploy import files, saved
from lorafamily.deploy.folder import read_record, read_sealed_tensors, write_sealed
from lorafamily.errors import FileError, StateError
from lorafamily.insight.record import STEPS, recorded
from lorafamily.training.state import pack, unpack

STATE, TENSORS = "state.json", "state.safetensors"
FOLDER = f"a checkpoint is a folder with {STATE} and {TENSORS}"
FORMAT = 1

Resume = Literal["never", "auto", "anyway"]


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint. `adapters`: None if the run trains a plain model."""

    folder: Path
    state: dict[str, Any]
    adapters: saved.Saved | None


class Checkpoints:
    """The checkpoints of one run, in its folder; none without a folder, or if `every` is None. `keep`: how many of the
    last are kept."""

    def __init__(self, folder: str | os.PathLike[str] | None, every: int | None, keep: int):
        if every is not None and (folder is None or every < 1):
            raise StateError(
                f"save_every={every!r} must be a number of steps, and needs log_dir=..., a folder to save in"
            )
        if keep < 1:
            raise StateError(f"keep={keep!r}: must be a number of checkpoints, at least 1")
        self.log_folder = None if folder is None else Path(folder)
        self.folder = None if every is None or self.log_folder is None else self.log_folder / "checkpoints"
        self.every, self.keep = every, keep

    def due(self, step: int) -> bool:
        return self.every is not None and step % self.every == 0

    def to_go_on_from(self, resume: Resume) -> Checkpoint | None:
        """The newest checkpoint, None if the run begins.

        Raises:
            StateError: `resume` is "never" and the folder has checkpoints or the record of an earlier run; or it is
                not, and there is no folder.
            FileError: there are checkpoints, and all are damaged.
        """
        if resume not in ("never", "auto", "anyway"):
            raise StateError(f'resume={resume!r}: must be "never", "auto" or "anyway"')
        if resume != "never":
            if self.folder is None:
                raise StateError(f"resume={resume!r} needs checkpoints: pass log_dir and save_every as well")
            return self.newest()
        if folders := self._folders():
            raise StateError(
                f'{self.log_folder} has checkpoints of an earlier run; resume="auto" goes on from {folders[-1].name}, '
                "another log_dir begins anew"
            )
        if self.log_folder is not None and recorded(self.log_folder):
            raise StateError(
                f"{self.log_folder} has the record of an earlier run ({STEPS}), which this one would overwrite; give "
                "another log_dir, or remove the record"
            )
        return None

    def newest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint; damaged ones are skipped with a warning.

        Raises:
            FileError: all are damaged.
        """
        damaged = []
        for folder in reversed(self._folders()):
            try:
                found = read(folder)
            except FileError as error:
                damaged.append(str(error))
                continue
            if damaged:
                warnings.warn(f"{'; '.join(damaged)}. Going on from {folder.name} instead", stacklevel=3)
            return found
        if damaged:
            raise FileError(f"no checkpoint can be read: {'; '.join(damaged)}; remove them to begin anew")
        return None

    def write(self, step: int, model: nn.Module, adapters: str | None, state: Mapping[str, Any], best: int) -> None:
        """Write a checkpoint; then remove those that are neither among the last nor of the step `best`. `adapters`: the
        name of those that train.

        Raises:
            FileError: it cannot be written; the earlier ones are unchanged.
        """
        assert self.folder is not None
        final = self.folder / name_of(step)
        partial = final.with_name(final.name + ".partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            if adapters is not None:
                files.save(model, partial, adapters)
            tensors: dict[str, Any] = {}
            packed = pack(dict(state), "state", tensors)
            write_sealed(partial, STATE, {"format": FORMAT, "state": packed}, TENSORS, tensors)
            shutil.rmtree(final, ignore_errors=True)  # a damaged one, or one from before the run went back
            partial.rename(final)
            _flush(self.folder)
        except OSError as error:
            raise FileError(f"{final}: cannot write the checkpoint ({error})") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        for old in self._folders()[: -self.keep]:
            if old.name != name_of(best):
                shutil.rmtree(old, ignore_errors=True)

    def _folders(self) -> list[Path]:
        if self.folder is None or not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))


def name_of(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def read(folder: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        FileError: it is missing or damaged.
    """
    record = read_record(folder / STATE, FOLDER, FORMAT)
    tensors = read_sealed_tensors(folder / TENSORS, FOLDER, record)
    try:
        state = unpack(record["state"], tensors)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise FileError(f"{folder / STATE}: not the state of a run ({type(error).__name__}: {error})") from None
    if not isinstance(state, dict):
        raise FileError(f"{folder / STATE}: not the state of a run, but a {type(state).__name__}")
    has_adapters = (folder / saved.RECORD).exists() or state.get("has adapters")
    return Checkpoint(folder, state, saved.read(folder) if has_adapters else None)


def _flush(folder: Path) -> None:
    """Make a renaming survive a loss of power, where the system can."""
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
