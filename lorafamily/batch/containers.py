"""The containers that batches are made of: mappings, lists, tuples and dataclasses, with tensors or other values."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lorafamily.errors import DataError


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch, of the same type, with every tensor on the device, and every unknown object that has a method `to`.
    Copies from pinned memory overlap with computation."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    parts = items_of(batch)
    if parts is not None:
        return rebuilt(batch, [to_device(value, device) for _, value in parts])
    move = getattr(batch, "to", None)
    return move(device) if callable(move) and not isinstance(batch, type) else batch


def fingerprint(batch: Any) -> str:
    """A digest of the tensors, arrays, texts and numbers in a batch; other objects count only by their type."""
    digest = hashlib.sha256()

    def look(node: Any) -> None:
        parts = list(enumerate(node)) if isinstance(node, PackedSequence) else items_of(node)
        digest.update(f"{type(node).__name__}{len(parts or ())};".encode())
        for key, value in parts or ():
            digest.update(f"{key};".encode())
            look(value)
        if isinstance(node, Tensor) and not node.is_meta:
            digest.update(f"{node.dtype}{tuple(node.shape)}".encode())
            digest.update(node.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(node, np.ndarray) and not node.dtype.hasobject:
            digest.update(f"{node.dtype}{node.shape}".encode() + np.ascontiguousarray(node).tobytes())
        elif isinstance(node, (str, bytes, int, float, complex)):
            digest.update(repr(node).encode())

    look(batch)
    return digest.hexdigest()


def refuse_one_batch(data: Any, name: str = "data") -> None:
    """Tell a single batch from batches: iterating over it would give keys or rows.

    Raises:
        DataError: `data` is a single batch.
    """
    if isinstance(data, Mapping):
        details = f" with the keys {', '.join(map(str, data))}"
    elif is_array(data):
        details = f" of shape {tuple(data.shape)}"
    elif isinstance(data, tuple) and hasattr(data, "_fields"):
        details = f" with {', '.join(data._fields)}"
    elif isinstance(data, tuple) and data and all(is_array(part) for part in data):
        details = f" of {len(data)} tensors"
    elif isinstance(data, (str, bytes)) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        details = ""
    else:
        return
    raise DataError(
        f"{name} is a {type(data).__name__}{details}, and must be batches: a DataLoader, or a list, [batch] for one"
    )


def is_array(node: Any) -> bool:
    """Whether it is a tensor or a NumPy array."""
    return isinstance(node, (Tensor, np.ndarray))


def items_of(node: Any) -> list[tuple[Any, Any]] | None:
    """Keys and values of a container; None for a tensor, a text, or an unknown object."""
    if isinstance(node, (PackedSequence, torch.Size)):
        return None
    if isinstance(node, Mapping):
        return list(node.items())
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return list(zip(node._fields, node, strict=True))
    if isinstance(node, (list, tuple)):
        return list(enumerate(node))
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return [(f.name, getattr(node, f.name)) for f in dataclasses.fields(node) if hasattr(node, f.name)]
    return None


def rebuilt(node: Any, values: list[Any]) -> Any:
    """A container like this one, with other values."""
    if isinstance(node, tuple) or type(node) is list:
        return node._make(values) if hasattr(node, "_make") else type(node)(values)
    if isinstance(node, Mapping) and not isinstance(node, MutableMapping):
        return type(node)(dict(zip(node, values, strict=True)))  # type: ignore[call-arg]
    copied: Any = copy.copy(node)  # a subclass keeps its other attributes
    if isinstance(node, list):
        copied[:] = values
        return copied
    for (name, _), value in zip(items_of(node) or (), values, strict=True):
        if isinstance(node, Mapping):
            copied[name] = value
        else:
            object.__setattr__(copied, name, value)  # also where the dataclass is frozen; __post_init__ has run
    return copied
