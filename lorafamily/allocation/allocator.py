"""The contract between the training loop and whatever moves rank between modules.

A method carries an `Allocation`: plain settings. At the start of a run it becomes an `Allocator`, which the loop calls
after every optimiser step, while the gradients are still there. What it does is returned as a `Decision`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.allocation.scorer import Scorer, Scores
from lorafamily.allocation.surgery import follow_resize
from lorafamily.errors import AllocationError


@dataclass(frozen=True)
class Decision:
    """One change of the allocation. Ranks and scores are by module name; `threshold`: the highest score dropped."""

    step: int
    before: dict[str, int]
    after: dict[str, int]
    reason: str
    threshold: float | None = None
    scores: dict[str, list[float]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Rank slices left in all modules."""
        return sum(self.after.values())


@dataclass(frozen=True)
class Run:
    """What an allocator may know and touch.

    `adapters`: by name of their layer in `model`. `steps`: optimiser steps of the whole run. `limit`, `rank_limit`:
    trainable adapter numbers and rank slices that must never be exceeded, None for no such limit. `validation_loss()`:
    the task loss on one fixed batch of validation data, in eval mode, with the gates' gradients if gradients are on;
    None where the run has no validation data. `scoring_memory`: MiB of activations that scoring may hold, None for
    what suits the device.
    """

    model: nn.Module
    adapters: Mapping[str, Adapter]
    steps: int
    limit: int | None = None
    rank_limit: int | None = None
    optimizer: torch.optim.Optimizer | None = None
    validation_loss: Callable[[], Tensor] | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)
    scoring_memory: float | None = None
    progress: bool = False

    def resize(self, name: str, keep: Tensor, add: int = 0) -> None:
        """Change one adapter's slices, and the optimiser's state with them."""
        adapter = self.adapters[name]
        for change in adapter.resize(keep.to(adapter.device), add, generator=self.generator):
            if self.optimizer is not None:
                follow_resize(self.optimizer, change)

    def has_room(self, name: str) -> bool:
        """Whether a module may get one slice more: within the limits, and ΔW could gain from it."""
        update = self.adapters[name].update
        slices = sum(adapter.rank for adapter in self.adapters.values())
        return (
            update.rank < update.largest_rank
            and (self.limit is None or self.trainable() + update.slice_cost <= self.limit)
            and (self.rank_limit is None or slices < self.rank_limit)
        )

    def trainable(self) -> int:
        """Trainable adapter numbers now."""
        return sum(adapter.trainable() for adapter in self.adapters.values())


class Allocator(ABC):
    """Moves rank during one run. Deterministic: the same numbers seen, the same decisions."""

    grows: ClassVar[bool] = False
    """Whether a module may end with more slices than it started with."""

    def __init__(self, run: Run):
        self.run = run
        self.ranks = {name: adapter.rank for name, adapter in run.adapters.items()}
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
    """A schedule setting in optimiser steps: a whole number is steps already, a fraction is of the run."""
    if isinstance(value, int) and value >= 0:
        return value
    if isinstance(value, float) and 0 <= value < 1:
        return round(value * steps)
    raise AllocationError(
        f"{name}={value!r}: must be a whole number of optimiser steps or a fraction of the run in [0, 1)"
    )
