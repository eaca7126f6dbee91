"""Everything a run writes into its folder: records, TensorBoard, pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from lorafamily.history import Decision, Evaluation, History, Step
from lorafamily.insight.record import Record, draw
from lorafamily.insight.record import pictures as pictures_of
from lorafamily.training.board import Board, Setting


class Log:
    """Of one run, from where its history ends; does nothing without a folder."""

    def __init__(self, folder: str | os.PathLike[str] | None, history: History, grows: bool):
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self.start = Decision(0, {}, dict(history.ranks_start), "start")
            self.record = Record(self.folder, [self.start, *history.decisions], history.steps)
            highest = (2 if grows else 1) * max(self.start.after.values(), default=0)
            self.board = Board(self.folder, self.start, highest, len(history.steps))

    def step(self, step: Step, decision: Decision | None) -> None:
        if self.folder is not None:
            self.record.step(step)
            if decision is not None:
                self.record.decision(decision)
            self.board.step(step, decision)

    def evaluation(self, evaluation: Evaluation) -> None:
        if self.folder is not None:
            self.board.evaluation(evaluation)

    def close(self, history: History, settings: Mapping[str, Setting], *, pictures: bool = True) -> None:
        """Draw the pictures of whatever was run, and close the files."""
        if self.folder is not None:
            self.record.close()
            drawn = pictures_of([self.start, *history.decisions], history.steps) if pictures else {}
            draw(self.folder, drawn)
            self.board.close(history, settings, drawn)
