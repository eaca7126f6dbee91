"""Writes a record (JSON) and its tensors (safetensors) as two files, and reads them back without unpickling.

Each file is written next to its place and renamed into it, so a killed process leaves no half-written one there. In a
sealed folder the record holds the SHA-256 of both files, so that flipped bits are noticed.

Every function here raises `FileError` where a file cannot be written, is missing or is damaged. Where a function takes
`what`, that says in the error what the folder should have been.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lorafamily.errors import FileError

SEAL = "sha256"


def write_sealed(
    folder: Path, record_name: str, record: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]
) -> None:
    """Write tensors and their record, with the hashes of both in the record."""
    data = _bytes_of(tensors)
    write_bytes(folder / name, data)
    write_json(folder / record_name, _sealed(record_name, record, name, hashlib.sha256(data).hexdigest()))


def sealed_sizes(
    record_name: str, record: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]
) -> dict[str, int]:
    """Bytes of the two files that `write_sealed` would write; only shapes and dtypes of the tensors are read."""
    any_hash = hashlib.sha256().hexdigest()  # all hashes have the same length
    return {
        record_name: len(_text_of(_sealed(record_name, record, name, any_hash))),
        name: _header_size(tensors) + sum(tensor.nbytes for tensor in tensors.values()),
    }


def _sealed(record_name: str, record: Mapping[str, Any], name: str, data_hash: str) -> dict[str, Any]:
    record = {key: value for key, value in record.items() if key != SEAL}
    return record | {SEAL: {name: data_hash, record_name: _hash_of(record)}}


_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}
"""safetensors' names of the dtypes of parameters. Its files begin with the last dtype here, and sort each by name."""


def _header_size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes before the tensors in a safetensors file: 8 that hold a length, and JSON padded to a multiple of 8."""
    places = list(_DTYPES)
    header: dict[str, Any] = {}
    begin = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-places.index(item[1].dtype), item[0])):
        end = begin + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return 8 + -(-len(text) // 8) * 8


def read_record(path: Path, what: str, format: int) -> dict[str, Any]:
    """The record of a sealed folder.

    Raises:
        FileError: it is missing, damaged, of another format, or its hash is not the one that it notes.
    """
    record = read_json(path, what)
    found = record.get("format") if isinstance(record, dict) else None
    if found != format:
        raise FileError(f"{path}: format {found!r}; this version of lorafamily reads format {format}")
    seal = record.pop(SEAL, None)
    if not isinstance(seal, dict) or seal.get(path.name) != _hash_of(record):
        raise FileError(f"{path}: damaged, its SHA-256 is not the one noted when it was written")
    return record | {SEAL: seal}


def read_sealed_tensors(path: Path, what: str, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a sealed folder, on the CPU.

    Raises:
        FileError: the file is missing or damaged, or its hash is not the one that the record notes.
    """
    check_there(path, what)
    with open(path, "rb") as file:
        if record[SEAL].get(path.name) != hashlib.file_digest(file, "sha256").hexdigest():
            raise FileError(f"{path}: damaged, its SHA-256 is not the one that the record notes for these tensors")
    return read_tensors(path, what)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors of any device, but meta, as a safetensors file."""
    write_bytes(path, _bytes_of(tensors, metadata))


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as a JSON file."""
    write_bytes(path, _text_of(record))


def _bytes_of(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    if on_meta := [key for key, value in tensors.items() if value.is_meta]:
        raise FileError(f"{on_meta[0]} is on the meta device: there are no values to write")
    on_cpu = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    return safetensors.torch.save(on_cpu, metadata)


def _text_of(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=1) + "\n").encode()


def _hash_of(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text_of(record)).hexdigest()


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Each is copied into memory of its own: in the file they lie at any address, and on some processors the product of a
    matrix that is not aligned differs in its last bit.

    Raises:
        FileError: the file is missing or damaged.
    """
    check_there(path, what)
    try:
        return {key: value.clone() for key, value in safetensors.torch.load_file(path).items()}
    except safetensors.SafetensorError as error:
        raise FileError(f"{path}: damaged, not a safetensors file ({error})") from None


def read_json(path: Path, what: str) -> Any:
    """What a JSON file holds.

    Raises:
        FileError: it is missing or damaged; two entries of one name count as damage.
    """
    check_there(path, what)
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: damaged, not JSON ({error})") from None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two entries of one name, json would silently keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a name occurs twice among {', '.join(name for name, _ in pairs)[:80]}")
    return found


def bits_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in one row; a view where it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def hash_of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """A hash of the names and shapes of a base's parameters, in any order."""
    lines = [f"{name} {shape}" for name, shape in sorted(shapes.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def hash_of_bits(*tensors: Tensor) -> str:
    """A hash of the bits of tensors, on any device."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(bits_of(tensor.detach().cpu()).numpy().tobytes())
    return digest.hexdigest()[:32]


def listed(problems: list[str]) -> str:
    """The first five problems, and how many more there are."""
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    return "; ".join(problems[:5]) + more


def in_one_line(error: Exception) -> str:
    """Class and message of an error that somebody else's code raised."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


def check_there(path: Path, what: str) -> None:
    """Look for a file; `what` says in the message what belongs there.

    Raises:
        FileError: there is no such file.
    """
    if not path.is_file():
        raise FileError(f"{path.parent}: no {path.name} there; {what}")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all.

    Raises:
        FileError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise FileError(f"{path}: cannot write its {len(data):,} bytes ({error}); {free:,} are free there") from error
