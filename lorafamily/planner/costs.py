"""A plan as data and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

from lorafamily.budget import Sizing
from lorafamily.names import by_stack, expert_of, place_of
from lorafamily.terminal import aligned, in_units

FULL, FLOOR = "full fine-tuning", "frozen floor"


@dataclass(frozen=True)
class Memory:
    """Bytes on the device. `optimizer`: its states; `activations`: the most bytes of other tensors alive at once,
    None if not counted; `peak`: the most of all together, at most the sum, since gradients come as activations go."""

    weights: int
    gradients: int
    optimizer: int
    activations: int | None
    peak: int


@dataclass(frozen=True)
class Use:
    """One way to train a model. Trained parameters: of `adapters`; `extra` ones, such as a head; of the `base`, in full
    fine-tuning. `files`: bytes of each file that is saved."""

    way: str
    adapters: int
    extra: int
    base: int
    files: dict[str, int]
    memory: Memory

    @property
    def trainable(self) -> int:
        """All trained parameters."""
        return self.adapters + self.extra + self.base

    @property
    def file_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(self.files.values())


@dataclass(frozen=True)
class Plan:
    """One method on one model; prints as a table.

    `full`: full fine-tuning, which saves all the weights; `floor`: gradients pass through the frozen model and nothing
    trains. `slices`: of every adapted layer at the start. `assumptions`: what was counted, and how.
    """

    model: str
    base_parameters: int
    sizing: Sizing
    options: dict[str, Any]
    slices: dict[str, int]
    use: Use
    full: Use
    floor: Use
    assumptions: tuple[str, ...]

    @property
    def method(self) -> str:
        """As `apply` takes it."""
        return self.use.way

    def __str__(self) -> str:
        return table([self])

    def record(self) -> dict[str, Any]:
        """The plan as plain data, for a file."""
        return asdict(self)


def table(plans: Sequence[Plan], refused: Sequence[str] = ()) -> str:
    """Plans for one model with their references below; `refused`: methods without a plan, each with the reason."""
    first = plans[0]
    sizes = ["rank", "slices", "adapters", "extra", "file"]
    rows = [["", *sizes, "weights", "gradients", "optimizer", "activations", "peak", "of full"]]
    rows += [_row(plan.use, first.full, _rank(plan.sizing), f"{sum(plan.slices.values()):,}") for plan in plans]
    rows += [_row(use, first.full) for use in (first.full, first.floor)]
    lines = aligned(rows)
    rule = "─" * len(lines[0])
    head = [f"{first.model}: {first.base_parameters:,} parameters; adapted: {_layers(first)}"]
    notes = [f"  {note}" for note in first.assumptions]
    return "\n".join([*head, lines[0], rule, *lines[1:-2], rule, *lines[-2:], rule, *refused, *notes])


def _rank(sizing: Sizing) -> str:
    """The rank of every layer; the smallest and the largest if they differ."""
    return f"{sizing.rank}" if sizing.ranks is None else f"{min(sizing.ranks.values())}–{sizing.rank}"


def _layers(plan: Plan) -> str:
    """What is adapted: for every stack the names of its matrices, and how many there are of each."""
    stacks = []
    for stack, names in by_stack(plan.slices).items():
        by_count: dict[int, list[str]] = {}
        for matrix, count in Counter(place_of((expert_of(name) or (name,))[0]).matrix for name in names).items():
            by_count.setdefault(count, []).append(matrix)
        matrices = "; ".join(f"{count} × {', '.join(found)}" for count, found in by_count.items())
        stacks.append(f"{stack}: {matrices}" if stack else matrices)
    return "; ".join(stacks)


def _row(use: Use, full: Use, rank: str = "–", slices: str = "–") -> list[str]:
    return [
        use.way,
        rank,
        slices,
        f"{use.adapters or use.base:,}",
        f"{use.extra:,}" if use.extra else "–",
        in_units(use.file_bytes) if use.files else "–",
        *("–" if part is None else in_units(part) for part in astuple(use.memory)),
        f"{use.memory.peak / full.memory.peak:.1%}",
    ]
