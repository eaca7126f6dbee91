"""The contract of a scorer, which gives every slice a number by which an allocation drops and adds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from lorafamily.allocation.run import Run

Scores = dict[str, Float[Tensor, " r"]]
"""By module name, one score per slice, float64 on the CPU; a higher score means that the slice is worth more."""


class Scorer(ABC):
    """Scores the slices of one run's adapters. Options are keywords of `__init__`."""

    wants_task_gradient: bool = False
    """Whether `observe` uses `run.task_gradient`, so that the loop must keep the task's gradient apart."""

    def __init__(self, run: Run):
        self.run = run

    def observe(self) -> None:
        """Called after every optimizer step, before the gradients are cleared."""

    @property
    def observes(self) -> bool:
        """Whether it observes steps, and so has no scores before the first one."""
        return type(self).observe is not Scorer.observe

    @abstractmethod
    def scores(self) -> Scores:
        """The current score of every slice."""

    def why_not_finite(self) -> str:
        """The likely reason why scores are not finite, for an error message."""
        return "its weights, or the gradients that it observed, are not finite; lower lr, or check the data"

    def state(self) -> Any:
        """What was observed, as plain data and tensors, for `restore`."""
        return None

    def restore(self, state: Any) -> None:
        """Continue from the `state` of another scorer of the same class."""

    def follow(self, name: str, keep: Int[Tensor, " n"], add: int) -> None:
        """Adjust averages to a module that kept the slices with indices `keep` and got `add` new ones."""
