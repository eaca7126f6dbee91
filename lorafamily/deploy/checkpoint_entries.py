"""The tensors of a checkpoint on disk, found from headers without reading their values.

A checkpoint is a folder as `transformers` writes it: `model.safetensors`, or an index and its shards, and a config. A
safetensors file is eight bytes with the length of a JSON header, the header (dtype, shape and place of every tensor),
and the tensors' bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorafamily.deploy.folder import check_there, read_json
from lorafamily.errors import FileError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FOLDER = f"a checkpoint is a folder with {SINGLE}, or {INDEX} and its shards"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file. `begin`, `end`: where its bytes are, counted from the file's start."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def refuse_used(out: Path) -> None:
    """Check that a merged checkpoint would be written over nothing.

    Raises:
        FileError: `out` is a file, or a folder that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileError(f"{out}: is there and not empty; a merged checkpoint goes into a folder of its own")


def is_weights(file: Path) -> bool:
    """Whether a file holds weights, in any format, and not a config or tokenizer."""
    return file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack")


def entries_of(base: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint by name.

    Raises:
        FileError: there is no checkpoint, or a shard is missing, damaged or outside the folder.
    """
    if (base / INDEX).is_file():
        if (base / SINGLE).exists():
            raise FileError(f"{base}: {SINGLE} and {INDEX} are both there; remove the one that is not to be read")
        shards = read_json(base / INDEX, FOLDER)
        if not isinstance(shards, dict) or not isinstance(shards.get("weight_map"), dict):
            raise FileError(f"{base / INDEX}: not an index of shards (it needs a weight_map)")
        names = list(shards["weight_map"].values())
        if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
            raise FileError(f"{base / INDEX}: {outside[0]!r} is no file of this folder")
        files = sorted(set(names))
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
    check_there(file, FOLDER)
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


def read_entry(entry: Entry) -> Tensor:
    """The tensor, on the CPU, read from its place in the file."""
    with open(entry.file, "rb") as file:
        file.seek(entry.begin)
        data = bytearray(file.read(entry.end - entry.begin))
    if not data:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).clone().view(entry.shape)
