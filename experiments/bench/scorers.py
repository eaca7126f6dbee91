"""The cost of scoring ranks, and whether the cheap score of AB-LoRA agrees with the exact one.

    python experiments/bench/scorers.py --model PATH --task sst2 --data DIR

Prints three tables. The first compares exact and first-order scores after training, seed by seed. The second has the
wall time of the definition, the exact scorer and the first-order one, which take turns in one run. The third has the
share of a training step that keeping sensitivity scores takes, and how many entries are scored for it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that rooms find each other

import waiting  # noqa: F401 - before torch

# isort: split
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import scipy.stats
import torch
import tyro
from torch import Tensor

import lorafamily
from lorafamily.allocation.ablation import SCORING_ROWS, Ablation, AblationEstimate
from lorafamily.allocation.allocator import Allocation, Allocator
from lorafamily.allocation.run import Run
from lorafamily.allocation.scorer import Scores
from lorafamily.batch import first_rows, loss_of
from lorafamily.history import Decision
from lorafamily.layers.placement import placement_of
from lorafamily.names import modules_per_block
from pages.report import as_text
from tasks import Task, TaskOptions, refusals_in_one_line


@dataclass(frozen=True)
class Settings(TaskOptions):
    """Compare the scorers of rank slices on a trained model."""

    rank: int = 8
    """rank of plain LoRA on every linear layer"""
    steps: int = 100
    """training steps before ranks are scored"""
    lr: float = 1e-3
    """learning rate of that training"""
    seeds: int = 3
    """seeds for the agreement of the scores"""
    scoring_memory: float | None = None
    """MiB for ablations in one batch; none: what suits the device"""
    rounds: int = 2
    """rounds of timing; the scorers take turns"""
    observed_steps: int = 60
    """training steps in which the cost of keeping sensitivity scores is measured"""


def main(settings: Settings) -> None:
    task = settings.find_task()
    lines = [["seed", "ranks", "Spearman", "p", "same among the lowest", "first-order range", "exact range"]]
    for seed in range(settings.seeds):
        run = _trained(task, settings, seed)
        exact, estimate = _exact(run, settings), AblationEstimate(run).scores()
        lines.append([str(seed), *_agreement(exact, estimate)])
    print(f"\nExact AB-LoRA against its first-order estimate, LoRA rank {settings.rank}, {settings.steps} steps")
    print(as_text(lines), flush=True)

    print(f"\nWall time of scoring {sum(map(len, exact.values()))} ranks on one batch of {SCORING_ROWS}, seconds")
    scorers: dict[str, Callable[[], Scores]] = {
        "definition": lambda: by_definition(run),
        "exact": lambda: _exact(run, settings),
        "first-order": lambda: AblationEstimate(run).scores(),
    }
    spent: dict[str, list[float]] = {name: [] for name in scorers}
    for _ in range(settings.rounds):
        for name, score in scorers.items():
            begun = time.perf_counter()
            found = score()
            spent[name].append(time.perf_counter() - begun)
            if name == "exact":
                exact = found
            if name == "definition":
                defined = found
    total = {name: sum(seconds) for name, seconds in spent.items()}
    rows = [["scorer", "each round", "definition / this"]]
    for name, seconds in spent.items():
        rows.append([name, ", ".join(f"{s:.2f}" for s in seconds), f"{total['definition'] / total[name]:.2f}"])
    print(as_text(rows))
    print(f"largest difference of exact and definition: {_largest_difference(exact, defined):.1e}", flush=True)

    rows = [["method", "entries scored", "of adalora's", "s/step with", "s/step without", "bookkeeping"]]
    scored: dict[str, int] = {}
    for method in ("adalora", "lora2"):
        scored[method], with_scores, without = _bookkeeping(task, settings, method)
        rows.append(
            [
                method,
                f"{scored[method]:,}",
                f"{scored[method] / scored['adalora']:.2%}",
                f"{with_scores:.4f}",
                f"{without:.4f}",
                f"{with_scores / without - 1:.2%}",
            ]
        )
    print(f"\nKeeping sensitivity scores, {settings.observed_steps} training steps, batch {settings.batch}")
    print(as_text(rows))
    print(
        f"Entries scored: of the tensors whose sensitivity is averaged, before training, all modules, rank "
        f"{settings.rank} (lora2: k = r = {settings.rank}); adalora P, λ, Q whole, lora2 E, aa, B only."
    )


def _trained(task: Task, settings: Settings, seed: int) -> Run:
    """Plain LoRA after training, as a `Run` whose validation loss is that of one validation batch."""
    model, head = task.model(seed)
    lorafamily.apply(model, "lora", rank=settings.rank, also_train=head, seed=seed)
    lorafamily.train(
        model, task.training(seed), steps=settings.steps, lr=settings.lr, head_lr=settings.lr, seed=seed, progress=False
    )
    model.eval()
    batch = next(iter(task.validation()))
    return Run(
        model, placement_of(model).adapters, 1, validation_loss=lambda rows: loss_of(model, first_rows(batch, rows))
    )


def _exact(run: Run, settings: Settings) -> Scores:
    return Ablation(run, scoring_memory=settings.scoring_memory).scores()


def _agreement(exact: Scores, estimate: Scores) -> list[str]:
    one, other = torch.cat(list(exact.values())), torch.cat(list(estimate.values()))
    result = scipy.stats.spearmanr(one.numpy(), other.numpy())
    n = modules_per_block(exact)  # as many as one round of ALoRA drops
    same = len(set(one.argsort()[:n].tolist()) & set(other.argsort()[:n].tolist()))
    ranges = [f"{float(s.min()):.4f} … {float(s.max()):.4f}" for s in (other, one)]
    return [str(len(one)), f"{result.statistic:.3f}", f"{result.pvalue:.0e}", f"{same} of {n}", *ranges]


@torch.no_grad()
def by_definition(run: Run) -> Scores:
    """AB-LoRA by its definition: for every slice one forward without it and one with it alone."""
    assert run.validation_loss is not None
    gates = {name: torch.ones(adapter.slices) for name, adapter in run.adapters.items()}

    def loss(value: float, name: str = "", i: int = 0) -> Tensor:
        assert run.validation_loss is not None
        for gate in gates.values():
            gate.fill_(value)
        if name:
            gates[name][i] = 1 - value
        return run.validation_loss(SCORING_ROWS).double()

    with ExitStack() as stack:
        for name, adapter in run.adapters.items():
            stack.enter_context(adapter.gated(gates[name]))
        whole = loss(1.0)
        return {
            name: torch.stack([loss(1.0, name, i) - whole - loss(0.0, name, i) for i in range(adapter.slices)])
            for name, adapter in run.adapters.items()
        }


def _largest_difference(one: Scores, other: Scores) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def _bookkeeping(task: Task, settings: Settings, method: str) -> tuple[int, float, float]:
    """Entries scored, and seconds a step with and without the allocator's time, both from the same steps."""
    model, head = task.model(0)
    options: dict[str, Any] = {"slices": settings.rank} if method == "lora2" else {}
    lorafamily.apply(model, method, rank=settings.rank, also_train=head, seed=0, warmup=0.1, final=0.1, **options)
    placement = placement_of(model)
    scored = sum(p.numel() for adapter in placement.adapters.values() for p, _ in adapter.update.sliced())
    timed = Timed(placement.method.allocation)
    placement.method = placement.method.but(allocation=timed)
    history = lorafamily.train(
        model,
        task.training(0),
        steps=settings.observed_steps,
        lr=settings.lr,
        head_lr=settings.lr,
        seed=0,
        progress=False,
    )
    with_scores = history.seconds / settings.observed_steps
    return scored, with_scores, with_scores - sum(timed.spent) / settings.observed_steps


@dataclass(frozen=True)
class Timed(Allocation):
    """An allocation that records the seconds that its allocator takes after every step."""

    inner: Allocation
    spent: list[float] = field(default_factory=list)

    def allocator(self, run: Run) -> Allocator:
        allocator = self.inner.begin(run)
        step = allocator.step

        def timed(number: int, **how: bool) -> Decision | None:
            begun = time.perf_counter()
            decision = step(number, **how)
            self.spent.append(time.perf_counter() - begun)
            return decision

        allocator.step = timed  # type: ignore[method-assign, assignment]
        return allocator


if __name__ == "__main__":
    with refusals_in_one_line():
        main(tyro.cli(Settings))
