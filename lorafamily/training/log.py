"""Everything a run writes into its folder: records, TensorBoard, pictures."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from lorafamily.errors import FileError
from lorafamily.history import Decision, Evaluation, History, Step
from lorafamily.insight.record import DECISIONS, EVENTS, STEPS, Record, draw, recorded, set_aside
from lorafamily.insight.record import pictures as pictures_of
from lorafamily.training.board import Board, Setting


class Log:
    """Of one run, from where its history ends; does nothing without a folder.

    A run that begins, in a folder where an earlier one was recorded (and died before its first checkpoint, or had its
    checkpoints removed), moves that record aside. A run that made no step leaves nothing.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, history: History, grows: bool):
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            if not history.steps and recorded(self.folder):
                set_aside(self.folder)
            self.events_before = set(self.folder.glob(EVENTS))
            self.start = Decision(0, {}, dict(history.ranks_start), "start")
            self.record = Record(self.folder, [self.start, *history.decisions], history.steps)
            highest = (2 if grows else 1) * max(self.start.after.values(), default=0)
            self.board = Board(self.folder, self.start, highest, len(history.steps))

    def step(self, step: Step, decision: Decision | None) -> None:
        if self.folder is not None:
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
        if self.folder is not None:
            self.record.close()
            drawn = pictures_of([self.start, *history.decisions], history.steps) if pictures and history.steps else {}
            draw(self.folder, drawn)
            with _named(self.folder):
                self.board.close(history, settings, drawn)
                if not history.steps:
                    self._remove()

    def _remove(self) -> None:
        assert self.folder is not None
        own = set(self.folder.glob(EVENTS)) - self.events_before
        for path in (self.folder / STEPS, self.folder / DECISIONS, *own):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    """TensorBoard writes in a thread, whose errors come out later and name no file."""
    try:
        yield
    except OSError as error:
        raise FileError(f"{folder}: cannot write TensorBoard's events ({error})") from error
