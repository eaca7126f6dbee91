"""The contract of a scorer, which says what every slice is worth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from lorafamily.allocation.run import Run

Scores = dict[str, Float[Tensor, " r"]]
"""By module name one score a slice, float64 on the CPU; higher is better."""


class Scorer(ABC):
    """Scores the slices of one run's adapters. Options are keywords of `__init__`."""

    wants_task_gradient: bool = False
    """Whether `observe` uses `run.task_gradient`, so that the loop must keep the task's gradient apart."""

    def __init__(self, run: Run):
        self.run = run

    def observe(self) -> None:
        """Called after every optimiser step, before the gradients are cleared."""

    @property
    def observes(self) -> bool:
        """Whether it learns from steps, and so has no scores before the first."""
        return type(self).observe is not Scorer.observe

    @abstractmethod
    def scores(self) -> Scores:
        """What every slice is worth now."""

    def why_not_finite(self) -> str:
        """The likely reason why scores are not finite, for the message of an error."""
        return "its weights, or gradients that were observed, are not finite; lower lr or look at the data"

    def state(self) -> Any:
        """What was observed, as plain data and tensors, for `restore`."""
        return None

    def restore(self, state: Any) -> None:
        """Continue from what another scorer of the same class had observed."""

    def follow(self, name: str, keep: Int[Tensor, " n"], add: int) -> None:
        """Make averages follow a module that kept the given slices and got `add` new ones."""
