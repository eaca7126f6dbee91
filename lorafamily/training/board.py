"""What a run shows on TensorBoard. It observes; nothing of the result exists only here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from lorafamily.history import Decision, Evaluation, History, Step
from lorafamily.insight.drawing import pixels
from lorafamily.insight.grids import area_labels, rank_by_kind
from lorafamily.insight.heatmaps import rank_heatmap
from lorafamily.training.settings import Setting

SHARE = 0.02  # of a run's time, for pictures while it goes
FIRST = 0.5  # seconds that the first picture is expected to take


class Allowance:
    """Time that pictures may take: `SHARE` of the time since the run began, counting the next one as long as the
    last."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock, self.begun = clock, clock()
        self.spent, self.expected = 0.0, FIRST

    def has_room(self) -> bool:
        return self.spent + self.expected <= SHARE * (self.clock() - self.begun)

    @contextmanager
    def spending(self) -> Iterator[None]:
        before = self.clock()
        try:
            yield
        finally:
            self.expected = self.clock() - before
            self.spent += self.expected


class Board:
    """Scalars at every step; ranks by kind whenever an allocation changed, and a rank heat-map and scores then too as
    far as the `allowance` goes; at the end the last heat-map, the history of the allocation, and a line in the HParams
    tab.

    `highest`: top of the colour scale of all heat-maps, so that they compare; `done`: steps of an earlier session.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        start: Decision,
        highest: int,
        done: int = 0,
        allowance: Allowance | None = None,
    ):
        # What an interrupted run showed of steps after its last checkpoint is taken back.
        self.writer = SummaryWriter(os.fspath(folder), purge_step=done + 1 if done else None)
        self.start, self.highest, self.kinds = start, highest, area_labels(start.after)
        self.allowance = allowance or Allowance()
        self.last, self.shown = start, True  # the start is the left half of every heat-map
        if not done:
            self._by_kind(start)

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
            if decision.before != decision.after:
                self.last, self.shown = decision, False
                self._by_kind(decision)
            if self.allowance.has_room():
                with self.allowance.spending():
                    self._scores(decision)
                    self._ranks()

    def evaluation(self, evaluation: Evaluation) -> None:
        for name, value in evaluation.metrics.items():
            self.writer.add_scalar(f"validation/{name}", value, evaluation.step)

    def close(self, history: History, settings: Mapping[str, Setting], drawn: Mapping[str, Figure]) -> None:
        """`drawn`: the run's pictures, of which the history and the scores are shown; without any, as where somebody
        waits for the process to end, nothing is drawn."""
        if "rank-by-layer" in drawn and not self.shown:
            if self.allowance.spent:
                self._ranks()  # on the colour scale of those before
            else:
                self._image("rank/by layer", drawn["rank-by-layer"], self.last.step)
        last = history.steps[-1] if history.steps else None
        for tag, name in (
            ("rank/by expert", "rank-by-expert"),
            ("rank/history", "rank-history"),
            ("rank/scores at decisions", "scores"),
        ):
            if name in drawn and last is not None:
                self._image(tag, drawn[name], last.step)
        final = {f"final/{name}": value for name, value in history.metrics.items()}
        if last is not None:
            final |= {"final/train loss (nats)": history.smoothed_loss()[-1], "final/rank": last.rank}
            final |= {"final/trainable numbers": last.trainable}
            # Under the run's own name; the default is a run of its own, named after the time.
            self.writer.add_hparams(dict(settings), final, run_name=".")
        self.writer.close()

    def _ranks(self) -> None:
        """The heat-map of the last decision that changed something, if it has not been shown."""
        if not self.shown:
            title = f"Rank by layer and matrix, step {self.last.step}: {self.last.reason}"
            figure = rank_heatmap(self.start.after, self.last.after, title, self.highest)
            self._image("rank/by layer", figure, self.last.step)
        self.shown = True

    def _by_kind(self, decision: Decision) -> None:
        for kind, rank in rank_by_kind(decision.after, self.kinds).items():
            self.writer.add_scalar(f"rank by kind/{kind}", rank, decision.step)

    def _scores(self, decision: Decision) -> None:
        scores = np.array([score for own in decision.scores.values() for score in own])
        if scores.size and np.ptp(scores) > 0:
            self.writer.add_histogram("rank/scores", scores, decision.step)

    def _image(self, tag: str, figure: Figure, step: int) -> None:
        self.writer.add_image(tag, pixels(figure), step, dataformats="HWC")
