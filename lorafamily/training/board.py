"""What a run shows on TensorBoard. It observes; nothing of the result exists only here."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from lorafamily.history import Decision, Evaluation, History, Step
from lorafamily.insight.figures import pixels, rank_by_kind, rank_heatmap

Setting = str | int | float | bool


class Board:
    """Scalars at every step; rank heat-map, ranks by kind and scores whenever an allocation changed; at the end the
    history of the allocation, and a line in the HParams tab.

    `highest`: top of the colour scale of all heat-maps, so that they compare; `done`: steps of an earlier session.
    """

    def __init__(self, folder: str | os.PathLike[str], start: Decision, highest: int, done: int = 0):
        # What an interrupted run showed of steps after its last checkpoint is taken back.
        self.writer = SummaryWriter(os.fspath(folder), purge_step=done + 1 if done else None)
        self.start, self.highest = start, highest
        if not done:
            self._ranks(start)

    def step(self, record: Step, decision: Decision | None) -> None:
        scalars = {
            "train/loss (nats)": record.loss,
            "train/penalty": record.penalty,
            "train/learning rate": record.lr,
            "train/gradient norm": record.gradient,
            "rank/total": record.rank,
            "rank/trainable numbers": record.trainable,
        }
        if record.orthogonality is not None:
            scalars["train/orthogonality error"] = record.orthogonality
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, record.step)
        if decision is not None:
            scores = np.array([score for own in decision.scores.values() for score in own])
            if scores.size and np.ptp(scores) > 0:
                self.writer.add_histogram("rank/scores", scores, decision.step)
            if decision.before != decision.after:
                self._ranks(decision)

    def evaluation(self, evaluation: Evaluation) -> None:
        for name, value in evaluation.metrics.items():
            self.writer.add_scalar(f"validation/{name}", value, evaluation.step)

    def close(self, history: History, settings: Mapping[str, Setting], drawn: Mapping[str, Figure]) -> None:
        """`drawn`: the run's pictures, of which the history and the scores are shown."""
        last = history.steps[-1] if history.steps else None
        for tag, name in (("rank/history", "rank-history"), ("rank/scores at decisions", "scores")):
            if name in drawn and last is not None:
                self._image(tag, drawn[name], last.step)
        final = {f"final/{name}": value for name, value in history.metrics.items()}
        if last is not None:
            final |= {"final/train loss (nats)": history.smoothed_loss()[-1], "final/rank": last.rank}
            final |= {"final/trainable numbers": last.trainable}
            # Under the run's own name; the default is a run of its own, named after the time.
            self.writer.add_hparams(dict(settings), final, run_name=".")
        self.writer.close()

    def _ranks(self, decision: Decision) -> None:
        if not decision.after:
            return
        title = f"Rank by layer and matrix, step {decision.step}: {decision.reason}"
        now = None if decision is self.start else decision.after
        self._image("rank/by layer", rank_heatmap(self.start.after, now, title, self.highest), decision.step)
        for kind, rank in rank_by_kind(decision.after).items():
            self.writer.add_scalar(f"rank by kind/{kind}", rank, decision.step)

    def _image(self, tag: str, figure: Figure, step: int) -> None:
        self.writer.add_image(tag, pixels(figure), step, dataformats="HWC")
