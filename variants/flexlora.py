"""FlexLoRA (arXiv:2601.22905): ranks by the entropy of singular values.   ΔW = s · P diag(λ) Q, as AdaLoRA.

With s_i = λ_i² / Σ λ² a matrix scores   H = −Σ s_i log s_i / log r,   from 0 (all but one are zero) to 1 (all
are equal). Every Δ_T steps the b(t) matrices with the lowest H lose the slice of their smallest |λ|, and the b(t)
matrices with the highest H gain one; b(t) falls cubically to 0.
Trainable parameters: r (d_in + d_out + 1).   Axes: d_in, d_out of the weight; r = rank.

The formula is 0 / 0 at r = 1 and where all λ are zero. Here H = 1 at r = 1, as for r equal λ at any r. H = 0 where all
λ are zero, since the matrix has learnt nothing, and at rank 0, where it is the last to gain and cannot lose. A single
λ_i = 0 adds nothing to the sum. The authors' code gives NaN at r = 1, which its `topk` then prefers; it prunes by the
signed λ; and its code for text generation never tells the optimizer which matrices changed.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lorafamily.allocation.allocator import Allocator
from lorafamily.allocation.moving import CubicExchange, CubicExchanger, Slice
from lorafamily.allocation.run import Run
from lorafamily.allocation.scorer import Scores
from lorafamily.method import Method
from lorafamily.variants.adalora import SVD, adalora


def entropy(singular: Float[Tensor, " r"]) -> float:
    """H, where the formula leaves it open as decided above."""
    total = float(singular.square().sum())
    if not total:
        return 0.0
    if len(singular) == 1:
        return 1.0
    return float(torch.special.entr(singular.square() / total).sum()) / math.log(len(singular))


@dataclass(frozen=True)
class EvenForUneven(CubicExchange):
    """As `CubicExchange`: matrices with uneven singular values lose, those with even ones gain. Scores of slices are
    taken for |λ|: "singular" gives |λ|, or the slices' norms where a parametrisation has no singular values."""

    scorer: str = "singular"

    def allocator(self, run: Run) -> Allocator:
        return EvenForUnevenExchanger(self, run)


class EvenForUnevenExchanger(CubicExchanger):
    """One run of `EvenForUneven`."""

    def order(self, scores: Scores) -> tuple[list[Slice], list[str]]:
        H = {name: entropy(values) for name, values in scores.items()}
        rising = sorted((name for name in scores if len(scores[name])), key=lambda name: (H[name], name))
        smallest = [(name, int(scores[name].argmin())) for name in rising]
        return smallest, sorted(scores, key=lambda name: (-H[name], name))


flexlora = Method(parametrisation=SVD, allocation=EvenForUneven(), penalty=adalora.penalty)
