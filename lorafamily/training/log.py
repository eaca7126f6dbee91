"""Everything that a run writes into its folder, checkpoints aside: record, TensorBoard, pictures."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafamily.errors import FileError, LoraFamilyError
from lorafamily.history import Decision, Evaluation, History, Step
from lorafamily.insight.record import Record, recorded, set_aside
from lorafamily.training.interrupt import Interrupted
from lorafamily.training.session import Session
from lorafamily.training.settings import Setting

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Log:
    """Of one run, from where its history ends, in a `with` block; does nothing without a folder.

    It begins with the first step, since the first batch may show that some adapters have no effect; a run without a
    step leaves no files. If an earlier run was recorded in the folder (and died before its first checkpoint, or had its
    checkpoints removed), that record is moved aside. At the end of the block pictures are drawn of whatever was run,
    unless a signal ended it: whoever asks a process to stop does not wait for long.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        history: History,
        session: Session,
        settings: Mapping[str, Setting],
    ):
        self.folder = None if folder is None else Path(folder)
        self.history, self.session, self.settings = history, session, settings
        self.record: Record | None = None

    def step(self, step: Step, decision: Decision | None) -> None:
        """Call it before the step is in the history."""
        self._begin()
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

    def __enter__(self) -> Log:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        # After an error nothing that goes wrong here may hide it.
        hidden = (OSError, LoraFamilyError) if error is not None and not issubclass(error, Interrupted) else ()
        with contextlib.suppress(*hidden):
            self._close(pictures=error is None or not issubclass(error, Interrupted))

    def _begin(self) -> None:
        if self.folder is not None and self.record is None:
            from lorafamily.training.board import Board  # brings matplotlib, which takes long to import

            if not self.history.steps and recorded(self.folder):
                set_aside(self.folder)
            self.start = Decision(0, {}, dict(self.session.start), "start")
            self.record = Record(self.folder, [self.start, *self.history.decisions], self.history.steps)
            grows = self.session.allocator.grows
            highest = (2 if grows else 1) * max(self.start.after.values(), default=0)
            self.board = Board(self.folder, self.start, highest, len(self.history.steps))

    def _close(self, pictures: bool) -> None:
        if self.folder is not None and self.record is not None:
            self.record.close()
            drawn = self._pictures(self.folder) if pictures else {}
            with _named(self.folder):
                self.board.close(self.history, self.settings, drawn)

    def _pictures(self, folder: Path) -> dict[str, Figure]:
        from lorafamily.insight.pictures import draw, pictures_of

        drawn = pictures_of([self.start, *self.history.decisions], self.history.steps)
        draw(folder, drawn)
        return drawn


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    """TensorBoard writes in a thread, whose errors come out later and name no file."""
    try:
        yield
    except OSError as error:
        raise FileError(f"{folder}: cannot write TensorBoard's events ({error})") from error
