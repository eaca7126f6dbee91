"""Kill training processes at random moments, resume them, and compare their results with an uninterrupted run's.

    python experiments/checks/faults.py                # 20 kills of each method
    python experiments/checks/faults.py --kills 3 --methods alora

A process is killed with SIGKILL, which it cannot catch, while it trains and while it writes checkpoints. Then the same
command is started again, until a run completes. Adapter files, history, `allocation.jsonl` and `steps.jsonl` must be
byte for byte those of the run that nobody killed.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that rooms find each other

import waiting  # noqa: F401 - before torch

# isort: split
import dataclasses
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch.utils.data import DataLoader

import lorafamily
from embedded import tiny
from pages.report import as_text

COMPARED = ("adapter/adapter.safetensors", "adapter/adapter.json", "history.json", "allocation.jsonl", "steps.jsonl")


@dataclass(frozen=True)
class Faults:
    """Kill training processes at random moments and compare their results."""

    methods: tuple[str, ...] = ("lora", "olora", "alora", "lora2", "adalora")
    """any of lorafamily.methods(), or combinations"""
    kills: int = 20
    """kills for each method, at least"""
    steps: int = 40
    """optimizer steps of a run"""
    seed: int = 0
    """seed of the random moments"""


@dataclass(frozen=True)
class Outcome:
    """The results for one method. `while_writing`: kills that left a checkpoint half written; `anew`: kills before the
    first checkpoint was complete; `identical`: how many of the `runs` ended like the uninterrupted run."""

    method: str
    kills: int
    while_writing: int
    anew: int
    identical: int
    runs: int


def main(settings: Faults) -> list[Outcome]:
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [outcome(method, settings, Path(folder)) for method in settings.methods]
    head = ("method", "killed", "while writing a checkpoint", "before the first one", "identical ends")
    rows = [(o.method, o.kills, o.while_writing, o.anew, f"{o.identical} of {o.runs}") for o in outcomes]
    print(as_text([head, *([str(cell) for cell in row] for row in rows)]))
    return outcomes


def outcome(method: str, settings: Faults, folder: Path) -> Outcome:
    """Kill runs of a method until there are enough kills and the last run has completed."""
    draw = random.Random(f"{settings.seed} {method}")
    begun = time.time()
    whole = folder / method / "whole"
    process = _start(method, settings.steps, whole)
    while not (whole / "lock").exists() and process.is_alive():
        time.sleep(0.01)
    starting = time.time() - begun
    process.join()
    training = max(path.stat().st_mtime for path in whole.glob("checkpoints/*")) - begun - starting
    kills = while_writing = anew = identical = runs = 0
    while kills < settings.kills:
        broken = folder / method / f"broken-{runs}"
        while not (broken / "history.json").exists():
            process = _start(method, settings.steps, broken)
            # Lives are short, so that most processes are killed; after enough kills a run may complete.
            life = starting + draw.uniform(-0.1, 0.5) * training
            process.join(life if kills < settings.kills else None)
            if process.exitcode is None:
                os.kill(process.pid or 0, signal.SIGKILL)
                process.join()
                kills += 1
                while_writing += any(broken.glob("checkpoints/*.partial"))
                anew += not any(broken.glob("checkpoints/step-*[0-9]"))
            elif process.exitcode != 0:
                raise SystemExit(f"faults.py: a run of {method} failed by itself (exit code {process.exitcode})")
        runs += 1
        identical += all((broken / name).read_bytes() == (whole / name).read_bytes() for name in COMPARED)
    return Outcome(method, kills, while_writing, anew, identical, runs)


def train(method: str, steps: int, folder: Path) -> None:
    """The run of the killed processes: a shuffled loader, dropout, a checkpoint at every step."""
    torch.set_num_threads(1)
    model = tiny()
    lorafamily.apply(model, method, rank=4, dropout=0.1, also_train="norm", seed=0)
    rows = torch.randint(256, (60, 24), generator=torch.Generator().manual_seed(0))
    samples: Any = [{"bytes": row} for row in rows]
    loader: DataLoader[Any] = DataLoader(samples, batch_size=8, shuffle=True)
    history = lorafamily.train(
        model,
        loader,
        steps=steps,
        lr=1e-2,
        validation=[{"bytes": rows[:8]}],
        evaluate_every=10,
        log_dir=folder,
        pictures=False,
        save_every=1,
        resume="auto",
        progress=False,
    )
    lorafamily.save(model, folder / "adapter")
    text = json.dumps(dataclasses.replace(history, seconds=0.0).to_dict())
    (folder / "history.partial").write_text(text)
    os.replace(folder / "history.partial", folder / "history.json")


def _start(method: str, steps: int, folder: Path) -> multiprocessing.process.BaseProcess:
    # Forked, since importing torch anew would take most of a short life.
    process = multiprocessing.get_context("fork").Process(target=train, args=(method, steps, folder))
    process.start()
    return process


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(0 if all(o.identical == o.runs for o in main(tyro.cli(Faults))) else 1)
