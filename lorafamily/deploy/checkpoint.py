"""Merging into a checkpoint on disk, tensor by tensor: a model larger than memory can be merged.

A checkpoint is a folder as `transformers` writes it: `model.safetensors`, or shards of it with an index, and its
config. A safetensors file is eight bytes with the length of a JSON header, the header (dtype, shape and place of every
tensor), and the tensors' bytes. Merging changes bytes only, so headers and shards stay as they are.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lorafamily.adapter import Adapter
from lorafamily.deploy.files import Saved
from lorafamily.deploy.folder import listed, read_json
from lorafamily.deploy.merge import changed_weight
from lorafamily.errors import FileError, StateError
from lorafamily.layers import LayerKind
from lorafamily.parts import kind_of_record

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FOLDER = f"a checkpoint is a folder with {SINGLE}, or {INDEX} and its shards"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CHUNK = 1 << 24  # bytes copied at a time


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its bytes are those from `begin` to `end`, counted from the file's start."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def merge_checkpoint(
    base: Path, saved: Saved, out: Path, progress: Callable[[int], None] = lambda written: None
) -> None:
    """Write into `out` the checkpoint `base` with an adapter merged into its weights.

    Weights are rounded as `merge` rounds them: the tensors are those that merging in memory and saving gives.
    Everything is checked before anything is written; the folder is written beside its place and renamed into it.
    `progress` is told how many bytes were written, again and again.

    Raises:
        FileError: no checkpoint there, or one that the adapter was not made for, or `out` is not empty.
        StateError: an adapted weight was tied to another in the model, which would change too; as in memory.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileError(f"{out}: is there and not empty; a merged checkpoint goes into a folder of its own")
    entries = entries_of(base)
    changes = _checked(saved, entries, base)
    beside = out.with_name(out.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)  # of a merge that was killed; mostly there is none
    beside.mkdir(parents=True)
    try:
        by_file: dict[Path, list[tuple[str, Entry]]] = defaultdict(list)
        for name, entry in entries.items():
            by_file[entry.file].append((name, entry))
        for file in sorted(base.iterdir()):
            if file in by_file:
                _rewrite(file, by_file[file], changes, beside / file.name, progress)
            elif file.is_file() and file.suffix not in (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack"):
                shutil.copyfile(file, beside / file.name)  # config, tokenizer; no weights in other formats
        if out.exists():
            out.rmdir()
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # after a failure; once renamed it is not there


def entries_of(base: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint by name.

    Raises:
        FileError: no checkpoint there, a shard that is missing, damaged or outside the folder.
    """
    if (base / INDEX).is_file():
        shards = read_json(base / INDEX, FOLDER)
        if not isinstance(shards, dict) or not isinstance(shards.get("weight_map"), dict):
            raise FileError(f"{base / INDEX}: no index of shards (it needs a weight_map)")
        files = sorted(set(shards["weight_map"].values()))
        if escaping := [name for name in files if not isinstance(name, str) or Path(name).name != name]:
            raise FileError(f"{base / INDEX}: {escaping[0]!r} is no file of this folder")
    else:
        files = [SINGLE]
    entries: dict[str, Entry] = {}
    for name in files:
        for tensor, entry in _header(base / name).items():
            if tensor in entries:
                raise FileError(f"{base}: {tensor} is in {entries[tensor].file.name} and in {name}")
            entries[tensor] = entry
    return entries


def _header(file: Path) -> dict[str, Entry]:
    if not file.is_file():
        raise FileError(f"{file.parent}: no {file.name} there; {FOLDER}")
    size = file.stat().st_size
    try:
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("its header would be longer than the file")
            header = json.loads(opened.read(length))
        found = {}
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                if not 0 <= begin <= end <= size - 8 - length:
                    raise ValueError(f"{name} would lie outside the file")
                found[name] = Entry(file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, 8 + length + end)
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{file}: damaged, not a safetensors file ({error})") from None


def _checked(saved: Saved, entries: Mapping[str, Entry], base: Path) -> dict[str, Callable[[Tensor], Tensor]]:
    """What happens to which tensor of the checkpoint, by its name there."""
    prefix = _prefix(saved, entries)
    adapters: dict[str, list[tuple[LayerKind, Adapter]]] = defaultdict(list)
    wrong = []
    for at, entry in saved.modules.items():
        kind = kind_of_record(entry)
        if kind is None:
            wrong.append(f"{at} is of a kind that is not registered here ({entry.get('kind')!r})")
            continue
        name = kind.stored_as(at).removeprefix(prefix)
        if entry.get("tied"):
            raise StateError(
                f"{' and '.join(entry['tied'])} are one tied tensor in the model: merging the adapter of {at} would "
                "change the others too; untie them (a clone of the weight) before merging"
            )
        if name not in entries:
            wrong.append(f"{name} is missing")
        elif entries[name].dtype not in DTYPES:
            raise FileError(
                f"{base}: {name} is stored as {entries[name].dtype}; merging needs plain floating-point weights. Where "
                "it is quantised, merge into the checkpoint it was quantised from, which the adapter fits, or load it, "
                "call lorafamily.merge(model, dequantise=torch.bfloat16) and save the model"
            )
        elif (shape := _as_matrix(kind, entries[name].shape)) != entry["shape"]:
            wrong.append(f"{name} is {shape} as (d_out, d_in), not {entry['shape']}")
        else:
            adapters[name].append((kind, saved.adapters[at]))
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        name: partial(changed_weight, acting=those) for name, those in adapters.items()
    }
    for at, value in saved.beside.items():
        name = at.removeprefix(prefix)
        if name not in entries:
            wrong.append(f"{at}, which trained beside the adapter, is missing; save the model with it first")
        elif entries[name].shape != tuple(value.shape) or entries[name].dtype not in DTYPES:
            wrong.append(f"{name} is {entries[name].dtype} {list(entries[name].shape)}, not {list(value.shape)}")
        else:
            changes[name] = partial(_instead, value=value)
    if wrong:
        raise FileError(f"{base}: not the checkpoint this adapter was made for: {listed(wrong)}")
    return changes


def _as_matrix(kind: LayerKind, shape: tuple[int, ...]) -> list[int]:
    try:
        return list(kind.matrix(torch.empty(shape, device="meta")).shape)
    except (RuntimeError, IndexError):  # too few axes, or rows that the kind's parts do not share out
        return list(shape)


def _instead(weight: Tensor, value: Tensor) -> Tensor:
    return value.to(weight.dtype)


def _prefix(saved: Saved, entries: Mapping[str, Entry]) -> str:
    """What the adapter's names begin with and the checkpoint's do not: a model with a head calls its trunk by a name,
    the trunk's own checkpoint does not."""
    at, entry = next(iter(saved.modules.items()), ("", {}))
    kind = kind_of_record(entry)
    if kind is None:
        return ""
    first, trunk = kind.stored_as(at), at.partition(".")[0] + "."
    return trunk if first not in entries and first.removeprefix(trunk) in entries else ""


def _rewrite(
    source: Path,
    entries: list[tuple[str, Entry]],
    changes: Mapping[str, Callable[[Tensor], Tensor]],
    target: Path,
    progress: Callable[[int], None],
) -> None:
    """Copy a safetensors file, with the tensors that change put in their place; one of them is in memory at a time."""
    changing = sorted((entry for entry in entries if entry[0] in changes), key=lambda entry: entry[1].begin)
    with open(source, "rb") as old, open(target, "wb") as new:
        for name, entry in changing:
            _copy(old, new, entry.begin - old.tell(), progress)
            stored = torch.frombuffer(bytearray(old.read(entry.end - entry.begin)), dtype=DTYPES[entry.dtype]).clone()
            with torch.no_grad():
                changed = changes[name](stored.view(entry.shape)).contiguous()
            new.write(changed.view(torch.uint8).numpy().tobytes() if changed.numel() else b"")
            progress(entry.end - entry.begin)
        _copy(old, new, source.stat().st_size - old.tell(), progress)


def _copy(old: BinaryIO, new: BinaryIO, size: int, progress: Callable[[int], None]) -> None:
    while size > 0:
        chunk = old.read(min(size, CHUNK))
        new.write(chunk)
        progress(len(chunk))
        size -= len(chunk)
