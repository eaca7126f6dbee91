"""Files of an adapter folder: written beside their place and renamed into it, read without unpickling anything."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from lorafamily.errors import FileError


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Tensors of any device as a safetensors file."""
    on_cpu = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    _write(path, safetensors.torch.save(on_cpu, metadata))


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    _write(path, (json.dumps(record, indent=1) + "\n").encode())


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; `what` says in the error what the folder should have been."""
    _check_there(path, what)
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise FileError(f"{path}: damaged, not a safetensors file ({error})") from None


def read_json(path: Path, what: str) -> Any:
    _check_there(path, what)
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=_without_twins)
    except ValueError as error:
        raise FileError(f"{path}: damaged, not JSON ({error})") from None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two entries of one name, json would keep the last and say nothing."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a name occurs twice among {', '.join(name for name, _ in pairs)[:80]}")
    return found


def listed(problems: list[str]) -> str:
    """The first five of what is wrong, and how many more."""
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    return "; ".join(problems[:5]) + more


def _check_there(path: Path, what: str) -> None:
    if not path.is_file():
        raise FileError(f"{path.parent}: no {path.name} there; {what}")


def _write(path: Path, data: bytes) -> None:
    beside = path.with_name(path.name + ".partial")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
