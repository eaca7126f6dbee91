"""Fingerprints of tensors, to check that no bit has changed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lorafamily.layers.sharded import local

PIECE = 1 << 18
"""Entries that a CPU sums at once: it makes 64-bit copies of them first, which should be small."""


@torch.no_grad()
def fingerprints(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """For each tensor the sum of its entries' bits, read as integers: any single flipped bit changes it."""
    sums: dict[str, list[Tensor]] = {}
    for name, value in parameters:
        here = local(value)
        words = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(here.element_size(), torch.int64)
        bits = here.contiguous().view(words).flatten()
        pieces = bits.split(PIECE) if bits.device.type == "cpu" else [bits]
        sums[name] = [piece.sum(dtype=torch.int64) for piece in pieces]
    return {name: added_up([int(piece) for piece in found]) for name, found in sums.items()}


def added_up(pieces: list[int]) -> int:
    """A tensor's fingerprint, from those of its pieces; sums of 64-bit integers wrap."""
    return (sum(pieces) + 2**63) % 2**64 - 2**63
