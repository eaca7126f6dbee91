"""The best evaluation of a run, and its weights where they are to be restored."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lorafamily.errors import StateError, TrainingError
from lorafamily.history import Evaluation, History, Weights
from lorafamily.training.session import Session
from lorafamily.training.snapshot import Snapshot


def chosen_mode(monitor: str, mode: Literal["min", "max"] | None) -> Literal["min", "max"]:
    """Whether low or high is good: as was said, and low for the loss.

    Raises:
        TrainingError: nothing was said of another metric.
    """
    if mode is None and monitor != "loss":
        raise TrainingError(
            f'monitor="{monitor}" needs a mode: "max" if higher is better, as for an accuracy, or "min"'
        )
    return "min" if mode is None else mode


@dataclass
class Best:
    """The best evaluation since the ranks settled: its `value` and `step`, and the number of evaluations `since` then.

    `monitor`: the metric that decides; `mode`: whether low ("min") or high ("max") is good; `patience`: evaluations
    without a better one after which the run stops; `keep`: whether to copy the weights, for `restore_if_kept`.
    """

    model: nn.Module
    session: Session
    monitor: str
    mode: Literal["min", "max"]
    patience: int | None
    keep: bool
    step: int = 0
    since: int = 0
    weights: Snapshot | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise TrainingError(f'mode={self.mode!r}: must be "min" (lower is better) or "max"')
        self.value = math.inf if self.mode == "min" else -math.inf

    def improved(self, evaluation: Evaluation, history: History) -> bool:
        """Whether this evaluation is the best so far. Those before the ranks settle count only at the run's end.

        Raises:
            TrainingError: `evaluate` did not return the metric that patience or the best weights go by.
        """
        value = evaluation.metrics.get(self.monitor)
        if value is None and (self.patience is not None or self.keep or self.monitor != "loss"):
            asks = "patience" if self.patience is not None else "restore_best" if self.keep else "monitor"
            raise TrainingError(f'{asks} watches "{self.monitor}", but evaluate gave {", ".join(evaluation.metrics)}')
        settled = self.session.allocator.settled or evaluation.step == self.session.run.steps
        if value is None or not settled:
            return False
        if value < self.value if self.mode == "min" else value > self.value:
            self.value, self.step, self.since = value, evaluation.step, 0
            history.best = Weights(evaluation.step, dict(evaluation.metrics))
            if self.keep:
                self.take(Snapshot.of(self.model, self.session.adapters), history)
            return True
        self.since += 1
        return False

    def reason_to_stop(self, step: int) -> str:
        """Why the run ends after this step; empty if it goes on."""
        if step == self.session.run.steps:
            return f"all {step} steps done"
        if self.patience is not None and self.since >= self.patience:
            better = "lower" if self.mode == "min" else "higher"
            return f"no {better} validation {self.monitor} in {self.patience} evaluations"
        return ""

    def take(self, weights: Snapshot, history: History) -> None:
        assert history.best is not None
        self.weights = weights
        history.best = dataclasses.replace(history.best, tensors=weights.tensors)

    def restore_if_kept(self, history: History) -> None:
        """Give the model the weights of the best evaluation, ranks included; `history.last` keeps the last ones.

        Call it when the run is over and saved: a checkpoint at the end holds the last weights.

        Raises:
            StateError: no evaluation was the best.
        """
        if not self.keep:
            return
        adapters = self.session.adapters
        if self.weights is None:
            raise StateError(
                f'no best weights are kept: there was no evaluation with a finite "{self.monitor}" once the '
                "allocation had settled"
            )
        if self.step == len(history.steps):
            return  # the model has these weights
        if history.last is not None:
            history.last = dataclasses.replace(history.last, tensors=Snapshot.of(self.model, adapters).tensors)
        self.weights.put_into(self.model, adapters, self.session.optimizer)
        history.slices_end = {at: adapter.slices for at, adapter in adapters.items()}
        self.session.allocator.slices = dict(history.slices_end)
