"""The arithmetic of "frozen linear + low-rank update", free of modules:   y = x Wᵀ + b + (x Vᵀ) Uᵀ.

Axes: d_in, d_out of the weight; m = inner size of the factors; n = rows of x, tokens of all sequences. The scale of the
update is in U. Two ways, equal up to rounding:

factored: the update is added into the output, and its share of the input's gradient into that, in place: nothing of
    size n × d is made beside what the frozen layer makes. It reads and writes y once more, and the gradient of x.
folded: W + U V is formed for the forward and again for the backward, in place of that; one read and write of W each.
    Cheaper from so many rows on, and exact only where W has the precision for it: not in half precision.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def padded(
    U: Float[Tensor, "d_out r"], V: Float[Tensor, "r d_in"], rank: int
) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"]]:
    """The same U V at a higher rank, by zeros."""
    missing = rank - len(V)
    return F.pad(U, (0, missing)), F.pad(V, (0, 0, 0, missing))


def low_rank_linear(
    x: Float[Tensor, "*batch d_in"],
    U: Float[Tensor, "d_out r"],
    V: Float[Tensor, "r d_in"],
    scale: float,
) -> Float[Tensor, "*batch d_out"]:
    """s · U (V x), right to left, so that ΔW is never formed: the plain formulation, and the reference.

    The factors are kept in float32 or higher and cast to the dtype of `x` here: they are small, a float32 copy of
    the activations would not be.
    """
    return F.linear(F.linear(x, V.to(x.dtype)), (U * scale).to(x.dtype))


def folding_pays(n: int, d_in: int, d_out: int) -> bool:
    """Whether n rows are enough: 2 n (d_in + d_out) numbers are moved to add in place, 4 d_in d_out to fold twice."""
    return n * (d_in + d_out) > 2 * d_in * d_out


def adapted_linear(
    x: Float[Tensor, "*batch d_in"],
    W: Float[Tensor, "d_out d_in"],
    b: Float[Tensor, " d_out"] | None,
    U: Float[Tensor, "d_out m"],
    V: Float[Tensor, "m d_in"],
    start: tuple[Float[Tensor, "d_out m"], Float[Tensor, "m d_in"]] | None = None,
    folded: bool | None = None,
) -> Float[Tensor, "*batch d_out"]:
    """x Wᵀ + b + (x Vᵀ) Uᵀ with W and b frozen; gradients for x, U and V. It cannot be differentiated twice.

    Under autocast all products are in its dtype, and nothing else is cast but the factors.

    Args:
        start: frozen (U0, V0), whose product is subtracted: U V − U0 V0.
        folded: which way; None takes the cheaper one.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    x, W, U, V = x.to(dtype), W.to(dtype), U.to(dtype), V.to(dtype)
    b = None if b is None else b.to(dtype)
    if folded is None:
        exact = torch.finfo(dtype).bits >= 32
        folded = exact and folding_pays(x.numel() // x.shape[-1], W.shape[1], W.shape[0])
    if start is not None:
        # Zero to the last bit where nothing has been learnt: differences of small numbers, see `Adapter.factors`.
        U0, V0 = (factor.to(dtype) for factor in start)
        both = torch.cat([U - U0, U0], 1), torch.cat([V, V - V0], 0)
        if not folded:
            U, V = both
    Uf, Vf = (both if start is not None else (U, V)) if folded else (None, None)
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in (x, U, V)):
        return _forward(x, W, b, U, V, Uf, Vf)[0]  # which vmap can follow, and a Function cannot
    if Uf is not None and Vf is not None:
        Uf, Vf = Uf.detach(), Vf.detach()
    return _AdaptedLinear.apply(x, W, b, U, V, Uf, Vf)


def _forward(
    x: Tensor, W: Tensor, b: Tensor | None, U: Tensor, V: Tensor, Uf: Tensor | None, Vf: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The output, and x Vᵀ where it was computed; folded where there is something to fold."""
    if Uf is not None and Vf is not None:
        return F.linear(x, torch.addmm(W, Uf, Vf), b), None
    h = F.linear(x, V)
    y = F.linear(x, W, b)
    rows = y.view(-1, y.shape[-1])
    h = h.reshape(len(rows), h.shape[-1])
    rows.addmm_(h, U.T)
    return y, h


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, U: Tensor, V: Tensor, Uf: Tensor | None, Vf: Tensor | None
    ) -> Tensor:
        y, h = _forward(x, W, b, U, V, Uf, Vf)
        ctx.save_for_backward(x, W, U, V, h, Uf, Vf)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, W, U, V, h, Uf, Vf = ctx.saved_tensors
        of_x, _, _, of_U, of_V, *_ = ctx.needs_input_grad
        g = gradient.reshape(-1, gradient.shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        gh = g @ U
        gx = gU = gV = None
        if of_x:
            gx = g @ W if Uf is None else g @ torch.addmm(W, Uf, Vf)
            if Uf is None:
                gx.addmm_(gh, V)
            gx = gx.view(x.shape)
        if of_U:
            gU = g.T @ (rows @ V.T if h is None else h)
        if of_V:
            gV = gh.T @ rows
        return gx, None, None, gU, gV, None, None
