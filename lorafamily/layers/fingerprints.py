"""Fingerprints of tensors, to check that no bit has changed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lorafamily.layers.sharded import local

PIECE = 1 << 18
"""Entries that a CPU sums at once: it makes 64-bit copies of them first, which should be small."""


def fingerprints(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """For each tensor the sum of its entries' bits, read as integers: any single flipped bit changes it."""
    sums = {name: _fingerprint(value) for name, value in parameters}
    return {name: int(value) for name, value in sums.items()}


@torch.no_grad()
def _fingerprint(value: Tensor) -> Tensor:
    here = local(value)
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(here.element_size(), torch.int64)
    bits = here.contiguous().view(words).flatten()
    if bits.device.type != "cpu" or bits.numel() <= PIECE:
        return bits.sum(dtype=torch.int64)
    return torch.stack([piece.sum(dtype=torch.int64) for piece in bits.split(PIECE)]).sum()


def added_up(pieces: list[int]) -> int:
    """A tensor's fingerprint, from those of its pieces; sums of 64-bit integers wrap."""
    return (sum(pieces) + 2**63) % 2**64 - 2**63
