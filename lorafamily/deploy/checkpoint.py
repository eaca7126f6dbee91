"""Merging into a checkpoint on disk, tensor by tensor: a model larger than memory can be merged.

A checkpoint is a folder as `transformers` writes it: `model.safetensors`, or shards of it with an index, and its
config. A safetensors file is eight bytes with the length of a JSON header, the header (dtype, shape and place of every
tensor), and the tensors' bytes. Merging changes bytes only, so headers and shards stay as they are. Names on disk are
often not those in the model, and neither are the tensors: `conversion.py` knows which are which.
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

from lorafamily.deploy.conversion import CONFIG, Group, Names, names_of
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
    `progress` is told how many bytes were written, again and again. In memory is one tensor at a time, or as many as
    are one in the model: all experts of a layer.

    Raises:
        FileError: no checkpoint there, or one that the adapter was not made for, or that holds tensors in a form from
            which there is no way back; or `out` is not empty.
        StateError: an adapted weight is tied to another in the model, which would change too; as in memory.
    """
    refuse_used(out)
    entries = entries_of(base)
    changes = _Changes(*_checked(saved, entries, base), entries)
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
            elif file.is_file() and not is_weights(file):
                shutil.copyfile(file, beside / file.name)  # config, tokenizer; no weights in other formats
        if out.exists():
            out.rmdir()
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # after a failure; once renamed it is not there


def refuse_used(out: Path) -> None:
    """A merged checkpoint goes where nothing is.

    Raises:
        FileError: something is.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileError(f"{out}: is there and not empty; a merged checkpoint goes into a folder of its own")


def is_weights(file: Path) -> bool:
    """Whether a checkpoint's file holds weights, in whatever format, and not its config or tokenizer."""
    return file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack")


def entries_of(base: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint by name.

    Raises:
        FileError: no checkpoint there, a shard that is missing, damaged or outside the folder.
    """
    if (base / INDEX).is_file():
        if (base / SINGLE).exists():
            raise FileError(f"{base}: {SINGLE} and {INDEX} are both there, and of which one to read nobody says")
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


Change = Callable[[Tensor], Tensor]


def _checked(saved: Saved, entries: Mapping[str, Entry], base: Path) -> tuple[dict[str, Change], list[Group]]:
    """What happens to which tensor of the model, by its name there, and what holds these tensors on disk."""
    adapters: dict[str, list[tuple[str, LayerKind]]] = defaultdict(list)
    wrong = []
    for at, entry in saved.modules.items():
        kind = kind_of_record(entry)
        if kind is None:
            wrong.append(f"{at} is of a kind that is not registered here ({entry.get('kind')!r})")
            continue
        if entry.get("tied"):
            raise StateError(
                f"{' and '.join(entry['tied'])} are one tied tensor in the model: merging the adapter of {at} would "
                "change the others too; untie them (a clone of the weight) before merging"
            )
        adapters[kind.stored_as(at)].append((at, kind))
    shapes = {name: entry.shape for name, entry in entries.items()}
    names = names_of(base, shapes, saved.record["base"]["architecture"], [*adapters, *saved.beside])
    groups: dict[int, Group] = {}
    changes: dict[str, Change] = {}
    for name, of in adapters.items():
        group = names.of(name)
        if group is None:
            wrong.append(f"{name} {names.why_not(name)}")
            continue
        _check_alone(name, names, base)
        shape = _shape_in_memory(group, name.removeprefix(names.prefix), entries, base)
        for at, kind in of:
            if (as_matrix := _as_matrix(kind, shape)) != saved.modules[at]["shape"]:
                wrong.append(f"{name} is {as_matrix} as (d_out, d_in), not {saved.modules[at]['shape']}")
        changes[name.removeprefix(names.prefix)] = partial(
            changed_weight, acting=[(kind, saved.adapters[at]) for at, kind in of]
        )
        groups[id(group)] = group
    for name, value in saved.beside.items():
        together = _together(name, saved, names, base)
        found = [(other, group) for other in together if (group := names.of(other)) is not None]
        if not found:
            wrong.append(
                f"{name}, which trained beside the adapter, {names.why_not(name)}; save the model with it first"
            )
        for other, group in found:
            at = other.removeprefix(names.prefix)
            if (shape := _shape_in_memory(group, at, entries, base)) != tuple(value.shape):
                wrong.append(f"{other} is {list(shape)}, not {list(value.shape)}")
            changes[at] = partial(_instead, value=value)
            groups[id(group)] = group
    if wrong:
        raise FileError(f"{base}: not the checkpoint this adapter was made for: {listed(wrong)}{_if_quantised(base)}")
    return changes, [*groups.values()]


def _check_alone(name: str, names: Names, base: Path) -> None:
    """Refuse an adapted weight that loading the checkpoint would put in a second place.

    Raises:
        StateError: the config ties it to one that the checkpoint does not hold.
    """
    partners = [other for other in names.partners(name) if other != name]
    if without := [other for other in partners if names.of(other) is None]:
        raise StateError(
            f"{base}: {name} is {without[0]} too, by the config's tie_word_embeddings: merging would change both, and "
            "in the model that the adapter was made for they were apart; save that model with both, and merge into it"
        )


def _together(name: str, saved: Saved, names: Names, base: Path) -> tuple[str, ...]:
    """The names of all that take the value of what trained: itself, and what was tied to it in the model.

    Raises:
        StateError: it was not tied there, and the checkpoint's config ties it.
    """
    were = saved.record.get("tied", {}).get(name)
    if were is None:
        _check_alone(name, names, base)
        return (name,)
    apart = set(were) - set(names.partners(name))
    if missing := sorted(other for other in apart if names.of(other) is None):
        raise StateError(
            f"{base}: {' and '.join(were)} were one tied tensor in the model, and this checkpoint, whose config does "
            f"not tie them, has no {missing[0]}"
        )
    return tuple(were)


def _shape_in_memory(group: Group, name: str, entries: Mapping[str, Entry], base: Path) -> tuple[int, ...]:
    """The shape of a tensor of the model.

    Raises:
        FileError: what it comes from are no plain floating-point numbers, or not all of one dtype.
    """
    first = group.sources[0]
    for source in group.sources:
        if entries[source].dtype not in DTYPES:
            raise FileError(
                f"{base}: {source} is stored as {entries[source].dtype}; merging needs plain floating-point weights. "
                "Where it is quantised, merge into the checkpoint it was quantised from, which the adapter fits, or "
                "let lorafamily merge --dequantise bfloat16 write an ordinary one"
            )
        if entries[source].dtype != entries[first].dtype:
            raise FileError(
                f"{base}: {source} is {entries[source].dtype} and {first} {entries[first].dtype}, and both "
                "are in one tensor of the model; save the checkpoint in one dtype"
            )
    on_meta = {source: torch.empty(entries[source].shape, device="meta") for source in group.sources}
    return tuple(group.in_memory(on_meta)[name].shape)


def _if_quantised(base: Path) -> str:
    """What may be the matter where the checkpoint is quantised: packed weights have other names and shapes."""
    config = read_json(base / CONFIG, "") if (base / CONFIG).is_file() else {}
    if not isinstance(config, dict) or not config.get("quantization_config"):
        return ""
    return (
        "; by its config it is quantised: merge into the checkpoint it was quantised from, which the adapter fits, or "
        "let lorafamily merge --dequantise bfloat16 write an ordinary one"
    )


def _as_matrix(kind: LayerKind, shape: tuple[int, ...]) -> list[int]:
    try:
        return list(kind.matrix(torch.empty(shape, device="meta")).shape)
    except (RuntimeError, IndexError):  # too few axes, or rows that the kind's parts do not share out
        return list(shape)


def _instead(weight: Tensor, value: Tensor) -> Tensor:
    return value.to(weight.dtype)


class _Changes:
    """The tensors on disk that change, by name: the model's are put together from them, changed, and taken apart.

    What is in one tensor of the model is computed at once, and held until all of it is written.
    """

    def __init__(self, changes: Mapping[str, Change], groups: list[Group], entries: Mapping[str, Entry]):
        self.changes, self.entries = changes, entries
        self.group_of = {source: group for group in groups for source in group.sources}
        self.ready: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.group_of

    @torch.no_grad()
    def changed(self, name: str) -> Tensor:
        """The tensor of that name on disk, once.

        Raises:
            FileError: what is on disk does not come back the same if nothing is changed.
        """
        if name not in self.ready:
            group = self.group_of[name]
            stored = {source: _read(self.entries[source]) for source in group.sources}
            held = group.in_memory(stored)
            if group.converter is not None:  # transformers' operations are its own; a loss would not be seen
                for source, again in group.on_disk(held).items():
                    if not torch.equal(_bits(again), _bits(stored[source])):
                        file = self.entries[source].file
                        raise FileError(f"{file}: {source} would not come back from the model as it is on disk")
            del stored
            for at in group.targets:
                if at in self.changes:
                    held[at] = self.changes[at](held[at])
            self.ready |= group.on_disk(held)
        return self.ready.pop(name)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _read(entry: Entry) -> Tensor:
    with open(entry.file, "rb") as file:
        file.seek(entry.begin)
        data = bytearray(file.read(entry.end - entry.begin))
    if not data:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).clone().view(entry.shape)


def _rewrite(
    source: Path, entries: list[tuple[str, Entry]], changes: _Changes, target: Path, progress: Callable[[int], None]
) -> None:
    """Copy a safetensors file, with the tensors that change put in their place."""
    changing = sorted((entry for entry in entries if entry[0] in changes), key=lambda entry: entry[1].begin)
    with open(source, "rb") as old, open(target, "wb") as new:
        for name, entry in changing:
            _copy(old, new, entry.begin - old.tell(), progress)
            changed = changes.changed(name)
            new.write(_bits(changed).numpy().tobytes() if changed.numel() else b"")
            old.seek(entry.end)
            progress(entry.end - entry.begin)
        _copy(old, new, source.stat().st_size - old.tell(), progress)


def _copy(old: BinaryIO, new: BinaryIO, size: int, progress: Callable[[int], None]) -> None:
    while size > 0:
        chunk = old.read(min(size, CHUNK))
        new.write(chunk)
        progress(len(chunk))
        size -= len(chunk)
