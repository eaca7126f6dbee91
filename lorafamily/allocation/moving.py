"""Moving slices between modules during training: some are dropped and as many are added elsewhere, fewer each time."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lorafamily.allocation.allocator import Allocator, in_steps
from lorafamily.allocation.run import Run
from lorafamily.allocation.scored_allocation import ScoredAllocation
from lorafamily.allocation.scorer import Scorer, Scores
from lorafamily.errors import AllocationError
from lorafamily.history import Decision
from lorafamily.names import modules_per_block

Slice = tuple[str, int]
"""Module, and index of the slice in it."""


def slices_to_move(
    run: Run, drop: Sequence[Slice], gain: Sequence[str], most: int, *, once: bool = False
) -> tuple[dict[str, set[int]], list[str]]:
    """The slices to drop, by module, and the module of every new slice.

    At most `most` slices are dropped, the first of `drop`, and no more than the new ones need. As many are added to
    those modules of `gain` that lose none, in turn, so that the first get the remainder; with `once` at most one each.
    Slices differ in cost, and a module has a largest rank, so a module without room is skipped.
    """
    before = {name: adapter.slices for name, adapter in run.adapters.items()}
    costs = {name: adapter.update.slice_cost for name, adapter in run.adapters.items()}
    largest = {name: adapter.update.largest_rank for name, adapter in run.adapters.items()}
    spent = run.trainable()

    def shared(n: int, lost: Mapping[str, set[int]]) -> list[str]:
        now = {name: slices - len(lost[name]) for name, slices in before.items()}
        total = sum(now.values())
        free = math.inf if run.limit is None else run.limit - spent
        free += sum(len(dropped) * costs[name] for name, dropped in lost.items())
        candidates = [name for name in gain if not lost[name]]
        gains: list[str] = []
        while candidates:
            gained = []
            for name in candidates:
                if len(gains) == n or total == run.slice_limit:
                    return gains
                if costs[name] <= free and now[name] < largest[name]:
                    gained.append(name)
                    now[name], total, free = now[name] + 1, total + 1, free - costs[name]
                    gains.append(name)
            candidates = [] if once else gained
        return gains

    best: tuple[dict[str, set[int]], list[str]] = ({name: set() for name in before}, [])
    for n in range(min(most, len(drop)), 0, -1):
        if len(best[1]) > n:  # dropping fewer slices makes room for no more new ones
            break
        lost: dict[str, set[int]] = {name: set() for name in before}
        for name, i in drop[:n]:
            lost[name].add(i)
        gains = shared(n, lost)
        if gains and len(gains) >= len(best[1]):
            best = lost, gains
    return best


def move_slices(allocator: Allocator, lost: Mapping[str, set[int]], gains: Sequence[str]) -> dict[str, int]:
    """Drop and add these slices in the model, the optimizer and the scorer; returns the slices afterwards."""
    before = allocator.slices
    for name, dropped in lost.items():
        if dropped:
            keep = [i for i in range(before[name]) if i not in dropped]
            allocator.resize(name, torch.tensor(keep, dtype=torch.long, device="cpu"))
    for name in gains:
        allocator.resize(name, torch.arange(allocator.run.adapters[name].slices, device="cpu"), add=1)
    return {name: slices - len(lost[name]) + gains.count(name) for name, slices in before.items()}


@dataclass(frozen=True)
class CubicExchange(ScoredAllocation):
    """Every Δ_T steps b(t) slices move,   b(t) = ⌈b0 (1 − (t − t_i) / (T − t_f − t_i))³⌉   for
    t_i < t < T − t_f, and none before or after.

    `moved` is b0; None takes the number of adapted modules in one block. `warmup` (t_i), `final` (t_f) and `interval`
    (Δ_T) are fractions of the run or whole numbers of optimizer steps.
    """

    moved: int | None = None
    warmup: float = 0.1
    final: float = 0.3
    interval: float = 0.025


class CubicExchanger(Allocator):
    """One run of a `CubicExchange`; subclasses decide which slices are dropped first, and which modules gain first."""

    grows = True
    reason = "exchanged"

    def __init__(self, settings: CubicExchange, run: Run):
        super().__init__(run)
        self.scorer: Scorer = settings.make_scorer(run)
        self.moved = modules_per_block(run.adapters) if settings.moved is None else settings.moved
        if not isinstance(self.moved, int) or isinstance(self.moved, bool) or self.moved < 1:
            raise AllocationError(f"moved={settings.moved!r}: must be at least 1 slice, or None")
        self.warmup = in_steps(settings.warmup, run.steps, "warmup")
        self.end = run.steps - in_steps(settings.final, run.steps, "final")
        interval = max(1, in_steps(settings.interval, run.steps, "interval"))
        self.due = [step for step in range(self.warmup + 1, self.end) if step % interval == 0]
        if not self.due:
            raise AllocationError(
                f"no rank would ever move: of {run.steps} steps the first {self.warmup} are warm-up, the last "
                f"{run.steps - self.end} keep the final pattern, and between them no step is a multiple of {interval}; "
                "train longer, or lower warmup, final or interval"
            )

    @abstractmethod
    def order(self, scores: Scores) -> tuple[list[Slice], list[str]]:
        """Slices in the order in which they are dropped, and modules in the order in which they get a new one."""

    def slices_at(self, step: int) -> int:
        """b(t), rounded up, so that the last exchange moves one slice."""
        return math.ceil(self.moved * (1 - (step - self.warmup) / (self.end - self.warmup)) ** 3)

    def decide(self, step: int) -> Decision | None:
        self.settled = step >= self.due[-1]
        if step not in self.due or not self.has_scores:
            return None
        scores = self.scores()
        drop, gain = self.order(scores)
        lost, gains = slices_to_move(self.run, drop, gain, self.slices_at(step), once=True)
        return self.record(step, move_slices(self, lost, gains), self.reason, None, scores)
