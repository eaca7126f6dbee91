"""Parameters ↔ ranks: the largest start, the same for every module, that fits a budget.

A budget is in trainable numbers or in rank slices, never in both: a slice of a wide layer costs more numbers.
"""

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

    `budget`: trainable adapter numbers, not bytes; `rank_budget`: rank slices of all modules together; each None where
    something else was asked for. `rank`: of every module at the start; `start`: trainable numbers at the start.
    """

    budget: int | None
    budget_at: Literal["peak", "end"]
    rank: int
    start: int
    rank_budget: int | None = None


def solve(
    method: Method,
    shapes: Shapes,
    *,
    budget: float | None = None,
    rank: int | None = None,
    rank_budget: int | None = None,
    budget_at: Literal["peak", "end"] = "peak",
) -> tuple[Method, Sizing]:
    """The start that a budget buys, or the cost of the rank asked for; with the method, whose own sizes a rank budget
    sets where they are what counts slices.

    `budget_at="end"` lets a method that prunes start larger: what counts is what will be left at the end, the share of
    the slices that its allocation leaves and all that belongs to no slice (LoRA²'s outer factors).

    Raises:
        BudgetError: more than one given, not a positive number, or too small for one rank a module; `budget_at` without
            a budget.
    """
    given = {"budget": budget, "rank": rank, "rank_budget": rank_budget}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        said = " and ".join(f"{name}={value!r}" for name, value in given.items())
        raise BudgetError(
            f"{said} are {'both' if len(given) == 2 else 'all'} given; give one, the rest follows from it"
        )
    if budget_at not in ("peak", "end"):
        raise BudgetError(f'budget_at={budget_at!r}: must be "peak" (never exceeded) or "end" (held after pruning)')
    if budget_at == "end" and budget is None and rank_budget is None:
        raise BudgetError('budget_at="end" has no effect without budget or rank_budget: a rank is that of the start')
    share = method.allocation.end_share() if budget_at == "end" else 1.0
    largest = max(min(shape) for shape in shapes.values())

    def cost(at_rank: int) -> int:
        return sum(method.count(d_in, d_out, at_rank) for d_in, d_out in shapes.values())

    if rank_budget is not None:
        each = _slices_each(rank_budget, len(shapes), share, largest)
        method, rank = method.with_slices(each)
        return method, Sizing(None, budget_at, rank, cost(rank), rank_budget)
    if budget is None:
        rank = method.rank if rank is None else rank
        if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 1:
            raise BudgetError(f"rank={rank!r}: must be a whole number of at least 1")
        return method, Sizing(None, budget_at, int(rank), cost(int(rank)))

    if isinstance(budget, bool) or not isinstance(budget, numbers.Real) or not math.isfinite(budget) or budget <= 0:
        raise BudgetError(f"budget={budget!r}: must be a positive number of trainable parameters, such as 0.17e6")

    def counted(at_rank: int) -> float:
        """What the budget counts: the start, or with a share of the slices gone the end."""
        return cost(at_rank) if share == 1 else _left(method, shapes, at_rank, share)

    smallest = counted(1)
    if smallest > budget:
        costs = f"{cost(1):,}" + ("" if share == 1 else f" at the start, {math.ceil(smallest):,} at the end")
        raise BudgetError(
            f"budget {math.floor(budget):,} is too small: rank 1 on the {len(shapes)} matched layers costs {costs}; "
            f"the smallest budget that works is {math.ceil(smallest):,}, or narrow targets, for example to "
            '"attention"'
        )
    low, high = 1, largest  # `low` fits throughout; sizes are capped by each layer, so nothing grows past `high`
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if counted(middle) <= budget else (low, middle - 1)
    return method, Sizing(math.floor(budget), budget_at, low, cost(low))


def _left(method: Method, shapes: Shapes, rank: int, share: float) -> float:
    """Trainable numbers when a share of all slices is left of a start at `rank`, each of average cost; never less than
    with one slice, unless none is to be left."""
    whole = slices = sliced = 0
    by = method.parametrisation.sliced_by
    for d_in, d_out in shapes.values():
        sizes = method.capped(d_in, d_out, rank)
        without = method.parametrisation.count(d_in, d_out, **{**sizes, by: 0})
        whole += without
        sliced += method.count(d_in, d_out, rank) - without
        slices += sizes[by]
    return whole + (max(share, 1 / slices) * sliced if share else 0)


def _slices_each(rank_budget: int, modules: int, share: float, largest: int) -> int:
    """Slices of every module at the start, within a budget of slices for all."""
    if isinstance(rank_budget, bool) or not isinstance(rank_budget, numbers.Integral) or rank_budget < 1:
        raise BudgetError(f"rank_budget={rank_budget!r}: must be a whole number of rank slices, at least 1")
    allowed = rank_budget / share if share else math.inf
    if allowed < modules:
        raise BudgetError(
            f"rank_budget {rank_budget:,} is too small: one rank on each of the {modules} matched layers is the "
            f"least; the smallest that works is {math.ceil(modules * share):,}, or narrow targets, for example to "
            f'"attention"'
        )
    return largest if allowed >= largest * modules else int(allowed / modules)
