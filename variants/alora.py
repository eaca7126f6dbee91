"""ALoRA (Liu et al. 2024, arXiv:2403.16187): allocating LoRA.   z = x Wᴬ G Wᴮ,   G = diag(g), g ∈ {0, 1}.

Every module starts with the same rank, so the budget is met from the first step and nothing larger is ever allocated.
After K1 steps, N_A times, K2 steps apart (sec. 3.4): score every rank by what the network loses without it and is worth
with it alone (AB-LoRA, sec. 3.3), drop the n_A lowest of the whole network, and give n_A new ones to the modules that
lost none; where these cannot take so many, fewer are dropped. A gate that is 0 stays 0, so a dropped rank is removed; a
gate that is 1 is a factor of 1. Hence the update itself is plain LoRA, and gates exist only while ranks are scored.

Not to be confused with Activated LoRA (arXiv:2504.12397), which some servers call "aLoRA".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lorafamily.allocation.allocator import Allocator, in_steps
from lorafamily.allocation.run import Run
from lorafamily.allocation.scorer import Scorer, Scores
from lorafamily.allocation.scores import ScoredAllocation
from lorafamily.errors import AllocationError
from lorafamily.history import Decision
from lorafamily.names import modules_per_block
from lorafamily.variants.lora import lora


@dataclass(frozen=True)
class PruneAndGrow(ScoredAllocation):
    """`scores` names the scorer: "exact" is AB-LoRA (about one forward a rank), "first-order" its estimate (two
    backwards in all), and there are the others of `SCORERS` for comparison. `rounds` is N_A. `scoring_rows`: validation
    samples that ranks are scored on; `scoring_memory`: MiB of activations for ablations in one batch; see `Ablation`.

    `warmup` (K1) and `interval` (K2) are fractions of the run or whole numbers of optimiser steps; the paper's 1 and
    0.25 epochs are a tenth and a fortieth of its ten. `drop` is n_A; None takes the paper's, the number of adapted
    modules in one transformer block, the largest where blocks differ (T5's decoder blocks have 10, its encoder's 6).
    """

    scores: str = "exact"
    rounds: int = 8
    warmup: float = 0.1
    interval: float = 0.025
    drop: int | None = None

    def allocator(self, run: Run) -> Allocator:
        return PruneAndGrower(self, run)


class PruneAndGrower(Allocator):
    """One run of `PruneAndGrow`."""

    grows = True

    def __init__(self, settings: PruneAndGrow, run: Run):
        super().__init__(run)
        self.scorer: Scorer = settings.scorer(run)
        self.drop = modules_per_block(run.adapters) if settings.drop is None else settings.drop
        if self.drop < 1:
            raise AllocationError(f"drop={settings.drop!r}: must be at least 1 rank a round")
        first = max(1, in_steps(settings.warmup, run.steps, "warmup"))
        apart = max(1, in_steps(settings.interval, run.steps, "interval"))
        self.rounds = {first + i * apart for i in range(settings.rounds)}
        if not self.rounds or max(self.rounds) > run.steps:
            raise AllocationError(
                f"{settings.rounds} rounds of allocation, the first after {first} steps and then every {apart}, do not "
                f"fit into {run.steps} steps; train longer, or lower rounds, warmup or interval"
            )

    def decide(self, step: int) -> Decision | None:
        if step not in self.rounds:
            return None
        scores = self.scores()
        self.settled = step == max(self.rounds)
        lost, gains, threshold = self._moves(scores)
        for name, dropped in lost.items():
            if dropped:
                keep = [i for i in range(self.ranks[name]) if i not in dropped]
                self.resize(name, torch.tensor(keep, dtype=torch.long, device="cpu"))
        for name in gains:
            self.resize(name, torch.arange(self.run.adapters[name].rank, device="cpu"), add=1)
        after = {name: rank - len(lost[name]) + gains.count(name) for name, rank in self.ranks.items()}
        return self.decided(step, after, "pruned and grown", threshold, scores)

    def _moves(self, scores: Scores) -> tuple[dict[str, set[int]], list[str], float | None]:
        """The slices to drop by module, the module of every new one, and the highest score dropped.

        The lowest of the network go, n_A of them, or fewer: as few as make room for the most new ones. Where every
        module would lose one, or the others have no room, nothing is dropped that cannot be had elsewhere.
        """
        order = sorted((float(value), name, i) for name, values in scores.items() for i, value in enumerate(values))
        mean = {name: float(values.mean()) if len(values) else -math.inf for name, values in scores.items()}
        turn = sorted(scores, key=lambda name: (-mean[name], name))
        ranks = {name: adapter.rank for name, adapter in self.run.adapters.items()}
        costs = {name: adapter.update.slice_cost for name, adapter in self.run.adapters.items()}
        largest = {name: adapter.update.largest_rank for name, adapter in self.run.adapters.items()}
        spent = self.run.trainable()

        def shared(n: int, lost: Mapping[str, set[int]]) -> list[str]:
            """n new slices for modules that lost none: evenly, the remainder to the highest mean score. A module
            without slices has no score and comes last; one that has no room passes its turn on."""
            now = {name: rank - len(lost[name]) for name, rank in ranks.items()}
            slices = sum(now.values())
            free = math.inf if self.run.limit is None else self.run.limit - spent
            free += sum(len(dropped) * costs[name] for name, dropped in lost.items())
            waiting = [name for name in turn if not lost[name]]
            gains: list[str] = []
            while waiting:
                had_one = []
                for name in waiting:
                    if len(gains) == n or slices == self.run.rank_limit:
                        return gains
                    if costs[name] <= free and now[name] < largest[name]:
                        had_one.append(name)
                        now[name], slices, free = now[name] + 1, slices + 1, free - costs[name]
                        gains.append(name)
                waiting = had_one
            return gains

        best: tuple[dict[str, set[int]], list[str], float | None] = ({name: set() for name in scores}, [], None)
        for n in range(min(self.drop, len(order)), 0, -1):
            if len(best[1]) > n:  # fewer dropped make room for no more
                break
            lost: dict[str, set[int]] = {name: set() for name in scores}
            for _, name, i in order[:n]:
                lost[name].add(i)
            gains = shared(n, lost)
            if gains and len(gains) >= len(best[1]):
                best = lost, gains, order[n - 1][0]
        return best


alora = lora.but(allocation=PruneAndGrow())
