"""ALoRA (Liu et al. 2024, arXiv:2403.16187): allocating LoRA.   z = x Wᴬ G Wᴮ,   G = diag(g), g ∈ {0, 1}.

Every module has the same rank at first, so the budget is met from the first step and nothing larger is ever allocated.
After K1 steps, N_A times, K2 steps apart (sec. 3.4): score every rank, drop the n_A lowest of the whole network, and
give n_A new ones to the modules that lost none; where these cannot take so many, fewer are dropped. AB-LoRA (sec. 3.3)
scores rank i by what the network M loses without it and what it is worth alone,
    IS(i) = S(M) − S(M∖i) + S(M_i),
where S is minus the loss on validation samples. A gate that is 0 stays 0, so a dropped rank is removed; a gate that is
1 is a factor of 1. Hence the update itself is plain LoRA, and gates exist only while ranks are scored.

Not to be confused with Activated LoRA (arXiv:2504.12397), which some servers call "aLoRA".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorafamily.allocation.allocator import Allocator, in_steps
from lorafamily.allocation.moving import Slice, move_slices, slices_to_move
from lorafamily.allocation.run import Run
from lorafamily.allocation.scored_allocation import ScoredAllocation
from lorafamily.allocation.scorer import Scorer, Scores
from lorafamily.errors import AllocationError
from lorafamily.history import Decision
from lorafamily.names import modules_per_block
from lorafamily.variants.lora import lora


@dataclass(frozen=True)
class PruneAndGrow(ScoredAllocation):
    """`scorer`: "exact" is AB-LoRA (about one forward per rank), "first-order" its estimate (two backwards in all);
    `lorafamily.scorers()` names others for comparison. `rounds` is N_A. `scoring_rows`: how many validation samples
    ranks are scored on; `scoring_memory`: MiB of activations for the ablations in one batch; see `Ablation`.

    `warmup` (K1) and `interval` (K2) are fractions of the run or whole numbers of optimizer steps; the paper's 1 and
    0.25 epochs are a tenth and a fortieth of its ten. `drop` is n_A; None takes the paper's, the number of adapted
    modules in one transformer block, the largest where blocks differ (T5's decoder blocks have 10, its encoder's 6).
    """

    scorer: str = "exact"
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
        self.scorer: Scorer = settings.make_scorer(run)
        self.drop = modules_per_block(run.adapters) if settings.drop is None else settings.drop
        if self.drop < 1:
            raise AllocationError(f"drop={settings.drop!r}: must be at least 1 rank per round")
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
        drop, gain = self._order(scores)
        lost, gains = slices_to_move(self.run, drop, gain, self.drop)
        dropped = [float(scores[name][i]) for name, of in lost.items() for i in of]
        threshold = max(dropped) if dropped else None
        return self.record(step, move_slices(self, lost, gains), "pruned and grown", threshold, scores)

    def _order(self, scores: Scores) -> tuple[list[Slice], list[str]]:
        """Slices from the lowest score up; modules from the highest mean score down, last those without slices."""
        order = sorted((float(value), name, i) for name, values in scores.items() for i, value in enumerate(values))
        mean = {name: float(values.mean()) if len(values) else -math.inf for name, values in scores.items()}
        return [(name, i) for _, name, i in order], sorted(scores, key=lambda name: (-mean[name], name))


alora = lora.but(allocation=PruneAndGrow())
