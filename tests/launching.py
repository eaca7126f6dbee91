"""Programs of one or several processes, as `torchrun` starts them, by fork: what is imported already need not be again.

A fresh process imports torch and transformers for some seconds, and `torchrun` is one more. What `torchrun` itself does
when a process dies is tested with it, in test_processes.py.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist


class Launched:
    """Forked processes that execute one program; `returncode` is the first that is not zero."""

    def __init__(self, program: str, arguments: list[str], folder: Path, processes: int = 1):
        folder.mkdir(exist_ok=True)
        self.errors = [folder / f"stderr-{rank}" for rank in range(processes)]
        self.outputs = [folder / f"stdout-{rank}" for rank in range(processes)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        here = multiprocessing.get_context("fork")
        self.processes = []
        for rank in range(processes):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
            given = (program, arguments, environment if processes > 1 else {}, self.outputs[rank], self.errors[rank])
            self.processes.append(here.Process(target=_execute, args=given))
        for process in self.processes:
            process.start()

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for all; what they wrote to stdout and to stderr. Those that are not done in time are killed."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0.1))
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        self.returncode = next((p.exitcode for p in self.processes if p.exitcode), 0)
        return tuple("".join(path.read_text() for path in paths) for paths in (self.outputs, self.errors))

    def done(self, timeout: float = 300) -> str:
        """What they wrote to stdout, once all have ended well."""
        output, error = self.communicate(timeout)
        assert self.returncode == 0, error[-3000:]
        return output


def _execute(program: str, arguments: list[str], environment: Mapping[str, int], output: Path, error: Path) -> None:
    for path, stream in ((output, 1), (error, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    warnings.resetwarnings()  # those of the tests make errors of them
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in environment.items()}
    sys.argv = ["program.py", *arguments]
    code = 0
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
    except SystemExit as stopped:  # a run that a signal stopped says so and has a code of its own
        code = stopped.code if isinstance(stopped.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    if dist.is_initialized() and not code:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
