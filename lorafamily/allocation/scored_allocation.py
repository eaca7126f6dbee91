"""Allocations that decide by the scores of a scorer, whose name is an option."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from lorafamily.allocation.ablation import SCORING_ROWS
from lorafamily.allocation.allocator import Allocation
from lorafamily.allocation.run import Run
from lorafamily.allocation.scorer import Scorer
from lorafamily.errors import AllocationError
from lorafamily.registry import find_scorer


@dataclass(frozen=True)
class ScoredAllocation(Allocation):
    """An allocation that decides by scores. `scorer` is a name from `lorafamily.scorers()`. Other fields are options of
    scorers: `beta1`, `beta2`, `gradient_of` of "sensitivity", `scoring_rows` of "exact" and "first-order",
    `scoring_memory` of "exact", and `scorer_options`, by name, of any other scorer."""

    scorer: str
    beta1: float = 0.85
    beta2: float = 0.85
    gradient_of: Literal["total", "task"] = "total"
    scoring_rows: int = SCORING_ROWS
    scoring_memory: float | None = None
    scorer_options: Mapping[str, Any] = field(default_factory=dict)

    def make_scorer(self, run: Run) -> Scorer:
        """The scorer with those options that differ from their defaults. Raises as `scorer_named` does."""
        defaults = {f.name: f.default for f in fields(ScoredAllocation) if f.name not in ("scorer", "scorer_options")}
        changed = {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}
        return scorer_named(self.scorer, run, **changed, **self.scorer_options)


def scorer_named(name: str, run: Run, **options: Any) -> Scorer:
    """The scorer of that name for a run.

    Raises:
        AllocationError: no such scorer, it does not take an option, or it needs something that the run lacks.
    """
    made = find_scorer(name)
    taken = [option for option in inspect.signature(made).parameters if option != "run"]
    if unused := [option for option in options if option not in taken]:
        raise AllocationError(
            f"scorer={name!r} has no use for {', '.join(unused)}; it takes {', '.join(taken) or 'no options'}"
        )
    return made(run, **options)
