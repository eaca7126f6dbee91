"""Everything a run writes into its folder: records, TensorBoard, pictures."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from lorafamily.errors import FileError
from lorafamily.history import Decision, Evaluation, History, Step
from lorafamily.insight.record import Record, draw, recorded, set_aside
from lorafamily.insight.record import pictures as pictures_of
from lorafamily.training.board import Board, Setting
from lorafamily.training.session import Session


class Log:
    """Of one run, from where its history ends; does nothing without a folder.

    It begins with the first step, since the first batch may show that some adapters have no effect, and a run without
    a step leaves nothing. A run that begins where an earlier one was recorded (and died before its first checkpoint, or
    had its checkpoints removed) moves that record aside.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, history: History, session: Session):
        self.folder = None if folder is None else Path(folder)
        self.history, self.session = history, session
        self.record: Record | None = None

    def begin(self) -> None:
        """Open the files, if they are not."""
        if self.folder is not None and self.record is None:
            if not self.history.steps and recorded(self.folder):
                set_aside(self.folder)
            self.start = Decision(0, {}, dict(self.session.start), "start")
            self.record = Record(self.folder, [self.start, *self.history.decisions], self.history.steps)
            grows = self.session.allocator.grows
            highest = (2 if grows else 1) * max(self.start.after.values(), default=0)
            self.board = Board(self.folder, self.start, highest, len(self.history.steps))

    def step(self, step: Step, decision: Decision | None) -> None:
        """Before the step is in the history."""
        self.begin()
        if self.folder is not None and self.record is not None:
            self.record.step(step)
            if decision is not None:
                self.record.decision(decision)
            with _named(self.folder):
                self.board.step(step, decision)

    def evaluation(self, evaluation: Evaluation) -> None:
        if self.folder is not None:
            with _named(self.folder):
                self.board.evaluation(evaluation)

    def close(self, history: History, settings: Mapping[str, Setting], *, pictures: bool = True) -> None:
        """Draw the pictures of whatever was run, and close the files."""
        if self.folder is not None and self.record is not None:
            self.record.close()
            drawn = pictures_of([self.start, *history.decisions], history.steps) if pictures else {}
            draw(self.folder, drawn)
            with _named(self.folder):
                self.board.close(history, settings, drawn)


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    """TensorBoard writes in a thread, whose errors come out later and name no file."""
    try:
        yield
    except OSError as error:
        raise FileError(f"{folder}: cannot write TensorBoard's events ({error})") from error
