"""W + ΔW of all of a layer's experts as an object that can be multiplied, so that ΔW need not be formed.

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
    """The left and right factor of ΔW in the layout of W, from the adapters by expert; zeros for other experts."""
    adapted, experts = [*adapters.values()], [*adapters]
    Us, Vs = zip(*(adapter.factors(dropping=True) for adapter in adapted), strict=True)
    most = max(len(V) for V in Vs)
    most += -most % 8 if W.is_cuda else 0  # grouped products on a GPU need rows of a multiple of 16 bytes
    stack = _Stacked.apply if fast else _stacked
    U, V = stack(experts, len(W), most, *(U.T for U in Us), *Vs)
    s: Any = adapted[0].scale
    if any(adapter.scale != s for adapter in adapted):
        s = U.new_ones(len(W), 1, 1)
        s[experts, 0, 0] = U.new_tensor([adapter.scale for adapter in adapted])
    U = U * s
    if p := adapted[0].drops("entries"):
        V = V * F.dropout(V.new_ones(len(V), 1, V.shape[2]), p)
    U, V = in_dtype(U.mT, V, W.dtype)
    return (V.mT, U.mT) if transposed else (U, V)


def _stacked(experts: list[int], E: int, most: int, *factors: Tensor) -> tuple[Tensor, Tensor]:
    """The factors (m, d) of some experts as (E, most, d), with zeros elsewhere; `factors`: all ups, then all downs."""
    both = []
    for some in (factors[: len(experts)], factors[len(experts) :]):
        padded = {i: F.pad(factor, (0, 0, 0, most - len(factor))) for i, factor in zip(experts, some, strict=True)}
        zeros = some[0].new_zeros(most, some[0].shape[1])
        both.append(torch.stack([padded.get(i, zeros) for i in range(E)]))
    return both[0], both[1]


class _Stacked(torch.autograd.Function):
    """`_stacked` without a copy for the padding. Where the gradients of both factors of an expert are zero, no token
    visited it, and it gets None: an optimizer leaves it alone, moments and decay included, like any unused layer."""

    @staticmethod
    def forward(ctx: Any, experts: list[int], E: int, most: int, *factors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.experts, ctx.ranks = experts, [len(factor) for factor in factors]
        up, down = (some.new_zeros(E, most, some.shape[1]) for some in (factors[0], factors[len(experts)]))
        torch._foreach_copy_(_views(up, down, experts, ctx.ranks), list(factors))
        return up, down

    @staticmethod
    def backward(ctx: Any, up: Tensor, down: Tensor) -> tuple[Tensor | None, ...]:
        visited = [True] * len(up)
        if not any(isinstance(gradient, FakeTensor) or gradient.is_meta for gradient in (up, down)):
            visited = torch.stack([gradient.detach().flatten(1).any(1) for gradient in (up, down)]).any(0).tolist()
        views = zip(_views(up, down, ctx.experts, ctx.ranks), ctx.experts * 2, strict=True)
        return None, None, None, *(view if visited[i] else None for view, i in views)


def _views(up: Tensor, down: Tensor, experts: list[int], ranks: list[int]) -> list[Tensor]:
    """The entries of two stacks that are each expert's factors: all ups, then all downs."""
    stacks = [up] * len(experts) + [down] * len(experts)
    return [stack[i, :rank] for stack, i, rank in zip(stacks, experts * 2, ranks, strict=True)]


class UpdatedWeight:
    """W + ΔW of all experts, or of those that an index picks, in place of W in a layer. PyTorch hands operations on it
    to `__torch_function__`: products do not form the sum; others do, so that they are right, too. W is (…, a, b), and
    ΔW is left (…, a, m) times right (…, m, b)."""

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
        """W + ΔW of one expert, or of one for each row, if `experts` indexes only the first axis."""
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
"""Attributes that W + ΔW shares with W."""

_TIMES = {torch.bmm, torch.matmul, torch.mm, Tensor.bmm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
_TIMES |= {product for product in (getattr(torch, "_grouped_mm", None),) if product is not None}
"""Products with a matrix, which can be computed as two products with its factors."""
