"""Parameters ↔ ranks: the largest rank, the same for every module, whose adapters fit a budget of trainable numbers."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lorafamily.errors import BudgetError
from lorafamily.method import Method

Shapes = Mapping[str, tuple[int, int]]
"""Module name -> (d_in, d_out)."""


@dataclass(frozen=True)
class Sizing:
    """What was asked for and what it comes to.

    `budget`: trainable adapter numbers, not bytes, or None where a rank was asked for; `rank`: of every module at the
    start; `start`: trainable numbers at the start.
    """

    budget: int | None
    budget_at: Literal["peak", "end"]
    rank: int
    start: int


def solve(
    method: Method,
    shapes: Shapes,
    *,
    budget: float | None = None,
    rank: int | None = None,
    budget_at: Literal["peak", "end"] = "peak",
) -> Sizing:
    """The start rank that a budget buys, or the cost of the rank asked for.

    `budget_at="end"` lets a method that prunes start larger, by the share that its allocation leaves at the end.

    Raises:
        BudgetError: both or neither usable, not a positive number, or too small for one rank a module.
    """
    if budget is not None and rank is not None:
        raise BudgetError(f"budget={budget!r} and rank={rank!r} are both given; give one, the other follows from it")
    if budget_at not in ("peak", "end"):
        raise BudgetError(f'budget_at={budget_at!r}: must be "peak" (never exceeded) or "end" (held after pruning)')

    def cost(at_rank: int) -> int:
        return sum(method.count(d_in, d_out, at_rank) for d_in, d_out in shapes.values())

    if budget is None:
        rank = method.rank if rank is None else rank
        if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 1:
            raise BudgetError(f"rank={rank!r}: must be a whole number of at least 1")
        return Sizing(None, budget_at, int(rank), cost(int(rank)))

    if isinstance(budget, bool) or not isinstance(budget, numbers.Real) or not math.isfinite(budget) or budget <= 0:
        raise BudgetError(f"budget={budget!r}: must be a positive number of trainable parameters, such as 0.17e6")
    share = method.allocation.end_share() if budget_at == "end" else 1.0
    allowed = math.floor(budget / share) if share else math.inf
    smallest = cost(1)
    if smallest > allowed:
        raise BudgetError(
            f"budget {math.floor(budget):,} is too small: rank 1 on the {len(shapes)} matched layers costs "
            f"{smallest:,}; the smallest budget that works is {math.ceil(smallest * share):,}, or narrow targets, "
            f'for example to "attention"'
        )
    largest = max(min(shape) for shape in shapes.values())
    low, high = 1, largest  # cost(low) fits throughout; sizes are capped by each layer, so nothing grows past `high`
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= allowed else (low, middle - 1)
    return Sizing(math.floor(budget), budget_at, low, cost(low))
