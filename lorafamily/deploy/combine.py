"""Adding adapters up, and making them smaller."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.budget import Sizing, check_budgets, highest
from lorafamily.deploy.plain import PLAIN, place_plain, plain_adapters, sizing_of
from lorafamily.errors import StateError
from lorafamily.layers.extra_trained import extra_trained_values
from lorafamily.layers.placement import (
    Model,
    adapted,
    check_can_place,
    let_train,
    noted,
    placement_of,
    refuse_merged,
    state_of,
    targets_of,
)
from lorafamily.layers.state import Placement
from lorafamily.method import Method


def combine(model: Model, weights: Mapping[str, float], name: str) -> Model:
    """Place a new adapter whose update is the weighted sum of others, and make it the active one.

    Exact: the factors are put side by side, so ranks add up; `compress` makes them small again. What only one of them
    trained along with its adapters (a task head) comes along.

    Raises:
        StateError: an unknown name, a name that is taken, a merged model, or a head that several of them trained.
        MethodError: none of them has a rank left in any layer.
        TargetError: a layer cannot carry an adapter, as where it has an attribute "lorafamily" of its own.
    """
    if not weights:
        raise StateError('nothing to combine: give names with their weights, such as {"a": 0.7, "b": 0.3}')
    placements = {own: placement_of(model, own) for own in weights}
    check_can_place(model, name)
    owner, _ = noted(model)
    extra_trained = _extra_trained(owner, placements)
    layers = {at for placement in placements.values() for at in placement.adapters}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for at in layers:
        of_layer = [
            (weights[own], placement.adapters[at]) for own, placement in placements.items() if at in placement.adapters
        ]
        with torch.no_grad():
            both = [(weight * adapter.scale, *adapter.factors()) for weight, adapter in of_layer]
        factors[at] = torch.cat([s * U for s, U, _ in both], 1), torch.cat([V for _, _, V in both], 0)
    rank = max(len(V) for _, V in factors.values())
    scales, options = dict.fromkeys(layers, 1.0), {"alpha": rank}
    return place_plain(model, name, targets_of(owner), factors, scales, extra_trained, rank=rank, options=options)


@dataclass(frozen=True)
class Compressed:
    """What `compress` did to one layer. `norm`: ‖ΔW‖_F before; `error`: ‖ΔW − ΔW′‖_F / ‖ΔW‖_F, 0 where ΔW is zero."""

    module: str
    rank_before: int
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
    """Replace an adapter (default: the active one) in place by plain LoRA of lower rank, the best there is; reports by
    layer, and the error in all.

    The singular values of U V come from the QR factors of U and V, an m × m matrix; no d_out × d_in one is formed.

    Two of the arguments cut every layer for itself, two cut once through the singular values σ of all layers together:
    what is left then goes where ΔW needs it, after training, as PARA (arXiv:2604.27796) and LoRA-Squeeze
    (arXiv:2602.10993) do.

    Args:
        rank: of every layer at most.
        energy: share of ‖ΔW‖²_F that every layer keeps at least, in (0, 1]; the rank follows from it.
        budget: trainable adapter parameters of all layers. The σ² / (d_in + d_out) highest stay: what a parameter is
            worth, since a slice of a wide layer costs more of them. One that does not fit into the rest is passed over.
        rank_budget: rank slices of all layers; the σ highest stay.

    Raises:
        StateError: unknown name, a merged model, or not just one of the four.
        BudgetError: a budget that is no positive number, or less than the cheapest slice.
    """
    placement = placement_of(model, name)
    refuse_merged(state_of(model))
    method, sizing, adapters, report = compressed(placement.adapters, Cut(rank, energy, budget, rank_budget))
    placement.spec, placement.method, placement.sizing = PLAIN, method, sizing
    _replace_adapters(model, placement, adapters)
    return report


@dataclass(frozen=True)
class Cut:
    """Where to cut the singular values, see `compress`.

    Raises:
        StateError: not just one is given, or it is out of its range.
        BudgetError: it is no budget.
    """

    rank: int | None = None
    energy: float | None = None
    budget: float | None = None
    rank_budget: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            said = ", ".join(f"{name}={value!r}" for name, value in (given or vars(self)).items())
            raise StateError(f"{said}: give one of them")
        rank, energy = self.rank, self.energy
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise StateError(f"rank={rank!r}: must be a whole number of at least 1")
        if energy is not None and not 0 < energy <= 1:
            raise StateError(f"energy={energy!r}: must be a share in (0, 1]")
        check_budgets(self.budget, self.rank_budget)

    def __call__(self, values: Mapping[str, Tensor], costs: Mapping[str, int]) -> dict[str, int]:
        """How many singular values every layer keeps. `values`: in falling order, without those that are rounding;
        `costs`: trainable parameters of one slice."""
        if self.rank is not None:
            return {at: min(self.rank, len(S)) for at, S in values.items()}
        if self.energy is not None:
            kept = {}
            for at, S in values.items():
                left = S.square().flip(0).cumsum(0).flip(0)  # left[i]: energy of what falls if i values are kept
                kept[at] = int((left > (1 - self.energy) * left[:1]).sum())
            return kept
        if self.budget is not None:
            worth = {at: S.square() / costs[at] for at, S in values.items()}
            return highest(worth, lambda at, n: n * costs[at], self.budget)
        assert self.rank_budget is not None
        return highest(values, lambda at, n: n, self.rank_budget)


def compressed(adapters: Mapping[str, Adapter], cut: Cut) -> tuple[Method, Sizing, dict[str, Adapter], Compression]:
    """Plain LoRA adapters in the place of others, see `compress`.

    Raises:
        BudgetError: less than the cheapest slice.
    """
    decomposed = {at: adapter.svd() for at, adapter in adapters.items()}
    real = {at: S[S[:1] * 1e-12 < S] for at, (_, S, _) in decomposed.items()}
    kept = cut(real, {at: a.update.d_in + a.update.d_out for at, a in adapters.items()})
    factors, report = {}, Compression()
    for at, adapter in adapters.items():
        (Q, S, K), n = decomposed[at], kept[at]
        norm = float(S.norm())
        error = float(S[n:].norm()) / norm if norm else 0.0
        root, dtype = S[:n].sqrt(), next(adapter.update.parameters()).dtype
        factors[at] = (Q[:, :n] * root).to(dtype), (root[:, None] * K[:n]).to(dtype)
        report.append(Compressed(at, adapter.rank, n, norm, error))
    largest = max([1, *(row.rank_after for row in report)])
    dropout = next(iter(adapters.values())).dropout  # of all of them
    method, made = plain_adapters(factors, dict.fromkeys(factors, 1.0), dropout=dropout, options={"alpha": largest})
    sizing = sizing_of(made, largest)
    budget = None if cut.budget is None else math.floor(cut.budget)
    return method, replace(sizing, budget=budget, rank_budget=cut.rank_budget), made, report


def _replace_adapters(model: nn.Module, placement: Placement, adapters: dict[str, Adapter]) -> None:
    """Replace the adapters of a placement."""
    owner, state = adapted(model)
    targets = targets_of(owner)
    for path, adapter in adapters.items():
        targets[path].site.put(targets[path].part, targets[path].kind, placement.name, adapter)
    placement.adapters = adapters
    let_train(owner, placement, state.active == placement.name)


def _extra_trained(model: nn.Module, placements: Mapping[str, Placement]) -> dict[str, Tensor]:
    extra_trained: dict[str, Tensor] = {}
    owner, state = adapted(model)
    for placement in placements.values():
        for at, value in extra_trained_values(owner, state, placement).items():
            if at in extra_trained:
                raise StateError(
                    f"{at} was trained with several of these adapters; which of them counts is not defined"
                )
            extra_trained[at] = value.clone()
    return extra_trained
