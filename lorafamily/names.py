"""Where a module stands in a network of repeated blocks, read off its name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple


class Place(NamedTuple):
    """`layer`: index of the block, None outside blocks; `kind`: the rest of the name, the same in every block."""

    layer: int | None
    kind: str


def place_of(name: str) -> Place:
    """`encoder.layer.3.attention.self.query` -> (3, "attention.self.query").

    The first number in a name counts blocks; experts and the like, numbered further in, are part of the kind.
    """
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit() and position + 1 < len(parts):
            return Place(int(part), ".".join(parts[position + 1 :]))
    return Place(None, name)


def modules_per_block(names: Iterable[str]) -> int:
    """How many of the names stand in one block; the largest such number where blocks differ."""
    return max(Counter(place_of(name).layer for name in names).values())
