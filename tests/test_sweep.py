"""Cells side by side: the rows of one after another, none twice, none lost, whatever dies or is asked to stop."""

from __future__ import annotations

import functools
import os
import signal
import threading

import pytest
import torch

import compare
from cells import sweep
from cells.settings import Compare, where_of
from cells.sweep import Where
from jobs import always_dying, doubling
from lorafamily.training.interrupt import Interrupted
from tasks import TaskError


def test_a_worker_that_is_killed_costs_no_row(tmp_path):
    found = list(sweep.rows(range(6), functools.partial(doubling, tmp_path), Where(workers=2)))
    assert sorted(job for job, _ in found) == list(range(6))
    assert all(row == {"twice": 2 * job, "threads": 1} for job, row in found)
    assert (tmp_path / "died").exists()


def test_jobs_that_follow_from_rows_are_run_too(tmp_path):
    waiting = [[10], [11], []]
    found = list(sweep.rows([1], functools.partial(doubling, tmp_path), Where(workers=1), lambda: waiting.pop(0)))
    assert [job for job, _ in found] == [1, 10, 11]


def test_what_a_job_raises_ends_the_sweep(tmp_path):
    with pytest.raises(ValueError, match="-1 is negative"):
        list(sweep.rows([-1], functools.partial(doubling, tmp_path), Where(workers=2)))


def test_a_job_that_kills_every_worker_is_named(monkeypatch):
    monkeypatch.setattr(sweep, "TRIES", 1)
    with pytest.raises(TaskError, match="7: 1 workers died on it"):
        list(sweep.rows([7], always_dying, Where(workers=2)))


def test_sigterm_stops_a_sweep_and_says_what_is_left(tmp_path):
    found = sweep.rows([1, 2, 4], functools.partial(doubling, tmp_path), Where(workers=2))
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"stopped with [123] cells to go") as stopped:
        list(found)
    assert stopped.value.code == 75
    assert signal.getsignal(signal.SIGTERM) is before


def test_rows_of_two_workers_are_those_of_one_to_the_bit(tmp_path):
    import json

    settings = {
        **{"steps": 6, "evaluations": 2, "batch": 4, "held_out": 8, "lr": ("2e-3",), "seeds": 1},
        **{"methods": ("lora", "adalora"), "budgets": ("10e3",), "progress": False, "pictures": False},
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for workers in (1, 2):
            compare.main(Compare(out=tmp_path / str(workers), workers=workers, **settings))
    finally:
        torch.set_num_threads(threads)
    found = []
    for workers in (1, 2):
        text = (tmp_path / str(workers) / "embedded" / "results.jsonl").read_text()
        rows = {row["key"]: row for row in map(json.loads, text.splitlines())}
        for row in rows.values():
            del row["seconds_per_step"], row["peak_mib"]
        assert len(text.splitlines()) == len(rows) == 2
        found.append(rows)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("settings", "device", "message"),
    [
        ({"workers": 0}, "cpu", "must be at least 1"),
        ({"workers": 2, "cluster": "auto"}, "cpu", "not both"),
        ({"gpus_per_cell": 0.5}, "cuda", "--gpus-per-cell is for --cluster"),
        ({"gpus_per_cell": 0.5, "cluster": "auto"}, "cpu", "need --device cuda"),
        ({"cluster": "auto"}, "cuda", "need --device cuda"),
        ({"cpus_per_cell": 2, "workers": 1}, "cpu", "--cpus-per-cell is for several workers"),
    ],
)
def test_settings_without_effect_are_refused(settings, device, message):
    with pytest.raises(TaskError, match=message):
        where_of(Compare(**settings), device)


def test_cells_run_on_all_cores_by_default_on_a_cpu_and_alone_on_a_gpu(monkeypatch):
    monkeypatch.setattr("cells.settings.cores", lambda: 8)
    assert where_of(Compare(), "cpu") == Where(workers=8)
    assert where_of(Compare(cpus_per_cell=4), "cpu") == Where(workers=2, cpus=4)
    assert where_of(Compare(), "cuda") == Where(workers=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert where_of(Compare(), "cpu") == Where(workers=1)
    with pytest.raises(TaskError, match="under torchrun the processes share every cell"):
        where_of(Compare(workers=2), "cpu")
