"""SIGTERM and SIGINT (Ctrl-C): at the first signal a run finishes its step and saves; a second ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import ExitStack
from types import FrameType

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


class StopSignals(ExitStack):
    """Catches both signals until the end of a `with` block. It does nothing outside the main thread, where Python
    delivers none."""

    def __init__(self, active: bool):
        super().__init__()
        self.received: signal.Signals | None = None
        if active and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.callback(signal.signal, number, signal.signal(number, self._handle))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:  # safe: a file has another name until it is complete
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = signal.Signals(number)
