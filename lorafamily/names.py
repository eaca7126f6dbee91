"""The place of a module in a network of repeated blocks, found from its name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from itertools import pairwise, takewhile
from typing import NamedTuple

OUTSIDE = "outside blocks"
"""The name for modules outside all stacks, where there are several stacks."""


class Place(NamedTuple):
    """`stack`: the name before the block's number; `layer`: that number, None outside blocks; `kind`: the rest of the
    name, the same in every block of the stack. No two names have the same place."""

    stack: str
    layer: int | None
    kind: str


def place_of(name: str) -> Place:
    """`bert.encoder.layer.3.attention.self.query` -> ("bert.encoder.layer", 3, "attention.self.query").

    The first number in a name counts blocks. Two exceptions:

    - Where blocks form stages (Swin's `layers.0.blocks.1.mlp.fc1`, ConvNeXt's `stages.0.layers.1.pwconv1`), every stage
      is a stack of its own. A list right below an entry of a list holds blocks if it is called `…blocks` or `…layers`;
      T5's `block.0.layer.1.DenseReluDense.wi` is sublayer 1 of block 0, and experts are part of the kind.
    - A number at the very beginning picks one of several models (the transformer in a `SentenceTransformer`,
      `0.auto_model.encoder.layer.3.output.dense`) if further in, there are blocks.
    """
    parts = name.split(".")
    # A number at the end is a module of its own: the linear layers of an nn.Sequential repeat nothing.
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    if not numbers:
        return Place("", None, name)
    if numbers[0] == 0:
        inside = [i for i, at in enumerate(numbers) if at > 2 and _holds_blocks(parts[at - 1])]
        numbers = numbers[inside[0] :] if inside else numbers
    block = numbers[0]
    for outer, inner in pairwise(numbers):
        if inner != outer + 2:
            break
        if parts[inner - 1].endswith(("blocks", "layers")):
            block = inner
    return Place(".".join(parts[:block]), int(parts[block]), ".".join(parts[block + 1 :]))


def _holds_blocks(word: str) -> bool:
    return word.endswith(("block", "blocks", "layer", "layers")) or word == "h"


def expert_of(name: str) -> tuple[str, int] | None:
    """`model.layers.0.mlp.experts.3.up_proj` -> ("model.layers.0.mlp.experts.*.up_proj", 3): what all experts of a
    layer have together, and which one it is; None for what is in no list called `…experts`."""
    match = _EXPERT.fullmatch(name)
    return None if match is None else (f"{match[1]}.*.{match[3]}", int(match[2]))


_EXPERT = re.compile(r"(.*experts)\.(\d+)\.(.+)")


def modules_per_block(names: Iterable[str]) -> int:
    """How many of the names stand in one block; the largest such number where blocks differ, as an encoder's and a
    decoder's do. Modules outside blocks count only where there is nothing else: the network is then one block."""
    places = [place_of(name) for name in names]
    blocks = Counter((place.stack, place.layer) for place in places if place.layer is not None)
    return max(blocks.values(), default=len(places))


def by_stack(names: Iterable[str]) -> dict[str, list[str]]:
    """The names in their order, by stack, under the stacks' short names (`encoder`, `decoder`); last, under `OUTSIDE`,
    those in no block. Where there are fewer than two stacks, all are together under ""."""
    places = {name: place_of(name) for name in names}
    stacks = dict.fromkeys(place.stack for place in places.values() if place.layer is not None)
    if len(stacks) < 2:
        return {"": [*places]} if places else {}
    short = short_names(stacks)
    groups: dict[str, list[str]] = {name: [] for name in [*short.values(), OUTSIDE]}
    for name, place in places.items():
        groups[OUTSIDE if place.layer is None else short[place.stack]].append(name)
    return {stack: own for stack, own in groups.items() if own}


def kind_labels(names: Iterable[str]) -> dict[str, str]:
    """The kind of every module in words: `attention.query`, or `encoder, attention.query` among several stacks."""
    return {
        name: place_of(name).kind if stack in ("", OUTSIDE) else f"{stack}, {place_of(name).kind}"
        for stack, own in by_stack(names).items()
        for name in own
    }


def short_names(stacks: Collection[str]) -> dict[str, str]:
    """For each stack the shortest part of its name that tells it apart: `model.encoder.layers`, `model.decoder.layers`
    -> `encoder`, `decoder`. A number keeps the word before it: Swin's stages are `layers.0`, `layers.1`."""
    parts = {stack: stack.split(".") for stack in stacks}
    before = _common([*parts.values()])
    after = _common([own[before:][::-1] for own in parts.values()])
    if before and any(own[before : before + 1] and own[before].isdigit() for own in parts.values()):
        before -= 1
    differing = {stack: own[before : len(own) - after] or own[-1:] for stack, own in parts.items()}
    runs = {stack: _runs(own) for stack, own in differing.items()}
    often = Counter(run for own in runs.values() for run in set(own))
    short = {
        stack: next((run for run in runs[stack] if often[run] == 1), ".".join(own)) or "top level"
        for stack, own in differing.items()
    }
    return short if len(set(short.values())) == len(short) else {stack: stack for stack in stacks}


def _common(lists: list[list[str]]) -> int:
    """How many entries at the beginning are the same in all of the lists."""
    same = (len(set(entries)) == 1 for entries in zip(*lists, strict=False))
    return sum(takewhile(bool, same))


def _runs(parts: list[str]) -> list[str]:
    """Neighbouring parts joined, the shortest runs first; none begins with a number."""
    return [
        ".".join(parts[begin : begin + length])
        for length in range(1, len(parts) + 1)
        for begin in range(len(parts) - length + 1)
        if not parts[begin].isdigit()
    ]


def join(at: str, name: str) -> str:
    """A full name from that of a module and one in it."""
    return f"{at}.{name}" if at else name
