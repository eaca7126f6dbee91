"""FlexLoRA (arXiv:2601.22905): ranks by the entropy of singular values.   ΔW = s · P diag(λ) Q, as AdaLoRA.

With s_i = λ_i² / Σ λ² a matrix scores   H = −Σ s_i log s_i / log r,   from 0 (one direction has all) to 1 (all have the
same). Every Δ_T steps the b(t) matrices with the lowest H lose the slice of their smallest |λ|, and the b(t) with the
highest gain one; b(t) falls cubically to 0.
Trainable parameters: r (d_in + d_out + 1).   Axes: d_in, d_out of the weight; r = rank.

The formula is 0 / 0 at r = 1 and where all λ are zero. Here one slice is used evenly, H = 1, as r equal ones are for
any r; λ = 0 throughout has learnt nothing and asks for nothing, H = 0, and so has a matrix of rank 0, which is last to
gain and cannot lose. λ_i = 0 alone adds nothing to the sum. The authors' code is NaN at r = 1, which its `topk` then
prefers; prunes by the signed λ; and, for text generation, never tells the optimiser of matrices that changed.
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
    """H, with the cases that the formula leaves open decided as above."""
    total = float(singular.square().sum())
    if not total:
        return 0.0
    if len(singular) == 1:
        return 1.0
    return float(torch.special.entr(singular.square() / total).sum()) / math.log(len(singular))


@dataclass(frozen=True)
class EvenForUneven(CubicExchange):
    """As `CubicExchange`; matrices whose singular values are uneven lose, those whose are even gain. The scores of
    slices stand for |λ|: "singular" gives them, and of parametrisations without singular values the slices' norms."""

    scorer: str = "singular"

    def allocator(self, run: Run) -> Allocator:
        return EvenForUnevenExchanger(self, run)


class EvenForUnevenExchanger(CubicExchanger):
    """One run of `EvenForUneven`."""

    def order(self, scores: Scores) -> tuple[list[Slice], list[str]]:
        H = {name: entropy(values) for name, values in scores.items()}
        rising = sorted((name for name in scores if len(scores[name])), key=lambda name: (H[name], name))
        return [(name, int(scores[name].argmin())) for name in rising], sorted(
            scores, key=lambda name: (-H[name], name)
        )


flexlora = Method(parametrisation=SVD, allocation=EvenForUneven(), penalty=adalora.penalty)
