"""A run on TensorBoard. The board only observes: every result is in the history, too."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from lorafamily.history import Decision, Evaluation, History, Step
from lorafamily.insight.drawing import pixels
from lorafamily.insight.grids import area_labels, slices_by_matrix
from lorafamily.insight.heatmaps import rank_heatmap

SHARE = 0.02  # of a run's time, for pictures during the run
FIRST = 0.5  # seconds that the first picture is expected to take
SCALARS = {
    "loss": "train/loss (nats)",
    "penalty": "train/penalty",
    "lr": "train/learning rate",
    "gradient": "train/gradient norm",
    "slices": "rank/slices",
    "trainable": "rank/trainable parameters",
    "orthogonality": "train/orthogonality error",
}
AT_END = {"rank-by-expert": "slices by expert", "rank-history": "history of slices", "scores": "scores at decisions"}


class Allowance:
    """The time that pictures may take: `SHARE` of the time since the run began. The next picture is expected to take as
    long as the last one."""

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
    """Shows scalars at every step. After a decision it shows slices by type of matrix and, while the `allowance` lasts,
    a heat-map of slices and a histogram of scores; at the end the last heat-map, the history of slices, and a line in
    the HParams tab.

    `highest`: top of the colour scale of all heat-maps, so that they can be compared; `done`: steps made before;
    `pictures`: whether heat-maps and histograms are shown.

    TensorBoard keeps one plugin per tag: never use a tag for both a histogram and an image.
    """

    def __init__(
        self,
        folder: Path,
        start: Decision,
        highest: int,
        done: int = 0,
        pictures: bool = True,
        allowance: Allowance | None = None,
    ):
        # An interrupted run repeats the steps after its last checkpoint: hide those that it made before.
        self.writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)
        self.start, self.highest, self.area_of = start, highest, area_labels(start.after)
        self.pictures, self.allowance = pictures, allowance or Allowance()
        self.last, self.shown = start, True  # every heat-map shows the start, too
        if not done:
            self._slices_by_area(start)

    def step(self, record: Step, decision: Decision | None) -> None:
        for field, tag in SCALARS.items():
            if (value := getattr(record, field)) is not None:
                self.writer.add_scalar(tag, value, record.step)
        if decision is not None:
            if decision.before != decision.after:
                self.last, self.shown = decision, False
                self._slices_by_area(decision)
            if self.pictures and self.allowance.has_room():
                with self.allowance.spending():
                    self._score_histogram(decision)
                    self._ranks()

    def evaluation(self, evaluation: Evaluation) -> None:
        for name, value in evaluation.metrics.items():
            self.writer.add_scalar(f"validation/{name}", value, evaluation.step)

    def close(self, history: History, settings: Mapping[str, Any], drawn: Mapping[str, Figure]) -> None:
        """Show the pictures that were drawn for the run's folder, and close the file. If none were, because a signal
        ended the run, none is drawn here either."""
        if "rank-by-layer" in drawn and not self.shown:
            if self.allowance.spent:
                self._ranks()  # on the colour scale of the earlier heat-maps
            else:
                self._image("rank/slices by layer", drawn["rank-by-layer"], self.last.step)
        if history.steps:
            last = history.steps[-1]
            for name, what in AT_END.items():
                if name in drawn:
                    self._image(f"rank/{what}", drawn[name], last.step)
            final = {f"final/{name}": value for name, value in history.metrics.items()}
            final |= {"final/train loss (nats)": history.smoothed_loss()[-1], "final/slices": last.slices}
            final |= {"final/trainable parameters": last.trainable}
            # By default TensorBoard would list this line as another run, named after the time.
            self.writer.add_hparams(dict(settings), final, run_name=".")
        self.writer.close()

    def _ranks(self) -> None:
        """Show the heat-map of the last decision that changed ranks, unless it was shown."""
        if not self.shown:
            title = f"Slices by layer and matrix, step {self.last.step}: {self.last.reason}"
            figure = rank_heatmap(self.start.after, self.last.after, title, self.highest)
            self._image("rank/slices by layer", figure, self.last.step)
        self.shown = True

    def _slices_by_area(self, decision: Decision) -> None:
        for area, slices in slices_by_matrix(decision.after, self.area_of).items():
            self.writer.add_scalar(f"slices by matrix/{area}", slices, decision.step)

    def _score_histogram(self, decision: Decision) -> None:
        scores = np.array([score for slices in decision.scores.values() for score in slices])
        if scores.size and np.ptp(scores) > 0:
            self.writer.add_histogram("rank/scores", scores, decision.step)

    def _image(self, tag: str, figure: Figure, step: int) -> None:
        self.writer.add_image(tag, pixels(figure), step, dataformats="HWC")
