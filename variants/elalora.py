"""ElaLoRA (Chang et al. 2025, arXiv:2504.00254): ranks that shrink and grow.   ΔW = s · P diag(λ) Q, as AdaLoRA.

Slices are scored by AdaLoRA's smoothed sensitivity. Every Δ_T steps the b(t) lowest slices of the whole network are
pruned, and the b(t) matrices whose lowest slice scores highest grow by one each; b(t) falls cubically to 0. The total
rank stays what it was.
Trainable parameters: r (d_in + d_out + 1).   Axes: d_in, d_out of the weight; r = rank.

A new slice has λ = 0 and random vectors, so that the function does not change, and zero moments in the optimizer; all
other slices keep their moments. The authors' code makes a new optimizer at every exchange, which loses all moments,
while the schedule still drives the old one. A matrix of rank 0 has no lowest slice, and so is the last to grow.
"""

import math
from dataclasses import dataclass

from lorafamily.allocation.allocator import Allocator
from lorafamily.allocation.moving import CubicExchange, CubicExchanger, Slice
from lorafamily.allocation.run import Run
from lorafamily.allocation.scorer import Scores
from lorafamily.method import Method
from lorafamily.variants.adalora import SVD, adalora


@dataclass(frozen=True)
class LowestForHighest(CubicExchange):
    """As `CubicExchange`: the lowest slices go, and the matrices whose lowest slice scores highest gain one."""

    scorer: str = "sensitivity"

    def allocator(self, run: Run) -> Allocator:
        return LowestForHighestExchanger(self, run)


class LowestForHighestExchanger(CubicExchanger):
    """One run of `LowestForHighest`."""

    def order(self, scores: Scores) -> tuple[list[Slice], list[str]]:
        lowest = sorted((float(value), name, i) for name, values in scores.items() for i, value in enumerate(values))
        least = {name: float(values.min()) if len(values) else -math.inf for name, values in scores.items()}
        return [(name, i) for _, name, i in lowest], sorted(scores, key=lambda name: (-least[name], name))


elalora = Method(parametrisation=SVD, allocation=LowestForHighest(), penalty=adalora.penalty)
