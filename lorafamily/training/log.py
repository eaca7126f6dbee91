"""Everything a run writes into its folder: records, TensorBoard, pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from lorafamily.allocation.allocator import Allocator
from lorafamily.history import Decision, Evaluation, History, Step
from lorafamily.insight.record import Record, draw, pictures
from lorafamily.training.board import Board, Setting


class Log:
    """Of one run; does nothing without a folder."""

    def __init__(self, folder: str | os.PathLike[str] | None, allocator: Allocator):
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self.start = Decision(0, {}, dict(allocator.ranks), "start")
            head_room = 2 if allocator.grows else 1
            self.record = Record(self.folder, self.start)
            self.board = Board(self.folder, self.start, head_room * max(self.start.after.values(), default=0))

    def step(self, step: Step, decision: Decision | None) -> None:
        if self.folder is not None:
            self.record.step(step)
            if decision is not None:
                self.record.decision(decision)
            self.board.step(step, decision)

    def evaluation(self, evaluation: Evaluation) -> None:
        if self.folder is not None:
            self.board.evaluation(evaluation)

    def close(self, history: History, settings: Mapping[str, Setting]) -> None:
        """Draw the pictures of whatever was run, and close the files."""
        if self.folder is not None:
            self.record.close()
            drawn = pictures([self.start, *history.decisions], history.steps)
            draw(self.folder, drawn)
            self.board.close(history, settings, drawn)
