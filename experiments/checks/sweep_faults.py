"""Kill workers, drivers and simulated Ray nodes during sweeps, and compare the rows with those of an undisturbed run.

    python experiments/checks/sweep_faults.py
    python experiments/checks/sweep_faults.py --parts worker driver --kills 3

The sweeps are short cells of compare.py on the embedded model. The reference runs one cell after another with one
thread. A disturbed sweep must have every row once, equal to the bit except for times and memory. Linux only.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that rooms find each other

import waiting  # noqa: F401 - before torch

# isort: split
import importlib.util
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import tyro

from pages.report import as_text

COMPARE = Path(__file__).parents[1] / "compare.py"
MEASURED = ("seconds_per_step", "peak_mib")
ARGUMENTS = (
    *("--methods", "lora", "adalora", "alora", "--budgets", "10e3", "--lr", "5e-3", "--steps", "30", "--batch", "4"),
    *("--held-out", "16", "--evaluations", "3", "--seeds", "4", "--no-progress"),
    *("--options", "alora.scorer=first-order", "alora.rounds=2"),
)
"""Twelve cells of some seconds each, with a checkpoint at every tenth step."""

Part = Literal["worker", "driver", "node"]


@dataclass(frozen=True)
class SweepFaults:
    """Kill parts of sweeps at random moments and compare the results."""

    parts: tuple[Part, ...] = ("worker", "driver", "node")
    """what to kill; node: one of two Ray nodes, both on this machine"""
    kills: int = 10
    """kills of each"""
    seed: int = 0
    """seed of the random moments"""


@dataclass(frozen=True)
class Outcome:
    """The results of killing one part. `same`: how many of the `sweeps` ended with the reference's rows; `twice`,
    `lost`: numbers of rows."""

    part: str
    kills: int
    sweeps: int
    same: int
    twice: int
    lost: int

    @property
    def good(self) -> bool:
        return self.same == self.sweeps and not self.twice and not self.lost


def main(settings: SweepFaults) -> list[Outcome]:
    if "node" in settings.parts and importlib.util.find_spec("ray") is None:
        raise SystemExit("sweep_faults.py: killing nodes needs Ray: pip install 'lorafamily[sweep]', or leave out node")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        process = start(folder / "reference", "--workers", "1")
        if process.wait() != 0:
            raise SystemExit("sweep_faults.py: the reference run failed")
        reference = {row["key"]: row for row in rows(folder / "reference")}
        killers: dict[Part, Callable[..., Outcome]] = {"worker": workers, "driver": drivers, "node": nodes}
        outcomes = []
        for part in settings.parts:
            draw = random.Random(f"{settings.seed} {part}")
            outcomes.append(killers[part](folder / part, settings.kills, draw, reference))
            print(outcomes[-1], flush=True)
    head = ["killed", "times", "sweeps", "same rows", "rows twice", "rows lost"]
    lines = [
        [o.part, str(o.kills), str(o.sweeps), f"{o.same} of {o.sweeps}", str(o.twice), str(o.lost)] for o in outcomes
    ]
    print(f"{time.strftime('%Y-%m-%d')}, {len(reference)} cells a sweep\n{as_text([head, *lines])}")
    return outcomes


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a driver; with the same folder again it runs the missing cells."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output", "ab") as output:
        return subprocess.Popen(
            [sys.executable, str(COMPARE), *ARGUMENTS, "--out", str(folder), *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
        )


def rows(folder: Path) -> list[dict[str, Any]]:
    """Finished rows without times and memory; a line that was cut while it was written does not count."""
    path = folder / "embedded" / "results.jsonl"
    text = path.read_text() if path.exists() else ""
    found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in found]


def judged(part: str, kills: int, folders: list[Path], reference: dict[str, Any]) -> Outcome:
    same = twice = lost = 0
    for folder in folders:
        found = rows(folder)
        keys = [row["key"] for row in found]
        twice += len(keys) - len(set(keys))
        lost += len(reference.keys() - set(keys))
        same += {row["key"]: row for row in found} == reference
    return Outcome(part, kills, len(folders), same, twice, lost)


def workers(folder: Path, wanted: int, draw: random.Random, reference: dict[str, Any]) -> Outcome:
    """Kill workers of running sweeps."""
    kills = 0
    folders: list[Path] = []
    while kills < wanted:
        folders.append(folder / str(len(folders)))
        driver = start(folders[-1], "--workers", "2")
        while kills < wanted and driver.poll() is None:
            time.sleep(draw.uniform(0.5, 6.0))
            if found := _workers_of(driver.pid):
                os.kill(draw.choice(found), signal.SIGKILL)
                kills += 1
        _ended(driver, folders[-1])
    return judged("worker", kills, folders, reference)


def _workers_of(pid: int) -> list[int]:
    """Worker processes of a driver."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        named = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    except OSError:  # a process ended meanwhile
        return []
    return [child for child, command in named.items() if b"spawn_main" in command]


def drivers(folder: Path, wanted: int, draw: random.Random, reference: dict[str, Any]) -> Outcome:
    """Kill drivers, and start each again at once."""
    kills = 0
    folders: list[Path] = []
    while kills < wanted:
        folders.append(folder / str(len(folders)))
        while kills < wanted:
            driver = start(folders[-1], "--workers", "2")
            while driver.poll() is None and not _workers_of(
                driver.pid
            ):  # before its workers run there is nothing to lose
                time.sleep(0.1)
            time.sleep(draw.uniform(0.5, 12.0))
            if driver.poll() is not None:
                break
            os.kill(driver.pid, signal.SIGKILL)
            driver.wait()
            kills += 1
        _ended(start(folders[-1], "--workers", "2"), folders[-1])
    return judged("driver", kills, folders, reference)


def nodes(folder: Path, wanted: int, draw: random.Random, reference: dict[str, Any]) -> Outcome:
    """Kill one of two simulated nodes of a Ray cluster, and add another."""
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=small | {"include_dashboard": False})
    kills = 0
    folders: list[Path] = []
    try:
        node = cluster.add_node(**small)
        while kills < wanted:
            folders.append(folder / str(len(folders)))
            driver = start(folders[-1], "--cluster", cluster.address)
            while kills < wanted and driver.poll() is None:
                time.sleep(draw.uniform(4.0, 15.0))
                if driver.poll() is None and (folders[-1] / "embedded" / "cells").exists():
                    cluster.remove_node(node, allow_graceful=False)
                    kills += 1
                    node = cluster.add_node(**small)
            _ended(driver, folders[-1])
    finally:
        cluster.shutdown()
    return judged("Ray node", kills, folders, reference)


def _ended(driver: subprocess.Popen[bytes], folder: Path) -> None:
    if driver.wait() != 0:
        output = (folder / "output").read_text()[-2000:]
        raise SystemExit(f"sweep_faults.py: a driver failed by itself (exit code {driver.returncode}):\n{output}")


if __name__ == "__main__":
    sys.exit(0 if all(outcome.good for outcome in main(tyro.cli(SweepFaults))) else 1)
