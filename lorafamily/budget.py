"""Budgets ↔ ranks: the largest initial rank, the same for every module, that fits a budget; or ranks given by layer.

A budget counts trainable parameters or slices, never both: a slice of a wide layer has more parameters.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lorafamily.errors import BudgetError
from lorafamily.method import Method
from lorafamily.patterns import by_layer

Shapes = Mapping[str, tuple[int, int]]
"""Module name -> (d_in, d_out)."""


@dataclass(frozen=True)
class Sizing:
    """The budget that was asked for, and the ranks that follow.

    `budget`: trainable adapter parameters, not bytes; `rank_budget`: slices of all modules together; None where it was
    not asked for. `rank`: initial rank of every module, the largest where they differ; `ranks`: by module where they
    differ; `initial_parameters`: trainable parameters at these ranks.
    """

    budget: int | None
    budget_at: Literal["peak", "end"]
    rank: int
    initial_parameters: int
    rank_budget: int | None = None
    ranks: Mapping[str, int] | None = None

    def rank_of(self, module: str) -> int:
        """The initial rank of a module, before the module's size caps it."""
        return self.rank if self.ranks is None else self.ranks[module]


def solve(
    method: Method,
    shapes: Shapes,
    *,
    budget: float | None = None,
    rank: int | Mapping[str, int] | None = None,
    rank_budget: int | None = None,
    budget_at: Literal["peak", "end"] = "peak",
) -> tuple[Method, Sizing]:
    """The initial rank that a budget pays for, or the parameters that a given rank costs. Returns the method too,
    because a rank budget sets LoRA²'s `slices`.

    With `budget_at="end"` a method that prunes starts larger: the budget counts what is left at the end, which is the
    share of the slices that the allocation leaves, and the parameters that belong to no slice (LoRA²'s outer factors).

    Raises:
        BudgetError: more than one is given, it is no positive number, or too small for rank 1 everywhere; `budget_at`
            without a budget.
    """
    sizes = {"budget": budget, "rank": rank, "rank_budget": rank_budget}
    given = {name: value for name, value in sizes.items() if value is not None}
    if len(given) > 1:
        said, count = " and ".join(f"{name}={value!r}" for name, value in given.items()), len(given)
        raise BudgetError(f"{said} are {'both' if count == 2 else 'all'} given; give one, the rest follows from it")
    if budget_at not in ("peak", "end"):
        raise BudgetError(f'budget_at={budget_at!r}: must be "peak" (never exceeded) or "end" (held after pruning)')
    if budget_at == "end" and budget is None and rank_budget is None:
        raise BudgetError('budget_at="end" has no effect without budget or rank_budget: rank is always the initial one')
    check_budgets(budget, rank_budget)
    share = method.allocation.end_share() if budget_at == "end" else 1.0
    largest = max(min(shape) for shape in shapes.values())

    def cost(at_rank: int) -> int:
        return parameters(method, shapes, dict.fromkeys(shapes, at_rank))

    if isinstance(rank, Mapping):
        ranks = ranks_by_module(rank, shapes)
        return method, Sizing(None, budget_at, max(ranks.values()), parameters(method, shapes, ranks), None, ranks)
    if rank_budget is not None:
        if (by := method.parametrisation.sliced_by) in method.layered:
            raise BudgetError(f"rank_budget={rank_budget!r} and {by} by layer both set the number of slices; give one")
        each = _slices_each(rank_budget, len(shapes), share, largest)
        if by == method.parametrisation.sized_by:
            rank = each
        else:
            method, rank = method.with_options(**{by: each}), method.rank
        return method, Sizing(None, budget_at, rank, cost(rank), rank_budget)
    if budget is None:
        rank = method.rank if rank is None else rank
        if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 1:
            raise BudgetError(f"rank={rank!r}: must be a whole number of at least 1, or whole numbers by layer")
        return method, Sizing(None, budget_at, int(rank), cost(int(rank)))

    def counted(at_rank: int) -> float:
        return cost(at_rank) if share == 1 else _left(method, shapes, at_rank, share)

    smallest = counted(1)
    if smallest > budget:
        costs = f"{cost(1):,}" + ("" if share == 1 else f" at the start, {math.ceil(smallest):,} at the end")
        raise BudgetError(
            f"budget {math.floor(budget):,} is too small: rank 1 on the {len(shapes)} matched layers costs {costs}; "
            f'the smallest budget that works is {math.ceil(smallest):,}, or narrow targets, for example to "attention"'
        )
    low, high = 1, largest  # `low` always fits; every layer caps its sizes, so nothing grows past `high`
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if counted(middle) <= budget else (low, middle - 1)
    return method, Sizing(math.floor(budget), budget_at, low, cost(low))


def parameters(method: Method, shapes: Shapes, ranks: Mapping[str, int]) -> int:
    """Trainable parameters of all modules at these ranks."""
    return sum(method.at(name).count(*shapes[name], rank) for name, rank in ranks.items())


def check_budgets(budget: float | None, rank_budget: int | None) -> None:
    """Refuse an impossible budget of trainable parameters or of slices; None is no budget.

    Raises:
        BudgetError: `budget` is no positive, finite number, or `rank_budget` no whole number of at least 1.
    """
    number = isinstance(budget, numbers.Real) and not isinstance(budget, bool)
    if budget is not None and not (number and math.isfinite(budget) and budget > 0):
        raise BudgetError(f"budget={budget!r}: must be a positive number of trainable parameters, such as 0.17e6")
    whole = isinstance(rank_budget, numbers.Integral) and not isinstance(rank_budget, bool)
    if rank_budget is not None and not (whole and rank_budget >= 1):
        raise BudgetError(f"rank_budget={rank_budget!r}: must be a whole number of slices, at least 1")


def highest(worth: Mapping[str, Tensor], cost: Callable[[str, int], int], budget: float) -> dict[str, int]:
    """How many slices every module gets if the slices of all modules are taken in falling order of worth, as long as
    they fit a budget. Of equal slices those of earlier modules come first.

    `worth`: by module (n,), falling; `cost(module, n)`: of its first n slices. A slice that does not fit is skipped and
    later ones are tried, so that the rest of the budget is too small for any slice left out.

    Raises:
        BudgetError: the budget is smaller than the cheapest slice.
    """
    cheapest = min(cost(name, 1) for name in worth)
    if budget < cheapest:
        raise BudgetError(f"budget {budget:,.0f} is too small: the cheapest slice costs {cheapest:,}")
    names = [name for name, values in worth.items() for _ in values]
    order = torch.cat([values.double() for values in worth.values()]).argsort(descending=True, stable=True)
    ranks, room = dict.fromkeys(worth, 0), budget
    for name in (names[i] for i in order.tolist()):
        more = cost(name, ranks[name] + 1) - cost(name, ranks[name])
        if more <= room:
            ranks[name] += 1
            room -= more
    return ranks


def _left(of_all: Method, shapes: Shapes, rank: int, share: float) -> float:
    """Trainable parameters once a share of the initial slices, of average cost, is left: at least one slice, or none if
    the share is 0."""
    whole = slices = sliced = 0
    by = of_all.parametrisation.sliced_by
    for name, (d_in, d_out) in shapes.items():
        method = of_all.at(name)
        sizes = method.capped(d_in, d_out, rank)
        without = method.parametrisation.count(d_in, d_out, **{**sizes, by: 0})
        whole += without
        sliced += method.count(d_in, d_out, rank) - without
        slices += sizes[by]
    return whole + (max(share, 1 / slices) * sliced if share else 0)


def ranks_by_module(given: Mapping[str, int], shapes: Shapes) -> dict[str, int]:
    """The rank of every module, from ranks by name or pattern (see `by_layer`), capped by the module's size; else 0.

    Raises:
        BudgetError: a rank is no whole number of at least 0, or all are 0.
        TargetError: a key has no effect.
    """
    for key, rank in given.items():
        if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 0:
            raise BudgetError(f'rank["{key}"]={rank!r}: must be a whole number of at least 0')
    ranks = by_layer(given, shapes, "rank", 0)
    if not any(ranks.values()):
        raise BudgetError(f"rank={dict(given)!r} leaves all {len(shapes)} matched layers at rank 0; give one a rank")
    return {name: min(int(rank), *shapes[name]) for name, rank in ranks.items()}


def _slices_each(rank_budget: int, modules: int, share: float, largest: int) -> int:
    """How many slices every module has at first, within a budget of slices for all of them."""
    allowed = rank_budget / share if share else math.inf
    if allowed < modules:
        raise BudgetError(
            f"rank_budget {rank_budget:,} is too small for one slice on each of the {modules} matched layers; the "
            f'smallest that works is {math.ceil(modules * share):,}, or narrow targets, for example to "attention"'
        )
    return largest if allowed >= largest * modules else int(allowed / modules)
