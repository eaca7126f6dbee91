"""What a scorer is: the worth of every rank slice, as one number each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from lorafamily.allocation.run import Run

Scores = dict[str, Float[Tensor, " r"]]
"""By module name one score a slice, float64 on the CPU; higher is worth more."""


class Scorer(ABC):
    """Scores the slices of one run's adapters."""

    def __init__(self, run: Run):
        self.run = run

    def observe(self) -> None:
        """Called after every optimiser step, while the gradients are still there."""

    @abstractmethod
    def scores(self) -> Scores:
        """What every slice is worth now."""

    def state(self) -> Any:
        """What was observed, as plain data and tensors; `restore` takes it."""
        return None

    def restore(self, state: Any) -> None:
        """Go on from what another scorer of the same kind had observed."""

    def follow(self, name: str, keep: Int[Tensor, " n"], add: int) -> None:
        """A module kept the given slices and got `add` new ones; what was averaged must follow."""
