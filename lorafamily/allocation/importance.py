"""Pruning by sensitivity on a cubic schedule: AdaLoRA sec. 3.3, taken over by LoRA²."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafamily.allocation.allocator import Allocation, Allocator, in_steps
from lorafamily.allocation.run import Run
from lorafamily.allocation.scorer import Scorer
from lorafamily.allocation.scores import Sensitivity, scorer_named
from lorafamily.errors import AllocationError
from lorafamily.history import Decision


@dataclass(frozen=True)
class ImportancePruning(Allocation):
    """Start with b0 slices in all, end with b_T, the least important leaving first, over all modules at once.

    b(t) = b0 for t ≤ t_i;   b_T + (b0 − b_T) (1 − (t − t_i) / (T − t_f − t_i))³, truncated, every Δ_T steps;
    b_T for t > T − t_f. Until then a pruned slice is masked and may come back; from then on it is gone.

    `scores` names the scorer, see `SCORERS`; `beta1`, `beta2` smooth the sensitivity and belong to it alone.
    `target` is b_T: a fraction of b0, or a whole number of slices a module on average. `warmup` (t_i), `final` (t_f)
    and `interval` (Δ_T) are fractions of the run or whole numbers of optimiser steps; the papers give steps for one
    data set each, of which these are the rounded middle.
    """

    target: float = 2 / 3
    warmup: float = 0.1
    final: float = 0.5
    interval: float = 0.01
    scores: str = "sensitivity"
    beta1: float = 0.85
    beta2: float = 0.85

    def begin(self, run: Run) -> Allocator:
        return ImportancePruner(self, run)

    def end_share(self) -> float:
        return self.target if isinstance(self.target, float) else 1.0

    def slices_left(self, start: int, modules: int) -> int:
        """b_T for b0 = `start` slices in `modules` modules.

        Raises:
            AllocationError: `target` is neither a share nor a whole number, or more than there is.
        """
        if isinstance(self.target, int) and self.target >= 0:
            left = self.target * modules
        elif isinstance(self.target, float) and 0 <= self.target <= 1:
            left = round(self.target * start)
        else:
            raise AllocationError(
                f"target={self.target!r}: must be a fraction of the start rank in [0, 1] or a whole number of slices "
                f"a module"
            )
        if left > start:
            raise AllocationError(
                f"target={self.target} a module is {left} slices in all, but the start has {start}; "
                f"lower the target or raise the rank"
            )
        return left


class ImportancePruner(Allocator):
    """One run of `ImportancePruning`."""

    def __init__(self, settings: ImportancePruning, run: Run):
        super().__init__(run)
        self.start = sum(self.ranks.values())
        self.target = settings.slices_left(self.start, len(self.ranks))
        self.warmup = in_steps(settings.warmup, run.steps, "warmup")
        self.freeze = run.steps - in_steps(settings.final, run.steps, "final")
        self.interval = max(1, in_steps(settings.interval, run.steps, "interval"))
        if self.warmup >= self.freeze:
            raise AllocationError(
                f"nothing would ever be pruned: of {run.steps} steps the first {self.warmup} are warm-up and the last "
                f"{run.steps - self.freeze} keep the final pattern; train longer, or lower warmup or final"
            )
        if settings.scores == "sensitivity":
            self.scorer: Scorer = Sensitivity(run, settings.beta1, settings.beta2)
        elif (settings.beta1, settings.beta2) != (ImportancePruning.beta1, ImportancePruning.beta2):
            raise AllocationError(
                f"beta1 and beta2 smooth the sensitivity; scores={settings.scores!r} has no use for them"
            )
        else:
            self.scorer = scorer_named(settings.scores, run)

    def step(self, step: int) -> Decision | None:
        if self.settled:
            return None
        if step < self.freeze:
            self.scorer.observe()
        if step > self.freeze or step == self.run.steps:
            return self._settle(step)
        if step > self.warmup and step % self.interval == 0:
            return self._mask(step)
        return None

    def slices_at(self, step: int) -> int:
        """b(t)."""
        if step <= self.warmup:
            return self.start
        if step > self.freeze:
            return self.target
        ahead = 1 - (step - self.warmup) / (self.freeze - self.warmup)
        return int(self.target + (self.start - self.target) * ahead**3)

    def _mask(self, step: int) -> Decision:
        keep, threshold, scores = self._survivors(self.slices_at(step))
        for name, adapter in self.run.adapters.items():
            adapter.mask((~keep[name]).nonzero().squeeze(1).to(adapter.device))
        after = {name: int(kept.sum()) for name, kept in keep.items()}
        return self.decided(step, after, "masked by importance", threshold, scores)

    def _settle(self, step: int) -> Decision:
        keep, threshold, scores = self._survivors(self.target)
        self._fit_limit(keep, scores)
        for name, kept in keep.items():
            self.resize(name, kept.nonzero().squeeze(1))
        self.settled = True
        after = {name: int(kept.sum()) for name, kept in keep.items()}
        return self.decided(step, after, "final pattern", threshold, scores)

    def _survivors(self, slices: int) -> tuple[dict[str, Tensor], float | None, dict[str, Tensor]]:
        """The `slices` most important slices as masks by module, the highest score that falls, and all scores.

        The order is total (equal scores fall in order of the modules), so ties never prune more than asked.
        """
        scores = self.scores()
        flat = torch.cat(list(scores.values()))
        falling = flat.argsort(stable=True)[: len(flat) - slices]
        keep = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
        keep[falling] = False
        threshold = float(flat[falling[-1]]) if len(falling) else None
        masks = dict(zip(scores, keep.split([len(s) for s in scores.values()]), strict=True))
        return masks, threshold, scores

    def _fit_limit(self, keep: dict[str, Tensor], scores: dict[str, Tensor]) -> None:
        """Slices differ in cost between modules: drop more, least important first, until the budget holds."""
        if self.run.limit is None:
            return
        adapters = self.run.adapters
        spent = sum(a.trainable() - int((~keep[name]).sum()) * a.update.slice_cost for name, a in adapters.items())
        candidates = sorted((float(scores[n][i]), n, int(i)) for n in keep for i in keep[n].nonzero())
        for _, name, index in candidates:
            if spent <= self.run.limit:
                return
            keep[name][index] = False
            spent -= adapters[name].update.slice_cost
