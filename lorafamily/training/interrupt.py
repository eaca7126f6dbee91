"""SIGTERM and SIGINT (Ctrl-C): the first signal lets a run finish its step and save, a second ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

EXIT_CODE = 75
"""Exit code of a process whose run was interrupted and saved: "temporary failure; try again" in sysexits."""


class Interrupted(SystemExit):
    """Raised by `train` when a signal asked it to stop and it has saved; ends the process with `EXIT_CODE`."""

    def __init__(self, message: str):
        super().__init__(EXIT_CODE)
        self.message = message
        print(f"lorafamily: {message}", file=sys.stderr, flush=True)  # SystemExit prints nothing

    def __str__(self) -> str:
        return self.message


class StopSignals:
    """Catches the two signals in a `with` block; does nothing outside the main thread, where Python delivers none."""

    def __init__(self, active: bool):
        self.active = active and threading.current_thread() is threading.main_thread()
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if self.active:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:  # a file being written has another name until it is complete
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = signal.Signals(number)
