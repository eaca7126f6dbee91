"""ALoRA (Liu et al. 2024, arXiv:2403.16187): allocating LoRA.   z = x Wᴬ G Wᴮ,   G = diag(g), g ∈ {0, 1}.

Every module starts with the same rank, so the budget is met from the first step and nothing larger is ever allocated.
After K1 steps, N_A times, K2 steps apart (sec. 3.4): score every rank by what the network loses without it and is worth
with it alone (AB-LoRA, sec. 3.3), drop the n_A lowest of the whole network, and give n_A new ones to the modules that
lost none. A gate that is 0 stays 0, so a dropped rank is removed; a gate that is 1 is a factor of 1. Hence the update
itself is plain LoRA, and gates exist only while ranks are scored.

Not to be confused with Activated LoRA (arXiv:2504.12397), which some servers call "aLoRA".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorafamily.allocation.allocator import Allocation, Allocator, in_steps
from lorafamily.allocation.run import Run
from lorafamily.allocation.scorer import Scorer, Scores
from lorafamily.allocation.scores import scorer_named
from lorafamily.errors import AllocationError
from lorafamily.history import Decision
from lorafamily.names import modules_per_block
from lorafamily.variants.lora import lora


@dataclass(frozen=True)
class PruneAndGrow(Allocation):
    """`scores` names the scorer: "exact" is AB-LoRA (about one forward a rank), "first-order" its estimate (two
    backwards in all), and there are the others of `SCORERS` for comparison. `rounds` is N_A.

    `warmup` (K1) and `interval` (K2) are fractions of the run or whole numbers of optimiser steps; the paper's 1 and
    0.25 epochs are a tenth and a fortieth of its ten. `drop` is n_A; None takes the paper's, the number of adapted
    modules in one transformer block, the largest where blocks differ (T5's decoder blocks have 10, its encoder's 6).
    """

    scores: str = "exact"
    rounds: int = 8
    warmup: float = 0.1
    interval: float = 0.025
    drop: int | None = None

    def begin(self, run: Run) -> Allocator:
        return PruneAndGrower(self, run)


class PruneAndGrower(Allocator):
    """One run of `PruneAndGrow`."""

    grows = True

    def __init__(self, settings: PruneAndGrow, run: Run):
        super().__init__(run)
        self.scorer: Scorer = scorer_named(settings.scores, run)
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

    def step(self, step: int) -> Decision | None:
        if self.settled:  # and stays so where the run is made longer, which moves the rounds
            return None
        self.scorer.observe()
        self.settled = step >= max(self.rounds)
        if step not in self.rounds:
            return None
        scores = self.scores()
        lost, threshold = self._lowest(scores)
        for name, dropped in lost.items():
            if not dropped:
                continue
            keep = [i for i in range(self.ranks[name]) if i not in dropped]
            self.resize(name, torch.tensor(keep, dtype=torch.long, device="cpu"))
        added = self._grow([name for name in lost if not lost[name]], scores)
        after = {name: rank - len(lost[name]) + added[name] for name, rank in self.ranks.items()}
        return self.decided(step, after, "pruned and grown", threshold, scores)

    def _lowest(self, scores: Scores) -> tuple[dict[str, set[int]], float | None]:
        """The n_A lowest ranks of the network, by module, and the highest score among them."""
        order = sorted((float(value), name, i) for name, values in scores.items() for i, value in enumerate(values))
        lost: dict[str, set[int]] = {name: set() for name in scores}
        for _, name, i in order[: self.drop]:
            lost[name].add(i)
        return lost, order[min(self.drop, len(order)) - 1][0] if order and self.drop else None

    def _grow(self, untouched: list[str], scores: Scores) -> dict[str, int]:
        """Share n_A new ranks among the modules that lost none: evenly, the remainder to the highest mean score.

        A module without ranks has no score and comes last. Where one rank more would break a budget or exceed the
        layer's own size, that module gets none.
        """
        added = dict.fromkeys(self.ranks, 0)
        mean = {name: float(scores[name].mean()) if len(scores[name]) else float("-inf") for name in untouched}
        turn = sorted(untouched, key=lambda name: (-mean[name], name))
        for i in range(self.drop if turn else 0):
            name = turn[i % len(turn)]
            if self.run.has_room(name):
                self.resize(name, torch.arange(self.run.adapters[name].rank, device="cpu"), add=1)
                added[name] += 1
        return added


alora = lora.but(allocation=PruneAndGrow())
