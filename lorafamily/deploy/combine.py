"""Adding adapters up, and making them smaller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.beside import trained_beside
from lorafamily.budget import Sizing
from lorafamily.deploy.plain import PLAIN, place_plain, plain_adapters, sizing_of
from lorafamily.errors import StateError
from lorafamily.method import Method
from lorafamily.placement import (
    Model,
    Placement,
    check_can_place,
    let_train,
    noted,
    placement_of,
    refuse_merged,
    state_of,
    targets_of,
)
from lorafamily.site import site_on


def combine(model: Model, weights: Mapping[str, float], name: str) -> Model:
    """Place a new adapter whose update is the weighted sum of others, and make it the active one.

    Exact: the factors are put side by side, so ranks add up; `compress` makes them small again. What only one of them
    trained beside its adapters (a task head) comes along.

    Raises:
        StateError: an unknown name, a name that is taken, a merged model, or a head that several of them trained.
        MethodError: none of them has a rank left in any layer.
        TargetError: a layer cannot carry an adapter, as where it has an attribute "lorafamily" of its own.
    """
    if not weights:
        raise StateError('nothing to combine: give names with their weights, such as {"a": 0.7, "b": 0.3}')
    parts = {own: placement_of(model, own) for own in weights}
    check_can_place(model, name)
    owner, _ = noted(model)
    beside = _beside(owner, parts)
    layers = {at for part in parts.values() for at in part.adapters}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for at in layers:
        of_layer = [(weights[own], part.adapters[at]) for own, part in parts.items() if at in part.adapters]
        with torch.no_grad():
            both = [(weight * adapter.scale, *adapter.factors()) for weight, adapter in of_layer]
        factors[at] = torch.cat([s * U for s, U, _ in both], 1), torch.cat([V for _, _, V in both], 0)
    rank = max(len(V) for _, V in factors.values())
    return place_plain(
        model, name, targets_of(owner), factors, dict.fromkeys(layers, 1.0), beside, rank=rank, options={"alpha": rank}
    )


@dataclass(frozen=True)
class Compressed:
    """What `compress` did to one layer. `error`: ‖ΔW − ΔW′‖_F / ‖ΔW‖_F, 0 where ΔW is zero."""

    module: str
    rank_before: int
    rank_after: int
    error: float


def compress(
    model: nn.Module, name: str | None = None, *, rank: int | None = None, energy: float | None = None
) -> list[Compressed]:
    """Replace an adapter (default: the active one) in place by plain LoRA of the best lower rank; reports by layer.

    The singular values of U V come from the QR factors of U and V, an m × m matrix; no d_out × d_in one is formed.

    Args:
        rank: of every layer at most.
        energy: share of ‖ΔW‖²_F that every layer keeps at least, in (0, 1]; the rank follows from it.

    Raises:
        StateError: unknown name, a merged model, or not just one of `rank` and `energy`.
    """
    placement = placement_of(model, name)
    refuse_merged(state_of(model))
    method, sizing, adapters, report = compressed(placement.adapters, rank, energy)
    placement.spec, placement.method, placement.sizing = PLAIN, method, sizing
    _exchange(model, placement, adapters)
    return report


def compressed(
    adapters: Mapping[str, Adapter], rank: int | None, energy: float | None
) -> tuple[Method, Sizing, dict[str, Adapter], list[Compressed]]:
    """Plain LoRA adapters in the place of others, see `compress`.

    Raises:
        StateError: not just one of `rank` and `energy`, or out of its range.
    """
    if (rank is None) == (energy is None):
        raise StateError(f"rank={rank!r}, energy={energy!r}: give one of them")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise StateError(f"rank={rank!r}: must be a whole number of at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise StateError(f"energy={energy!r}: must be a share in (0, 1]")
    factors, report = {}, []
    for at, adapter in adapters.items():
        Q, S, K = adapter.svd()
        kept = len(S) if rank is None else rank
        if energy is not None:
            left = S.square().flip(0).cumsum(0).flip(0)  # left[i]: energy of what falls if i values are kept
            kept = int((left > (1 - energy) * left[:1]).sum())
        kept = min(kept, int((S[:1] * 1e-12 < S).sum())) if S.any() else 0
        error = float(S[kept:].norm() / S.norm()) if S.any() else 0.0
        root, dtype = S[:kept].sqrt(), next(adapter.update.parameters()).dtype
        factors[at] = (Q[:, :kept] * root).to(dtype), (root[:, None] * K[:kept]).to(dtype)
        report.append(Compressed(at, adapter.rank, kept, error))
    largest = max([1, *(row.rank_after for row in report)])
    dropout = next(iter(adapters.values())).dropout  # of all of them
    method, made = plain_adapters(factors, dict.fromkeys(factors, 1.0), dropout=dropout, options={"alpha": largest})
    return method, sizing_of(made, largest), made, report


def _exchange(model: nn.Module, placement: Placement, adapters: dict[str, Adapter]) -> None:
    """Put other adapters into the layers of a placement, in the place of its own."""
    owner, state = noted(model)
    assert state is not None
    targets = targets_of(owner)
    for path, adapter in adapters.items():
        site = site_on(targets[path].layer)
        assert site is not None
        site.put(targets[path].part, targets[path].kind, placement.name, adapter)
    placement.adapters = adapters
    let_train(owner, placement, state.active == placement.name)


def _beside(model: nn.Module, parts: Mapping[str, Placement]) -> dict[str, Tensor]:
    beside: dict[str, Tensor] = {}
    owner, state = noted(model)
    assert state is not None
    for part in parts.values():
        for at, value in trained_beside(owner, part.parked, part.buffers, state.active == part.name).items():
            if at in beside:
                raise StateError(
                    f"{at} was trained with several of these adapters; which of them counts is not defined"
                )
            beside[at] = value.clone()
    return beside
