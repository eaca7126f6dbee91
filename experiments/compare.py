"""Compare methods at equal parameter budgets, under one training loop: the main command.

    python experiments/compare.py                       # embedded model and data, nothing to download
    python experiments/compare.py --preset which-weights --quick
    python experiments/compare.py --model PATH --task sst2 --data DIR --batch 32 --length 96 --budgets 0.17e6
    python experiments/compare.py --help

It runs a grid of cells: method @ size on targets × learning rate × seed. Each finished cell is a line of
`runs/NAME/results.jsonl` and is not run again; an interrupted cell continues from its last checkpoint. At the end
`runs/NAME/` has `report.html`, `report.md`, plots and the logs for `tensorboard --logdir runs`. On a CPU as many cells
run side by side as there are cores, one thread each (`--workers`, `--cluster`; docs/sweeps.md). `torchrun
--nproc-per-node 2 experiments/compare.py` uses two processes for every cell.
"""

from __future__ import annotations

import waiting  # noqa: F401 - before torch

# isort: split
import contextlib
import dataclasses
import functools
import json
import platform
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import embedded
import lorafamily
import presets
from cells import sweep
from cells.cell import FIRST, FULL, NONE, Cell, Training, Work, adapt, forget_checkpoints, run
from cells.settings import (
    AUTO,
    Compare,
    best_rates,
    cells_of,
    departures,
    suggested,
    training_of,
    what_rows_depend_on,
    where_of,
)
from cells.sweep import Line, Where
from lorafamily.allocation.run import Run
from lorafamily.layers.placement import placement_of
from lorafamily.registry import find as find_method
from lorafamily.training.folder_lock import FolderLock
from pages import report
from tasks import Task, TaskError, find, refusals_in_one_line


def main(settings: Compare) -> None:
    if settings.task == "code" or (settings.task == "text" and settings.model is None):
        _ensure_weights()
    arguments = {name: getattr(settings, name) for name in ("task", "model", "data", "batch", "length", "held_out")}
    task = find(**arguments)
    training = training_of(settings, task.rows)
    where = where_of(settings, training.device)
    folder = settings.folder.absolute()  # workers of a cluster may run in another folder
    tuning = [] if settings.tuning_seed is None else cells_of(settings, [settings.tuning_seed])
    cells = cells_of(settings, settings.run_seeds)
    _check(cells, task, training)
    if AUTO in settings.lr:
        suggest = functools.partial(_suggest, task, training)
        cells = cells_of(settings, settings.run_seeds, suggested(settings, cells, suggest))
    same = what_rows_depend_on(settings, training)
    work = Work(arguments, training, folder / "cells")
    begun = time.perf_counter()
    with FolderLock(folder if FIRST else None):
        rows = _finished(folder / "results.jsonl", same)
        _say(f"{task.about}\n")
        if tuning:
            _work(tuning, "cells that try learning rates", task, work, where, settings, rows, same)
            best = best_rates(list(rows.values()), tuning, task.higher_is_better)
            cells = cells_of(settings, settings.run_seeds, best)
        _work(cells, "cells", task, work, where, settings, rows, same)
    if not FIRST:
        return

    text = report.write(
        folder,
        [rows[cell.key] for cell in cells],
        metric=task.metric,
        higher_is_better=task.higher_is_better,
        about=task.about + departures(settings),
        facts=_facts(settings, training, where),
        tried=[rows[cell.key] for cell in tuning],
        marks=presets.find(settings.preset).published,
    )
    print(f"\n{text}\n\n{time.perf_counter() - begun:.0f} s; {folder} has report.html, report.md and plots; logs:")
    print(f"tensorboard --logdir {settings.out}")


def _work(
    cells: Sequence[Cell],
    what: str,
    task: Task,
    work: Work,
    where: Where,
    settings: Compare,
    rows: dict[str, dict[str, Any]],
    same: dict[str, Any],
) -> None:
    """Run the cells that have no row yet, and add their rows."""
    missing = [cell for cell in cells if cell.key not in rows]
    _say(f"{len(cells)} {what} on {work.training.device}, {len(cells) - len(missing)} of them done")
    if missing and not where.cluster:
        _say(f"about {minutes(missing, task, work.training, where):.0f} min of training steps, plus evaluations\n")
    found = _one_after_another(missing, task, work, settings.progress)
    line = Line(len(missing), quiet=not (where.beside_others and FIRST))
    if where.beside_others:
        found = sweep.rows(missing, work, where)
    with contextlib.closing(found):
        for cell, row in found:
            rows[cell.key] = row | {"settings": same}
            if FIRST:
                with open(settings.folder / "results.jsonl", "a") as file:
                    file.write(json.dumps(rows[cell.key]) + "\n")
                forget_checkpoints(work.folder / cell.key)
            said = f"failed: {row['failed']}" if row["failed"] else f"{task.metric}: {row['metric']:.4f}"
            line.show(f"{cell.key}, {said}")
            if not where.beside_others:
                _say(f"    {said}")


def minutes(cells: Sequence[Cell], task: Task, training: Training, where: Where) -> float:
    """An estimate for the training steps of the cells, from a few steps of plain LoRA, or of the model if none
    adapts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(where.cpus if where.beside_others else threads)
    model, head = task.model(seed=0)
    model.to(training.device)
    adapted = [cell for cell in cells if cell.size is not None]
    if adapted:
        adapt(model, head, dataclasses.replace(adapted[0], method="lora"), training)
    options: dict[str, Any] = {"lr": 1e-5, "seed": 0, "progress": False, "check_gradients": False}
    step = min(lorafamily.train(model, task.training(0), steps=3, **options).seconds / 3 for _ in range(2))
    torch.set_num_threads(threads)
    steps = training.steps * sum(cell.method != NONE for cell in cells)
    return steps * step / 60 / (where.workers if where.beside_others else 1)


def _one_after_another(
    cells: Sequence[Cell], task: Task, work: Work, progress: bool
) -> Generator[tuple[Cell, dict[str, Any]]]:
    """Run cells in this process with all its threads; under torchrun all processes share each cell."""
    begun = time.perf_counter()
    for number, cell in enumerate(cells, 1):
        left = (time.perf_counter() - begun) / max(1, number - 1) * (len(cells) - number + 1) / 60
        _say(f"[{number}/{len(cells)}] {cell.key}" + (f", about {left:.0f} min left" if number > 3 else ""))
        yield cell, run(cell, task, work.training, work.folder / cell.key, progress)


def _say(text: str) -> None:
    if FIRST:
        print(text, flush=True)


def _check(cells: list[Cell], task: Task, training: Training) -> None:
    """Apply every method at every budget once, so that errors show before hours of training."""
    model, head = task.model(seed=0)
    seen: set[Any] = set()
    for cell in cells:
        if cell.method in (NONE, FULL) or (cell.method, cell.size, cell.targets) in seen:
            continue
        seen.add((cell.method, cell.size, cell.targets))
        adapt(model.to("meta"), head, cell, training)
        placement = placement_of(model)
        trial = Run(
            model,
            placement.adapters,
            training.steps,
            placement.sizing.budget,
            validation_loss=lambda rows: torch.zeros(()),
            task_gradient=lambda parameter: parameter.grad,
        )
        placement.method.allocation.begin(trial)
        lorafamily.remove(model)


def _suggest(task: Task, training: Training, cell: Cell, reference: float) -> float:
    """The learning rate that `lorafamily.suggest_lr` derives from plain LoRA's for a cell."""
    model, head = task.model(seed=0)
    adapt(model, head, dataclasses.replace(cell, seed=0), training, task.training(0))
    suggestion = lorafamily.suggest_lr(model, reference_lr=reference)
    _say(f"{cell.method} at {cell.size}: {suggestion}")
    return suggestion.lr


def _finished(path: Path, same: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of earlier calls by key.

    Raises:
        TaskError: some were made with other settings, so that they cannot be compared.
    """
    if not path.exists():
        return {}
    rows = {}
    text = path.read_text()
    if text and not text.endswith("\n"):  # a run was killed while it wrote this line; its cell runs again
        text = text[: text.rfind("\n") + 1]
        if FIRST:
            path.write_text(text)
    for line in text.splitlines():
        row = json.loads(line)
        differing = [f"{k} {row['settings'].get(k)} → {same[k]}" for k in same if row["settings"].get(k) != same[k]]
        if differing:
            raise TaskError(
                f"{path} has cells made with other settings ({'; '.join(differing)}); give another --name, or delete it"
            )
        rows[row["key"]] = row
    return rows


def _facts(settings: Compare, training: Training, where: Where) -> dict[str, str]:
    facts = {"command": "python experiments/compare.py " + " ".join(sys.argv[1:])}
    facts |= {field.name: str(getattr(settings, field.name)) for field in dataclasses.fields(settings)}
    facts["device"] = training.device
    facts["seeds"] = ", ".join(str(settings.first_seed + i) for i in range(settings.seeds))
    facts["versions"] = ", ".join(f"{name} {version(name)}" for name in ("lorafamily", "torch", "numpy"))
    facts["python"] = platform.python_version()
    threads = f"{where.cpus} threads a cell" if where.beside_others else f"{torch.get_num_threads()} threads"
    facts["machine"] = f"{platform.machine()}, {threads}"
    facts["workers"] = "those of the cluster" if where.cluster else str(where.workers)
    if training.device == "cuda":
        facts["machine"] += f", {torch.cuda.get_device_name()}"
    for method in settings.methods:
        if method not in (NONE, FULL):
            facts[f"options of {method}"] = json.dumps(
                find_method(method.partition(":")[0]).with_options(**training.options_of(method)).options()
            )
    return facts


def _ensure_weights() -> None:
    if not embedded.WEIGHTS.exists():
        print(f"{embedded.WEIGHTS} is missing; pretraining the model first, about 20 minutes on two cores", flush=True)
        subprocess.run([sys.executable, str(Path(__file__).parent / "embedded" / "pretrain.py")], check=True)


if __name__ == "__main__":
    with refusals_in_one_line():
        main(presets.chosen(sys.argv[1:]))
