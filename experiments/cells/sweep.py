"""Run many cells at once, in processes of this machine or on the nodes of a Ray cluster.

A job goes to a worker and comes back as a row; only the driver, which iterates over `rows`, writes results. If a worker
dies, its job goes to another one and continues from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from lorafamily import StateError
from lorafamily.training.folder_lock import FolderLock
from lorafamily.training.interrupt import EXIT_CODE, Interrupted
from tasks import TaskError

TRIES = 20
"""How many workers a job may lose before the sweep ends: a job that needs too much memory kills every worker."""
PATIENCE = 60.0
"""Seconds that a job waits for another process to leave its folder: processes of a dead node take a while to end."""

Job = Any
Row = dict[str, Any]
Prepare = Callable[[], Callable[[Job], Row]]
"""Called once in every worker, for instance to load data; returns the function from jobs to rows. Must be picklable."""


@dataclass(frozen=True)
class Where:
    """Where jobs run. `workers`: processes on this machine; 1: this process itself. `cluster`: address of a Ray cluster
    to use instead. `cpus`: threads of a job when several run at once; `gpus`: GPUs of a job on the cluster, a fraction
    of one is shared."""

    workers: int = 1
    cluster: str | None = None
    cpus: int = 1
    gpus: float = 0.0

    @property
    def beside_others(self) -> bool:
        return self.workers > 1 or self.cluster is not None


def cores() -> int:
    """How many cores this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


More = Callable[[], Sequence[Job]]
"""Called after every row; returns the jobs that follow from it."""


def none() -> Sequence[Job]:
    """No jobs follow."""
    return ()


def rows(jobs: Sequence[Job], prepare: Prepare, where: Where, more: More = none) -> Generator[tuple[Job, Row]]:
    """Every job with its row, in the order in which they finish. Jobs are hashable.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; running jobs have saved, or will continue from an earlier checkpoint.
        TaskError: a job lost too many workers, or the cluster cannot be used.
    """
    if not jobs:
        return
    if not where.beside_others:
        run, waiting = prepare(), list(jobs)
        while waiting:
            job = waiting.pop(0)
            yield job, run(job)
            waiting += more()
    elif where.cluster is not None:
        yield from _on_cluster(jobs, prepare, where, more)
    else:
        yield from _on_workers(jobs, prepare, where, more)


def wait_until_free(folder: Path) -> None:
    """Wait until no other process trains in the folder.

    Raises:
        StateError: one still does after a minute.
    """
    begun = time.monotonic()
    while True:
        try:
            with FolderLock(folder):
                return
        except StateError:
            if time.monotonic() - begun > PATIENCE:
                raise
            time.sleep(0.2)


class _Worker:
    """A process in a pool of its own, so that its death breaks no other worker's pool."""

    def __init__(self, prepare: Prepare, threads: int):
        context = multiprocessing.get_context("spawn")
        receiver, self._stop = context.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(1, context, _begin, (threads, receiver))
        self._prepare = pickle.dumps(prepare)

    def submit(self, job: Job) -> Future[Row | None]:
        with _ctrl_c_held_back():  # the process starts here and inherits the blocked signals
            return self._pool.submit(_work, self._prepare, job)

    def stop(self) -> None:
        """Ask the job to save and to end."""
        with contextlib.suppress(OSError):
            self._stop.send(None)

    def end(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _on_workers(jobs: Sequence[Job], prepare: Prepare, where: Where, more: More) -> Generator[tuple[Job, Row]]:
    waiting, lost = list(jobs), Counter[Job]()
    wanted = where.workers if more is not none else min(where.workers, len(jobs))
    workers = [_Worker(prepare, where.cpus) for _ in range(wanted)]  # a process starts with its first job
    under_way: dict[Future[Row | None], tuple[_Worker, Job]] = {}
    try:
        with _sigterm_is_ctrl_c():
            idle = list(workers)
            while waiting or under_way:
                while waiting and idle:
                    worker, job = idle.pop(), waiting.pop(0)
                    under_way[worker.submit(job)] = worker, job
                done, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in done:
                    worker, job = under_way.pop(future)
                    try:
                        row = future.result()
                    except BrokenProcessPool:
                        row = None
                    if row is None:
                        lost[job] += 1
                        if lost[job] > TRIES:
                            raise TaskError(
                                f"{job}: {TRIES} workers died on it; take fewer --workers if memory is short"
                            ) from None
                        worker.end()
                        workers.remove(worker)
                        worker = _Worker(prepare, where.cpus)
                        workers.append(worker)
                        waiting.insert(0, job)
                    idle.append(worker)
                    if row is not None:
                        yield job, row
                        waiting += more()
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped with {len(waiting) + len(under_way)} cells to go; the same command goes on"
        ) from None
    finally:
        for worker, _ in under_way.values():
            worker.stop()
        for worker in workers:
            worker.end()


_prepared: dict[bytes, Callable[[Job], Row]] = {}
"""In a worker: the functions from jobs to rows, by the pickled `Prepare` that made them."""


def _begin(threads: int, stop: connection.Connection) -> None:
    """In a new worker process: set its threads, and watch the driver."""
    torch.set_num_threads(threads)
    threading.Thread(target=_watch, args=(stop,), daemon=True).start()


def _watch(stop: connection.Connection) -> None:
    """End with the driver: at once if it was killed, after saving if it asks to stop."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    if parent.sentinel in connection.wait([parent.sentinel, stop]):
        os._exit(EXIT_CODE)
    os.kill(os.getpid(), signal.SIGTERM)  # training catches it and saves; elsewhere there is nothing to save


def _work(prepare: bytes, job: Job) -> Row | None:
    """In a worker: run a job; None if it was asked to stop."""
    try:
        if prepare not in _prepared:
            _prepared[prepare] = pickle.loads(prepare)()
        return _prepared[prepare](job)
    except Interrupted:
        return None


@contextlib.contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Processes started meanwhile do not receive Ctrl-C, which a terminal sends to all; the driver tells them to
    stop."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _sigterm_is_ctrl_c() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _on_cluster(jobs: Sequence[Job], prepare: Prepare, where: Where, more: More) -> Generator[tuple[Job, Row]]:
    """Jobs as tasks of Ray, which restarts a task when its worker or node dies, on another node if necessary."""
    try:
        import ray
    except ImportError:
        raise TaskError("--cluster needs Ray: pip install 'lorafamily[sweep]'") from None
    started = not ray.is_initialized()
    if started:
        passed_on = {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}}
        try:
            ray.init(
                address=where.cluster,
                log_to_driver=False,
                include_dashboard=False,
                runtime_env=passed_on,
                logging_level="error",
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise TaskError(f"--cluster {where.cluster}: {error}") from None
    task = ray.remote(num_cpus=where.cpus, num_gpus=where.gpus, max_retries=TRIES)(_work_on_cluster)
    pickled = ray.put(pickle.dumps(prepare))
    under_way = {}
    try:
        with _sigterm_is_ctrl_c():
            under_way = {task.remote(pickled, where.cpus, job): job for job in jobs}
            while under_way:
                done, _ = ray.wait(list(under_way), num_returns=1)
                for future in done:
                    try:
                        row = ray.get(future)
                    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as error:
                        raise TaskError(f"{under_way[future]}: {TRIES} workers died on it ({error})") from None
                    yield under_way.pop(future), row
                    under_way |= {task.remote(pickled, where.cpus, job): job for job in more()}
    except KeyboardInterrupt:
        raise Interrupted(f"stopped with {len(under_way)} cells to go; the same command goes on") from None
    finally:
        for future in under_way:
            ray.cancel(future, force=False)  # like Ctrl-C in the worker, so that training saves
        if under_way:
            ray.wait(list(under_way), num_returns=len(under_way), timeout=PATIENCE)
        if started:
            ray.shutdown()


def _work_on_cluster(prepare: bytes, threads: int, job: Job) -> Row | None:
    """In a worker process of Ray."""
    torch.set_num_threads(threads)
    return _work(prepare, job)


class Line:
    """A line of progress for all jobs: overwritten in a terminal, a new line for each job elsewhere."""

    def __init__(self, total: int, quiet: bool = False):
        self.total, self.quiet = total, quiet
        self.done, self.begun = 0, time.perf_counter()

    def show(self, what: str) -> None:
        """Count a finished job, which `what` describes."""
        self.done += 1
        if self.quiet:
            return
        seconds = (time.perf_counter() - self.begun) / self.done
        left = seconds * (self.total - self.done) / 60
        text = f"[{self.done}/{self.total}] {seconds:.1f} s a cell, about {left:.0f} min left; {what}"
        terminal = sys.stdout.isatty()
        end = "\r" if terminal and self.done < self.total else "\n"
        print(f"{text:<110}" if terminal else text, end=end, flush=True)
