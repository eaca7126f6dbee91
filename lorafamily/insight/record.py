"""The record of a run in its folder, from which ranks and pictures can be had without the model.

`allocation.jsonl` has a line for the ranks at the start and one for every decision (step, reason, threshold, ranks
before and after, and scores by module). `steps.jsonl` has a line for every training step. Both are written during the
run. Reading them raises `FileError` where one is missing or damaged.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from lorafamily.deploy import saved
from lorafamily.errors import FileError
from lorafamily.history import Decision, Step

DECISIONS, STEPS = "allocation.jsonl", "steps.jsonl"
EVENTS = "events.out.tfevents.*"  # TensorBoard's
PICTURES = ("rank-by-layer", "rank-by-expert", "rank-history", "scores", "course")


class Record:
    """Writes the two files of a run, beginning with the given decisions and steps. A line is on disk when the call
    that writes it returns."""

    def __init__(self, folder: str | os.PathLike[str], decisions: Sequence[Decision], steps: Sequence[Step] = ()):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._decisions = open(self.folder / DECISIONS, "w")  # noqa: SIM115 - open as long as the run
        self._steps = open(self.folder / STEPS, "w")  # noqa: SIM115
        for decision in decisions:
            self.decision(decision)
        for step in steps:
            self.step(step)

    def decision(self, decision: Decision) -> None:
        _append(self._decisions, decision)

    def step(self, step: Step) -> None:
        _append(self._steps, step)

    def close(self) -> None:
        self._decisions.close()
        self._steps.close()


def recorded(folder: Path) -> bool:
    """Whether the folder has the record of a run that made at least one step."""
    steps = folder / STEPS
    return steps.is_file() and steps.stat().st_size > 0


def set_aside(folder: Path) -> Path:
    """Move an earlier run's record, events and pictures to the first free of `earlier-1`, `earlier-2`, …

    Raises:
        FileError: they cannot be moved.
    """
    number = next(number for number in count(1) if not (folder / f"earlier-{number}").exists())
    place = folder / f"earlier-{number}"
    pictures = [folder / f"{name}.png" for name in PICTURES]
    try:
        place.mkdir()
        for path in (folder / STEPS, folder / DECISIONS, *folder.glob(EVENTS), *pictures):
            if path.exists():
                path.rename(place / path.name)
    except OSError as error:
        raise FileError(f"{place}: cannot keep the record of an earlier run there ({error})") from error
    return place


def slices_at(folder: str | os.PathLike[str], step: int | None = None) -> dict[str, int]:
    """The slices of every module after `step` optimizer steps of a recorded run, or those of a saved adapter.

    `apply(model, method, rank=slices_at(folder))` starts with these ranks; for LoRA² use `slices=slices_at(folder)` and
    give a `width`.

    Args:
        folder: `log_dir` of a run, or what `save` wrote.
        step: 0 is the start, None the end. A saved adapter has no steps.

    Raises:
        FileError: the folder holds neither, a file is damaged, or a step of a saved adapter was asked for.
        MethodError: the saved adapter's method is not installed.
    """
    if (Path(folder) / saved.RECORD).is_file() and not (Path(folder) / DECISIONS).is_file():
        if step is not None:
            raise FileError(f"{folder} is a saved adapter with the slices of its end alone; leave out step={step}")
        return {at: adapter.slices for at, adapter in saved.read(folder).adapters.items()}
    slices: dict[str, int] = {}
    for decision in read_decisions(folder):
        if step is None or decision.step <= step:
            slices = decision.after
    return slices


def redraw(folder: str | os.PathLike[str]) -> list[Path]:
    """Draw the pictures of a recorded run into its folder again, from its two files; returns their paths.

    Raises:
        FileError: no record there, or it is damaged.
    """
    from lorafamily.insight.pictures import draw, pictures_of  # matplotlib takes long to import

    return draw(Path(folder), pictures_of(read_decisions(folder), read_steps(folder)))


def read_decisions(folder: str | os.PathLike[str]) -> list[Decision]:
    """The decisions of a recorded run. The first holds the ranks at the start.

    Raises:
        FileError: there is no record, or it is damaged or empty.
    """
    decisions: list[Decision] = _read(Path(folder) / DECISIONS, Decision)
    if not decisions:
        raise FileError(f"{Path(folder) / DECISIONS}: empty; a record begins with the ranks at the start")
    return decisions


def read_steps(folder: str | os.PathLike[str]) -> list[Step]:
    """The steps of a recorded run."""
    return _read(Path(folder) / STEPS, Step)


def _append(file: Any, entry: Any) -> None:
    line = json.dumps(dataclasses.asdict(entry)) + "\n"
    try:
        file.write(line)
        file.flush()
    except OSError as error:
        raise FileError(f"{file.name}: cannot write {len(line):,} bytes more ({error})") from error


def _read(path: Path, entry_class: type[Any]) -> list[Any]:
    if not path.is_file():
        raise FileError(f"{path} does not exist; train(..., log_dir=folder) writes it")
    entries = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            entries.append(entry_class(**json.loads(line)))
        except (ValueError, TypeError) as error:
            name = entry_class.__name__.lower()
            raise FileError(f"{path}, line {number}: not a record of a {name} ({error})") from None
    return entries
