"""The best evaluation of a run, and its weights where they are to be restored."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from torch import nn

from lorafamily.errors import StateError, TrainingError
from lorafamily.history import Evaluation, History, Weights
from lorafamily.training.session import Session
from lorafamily.training.snapshot import Snapshot


class Best:
    """The best evaluation since the ranks settled: its `value` and `step`, and the number of evaluations `since` then.
    The arguments are those of `train`; with `keep` the weights are copied, for `restore_if_kept`.

    Raises:
        TrainingError: a mode that there is not, or none although the metric is not the loss.
    """

    def __init__(
        self,
        model: nn.Module,
        session: Session,
        monitor: str,
        mode: Literal["min", "max"] | None,
        patience: int | None,
        keep: bool,
    ):
        if mode is None and monitor != "loss":
            raise TrainingError(
                f'monitor="{monitor}" needs a mode: "max" if higher is better, as for an accuracy, or "min"'
            )
        if mode not in (None, "min", "max"):
            raise TrainingError(f'mode={mode!r}: must be "min" (lower is better) or "max"')
        self.model, self.session, self.monitor, self.patience, self.keep = model, session, monitor, patience, keep
        self.mode, self.value = ("max", -math.inf) if mode == "max" else ("min", math.inf)
        self.step = self.since = 0
        self.weights: Snapshot | None = None

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
