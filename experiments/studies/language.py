"""Problems with a causal language model of your own, of 0.6B to 1B parameters; they need a GPU.

Rates are tuned by the loss on rows that nothing trains on; arms are judged by the final metric, such as accuracy.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

import lorafamily
from studies.problem import Batch, Problem, looking
from tasks import TaskError
from tasks.maths import GSM8K
from tasks.texts import CausalText, read_text, with_labels


class Language(Problem):
    """The budget is LoRA's at rank 8 on every linear layer of the model, plus a singular value for each slice."""

    steps, batch, length = 1000, 16, 512
    evaluations = 20
    seeds = range(5)
    task: Any

    def read(self, model: str | None, data: Path | None) -> None:
        if model is None or data is None:
            raise TaskError(f"the problem {self.name} needs --model, a causal language model, and --data")
        self.task = self.opened(model, data)
        self.budget = lorafamily.plan(self.task.model(0)[0], "adalora", rank=8).use.adapters

    @abstractmethod
    def opened(self, model: str, data: Path) -> Any:
        """The task."""

    def model(self, seed: int) -> nn.Module:
        return self.task.model(seed)[0]

    def training(self, seed: int) -> Any:
        return self.task.training(seed)


class Maths(Language):
    """Training on MetaMathQA, judged on GSM8K."""

    name = "llm-gsm8k"
    what = (
        "A causal language model that MetaMathQA teaches to reason in words; tuned by the loss on 500 of its rows, "
        "judged on the questions of GSM8K."
    )
    metric = "share of questions answered wrongly (tuning and curves: nats per token)"
    margin, goal = 0.01, 0.4

    def opened(self, model: str, data: Path) -> GSM8K:
        return GSM8K(model, data, self.batch, self.length)

    def tuning(self, seed: int) -> Sequence[Batch]:
        return [self.task.collate(self.task.tuning[i : i + 16]) for i in range(0, len(self.task.tuning), 16)]

    def tuned(self, model: nn.Module, seed: int) -> float:
        with looking(model):
            return float(self.task.loss(model, self.tuning(seed)))

    def judged(self, model: nn.Module, seed: int) -> float:
        with looking(model):
            return float(1 - self.task.accuracy(model))


class OwnText(Language):
    """A text file of your own; its last tenth is held out."""

    name = "llm-text"
    what = "A causal language model and a text: nine tenths to train on; half of the rest to tune on, half to judge on."
    metric = "bits per byte"
    margin, goal = 0.01, 0.8

    def opened(self, model: str, data: Path) -> CausalText:
        text = read_text(data)
        cut = len(text) * 9 // 10
        return CausalText(model, text[:cut], text[cut:], self.batch, self.length)

    def quality(self, loss: float, seed: int) -> float:
        return float(loss / math.log(2) / self.task.bytes_per_token)

    def tuning(self, seed: int) -> Sequence[Batch]:
        return self.halves(0)

    def judging(self, seed: int) -> Sequence[Batch]:
        return self.halves(1)

    def halves(self, which: int) -> Sequence[Batch]:
        """Every second piece of the held-out text, from the first (0) or the second (1) on."""
        pieces = self.task.pieces[1][which::2]
        return [with_labels(pieces[i : i + self.batch]) for i in range(0, len(pieces), self.batch)]
