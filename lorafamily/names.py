"""Where a module is in a network of repeated blocks, read from its name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from itertools import pairwise, takewhile
from typing import NamedTuple

OUTSIDE = "outside blocks"
"""The group of modules outside all stacks, if there are several stacks."""


class Place(NamedTuple):
    """`stack`: the name before the block's number; `layer`: that number, None outside blocks; `matrix`: the rest, which
    says which matrix of the block it is. No two names have the same place."""

    stack: str
    layer: int | None
    matrix: str


def place_of(name: str) -> Place:
    """`bert.encoder.layer.3.attention.self.query` -> ("bert.encoder.layer", 3, "attention.self.query").

    The first number in a name is that of the block, with two exceptions:

    - If blocks form stages (Swin's `layers.0.blocks.1.mlp.fc1`, ConvNeXt's `stages.0.layers.1.pwconv1`), every stage is
      a stack. A list right below an entry of a list holds blocks if its name ends in `blocks` or `layers`; T5's
      `block.0.layer.1.DenseReluDense.wi` is sublayer 1 of block 0, and the number of an expert belongs to `matrix`.
    - A number at the very beginning picks one of several models, if a list of blocks follows: the transformer in a
      `SentenceTransformer`, `0.auto_model.encoder.layer.3.output.dense`.
    """
    parts = name.split(".")
    # A number at the end is no block's: the linear layers of an nn.Sequential are not repeated blocks.
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
    """`model.layers.0.mlp.experts.3.up_proj` -> ("model.layers.0.mlp.experts.*.up_proj", 3): the name that all experts
    of a layer share, and the expert's number; None for modules in no list called `…experts`."""
    match = _EXPERT.fullmatch(name)
    return None if match is None else (f"{match[1]}.*.{match[3]}", int(match[2]))


_EXPERT = re.compile(r"(.*experts)\.(\d+)\.(.+)")


def modules_per_block(names: Iterable[str]) -> int:
    """How many of the names are in one block; where blocks differ, as an encoder's and a decoder's do, the largest such
    number. A network without blocks counts as one block; otherwise modules outside blocks do not count."""
    places = [place_of(name) for name in names]
    blocks = Counter((place.stack, place.layer) for place in places if place.layer is not None)
    return max(blocks.values(), default=len(places))


def by_stack(names: Iterable[str]) -> dict[str, list[str]]:
    """The names, grouped by the stacks' short names (`encoder`, `decoder`), in their order; names in no block are last,
    under `OUTSIDE`. If there are fewer than two stacks, all names are under ""."""
    places = {name: place_of(name) for name in names}
    stacks = dict.fromkeys(place.stack for place in places.values() if place.layer is not None)
    if len(stacks) < 2:
        return {"": [*places]} if places else {}
    short = short_names(stacks)
    groups: dict[str, list[str]] = {name: [] for name in [*short.values(), OUTSIDE]}
    for name, place in places.items():
        groups[OUTSIDE if place.layer is None else short[place.stack]].append(name)
    return {stack: group for stack, group in groups.items() if group}


def matrix_labels(names: Iterable[str]) -> dict[str, str]:
    """Which matrix every module is: `attention.query`, or `encoder, attention.query` if there are several stacks."""
    return {
        name: place_of(name).matrix if stack in ("", OUTSIDE) else f"{stack}, {place_of(name).matrix}"
        for stack, group in by_stack(names).items()
        for name in group
    }


def short_names(stacks: Collection[str]) -> dict[str, str]:
    """For each stack the shortest part of its name that no other has: `model.encoder.layers`, `model.decoder.layers` ->
    `encoder`, `decoder`. A number keeps the word before it: Swin's stages are `layers.0`, `layers.1`."""
    parts = {stack: stack.split(".") for stack in stacks}
    before = _common([*parts.values()])
    after = _common([words[before:][::-1] for words in parts.values()])
    if before and any(words[before : before + 1] and words[before].isdigit() for words in parts.values()):
        before -= 1
    differing = {stack: words[before : len(words) - after] or words[-1:] for stack, words in parts.items()}
    runs = {stack: _runs(words) for stack, words in differing.items()}
    often = Counter(run for found in runs.values() for run in set(found))
    short = {
        stack: next((run for run in runs[stack] if often[run] == 1), ".".join(words)) or "top level"
        for stack, words in differing.items()
    }
    return short if len(set(short.values())) == len(short) else {stack: stack for stack in stacks}


def _common(lists: list[list[str]]) -> int:
    """How many entries at the beginning all lists share."""
    same = (len(set(entries)) == 1 for entries in zip(*lists, strict=False))
    return sum(takewhile(bool, same))


def _runs(parts: list[str]) -> list[str]:
    """Neighbouring parts joined, the shortest first, without those that begin with a number."""
    return [
        ".".join(parts[begin : begin + length])
        for length in range(1, len(parts) + 1)
        for begin in range(len(parts) - length + 1)
        if not parts[begin].isdigit()
    ]


def join(at: str, name: str) -> str:
    """The full name of `name` inside the module `at`."""
    return f"{at}.{name}" if at else name
