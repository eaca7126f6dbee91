"""Compares updates with the weights they update and with other updates, as section 7 of the LoRA paper does.

Everything is computed in float64 from the factors of ΔW = s · U V: only m × d and m × m matrices are decomposed, never
the d_out × d_in update. Axes: d_in, d_out of the weight; m = inner size of the factors; i, j count directions.
"""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.errors import StateError
from lorafamily.layers.placement import adapted, placement_of, refuse_merged, targets_of
from lorafamily.names import place_of

Side = Literal["down", "up"]
"""A factor: "down" is V, with directions in R^{d_in}; "up" is U, with directions in R^{d_out}."""


@torch.no_grad()
def directions(adapter: Adapter, side: Side = "down") -> Float[Tensor, "k d"]:
    """Orthonormal directions of a factor, the strongest first: right singular vectors of V, left ones of U.

    There are as many as the factor's rank, up to rounding (LoRA, sec. 7.2). With a frozen initial update the factors
    are those of the difference, ΔW.

    Raises:
        StateError: `side` is neither "down" nor "up".
    """
    if side not in ("down", "up"):
        raise StateError(f'side={side!r}: must be "down" or "up"')
    U, V = (factor.cpu().double() for factor in adapter.factors())
    _, values, rows = torch.linalg.svd(V if side == "down" else U.T, full_matrices=False)
    return rows[values > values[:1] * 1e-12]


def similarity(one: Float[Tensor, "k d"], other: Float[Tensor, "l e"]) -> Float[Tensor, "k l"]:
    """φ(i, j) = ‖one[:i] other[:j]ᵀ‖²_F / min(i, j), for every i and j from 1 (LoRA, eq. 4), of directions as rows.

    The share of one subspace that lies in the other: 1 if the smaller lies in the larger, about max(i, j) / d for
    random ones.

    Raises:
        StateError: they are not orthonormal, or their lengths differ.
    """
    if one.shape[1] != other.shape[1]:
        raise StateError(f"directions in R^{one.shape[1]} and in R^{other.shape[1]} cannot be compared")
    for rows in (one, other):
        if ((rows @ rows.T - torch.eye(len(rows), device=rows.device, dtype=rows.dtype)).abs() > 1e-6).any():
            raise StateError("these directions are not orthonormal rows")
    shared = (one @ other.T).square().cumsum(0).cumsum(1)
    i, j = torch.arange(1, len(one) + 1).to(shared), torch.arange(1, len(other) + 1).to(shared)
    return shared / torch.minimum(i[:, None], j)


def random_directions(k: int, d: int, generator: torch.Generator) -> Float[Tensor, "k d"]:
    """k orthonormal directions of a uniformly random subspace of R^d, to compare φ with."""
    gaussian = torch.randn(d, k, dtype=torch.float64, device="cpu", generator=generator)
    return torch.linalg.qr(gaussian).Q.T


def spectrum(adapter: Adapter) -> Float[Tensor, " m"]:
    """Singular values of ΔW, the largest first."""
    return adapter.svd()[1]


def effective_rank(values: Float[Tensor, " m"]) -> float:
    """exp of the entropy of values / Σ values: how many directions carry the update; 0 for a zero update (Roy and
    Vetterli 2007, "The effective rank")."""
    total = values.sum()
    if not total > 0:
        return 0.0
    return math.exp(torch.special.entr(values / total).sum().item())


def leading(W: Float[Tensor, "d_out d_in"], k: int) -> tuple[Float[Tensor, "d_out k"], Float[Tensor, "k d_in"]]:
    """The k strongest left and right singular vectors of a weight, by Lanczos, which does not decompose all of W."""
    matrix = W.detach().cpu().double().numpy()
    if not matrix.any():  # any directions are as strong
        return torch.eye(len(matrix), k, dtype=torch.float64), torch.eye(k, matrix.shape[1], dtype=torch.float64)
    if k >= min(matrix.shape) // 2:  # where Lanczos would take longer than a full decomposition
        U, _, V = torch.linalg.svd(torch.from_numpy(matrix), full_matrices=False)
        return U[:, :k], V[:k]
    import scipy.sparse.linalg  # here, since it takes as long to import as the rest of the package

    # The same vectors every time. Ones would not do: rows that were centred add up to zero.
    start = random_directions(1, min(matrix.shape), torch.Generator().manual_seed(0)).flatten().numpy()
    U, S, V = scipy.sparse.linalg.svds(matrix, k=k, v0=start)
    order = S.argsort()[::-1].copy()
    return torch.from_numpy(U[:, order].copy()), torch.from_numpy(V[order].copy())


@dataclass(frozen=True)
class Amplification:
    """How much an update amplifies directions that are weak in the weight (LoRA, sec. 7.3, Table 7).

    `delta`: ‖ΔW‖_F. `weight`: ‖W‖_F. `in_delta`, `in_weight`, `in_random`: ‖Uᵀ W Vᵀ‖_F for the r strongest directions
    of ΔW, of W itself, and of a random matrix.
    """

    rank: int
    delta: float
    weight: float
    in_delta: float
    in_weight: float
    in_random: float

    @property
    def factor(self) -> float:
        """‖ΔW‖_F / ‖Uᵀ W Vᵀ‖_F, where U and V are the directions of ΔW; nan for a zero update, inf for zero W."""
        return _ratio(self.delta, self.in_delta)


@torch.no_grad()
def amplification(
    adapter: Adapter, W: Float[Tensor, "d_out d_in"], rank: int | None = None, *, seed: int = 0
) -> Amplification:
    """Table 7's values for one layer.

    Args:
        W: its base weight, as (d_out, d_in).
        rank: how many directions; None, or more than the update has: all of the update's.
        seed: of the random directions.
    """
    left, values, right = adapter.svd()
    r = int((values > values[:1] * 1e-12).sum())
    r = r if rank is None else min(rank, r)
    base = W.detach().cpu().double()

    def seen(U: Float[Tensor, "d_out r"], V: Float[Tensor, "r d_in"]) -> float:
        return (U.T @ base @ V.T).norm().item()

    generator = torch.Generator().manual_seed(seed)
    up, down = (random_directions(r, d, generator) for d in base.shape)
    return Amplification(
        rank=r,
        delta=values.norm().item(),
        weight=base.norm().item(),
        in_delta=seen(left[:, :r], right[:r]),
        in_weight=seen(*leading(base, r)) if r else 0.0,
        in_random=seen(up.T, down),
    )


@torch.no_grad()
def overlap(adapter: Adapter, W: Float[Tensor, "d_out d_in"], k: int) -> float:
    """Share of ‖ΔW‖²_F that lies in W's k strongest directions on both sides, ‖Pᵀ ΔW Qᵀ‖²_F / ‖ΔW‖²_F: nan for a zero
    update, about k² / (d_in d_out) for a random one."""
    left, values, right = adapter.svd()
    if not values.any():
        return math.nan
    P, Q = leading(W, k)
    return ((P.T @ left * values) @ (right @ Q.T)).square().sum().item() / values.square().sum().item()


def _ratio(delta: float, weight: float) -> float:
    """How large an update is beside a weight, which may be zero at first (adaLN-zero, the last layer of a block)."""
    return delta / weight if weight else math.inf if delta else math.nan


@dataclass(frozen=True)
class Norm:
    """The update of one layer. `delta`: ‖ΔW‖_F; `relative`: ‖ΔW‖_F / ‖W‖_F, inf or nan where W is zero; `stack`,
    `layer`, `matrix`: where the layer is, see `lorafamily.names.Place`."""

    module: str
    stack: str
    layer: int | None
    matrix: str
    slices: int
    delta: float
    relative: float
    effective_rank: float


def norms(model: nn.Module, name: str | None = None) -> list[Norm]:
    """Size and effective rank of the update of every adapted layer, in the model's order.

    Raises:
        StateError: no adapter of that name, or a merged model, whose weights are no longer the base's.
    """
    rows = []
    for at, (adapter, W) in layers_of(model, name).items():
        values = spectrum(adapter)
        place, delta = place_of(at), values.norm().item()
        relative = _ratio(delta, W.detach().cpu().double().norm().item())
        rows.append(Norm(at, *place, adapter.slices, delta, relative, effective_rank(values)))
    return rows


def layers_of(model: nn.Module, name: str | None = None) -> Mapping[str, tuple[Adapter, Float[Tensor, "d_out d_in"]]]:
    """Adapter and base weight of every adapted layer, by full name; quantised weights are dequantised on access. Raises
    what `norms` raises."""
    placement, (owner, state) = placement_of(model, name), adapted(model)
    refuse_merged(state)
    targets = targets_of(owner)
    return _Layers({at: (adapter, targets[at]) for at, adapter in placement.adapters.items()})


class _Layers(UserDict[str, Any]):
    """Reads weights only when they are asked for, since dequantised ones of all layers may not fit into memory."""

    def __getitem__(self, at: str) -> tuple[Adapter, Tensor]:
        adapter, target = self.data[at]
        return adapter, target.weight
