"""Everything that a run writes into its folder except checkpoints: record, TensorBoard's events, pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafamily.errors import FileError, LoraFamilyError
from lorafamily.history import Decision, Evaluation, History, Step
from lorafamily.insight.record import Record, recorded, set_aside
from lorafamily.training.interrupt import Interrupted
from lorafamily.training.session import Session

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Log(contextlib.AbstractContextManager["Log"]):
    """The log of one run in a `with` block, continued from its history; writes nothing without a folder.

    It begins with the first step, because the first batch may show that some adapters have no effect. The record of an
    earlier run, whose checkpoints are missing, is moved aside. At the end of the block `pictures` are drawn, unless a
    signal ended the run: whoever asks a process to stop does not wait for long.
    """

    def __init__(
        self, folder: Path | None, history: History, session: Session, settings: Mapping[str, Any], pictures: bool
    ):
        self.folder, self.history, self.session, self.settings = folder, history, session, settings
        self.pictures = pictures
        self.record: Record | None = None

    def step(self, step: Step, decision: Decision | None) -> None:
        """Write a step, which must not be in the history yet."""
        self._begin()
        if self.folder is not None and self.record is not None:
            self.record.step(step)
            if decision is not None:
                self.record.decision(decision)
            with _naming(self.folder):
                self.board.step(step, decision)

    def evaluation(self, evaluation: Evaluation) -> None:
        if self.folder is not None:
            with _naming(self.folder):
                self.board.evaluation(evaluation)

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        interrupted = error is not None and issubclass(error, Interrupted)
        # After an error of the run, one that occurs here must not hide it.
        with contextlib.suppress(*(() if error is None or interrupted else (OSError, LoraFamilyError))):
            if self.folder is not None and self.record is not None:
                self.record.close()
                drawn = self._drawn(self.folder) if self.pictures and not interrupted else {}
                with _naming(self.folder):
                    self.board.close(self.history, self.settings, drawn)

    def _begin(self) -> None:
        if self.folder is not None and self.record is None:
            from lorafamily.training.board import Board  # imports matplotlib, which takes long

            if not self.history.steps and recorded(self.folder):
                set_aside(self.folder)
            self.start = Decision(0, {}, dict(self.session.start), "start")
            self.record = Record(self.folder, [self.start, *self.history.decisions], self.history.steps)
            grows = self.session.allocator.grows
            highest = (2 if grows else 1) * max(self.start.after.values(), default=0)
            self.board = Board(self.folder, self.start, highest, len(self.history.steps), self.pictures)

    def _drawn(self, folder: Path) -> dict[str, Figure]:
        from lorafamily.insight.pictures import draw, pictures_of

        drawn = pictures_of([self.start, *self.history.decisions], self.history.steps)
        draw(folder, drawn)
        return drawn


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Name the folder in errors of TensorBoard: it writes in a thread, whose errors come later and name no file."""
    try:
        yield
    except OSError as error:
        raise FileError(f"{folder}: cannot write TensorBoard's events ({error})") from error
