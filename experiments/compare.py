"""The main job: methods of the family against each other at equal parameter budgets, under one loop.

    python experiments/compare.py                       # embedded model and data, nothing to download
    python experiments/compare.py --model PATH --task sst2 --data DIR --batch 32 --length 96 --budgets 0.17e6
    python experiments/compare.py --help

A grid of cells, method @ budget × learning rate × seed. Each finished cell is a line of `runs/NAME/results.jsonl` and
is not run again, and one that was interrupted goes on from its last checkpoint; at the end `runs/NAME/` has
`report.md`, plots and, for `tensorboard --logdir runs`, the logs. `torchrun --nproc-per-node 2 experiments/compare.py`
takes two processes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import tyro

import embedded
import lorafamily
import report
from cell import FIRST, FULL, NONE, Cell, Training, adapt, forget_checkpoints, run
from lorafamily.allocation.run import Run
from lorafamily.placement import placement_of
from lorafamily.registry import find as find_method
from tasks import Task, TaskError, find

TRADED_OFF = ("alora.scores=first-order",)
"""Exact AB-LoRA takes two forwards a rank and round, minutes a cell here; its first-order estimate two backwards."""

TUNED = ("1e-2", "full=2e-3", "olora=1e-3", "lora2=2e-2", "adalora=2e-2")
"""For the embedded setting: each method's best of four on another seed, docs/results.md has the numbers."""
CHOSEN = " The learning rates are each method's best of four, tried beforehand with another seed (docs/results.md)."


@dataclass(frozen=True)
class Compare:
    """Compare low-rank methods at equal parameter budgets."""

    name: str = "embedded"
    """folder under --out; the same name again goes on with the cells that are missing"""
    task: str = "code"
    """code (embedded model, Python source), text (--data FILE), or a GLUE task: sst2, rte, cola, mrpc, stsb, qnli, …"""
    model: str | None = None
    """folder or hub id of a transformers model; none for the embedded one"""
    data: Path | None = None
    """GLUE: folder of <task>/{train,validation}.jsonl.gz, none to take it from the hub; text: a file"""
    methods: tuple[str, ...] = (NONE, FULL, "lora", "olora", "alora", "lora2", "adalora")
    """any of lorafamily.methods(), joined by + to combine; none: no adaptation (a task head still trains); full: all"""
    budgets: tuple[float, ...] = (80e3, 10e3)
    """trainable adapter numbers, each exceeded at no step; on the embedded model 80e3 is LoRA at rank 8, 10e3 rank 1"""
    seeds: int = 2
    """runs of every cell"""
    first_seed: int = 0
    """the seeds are this one and those after it"""
    steps: int = 150
    """optimiser steps"""
    batch: int = 16
    """sequences per step"""
    length: int = 128
    """tokens per sequence at most (the embedded model takes 128 bytes always)"""
    lr: tuple[str, ...] = TUNED
    """peak learning rates, RATE for all or METHOD=RATE; as many for every method, of several each shows its best"""
    targets: str | None = None
    """regular expression for the layers to adapt, or "attention"; none: all linear layers but the head"""
    dropout: float = 0.0
    """probability, on the input of the adapters"""
    evaluations: int = 5
    """of the validation metric during a run, evenly spread"""
    options: tuple[str, ...] = TRADED_OFF
    """options of methods, as METHOD.OPTION=VALUE"""
    device: str = "auto"
    """auto takes a GPU where there is one"""
    out: Path = Path("runs")
    """folder for all runs"""
    progress: bool = True
    """show a progress bar for every cell"""


def main(settings: Compare) -> None:
    if settings.task == "code" or (settings.task == "text" and settings.model is None):
        _ensure_weights()
    task = find(settings.task, model=settings.model, data=settings.data, batch=settings.batch, length=settings.length)
    training = _training(settings)
    cells = _cells(settings)
    _check(cells, task, training)
    folder = settings.out / settings.name
    folder.mkdir(parents=True, exist_ok=True)
    same = _what_rows_depend_on(settings, training)
    rows = _finished(folder / "results.jsonl", same)

    missing = [cell for cell in cells if cell.key not in rows]
    _say(f"{task.about}\n{len(cells)} cells on {training.device}, {len(cells) - len(missing)} of them done\n")
    begun = time.perf_counter()
    for number, cell in enumerate(missing, 1):
        left = (time.perf_counter() - begun) / max(1, number - 1) * (len(missing) - number + 1) / 60
        _say(f"[{number}/{len(missing)}] {cell.key}" + (f", about {left:.0f} min left" if number > 3 else ""))
        row = run(cell, task, training, folder / "cells" / cell.key, settings.progress)
        row["settings"] = same
        rows[cell.key] = row
        if FIRST:
            with open(folder / "results.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            forget_checkpoints(folder / "cells" / cell.key)
        _say(f"    {task.metric}: {row['metric']:.4f}")
    if not FIRST:
        return

    text = report.write(
        folder,
        [rows[cell.key] for cell in cells],
        metric=task.metric,
        higher_is_better=task.higher_is_better,
        about=task.about + _departures(settings),
        facts=_facts(settings, training),
    )
    print(f"\n{text}\n\n{time.perf_counter() - begun:.0f} s; {folder}/report.md, plots beside it, and")
    print(f"tensorboard --logdir {settings.out}")


def _say(text: str) -> None:
    if FIRST:
        print(text, flush=True)


def _cells(settings: Compare) -> list[Cell]:
    cells = []
    rates = _rates(settings)
    for method in settings.methods:
        for budget in [None] if method in (NONE, FULL) else settings.budgets:
            for lr in rates[method]:
                for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
                    cells.append(Cell(method, None if budget is None else int(budget), lr, seed))
    if not cells:
        raise TaskError("nothing to compare: --methods, --budgets, --lr and --seeds must not be empty")
    return cells


def _departures(settings: Compare) -> str:
    """What a reader of the table must know besides the task: where rates come from, options unlike a method's own."""
    used = {part for method in settings.methods for part in method.split("+")}
    options = [setting for setting in settings.options if setting.partition(".")[0] in used]
    said = CHOSEN if settings.lr == TUNED else ""
    return said + (f" Options that differ from the methods' own: {', '.join(options)}." if options else "")


def _rates(settings: Compare) -> dict[str, list[float]]:
    """Learning rates by method: its own where --lr gives it some, else those of its parts, else those for all."""
    given: dict[str, list[float]] = {"": []}
    for entry in settings.lr:
        method, _, rate = entry.rpartition("=")
        try:
            given.setdefault(method, []).append(float(rate))
        except ValueError:
            raise TaskError(f"--lr {entry}: must be a number or METHOD=NUMBER, such as 1e-3 or lora2=2e-2") from None
        if method:
            _known(method, f"--lr {entry}")
    rates = {}
    for method in settings.methods:
        # A combination without rates of its own must be gentle enough for the most delicate of its parts.
        parts = [given[part] for part in method.split("+") if part in given]
        rates[method] = given.get(method) or min(parts, key=min, default=given[""])
    counts = {method: len(own) for method, own in rates.items()}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise TaskError(
            f"--lr gives {', '.join(f'{method} {n}' for method, n in counts.items())} learning rates; "
            "a comparison is fair where every method gets as many, and at least one"
        )
    return rates


def _known(method: str, setting: str) -> None:
    """Refuse a setting for a method that does not exist; it would be ignored."""
    if method not in (NONE, FULL):
        try:
            find_method(method)
        except lorafamily.MethodError as error:
            raise TaskError(f"{setting}: {error}") from None


def _training(settings: Compare) -> Training:
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    options: dict[str, dict[str, Any]] = {}
    for setting in settings.options:
        method, dot, rest = setting.partition(".")
        option, equals, value = rest.partition("=")
        if not (dot and equals and method and option):
            raise TaskError(f"--options {setting}: must be METHOD.OPTION=VALUE, such as alora.scores=exact")
        _known(method, f"--options {setting}")
        try:
            options.setdefault(method, {})[option] = json.loads(value)
        except ValueError:
            options.setdefault(method, {})[option] = value
    return Training(
        steps=settings.steps,
        evaluate_every=max(1, settings.steps // settings.evaluations),
        targets=settings.targets,
        dropout=settings.dropout,
        device=device,
        options=options,
    )


def _check(cells: list[Cell], task: Task, training: Training) -> None:
    """Apply every method at every budget once, so that what cannot work says so before hours of training."""
    model, head = task.model(seed=0)
    seen = set()
    for cell in cells:
        if cell.method in (NONE, FULL) or (cell.method, cell.budget) in seen:
            continue
        seen.add((cell.method, cell.budget))
        adapt(model.to("meta"), head, cell, training)
        placement = placement_of(model)
        trial = Run(
            model,
            placement.adapters,
            training.steps,
            placement.sizing.budget,
            validation_loss=lambda: torch.zeros(()),
        )
        placement.method.allocation.begin(trial)
        lorafamily.remove(model)


def _what_rows_depend_on(settings: Compare, training: Training) -> dict[str, Any]:
    """The settings that a finished cell must have been run with to stand beside the others."""
    fields = ("task", "model", "data", "steps", "batch", "length", "targets", "dropout", "evaluations")
    same: dict[str, Any] = {name: getattr(settings, name) for name in fields}
    same |= {"device": training.device, "options": training.options, "torch": torch.__version__}
    return dict(json.loads(json.dumps(same, default=str)))


def _finished(path: Path, same: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of earlier calls by key.

    Raises:
        TaskError: some were made with other settings; they could not be compared.
    """
    if not path.exists():
        return {}
    rows = {}
    text = path.read_text()
    if text and not text.endswith("\n"):  # a run was killed while writing; that cell runs again
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


def _facts(settings: Compare, training: Training) -> dict[str, str]:
    facts = {"command": "python experiments/compare.py " + " ".join(sys.argv[1:])}
    facts |= {field.name: str(getattr(settings, field.name)) for field in dataclasses.fields(settings)}
    facts["device"] = training.device
    facts["seeds"] = ", ".join(str(settings.first_seed + i) for i in range(settings.seeds))
    facts["versions"] = ", ".join(f"{name} {version(name)}" for name in ("lorafamily", "torch", "numpy"))
    facts["python"] = platform.python_version()
    facts["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if training.device == "cuda":
        facts["machine"] += f", {torch.cuda.get_device_name()}"
    for method in settings.methods:
        if method not in (NONE, FULL):
            facts[f"options of {method}"] = json.dumps(
                find_method(method).with_options(**training.options_of(method)).options()
            )
    return facts


def _ensure_weights() -> None:
    if not embedded.WEIGHTS.exists():
        print(f"{embedded.WEIGHTS} is absent; pretraining it first, about 20 minutes on two cores", flush=True)
        subprocess.run([sys.executable, str(Path(__file__).with_name("pretrain.py"))], check=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Compare))
    except (TaskError, lorafamily.LoraFamilyError) as refused:
        print(f"compare.py: {refused}", file=sys.stderr)
        sys.exit(2)
