"""GoRA (He et al. 2025, arXiv:2502.12171): ranks and initialisation from gradients.   ΔW = s · B A,   s = alpha / √r.

G is the mean gradient of W over some batches before training. Ranks: a layer's importance is I = mean |W ⊙ G|, its
share is a = I / ΣI; with b = Σ √(d_in + d_out) r_ref over all layers,
    r = clip(round(b a / √(d_in + d_out)), r_min, r_max),
where r_ref is the rank that all layers would have if ranks were equal, and r_min, r_max are r_ref / 2 and 4 r_ref (the
paper: 4 and 32 for 8). Initialisation: A is random,
    B = −ξ (G Aᵀ)(A Aᵀ)⁻¹,   ξ = γ √d_in / alpha,
so that B A / ξ is the best approximation of −G with A's rows, and s B A, about as large as γ G, a step down the
gradient.
Trainable parameters: r (d_in + d_out).   Axes: d_in, d_out of the weight; r = rank.

As published, B A is not subtracted: the adapted model does not start equal to the base, but a step ahead of it.
`keep_step=False` subtracts a frozen copy instead. The authors' code misses the budget by up to a tenth; here the budget
is never exceeded.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lorafamily.errors import BudgetError, MethodError
from lorafamily.evidence import LayerEvidence, Wanted
from lorafamily.method import FromEvidence, Room
from lorafamily.parametrisation import Parametrisation
from lorafamily.variants.lora import kaiming_uniform, rslora


@dataclass(frozen=True)
class GradientStart(FromEvidence):
    """`rank_min`, `rank_max`: r_min and r_max, None for the paper's. `step`: γ. `keep_step`: whether the adapted model
    starts a step ahead, as published, or equal to the base."""

    wants: ClassVar[tuple[Wanted, ...]] = ("gradients",)

    rank_min: int | None = None
    rank_max: int | None = None
    step: float = 0.05
    keep_step: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank_min", "rank_max"):
            bound = getattr(self, name)
            if bound is not None and (not isinstance(bound, int) or isinstance(bound, bool) or bound < 0):
                raise MethodError(f"{name}={bound!r}: must be a whole number from 0 on, or None")
        if not isinstance(self.step, int | float) or not 0 < self.step < math.inf:
            raise MethodError(f"step={self.step!r}: must be a positive number, γ of the paper")

    def freezes(self) -> bool:
        return not self.keep_step

    def bounds(self, layer: str, room: Room) -> tuple[int, int]:
        """r_min and r_max of a layer, within its size.

        Raises:
            MethodError: r_min is above r_max.
        """
        low = max(1, room.rank // 2) if self.rank_min is None else self.rank_min
        high = 4 * room.rank if self.rank_max is None else self.rank_max
        if low > high:
            raise MethodError(f"rank_min={low} is more than rank_max={high}")
        return min(low, room.largest(layer)), min(high, room.largest(layer))

    def shares(self, evidence: Mapping[str, LayerEvidence], room: Room) -> dict[str, float]:
        """b a / √(d_in + d_out) for every layer, which is then rounded and clipped to a rank."""
        importance = {}
        for name, layer in evidence.items():
            assert layer.gradient is not None
            W = room.weight(name).to(layer.gradient.device, layer.gradient.dtype)
            importance[name] = float((W * layer.gradient).abs().mean(dtype=torch.float64))
        total = sum(importance.values()) or 1.0
        root = {name: math.sqrt(sum(room.shapes[name])) for name in evidence}
        b = sum(root.values()) * room.rank
        return {name: b * importance[name] / total / root[name] for name in evidence}

    def ranks(self, evidence: Mapping[str, LayerEvidence], room: Room) -> dict[str, int]:
        """The paper's ranks, made to fit if there is a budget: while they exceed it, the layer whose rank is most above
        its share loses one; then the layer whose rank is most below its share gains one, until none fits.

        Raises:
            BudgetError: r_min in every layer exceeds the budget.
        """
        shares = self.shares(evidence, room)
        bounds = {name: self.bounds(name, room) for name in shares}
        ranks = {name: min(max(round(share), bounds[name][0]), bounds[name][1]) for name, share in shares.items()}
        if not room.exact:
            return ranks
        spent = sum(room.cost(name, rank) for name, rank in ranks.items())

        def missing(name: str) -> float:
            return shares[name] - ranks[name]

        while spent > room.limit:
            less = [name for name, rank in ranks.items() if rank > bounds[name][0]]
            if not less:
                raise BudgetError(f"rank_min everywhere costs {spent:,}, more than {room.limit:,}; lower rank_min")
            name = min(less, key=missing)
            spent -= room.cost(name, ranks[name]) - room.cost(name, ranks[name] - 1)
            ranks[name] -= 1
        while True:
            more = {
                name: cost
                for name, rank in ranks.items()
                if rank < bounds[name][1]
                and (cost := room.cost(name, rank + 1) - room.cost(name, rank)) <= room.limit - spent
            }
            if not more:
                return ranks
            name = max(more, key=missing)
            spent, ranks[name] = spent + more[name], ranks[name] + 1

    def fill(
        self,
        update: Parametrisation,
        weight: Float[Tensor, "d_out d_in"],
        generator: torch.Generator,
        evidence: LayerEvidence,
        scale: float,
    ) -> None:
        assert evidence.gradient is not None
        dtype = torch.promote_types(weight.dtype, torch.float32)
        r = update.capacity
        A = kaiming_uniform(r, update.d_in, generator, dtype)
        G = evidence.gradient.to(A)
        alpha = scale * math.sqrt(r)
        B = -self.step * math.sqrt(update.d_in) / alpha * torch.linalg.solve(A @ A.T, A @ G.T).T
        update.represent(B, A)


gora = rslora.but(initialisation=GradientStart(), scaling="alpha/sqrt(r)")
