"""What a problem of a study is: models, batches, and what is measured.

Every problem has three texts or samples: one to train on, one to tune on (rates are chosen by it, curves are drawn on
it, and methods that score ranks score them on it), and one to judge on, which nothing else sees.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafamily.training.execution import evaluating
from tasks import TaskError
from tasks.task import mean_loss

Batch = dict[str, Tensor]


@contextmanager
def looking(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients; the model is trained on as if nobody had looked."""
    with evaluating(model, next(model.parameters()).device), torch.no_grad():
        yield


class Problem(ABC):
    """`metric`: lower is better. `budget`: trainable parameters of an arm of size 1. `steps`, `evaluations`: of a run.
    `margin`: the difference in the metric that nobody would mind, fixed before any run. `tuning_seeds`, `seeds`: those
    that choose rates, and those that are judged. `goal`: the metric on the tuning split that steps are counted to.
    `constant`: the metric of the best answer that is always the same; infinite where there is none."""

    name: str
    what: str
    metric: str
    budget: int
    steps: int
    evaluations: int
    margin: float
    goal: float
    constant: float = math.inf
    tuning_seeds: Sequence[int] = (100,)
    seeds: Sequence[int] = range(8)
    head: str | None = None
    """A regular expression for the new task head, which trains with every arm at `head_lr`; known once read."""
    head_lr: float | None = None
    logs: bool = True
    """Whether a run writes logs and checkpoints; one of some seconds is sooner done again."""

    def read(self, model: str | None, data: Path | None) -> None:
        """Take the model and the data from there.

        Raises:
            TaskError: they cannot be read, or the problem has its own.
        """
        if model is not None or data is not None:
            raise TaskError(f"the problem {self.name} comes with its model and data; leave out --model and --data")

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """A fresh model, as it was before anything is adapted."""

    @abstractmethod
    def training(self, seed: int) -> Any:
        """Shuffled batches, the same for every arm of the seed."""

    @abstractmethod
    def tuning(self, seed: int) -> Sequence[Batch]:
        """What rates are chosen on, curves are drawn on, and ranks are scored on."""

    def judging(self, seed: int) -> Sequence[Batch]:
        """What `judged` looks at, and nothing else."""
        raise NotImplementedError

    def source(self) -> Sequence[Batch]:
        """What the model could do before, to measure forgetting on; empty where there is no such thing."""
        return ()

    def quality(self, loss: float, seed: int) -> float:
        """The metric, from a mean loss."""
        return loss

    def measure(self, model: nn.Module, batches: Sequence[Batch], seed: int) -> float:
        """The metric of a model."""
        return self.quality(self.loss(model, batches), seed)

    def tuned(self, model: nn.Module, seed: int) -> float:
        """What rates are chosen by and curves show."""
        return self.measure(model, self.tuning(seed), seed)

    def judged(self, model: nn.Module, seed: int) -> float:
        """What arms are compared by."""
        return self.measure(model, self.judging(seed), seed)

    def loss(self, model: nn.Module, batches: Sequence[Batch]) -> float:
        """Mean over rows, in eval mode."""
        with looking(model):
            return mean_loss(model, batches)

    def planted(self, seed: int) -> frozenset[str]:
        """Names of the layers that can help; empty where nobody knows."""
        return frozenset()
