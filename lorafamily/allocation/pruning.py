"""Pruning by sensitivity on a cubic schedule: AdaLoRA, sec. 3.3; LoRA² uses it too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafamily.allocation.allocator import Allocator, in_steps
from lorafamily.allocation.run import Run
from lorafamily.allocation.scored_allocation import ScoredAllocation
from lorafamily.allocation.scorer import Scorer, Scores
from lorafamily.errors import AllocationError
from lorafamily.history import Decision


@dataclass(frozen=True)
class ImportancePruning(ScoredAllocation):
    """From b0 slices in the whole network to b_T; the least important are pruned first, whatever module they are in.

    b(t) = b0 for t ≤ t_i;   b_T + (b0 − b_T) (1 − (t − t_i) / (T − t_f − t_i))³, truncated, every Δ_T steps;
    b_T for t > T − t_f. Until then a pruned slice is masked and may come back; then it is removed.

    `target` is b_T: a fraction of b0, or a whole number of slices a module on average. `warmup` (t_i), `final` (t_f)
    and `interval` (Δ_T) are fractions of the run or whole numbers of optimizer steps; the papers give steps for each
    data set, and the defaults are about the middle of these. For the scorer and its options see `ScoredAllocation`.
    """

    scorer: str = "sensitivity"
    target: float = 2 / 3
    warmup: float = 0.1
    final: float = 0.5
    interval: float = 0.01

    def allocator(self, run: Run) -> Allocator:
        return ImportancePruner(self, run)

    def end_share(self) -> float:
        return self.target if isinstance(self.target, float) else 1.0

    def slices_left(self, start: int, modules: int) -> int:
        """b_T for b0 = `start` slices in `modules` modules.

        Raises:
            AllocationError: `target` is neither a fraction nor a whole number, or more than `start`.
        """
        if isinstance(self.target, int) and self.target >= 0:
            left = self.target * modules
        elif isinstance(self.target, float) and 0 <= self.target <= 1:
            left = round(self.target * start)
        else:
            raise AllocationError(
                f"target={self.target!r}: must be a fraction in [0, 1] of the initial slices or a whole number of them "
                "a module"
            )
        if left > start:
            raise AllocationError(
                f"target={self.target} a module is {left} slices in all, but training begins with {start}; lower the "
                "target or raise the rank"
            )
        return left


class ImportancePruner(Allocator):
    """One run of `ImportancePruning`."""

    def __init__(self, settings: ImportancePruning, run: Run):
        super().__init__(run)
        self.start = sum(self.slices.values())
        self.target = settings.slices_left(self.start, len(self.slices))
        self.warmup = in_steps(settings.warmup, run.steps, "warmup")
        self.freeze = run.steps - in_steps(settings.final, run.steps, "final")
        self.interval = max(1, in_steps(settings.interval, run.steps, "interval"))
        if self.warmup >= self.freeze:
            raise AllocationError(
                f"nothing would ever be pruned: of {run.steps} steps the first {self.warmup} are warm-up and the last "
                f"{run.steps - self.freeze} keep the final pattern; train longer, or lower warmup or final"
            )
        self.scorer: Scorer = settings.make_scorer(run)
        if self.scorer.observes and self.freeze < 2:
            raise AllocationError(
                f"slices would be dropped before any gradient was observed: scores are updated only before step "
                f"{self.freeze} ({run.steps} steps less those of final); train longer, or lower final"
            )
        costs = [adapter.update.slice_cost for adapter in run.adapters.values() if adapter.slices]
        if run.limit is not None and self.target and costs and (needed := run.unsliced() + min(costs)) > run.limit:
            raise AllocationError(
                f"{run.limit:,} trainable parameters at the end cannot be met: {run.unsliced():,} belong to no slice "
                f"and are never pruned, and one slice makes it {needed:,}; start with a lower rank, or allow {needed:,}"
            )

    def observe(self, step: int) -> None:
        if step < self.freeze:
            super().observe(step)

    def decide(self, step: int) -> Decision | None:
        if step > self.freeze or step == self.run.steps:
            return self._settle(step)
        if step > self.warmup and step % self.interval == 0 and self.has_scores:
            return self._mask(step)
        return None

    def _mask(self, step: int) -> Decision:
        scores = self.scores()
        ahead = 1 - (step - self.warmup) / (self.freeze - self.warmup)
        slices = int(self.target + (self.start - self.target) * ahead**3)  # b(t)
        keep = self.highest(scores, slices, fit=False)
        for name, adapter in self.run.adapters.items():
            adapter.mask((~keep[name]).nonzero().squeeze(1).to(adapter.device))
        return self._recorded(step, keep, "masked by importance", scores)

    def _settle(self, step: int) -> Decision:
        scores = self.scores()
        keep = self.highest(scores, self.target)
        for name, kept in keep.items():
            self.resize(name, kept.nonzero().squeeze(1))
        self.settled = True
        return self._recorded(step, keep, "final pattern", scores)

    def _recorded(self, step: int, keep: dict[str, Tensor], reason: str, scores: Scores) -> Decision:
        pruned = torch.cat([scores[name][~kept] for name, kept in keep.items()])
        threshold = float(pruned.max()) if len(pruned) else None
        return self.record(step, {name: int(kept.sum()) for name, kept in keep.items()}, reason, threshold, scores)
