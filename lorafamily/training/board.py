"""What a run shows on TensorBoard. It observes; nothing of the result exists only here."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from torch.utils.tensorboard import SummaryWriter

from lorafamily.insight.figures import pixels, rank_heatmap

if TYPE_CHECKING:
    from lorafamily.allocation.allocator import Allocator, Decision
    from lorafamily.training.history import Evaluation, Step


class Board:
    """Scalars at every step, a rank heat-map at the start and whenever an allocation changed; nothing without a
    folder."""

    def __init__(self, log_dir: str | os.PathLike[str] | None, allocator: Allocator):
        self.writer = None if log_dir is None else SummaryWriter(os.fspath(log_dir))
        # One colour scale for the run, so that pictures compare: with head-room where modules may grow.
        self.highest = max(allocator.ranks.values(), default=0) * (2 if allocator.grows else 1)
        self.shown: dict[str, int] = {}
        self._heatmap(0, allocator.ranks, "start")

    def step(self, record: Step, decision: Decision | None) -> None:
        if self.writer is None:
            return
        scalars = {
            "train/loss (nats)": record.loss,
            "train/penalty": record.penalty,
            "train/learning rate": record.lr,
            "train/gradient norm": record.gradient,
            "rank/total": record.rank,
            "rank/trainable numbers": record.trainable,
        }
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, record.step)
        if decision is not None:
            self._heatmap(record.step, decision.after, decision.reason)

    def evaluation(self, evaluation: Evaluation) -> None:
        if self.writer is not None:
            for name, value in evaluation.metrics.items():
                self.writer.add_scalar(f"validation/{name}", value, evaluation.step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _heatmap(self, step: int, ranks: dict[str, int], why: str) -> None:
        if self.writer is None or not ranks or ranks == self.shown:
            return
        self.shown = dict(ranks)
        title = f"Rank by layer and matrix, {sum(ranks.values())} in all\nstep {step}: {why}"
        self.writer.add_image(
            "rank/by layer", pixels(rank_heatmap(ranks, title, self.highest)), step, dataformats="HWC"
        )
