"""The cost of looking at data before training, in forwards, backwards, time and memory, compared with training steps.

    python experiments/bench/evidence.py --model PATH --task sst2 --data DIR --batches 32

Time is measured in one process, where looking and training take turns. Memory is the most bytes of new tensors alive at
once: weights, optimizer state, and sums of gradients that are in a file do not count.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that rooms find each other

import waiting  # noqa: F401 - before torch

# isort: split
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from unittest import mock

import torch
import tyro
from torch import Tensor, nn

import lorafamily
from bench.measuring import timed
from lorafamily.allocation.replay import PeakActivations
from lorafamily.layers.placement import placement_of
from pages.report import as_text
from tasks import Task, TaskOptions, refusals_in_one_line


@dataclass(frozen=True)
class Settings(TaskOptions):
    """Measure the cost of methods that look at data before training."""

    batches: int = 32
    """batches to look at"""
    rank: int = 8
    """rank of the LoRA that is trained for comparison, and mean rank of the methods that choose ranks"""
    rounds: int = 3
    """rounds of timing; the ways take turns"""


@dataclass
class Calls:
    """The number of forwards of a model and of backwards."""

    forwards: int = 0
    backwards: int = 0

    @contextmanager
    def counted(self, model: nn.Module) -> Iterator[None]:
        backward = Tensor.backward

        def counting(*arguments: Any, **named: Any) -> None:
            self.backwards += 1
            backward(*arguments, **named)

        def called(*_: Any) -> None:
            self.forwards += 1

        hook = model.register_forward_pre_hook(called)
        with mock.patch.object(Tensor, "backward", counting):
            yield
        hook.remove()


@dataclass
class Looking:
    """One way to look at data, and its cost. `peak`: MiB."""

    name: str
    run: Callable[[], lorafamily.Evidence]
    seconds: list[float] = field(default_factory=list)
    calls: Calls = field(default_factory=Calls)
    batches: int = 0
    peak: float = 0.0


def main(settings: Settings) -> None:
    task = settings.find_task()
    data = list(islice(iter(task.training(0)), settings.batches))
    model, _ = task.model(0)
    ways = [
        _way(model, data, "eva, all batches", "eva", settings, tau=None),
        _way(model, data, "eva", "eva", settings),
        _way(model, data, "gora, in memory", "gora", settings),
        _way(model, data, "gora, in a file", "gora", settings, evidence_memory=0),
    ]
    training = Training(task, settings, data)
    trained: list[float] = []
    for _ in range(settings.rounds):
        trained.append(timed(training.epoch, "cpu") / len(data))
        for way in ways:
            way.seconds.append(timed(way.run, "cpu"))
    with PeakActivations() as step:
        training.epoch()  # all batches, since they differ in length
    for way in ways:
        with way.calls.counted(model):
            way.batches = way.run().batches
        with PeakActivations() as looking:
            way.run()
        way.peak = looking.peak / 2**20
    largest = max(a.update.d_in * a.update.d_out * 4 for a in placement_of(training.model).adapters.values()) / 2**20
    rows = [["what", "batches", "forwards", "backwards", "s a batch", "of a step", "MiB", "beyond a step's"]]
    peak = step.peak / 2**20
    mean = sum(trained) / len(trained)
    rows.append(["step of lora", str(len(data)), "1 a batch", "1 a batch", f"{mean:.3f}", "1.00", f"{peak:.1f}", ""])
    for way in ways:
        each = sum(way.seconds) / len(way.seconds) / way.batches
        ratio = each / mean
        counts = [str(way.batches), str(way.calls.forwards), str(way.calls.backwards)]
        rows.append([way.name, *counts, f"{each:.3f}", f"{ratio:.2f}", f"{way.peak:.1f}", f"{way.peak - peak:+.1f}"])
    print(f"{task.about}\n{len(data)} batches of {settings.batch}, {torch.get_num_threads()} thread(s)\n")
    print(as_text(rows))
    print(f"The largest layer's gradient is {largest:.1f} MiB.")


def _way(model: nn.Module, data: list[Any], name: str, method: str, settings: Settings, **options: Any) -> Looking:
    def run() -> lorafamily.Evidence:
        return lorafamily.gather(model, method, data, rank=settings.rank, evidence_batches=settings.batches, **options)

    return Looking(name, run)


class Training:
    """Plain LoRA on the same batches."""

    def __init__(self, task: Task, settings: Settings, data: list[Any]):
        self.model, head = task.model(0)
        lorafamily.apply(self.model, "lora", rank=settings.rank, also_train=head, seed=0)
        self.model.train()
        self.optimizer = torch.optim.AdamW(lorafamily.parameter_groups(self.model))
        self.data = data
        self.step(data[0])  # makes the optimizer's state

    def step(self, batch: Any) -> None:
        self.model(**batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def epoch(self) -> None:
        for batch in self.data:
            self.step(batch)


if __name__ == "__main__":
    with refusals_in_one_line():
        main(tyro.cli(Settings))
