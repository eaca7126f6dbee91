"""W + ΔW of all experts of a layer as an object with products, so that ΔW need not be formed.

Axes: E experts; d_in, d_out of one expert's weight; m = largest inner size of the factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from lorafamily.adapter import Adapter
from lorafamily.functional import in_dtype


def factors_of_all(
    W: Float[Tensor, "E _ _"], adapters: Mapping[int, Adapter], transposed: bool, fast: bool
) -> tuple[Float[Tensor, "E _ m"], Float[Tensor, "E m _"]]:
    """Left and right factor of ΔW in the layout of W, from the adapters by expert; zeros for experts without one."""
    some, places = [*adapters.values()], [*adapters]
    Us, Vs = zip(*(adapter.factors(dropping=True) for adapter in some), strict=True)
    most = max(len(V) for V in Vs)
    most += -most % 8 if W.is_cuda else 0  # grouped products on a GPU want rows of a multiple of 16 bytes
    ups = [U.T for U in Us]
    stack = _Stacked.apply if fast else _stacked
    U, V = stack(places, len(W), most, *ups, *Vs)
    scales = {adapter.scale for adapter in some}
    if len(scales) == 1:
        U = U * scales.pop()
    else:
        s = U.new_ones(len(W))
        s[places] = U.new_tensor([adapter.scale for adapter in some])
        U = U * s[:, None, None]
    if p := some[0].drops("entries"):
        V = V * F.dropout(V.new_ones(len(V), 1, V.shape[2]), p)
    U, V = in_dtype(U.mT, V, W.dtype)
    return (V.mT, U.mT) if transposed else (U, V)


def _stacked(places: list[int], experts: int, most: int, *factors: Tensor) -> tuple[Tensor, Tensor]:
    """The factors (m, d) of some experts as (E, most, d), with zeros elsewhere; ups first, then downs."""
    both = []
    for some in (factors[: len(places)], factors[len(places) :]):
        at = {place: F.pad(factor, (0, 0, 0, most - len(factor))) for place, factor in zip(places, some, strict=True)}
        nothing = some[0].new_zeros(most, some[0].shape[1])
        both.append(torch.stack([at.get(place, nothing) for place in range(experts)]))
    return both[0], both[1]


class _Stacked(torch.autograd.Function):
    """`_stacked` without a copy for the padding. An expert whose factors both got nothing but zeros was visited by no
    token, and gets no gradient: an optimiser leaves it alone, moments and decay included, as it does a layer unused."""

    @staticmethod
    def forward(ctx: Any, places: list[int], experts: int, most: int, *factors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.places, ctx.ranks = places, [len(factor) for factor in factors]
        ups, downs = factors[: len(places)], factors[len(places) :]
        both = [some[0].new_zeros(experts, most, some[0].shape[1]) for some in (ups, downs)]
        views = [
            whole[at, : len(factor)]
            for whole, some in zip(both, (ups, downs), strict=True)
            for at, factor in zip(places, some, strict=True)
        ]
        torch._foreach_copy_(views, list(factors))
        return both[0], both[1]

    @staticmethod
    def backward(ctx: Any, of_up: Tensor, of_down: Tensor) -> tuple[Tensor | None, ...]:
        visited = _nonzero(of_up, of_down)
        n = len(ctx.places)
        found = [
            whole[at, :rank] if visited is None or visited[at] else None
            for whole, ranks in ((of_up, ctx.ranks[:n]), (of_down, ctx.ranks[n:]))
            for at, rank in zip(ctx.places, ranks, strict=True)
        ]
        return None, None, None, *found


def _nonzero(*gradients: Float[Tensor, "E _ _"]) -> list[bool] | None:
    """For which experts there is anything; None where there are no numbers to look at."""
    if any(isinstance(g, FakeTensor) or g.is_meta for g in gradients):
        return None
    anything = torch.stack([g.detach().flatten(1).any(1) for g in gradients]).any(0)
    found: list[bool] = anything.tolist()
    return found


class UpdatedWeight:
    """W + ΔW of all experts, or of those picked by an index, which is never formed where a product is asked for.

    Stands where a layer looks for W: PyTorch asks an object with `__torch_function__` what a product with it is. W lies
    as (…, a, b), ΔW = left · right with left (…, a, m) and right (…, m, b). Of an operation that is no product with it
    the sum is formed, so that whatever a layer does is right.
    """

    def __init__(self, W: Tensor, left: Tensor, right: Tensor):
        self.W, self.left, self.right = W, left, right

    def formed(self) -> Tensor:
        """W + ΔW."""
        return self.W + self.left @ self.right

    def transpose(self, first: int, second: int) -> Any:
        if {first % self.W.ndim, second % self.W.ndim} == {self.W.ndim - 2, self.W.ndim - 1}:
            return self.mT
        return self.formed().transpose(first, second)

    @property
    def mT(self) -> UpdatedWeight:  # noqa: N802 (a tensor's name)
        return UpdatedWeight(self.W.mT, self.right.mT, self.left.mT)

    @property
    def T(self) -> Any:  # noqa: N802
        return self.mT if self.W.ndim == 2 else self.formed().T

    def __getitem__(self, experts: Any) -> Any:
        """Of one expert, or of one for each row; `experts` indexes the first axis alone."""
        if isinstance(experts, tuple):
            return self.formed()[experts]
        return UpdatedWeight(self.W[experts], self.left[experts], self.right[experts])

    def __len__(self) -> int:
        return len(self.W)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.W if name in _DESCRIBES else self.formed(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if len(args) >= 2 and func in _TIMES and kwargs.get("bias") is None:
            first, second, *rest = args
            if isinstance(second, cls) and isinstance(first, Tensor):
                y = func(first, second.W, *rest, **kwargs)
                return y.add_(func(func(first, second.left, *rest, **kwargs), second.right, *rest, **kwargs))
            if isinstance(first, cls) and isinstance(second, Tensor) and not rest and not kwargs:
                return func(first.W, second).add_(func(first.left, func(first.right, second)))
        if func is F.linear and isinstance(args[0], Tensor) and isinstance(args[1], cls):
            x, weight = args[:2]
            y = F.linear(x, weight.W, *args[2:], **kwargs)
            return y.add_(F.linear(F.linear(x, weight.right), weight.left))
        args, kwargs = tree_map(lambda leaf: leaf.formed() if isinstance(leaf, cls) else leaf, (args, kwargs))
        return func(*args, **kwargs)


_DESCRIBES = {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "data_ptr", "stride", "requires_grad"}
_DESCRIBES |= {"is_cuda", "is_meta", "is_contiguous", "is_floating_point", "layout", "element_size"}


_TIMES = {torch.bmm, torch.matmul, torch.mm, Tensor.bmm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
_TIMES |= {product for product in (getattr(torch, "_grouped_mm", None),) if product is not None}
"""Products in which a matrix may be given as two, one after the other."""
