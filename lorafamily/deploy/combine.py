"""Sums of adapters, and adapters of lower rank."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.budget import Sizing, check_budgets, highest
from lorafamily.deploy.plain import PLAIN, place_plain, plain_adapters
from lorafamily.deploy.writable import refuse_not_finite
from lorafamily.errors import StateError
from lorafamily.layers.extra_trained import extra_trained_values
from lorafamily.layers.placement import (
    Model,
    adapted,
    check_can_place,
    let_train,
    placement_of,
    refuse_merged,
    targets_of,
)
from lorafamily.method import Method


@torch.no_grad()
def combine(model: Model, weights: Mapping[str, float], name: str) -> Model:
    """Place a new adapter whose update is the weighted sum of others, and make it the active one.

    The sum is exact: the factors are put side by side, so ranks add up; `compress` lowers them again. The new adapter
    also gets the extra trained parameters (a task head) that only one of the others has.

    Raises:
        StateError: an unknown name, a name that is taken, a merged model, a head that several of them trained, or a
            weight or a factor of the sum that is not finite.
        MethodError: none of them has a rank left in any layer.
        TargetError: a layer cannot carry an adapter, for example because it has an attribute "lorafamily" of its own.
    """
    if not weights:
        raise StateError('nothing to combine: give names with their weights, such as {"a": 0.7, "b": 0.3}')
    placements = [placement_of(model, summand) for summand in weights]
    for summand, weight in weights.items():
        if not math.isfinite(weight):
            raise StateError(f'the weight of "{summand}" is {weight}: it must be a finite number')
    owner = check_can_place(model, name)
    _, state = adapted(owner)
    extra_trained: dict[str, Tensor] = {}
    for placement in placements:
        values = extra_trained_values(owner, state, placement)
        if twice := [at for at in values if at in extra_trained]:
            raise StateError(
                f"{twice[0]} was trained with several of these adapters; which of them counts is not defined"
            )
        extra_trained |= {at: value.clone() for at, value in values.items()}
    U_of: dict[str, list[Tensor]] = defaultdict(list)
    V_of: dict[str, list[Tensor]] = defaultdict(list)
    for weight, placement in zip(weights.values(), placements, strict=True):
        for at, adapter in placement.adapters.items():
            U, V = adapter.factors()
            U_of[at].append(weight * adapter.scale * U)
            V_of[at].append(V)
    factors = {at: (torch.cat(U_of[at], 1), torch.cat(V_of[at], 0)) for at in U_of}
    both = {f"{at} ({which})": factor for at, (U, V) in factors.items() for which, factor in (("U", U), ("V", V))}
    refuse_not_finite(both, "a weight is too large for the dtype of the factors, or a summand is not finite itself")
    rank = max(len(V) for _, V in factors.values())
    scales, options = dict.fromkeys(factors, 1.0), {"alpha": rank}
    return place_plain(model, name, targets_of(owner), factors, scales, extra_trained, rank=rank, options=options)


@dataclass(frozen=True)
class Compressed:
    """What `compress` did to one layer. `norm`: ‖ΔW‖_F before; `error`: ‖ΔW − ΔW′‖_F / ‖ΔW‖_F, 0 where ΔW is zero."""

    module: str
    slices_before: int
    rank_after: int
    norm: float
    error: float


class Compression(list[Compressed]):
    """What `compress` did, by layer."""

    @property
    def error(self) -> float:
        """‖ΔW − ΔW′‖_F / ‖ΔW‖_F, the ΔW of all layers taken together; 0 where they are zero."""
        whole = math.hypot(*(row.norm for row in self))
        return math.hypot(*(row.error * row.norm for row in self)) / whole if whole else 0.0


def compress(
    model: nn.Module,
    name: str | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: float | None = None,
    rank_budget: int | None = None,
) -> Compression:
    """Replace an adapter (default: the active one) in place by the best plain LoRA of lower rank; returns the error by
    layer and in all.

    The singular values of U V come from an m × m matrix, the product of the R factors of U and V; no d_out × d_in
    matrix is formed.

    `rank` and `energy` cut every layer by itself. `budget` and `rank_budget` compare the singular values σ of all
    layers, so that the layers whose ΔW needs rank keep it, as PARA (arXiv:2604.27796) and LoRA-Squeeze
    (arXiv:2602.10993) do after training.

    Args:
        rank: the largest that a layer keeps.
        energy: the share of ‖ΔW‖²_F in (0, 1] that every layer keeps at least; the rank follows from it.
        budget: trainable adapter parameters of all layers. A slice counts by σ² / (d_in + d_out), its worth per
            parameter, and the highest stay; one that does not fit into what is left of the budget is skipped.
        rank_budget: rank slices of all layers; those with the highest σ stay.

    Raises:
        StateError: an unknown name, a merged model, or not exactly one of the four.
        BudgetError: a budget that is no positive number, or less than the cheapest slice.
    """
    placement, (owner, state) = placement_of(model, name), adapted(model)
    refuse_merged(state)
    method, sizing, adapters, report = compressed(placement.adapters, Cut(rank, energy, budget, rank_budget))
    placement.spec, placement.method, placement.sizing, placement.adapters = PLAIN, method, sizing, adapters
    targets = targets_of(owner)
    for path, adapter in adapters.items():
        targets[path].site.put(targets[path].part, targets[path].kind, placement.name, adapter)
    let_train(owner, placement, state.active == placement.name)
    return report


@dataclass(frozen=True)
class Cut:
    """Where to cut the singular values: the arguments of `compress`, whose errors it raises."""

    rank: int | None = None
    energy: float | None = None
    budget: float | None = None
    rank_budget: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            arguments = ", ".join(f"{name}={value!r}" for name, value in (given or vars(self)).items())
            raise StateError(f"{arguments}: give one of them")
        rank, energy = self.rank, self.energy
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise StateError(f"rank={rank!r}: must be a whole number of at least 1")
        if energy is not None and not 0 < energy <= 1:
            raise StateError(f"energy={energy!r}: must be a share in (0, 1]")
        check_budgets(self.budget, self.rank_budget)

    def __call__(self, values: Mapping[str, Tensor], costs: Mapping[str, int]) -> dict[str, int]:
        """How many singular values every layer keeps. `values`: in falling order, without those that are rounding
        errors; `costs`: trainable parameters of one slice."""
        if self.rank is not None:
            return {at: min(self.rank, len(S)) for at, S in values.items()}
        if self.energy is not None:
            kept = {}
            for at, S in values.items():
                left = S.square().flip(0).cumsum(0).flip(0)  # left[i]: energy lost if i values are kept
                kept[at] = int((left > (1 - self.energy) * left[:1]).sum())
            return kept
        if self.budget is not None:
            worth = {at: S.square() / costs[at] for at, S in values.items()}
            return highest(worth, lambda at, n: n * costs[at], self.budget)
        assert self.rank_budget is not None
        return highest(values, lambda at, n: n, self.rank_budget)


def compressed(adapters: Mapping[str, Adapter], cut: Cut) -> tuple[Method, Sizing, dict[str, Adapter], Compression]:
    """The method, sizing, adapters and report of `compress`, whose errors it raises."""
    decomposed = {at: adapter.svd() for at, adapter in adapters.items()}
    real = {at: S[S[:1] * 1e-12 < S] for at, (_, S, _) in decomposed.items()}
    kept = cut(real, {at: a.update.d_in + a.update.d_out for at, a in adapters.items()})
    factors, report = {}, Compression()
    for at, adapter in adapters.items():
        (left, S, right), n = decomposed[at], kept[at]
        norm = float(S.norm())
        error = float(S[n:].norm()) / norm if norm else 0.0
        root, dtype = S[:n].sqrt(), next(adapter.update.parameters()).dtype
        factors[at] = (left[:, :n] * root).to(dtype), (root[:, None] * right[:n]).to(dtype)
        report.append(Compressed(at, adapter.slices, n, norm, error))
    largest = max([1, *(row.rank_after for row in report)])
    dropout = next(iter(adapters.values())).dropout  # the same for all of them
    method, made = plain_adapters(factors, dict.fromkeys(factors, 1.0), dropout=dropout, options={"alpha": largest})
    budget = None if cut.budget is None else math.floor(cut.budget)
    parameters = sum(adapter.trainable() for adapter in made.values())
    return method, Sizing(budget, "peak", largest, parameters, cut.rank_budget), made, report
