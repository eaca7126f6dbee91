"""A saved adapter as a folder: `adapter.safetensors` with the tensors, `adapter.json` with everything else.

Reading uses safetensors and json only, and checks that the two files fit each other; it needs no model.
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafamily.adapter import Adapter
from lorafamily.budget import Sizing
from lorafamily.deploy.folder import in_one_line, listed, read_record, read_sealed_tensors, sealed_sizes, write_sealed
from lorafamily.deploy.plain import noted_dropout
from lorafamily.errors import FileError, LoraFamilyError
from lorafamily.method import Method
from lorafamily.registry import find

FORMAT = 3  # 2 had other names in the record
TENSORS, RECORD = "adapter.safetensors", "adapter.json"
FOLDER = f"a saved adapter is a folder with {RECORD} and {TENSORS}"


@dataclass(frozen=True)
class Saved:
    """The content of an adapter folder. `extra_trained`: the parameters and buffers that training changed besides the
    adapters."""

    folder: Path
    record: dict[str, Any]
    method: Method
    sizing: Sizing
    adapters: dict[str, Adapter]
    extra_trained: dict[str, Tensor]

    @property
    def modules(self) -> dict[str, dict[str, Any]]:
        """The record's entry of every adapted layer: layer kind, shape as (d_out, d_in), slices, scale."""
        return self.record["modules"]


def write(saved: Saved, path: str | os.PathLike[str]) -> Path:
    """Write an adapter without a model; raises FileError if a file cannot be written."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    record, tensors = _contents(saved)
    write_sealed(folder, RECORD, record, TENSORS, tensors)
    return folder


def sizes(saved: Saved) -> dict[str, int]:
    """The exact size in bytes of each file that `write` would write; the tensors may be on the meta device."""
    record, tensors = _contents(saved)
    return sealed_sizes(RECORD, record, TENSORS, tensors)


def _contents(saved: Saved) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = {f"{at}.{key}": value for at, a in saved.adapters.items() for key, value in a.state_dict().items()}
    modules = {at: {**saved.modules[at], "slices": a.slices, **a.state()} for at, a in saved.adapters.items()}
    record = saved.record | {
        "options": saved.method.options(),
        # `ranks` is left out if there are none, as in records from before ranks could be given by layer.
        "sizing": {k: v for k, v in dataclasses.asdict(saved.sizing).items() if k != "ranks" or v is not None},
        "also_trained": {at: list(value.shape) for at, value in saved.extra_trained.items()},
        "modules": modules,
    }
    return record, tensors | saved.extra_trained


def read(path: str | os.PathLike[str]) -> Saved:
    """Read a saved adapter without a model, onto the CPU.

    Raises:
        FileError: the folder lacks a file, or a file is damaged.
        MethodError: the method is not installed.
    """
    folder = Path(path)
    record = read_record(folder / RECORD, FOLDER, FORMAT)
    tensors = read_sealed_tensors(folder / TENSORS, FOLDER, record)
    try:
        method = find(record["method"]).with_options(**record["options"])
        sizing, budgets = Sizing(**record["sizing"]), [record["sizing"][key] for key in ("budget", "rank_budget")]
        counts = [sizing.rank, sizing.initial_parameters, *(sizing.ranks or {}).values()]
        counts += [budget for budget in budgets if budget is not None]
        if sizing.budget_at not in ("peak", "end") or not all(map(_is_count, counts)):
            raise ValueError("sizing")
        adapters: dict[str, Adapter] = {}
        expected: dict[str, tuple[int, ...]] = {}
        for at, entry in record["modules"].items():
            d_out, d_in = entry["shape"]
            if not (math.isfinite(entry["scale"]) and _is_count(entry["initial_slices"])):
                raise ValueError(f"scale {entry['scale']} or initial_slices of {at}")
            settled = entry.get("settled", False)  # older records lack it
            if not isinstance(settled, bool):
                raise TypeError(f"settled of {at}")
            with torch.device("meta"):
                update = method.parametrisation(d_in, d_out, **entry["sizes"])
            dropout = noted_dropout(entry["dropout"], entry["dropout_kind"], folder / RECORD)
            adapter = Adapter(
                update, scale=entry["scale"], dropout=dropout, initial_slices=entry["initial_slices"], settled=settled
            )
            if entry["frozen_initial"]:
                adapter.freeze_initial()
            adapters[at] = adapter
            expected |= {f"{at}.{key}": tuple(value.shape) for key, value in adapter.state_dict().items()}
        extra_trained = {at: tuple(shape) for at, shape in record["also_trained"].items()}
        expected |= extra_trained
        if not isinstance(record["base"]["architecture"], str):
            raise TypeError("base")
    except LoraFamilyError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise FileError(f"{folder / RECORD}: not a record of an adapter ({in_one_line(error)})") from None
    _check_tensors(tensors, expected, folder)
    for at, adapter in adapters.items():
        if len({tensors[f"{at}.{key}"].dtype for key in adapter.state_dict()}) > 1:
            raise FileError(f"{folder / TENSORS}: the tensors of {at} are not all of one dtype")
        adapter.load_state_dict({key: tensors[f"{at}.{key}"] for key in adapter.state_dict()}, assign=True)
    return Saved(folder, record, method, sizing, adapters, {at: tensors[at] for at in extra_trained})


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    wrong = [f"{key} is missing" for key in expected if key not in tensors]
    wrong += [f"{key} is not in the record" for key in tensors if key not in expected]
    for key, value in tensors.items():
        if key in expected and tuple(value.shape) != expected[key]:
            wrong.append(f"{key} is {tuple(value.shape)}, not {expected[key]}")
        elif not torch.isfinite(value).all() or not (value.is_floating_point() or value.ndim == 0):
            wrong.append(f"{key} is not all finite floating-point numbers")
    if wrong:
        raise FileError(f"{folder / TENSORS}: {listed(wrong)}")


def warn_of_other_base(saved: Saved, shapes: str, base: str) -> None:
    """Warn if a base, into whose layers an adapter fits, has others besides; `shapes`: the hash of its shapes."""
    if saved.record["base"].get("shapes") != shapes:
        warnings.warn(
            f"{saved.folder}: every adapted layer fits, but {base} has other parameters besides them than the "
            f"{saved.record['base']['architecture']} the adapter was made for",
            stacklevel=3,
        )
