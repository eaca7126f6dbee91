"""SIGTERM and SIGINT (Ctrl-C): at the first signal a run finishes its step and saves; a second ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

EXIT_CODE = 75
"""Exit code of a process whose run was interrupted and saved; in sysexits.h a temporary failure, to try again."""


class Interrupted(SystemExit):
    """Raised by `train` when a signal asked it to stop and it has saved; ends the process with `EXIT_CODE`."""

    def __init__(self, message: str):
        super().__init__(EXIT_CODE)
        self.message = message
        print(f"lorafamily: {message}", file=sys.stderr, flush=True)  # SystemExit prints nothing

    def __str__(self) -> str:
        return self.message


class StopSignals:
    """Catches both signals in a `with` block. It does nothing outside the main thread, where Python delivers none."""

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
        if self.received is not None:  # safe: a file has another name until it is complete
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = signal.Signals(number)
