"""The contract between the training loop and whatever moves rank between modules.

A method carries an `Allocation`: plain settings. At the start of a run it becomes an `Allocator`, which the loop calls
after every optimiser step, while the gradients are still there. What it does is returned as a `Decision`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lorafamily.allocation.run import Run
from lorafamily.allocation.scorer import Scorer, Scores
from lorafamily.errors import AllocationError
from lorafamily.history import Decision


class Allocator(ABC):
    """Moves rank during one run. Deterministic: the same numbers seen, the same decisions."""

    grows: ClassVar[bool] = False
    """Whether a module may end with more slices than it started with."""

    def __init__(self, run: Run):
        self.run = run
        self.ranks = dict(run.start or {name: adapter.rank for name, adapter in run.adapters.items()})
        """Slices in use by module: present and not masked at the last decision."""
        self.settled = False
        """Whether no further decision will come."""
        self.scorer: Scorer | None = None

    @abstractmethod
    def step(self, step: int) -> Decision | None:
        """Called after optimiser step `step` (from 1) with the gradients still in place; does what it decides."""

    def resize(self, name: str, keep: Tensor, add: int = 0) -> None:
        """Change one adapter's slices, and with them the optimiser's state and what the scorer has averaged."""
        self.run.resize(name, keep, add)
        if self.scorer is not None:
            self.scorer.follow(name, keep, add)

    def state(self) -> dict[str, Any]:
        """Where it is in its run, as plain data and tensors; `restore` takes it."""
        scorer = None if self.scorer is None else self.scorer.state()
        return {"ranks": dict(self.ranks), "settled": self.settled, "scorer": scorer}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where another allocator with the same settings was; the adapters have its ranks already."""
        self.ranks, self.settled = dict(state["ranks"]), state["settled"]
        if self.scorer is not None:
            self.scorer.restore(state["scorer"])

    def scores(self) -> Scores:
        """What every slice is worth now, the same in every process."""
        assert self.scorer is not None
        return self.run.agreed(self.scorer.scores())

    def decided(
        self, step: int, after: dict[str, int], reason: str, threshold: float | None, scores: Scores
    ) -> Decision:
        """Record a change that was made."""
        before, self.ranks = self.ranks, after
        by_module = {name: values.tolist() for name, values in scores.items()}
        return Decision(step, before, dict(after), reason, threshold, by_module)


@dataclass(frozen=True)
class Allocation(ABC):
    """Settings of an allocator. Fields are options of the methods that use it."""

    @abstractmethod
    def begin(self, run: Run) -> Allocator:
        """The allocator for one run.

        Raises:
            AllocationError: the schedule cannot run as set, or needs what the run lacks.
        """

    def end_share(self) -> float:
        """The share of the start rank that is left at the end; what `budget_at="end"` divides by."""
        return 1.0


@dataclass(frozen=True)
class Fixed(Allocation):
    """Every module keeps the rank it started with."""

    def begin(self, run: Run) -> Allocator:
        return _Still(run)


class _Still(Allocator):
    def __init__(self, run: Run):
        super().__init__(run)
        self.settled = True

    def step(self, step: int) -> None:
        return None


def in_steps(value: float, steps: int, name: str) -> int:
    """A schedule setting in optimiser steps: a whole number is steps already, a fraction is of the run.

    Raises:
        AllocationError: neither; `name` is named.
    """
    if isinstance(value, int) and value >= 0:
        return value
    if isinstance(value, float) and 0 <= value < 1:
        return round(value * steps)
    raise AllocationError(
        f"{name}={value!r}: must be a whole number of optimiser steps or a fraction of the run in [0, 1)"
    )
