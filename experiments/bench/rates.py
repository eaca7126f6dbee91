"""Whether `lorafamily.suggest_lr` finds a method's best learning rate: suggested rates against a grid of tried ones.

    python experiments/bench/rates.py                                             # embedded model
    python experiments/bench/rates.py --model PATH --task sst2 --data DIR --batch 32 --length 96

For every method it tries rates a quarter of a decade apart, as the studies do: three around a start, then outwards
until the best lies inside. A new head has one rate under all methods. Each finished run is a line of `runs/NAME.csv`
and is not run again; `--table` prints the table of what is there.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that rooms find each other

import waiting  # noqa: F401 - before torch

# isort: split
import csv
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import tyro

import lorafamily
from pages.report import as_text
from studies.protocol import to_try
from tasks import Task, TaskOptions, refusals_in_one_line

REFERENCE = "lora@8"
"""The method whose best rate the suggestions start from."""
METHODS = ("lora@1", "lora@8", "lora@64", "olora@8", "lora2@8", "adalora@8", "eva@8")
FIELDS = ("method", "what", "lr", "metric", "seconds", "note")
DIVERGED = "diverged"


@dataclass(frozen=True)
class Settings(TaskOptions):
    """Compare suggested rates with the best of a grid."""

    methods: tuple[str, ...] = METHODS
    """METHOD@RANK"""
    start: int = -8
    """the first rate tried, in quarters of a decade: -8 is 10⁻²"""
    head_lr: float = 1e-2
    """learning rate of a new head, under every method"""
    run_steps: int = 600
    """steps of a whole run, of which the table shows a suggestion's time as a share"""
    steps: int = 100
    """training steps of each run here"""
    batch: int = 16
    """sequences per step"""
    length: int = 128
    """tokens per sequence at most"""
    held_out: int | None = 200
    """validation examples at most; none: all"""
    seed: int = 100
    """seed of all runs"""
    name: str = "rates-embedded"
    """name of the file of rows, in runs/"""
    table: bool = False
    """print the table of the rows that are there, and run nothing"""


def main(settings: Settings) -> None:
    path = Path("runs") / f"{settings.name}.csv"
    rows = _rows(path)
    if not settings.table:
        path.parent.mkdir(exist_ok=True)
        task = settings.find_task(settings.held_out)
        for row in _missing(settings, task, rows):
            with open(path, "a", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                if not file.tell():
                    writer.writeheader()
                writer.writerow(row)
            rows.append({name: str(value) for name, value in row.items()})
            print(row, flush=True)
        higher = task.higher_is_better
    else:
        higher = settings.task not in ("code", "text")
    print(table(rows, higher, settings))


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _missing(settings: Settings, task: Task, rows: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """Rows that are missing: runs of each method in turn, then suggestions. The caller adds each to `rows`."""
    while missing := [(m, q) for m in settings.methods for q in to_try(settings.start, _tried(rows, m, task))]:
        for method, quarter in missing:
            yield _run(method, 10 ** (quarter / 4), settings, task)
    tried = _tried(rows, REFERENCE, task)
    good = 10 ** (min(tried, key=lambda quarter: tried[quarter]) / 4)
    for method in settings.methods:
        if not any((row["method"], row["what"]) == (method, "suggested") for row in rows):
            yield _suggested(method, good, settings, task)


def _tried(rows: list[dict[str, str]], method: str, task: Task) -> dict[int, float]:
    """The metric by quarter decade, signed so that lower is better; infinite if a run diverged."""
    sign = -1 if task.higher_is_better else 1
    return {
        round(4 * math.log10(float(row["lr"]))): math.inf if row["metric"] == DIVERGED else sign * float(row["metric"])
        for row in rows
        if row["method"] == method and row["what"] == "run"
    }


def _adapted(method: str, settings: Settings, task: Task) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model, and the rate of its head as `train` takes it."""
    name, _, rank = method.partition("@")
    model, head = task.model(settings.seed)
    looks = lorafamily.methods()[name].looks_at_data
    data = task.training(settings.seed) if looks else None
    given: dict[str, Any] = {"evidence_batches": 4} if looks else {}
    lorafamily.apply(model, name, rank=int(rank), also_train=head, seed=settings.seed, data=data, **given)
    return model, {} if head is None else {"head_lr": settings.head_lr}


def _suggested(method: str, good: float, settings: Settings, task: Task) -> dict[str, Any]:
    model, _ = _adapted(method, settings, task)
    found = lorafamily.suggest_lr(model, reference_lr=good, seed=settings.seed)
    return _row(method, "suggested", found.lr, "", found.seconds, str(found))


def _run(method: str, lr: float, settings: Settings, task: Task) -> dict[str, Any]:
    model, head = _adapted(method, settings, task)
    begun = time.perf_counter()
    try:
        history = lorafamily.train(
            model,
            task.training(settings.seed),
            steps=settings.steps,
            lr=lr,
            **head,
            validation=task.validation(),
            evaluate=task.evaluate,
            seed=settings.seed,
            progress=False,
        )
    except lorafamily.NonFiniteError:
        return _row(method, "run", lr, DIVERGED, time.perf_counter() - begun, "")
    return _row(method, "run", lr, f"{history.metrics[task.metric]:.5f}", time.perf_counter() - begun, "")


def _row(method: str, what: str, lr: float, metric: str, seconds: float, note: str) -> dict[str, Any]:
    values = (method, what, f"{lr:.6g}", metric, f"{seconds:.2f}", note)
    return dict(zip(FIELDS, values, strict=True))


def table(rows: list[dict[str, str]], higher_is_better: bool, settings: Settings) -> str:
    """Per method the best rate tried, the suggested one, and their ratio."""
    sign = 1 if higher_is_better else -1
    best: dict[str, tuple[float, float]] = {}
    seconds: dict[str, float] = {}
    for row in rows:
        if row["what"] == "run" and row["metric"] != DIVERGED:
            best[row["method"]] = max(
                best.get(row["method"], (-float("inf"), 0.0)), (sign * float(row["metric"]), float(row["lr"]))
            )
            seconds[row["method"]] = float(row["seconds"])
    share = f"time, of {settings.run_steps} steps"
    lines = [["method", "rates tried", "best rate", "its metric", "suggested", "suggested / best", share]]
    for row in rows:
        method = row["method"]
        if row["what"] != "suggested" or method not in best:
            continue
        metric, lr = best[method]
        suggested = float(row["lr"])
        tried = sum(other["method"] == method and other["what"] == "run" for other in rows)
        part = float(row["seconds"]) / seconds[method] * settings.steps / settings.run_steps
        cells = [f"{lr:.2g}", f"{sign * metric:.4f}", f"{suggested:.2g}", f"{suggested / lr:.2g}", f"{part:.1%}"]
        lines.append([method, str(tried), *cells])
    return as_text(lines)


if __name__ == "__main__":
    with refusals_in_one_line():
        main(tyro.cli(Settings))
