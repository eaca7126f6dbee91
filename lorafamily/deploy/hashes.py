"""Hashes by which a file recognises the base that its adapter was made for, in memory or in a checkpoint on disk."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from lorafamily.deploy.saved import Saved


def hash_of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """A hash of names and shapes, in any order."""
    lines = [f"{name} {shape}" for name, shape in sorted(shapes.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def hash_of_bits(*tensors: Tensor) -> str:
    """A hash of the bits of tensors, on any device."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def warn_of_other_base(saved: Saved, shapes: str, base: str) -> None:
    """Warn if a base, into whose layers an adapter fits, has others besides; `shapes`: the hash of its shapes."""
    if saved.record["base"].get("shapes") != shapes:
        warnings.warn(
            f"{saved.folder}: every adapted layer fits, but {base} has other parameters besides them than the "
            f"{saved.record['base']['architecture']} the adapter was made for",
            stacklevel=3,
        )
