"""Memory that a training step of BERT takes, compared with the plan's; a line for each way to train.

    MALLOC_MMAP_THRESHOLD_=131072 python experiments/bench/planned.py lora lora2 full

A line has the way, the planned MB, the MB by which the resident set of the process grew at its peak, and their ratio.
The peak counts since the process began, so name the way that takes least first. The environment variable lets glibc
give freed tensors back; without it the process keeps more memory than is alive. Linux only, since it reads /proc.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that rooms find each other

import waiting  # noqa: F401 - before torch

# isort: split
import gc
import re

import torch

import lorafamily
from bench.measuring import bert
from lorafamily.layers.placement import placement_of
from lorafamily.planner import Planner

FULL, RANK = "full", 8


def main(ways: list[str]) -> None:
    step_of(ways[0], layers=1, rows=1)  # memory that kernels and libraries take once
    gc.collect()
    before = status("VmRSS")
    for way in ways:
        step_of(way, layers=6, rows=16)
        taken = status("VmHWM") - before
        predicted = planned(way)
        gc.collect()  # memory that this way leaves must not count for the next one
        print(f"{way} {predicted / 1e6:.1f} {taken / 1e6:.1f} {predicted / taken:.3f}")


def planned(way: str) -> int:
    planner = Planner(*bert(layers=6, rows=16))
    return (planner.full if way == FULL else planner.plan(way, rank=RANK).use).memory.peak


def step_of(way: str, *, layers: int, rows: int) -> None:
    """Two training steps, since the first one makes the optimizer's state."""
    model, batch = bert(layers=layers, rows=rows)
    penalty = None
    if way != FULL:
        lorafamily.apply(model, way, rank=RANK, seed=0)
        penalty = placement_of(model).method.penalty
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    model.train()
    for _ in range(2):
        model(**batch).loss.backward()
        if penalty is not None:
            penalty(placement_of(model).adapters.values()).backward()
        optimizer.step()
        optimizer.zero_grad()


def status(key: str) -> int:
    """A size in the status of this process, in bytes."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    main(sys.argv[1:])
