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
from jaxtyping import Bool, Float
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


def kept(x: Float[Tensor, "*batch d_in"], p: float) -> tuple[Bool[Tensor, "*batch d_in"], float]:
    """Which entries dropout keeps, and what those are multiplied by so that the mean stays.

    A byte of randomness decides over an entry, so p counts in steps of 1/256: a fifth of the time of `F.dropout`.
    """
    dropped = min(max(round(256 * p), 1), 255)
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    return (words.view(torch.uint8)[: x.numel()] >= dropped).view(x.shape), 256 / (256 - dropped)


def adapted_linear(
    x: Float[Tensor, "*batch d_in"],
    W: Float[Tensor, "d_out d_in"],
    b: Float[Tensor, " d_out"] | None,
    U: Float[Tensor, "d_out m"],
    V: Float[Tensor, "m d_in"],
    start: tuple[Float[Tensor, "d_out m"], Float[Tensor, "m d_in"]] | None = None,
    *,
    dropout: float = 0.0,
    folded: bool | None = None,
) -> Float[Tensor, "*batch d_out"]:
    """x Wᵀ + b + (x Vᵀ) Uᵀ with W and b frozen; gradients for x, U and V. It cannot be differentiated twice.

    Under autocast all products are in its dtype, and nothing else is cast but the factors.

    Args:
        start: frozen (U0, V0), whose product is subtracted: U V − U0 V0.
        dropout: probability, see `kept`, with which an entry of the update's x is zero; such an update is not folded.
        folded: which way; None takes the cheaper one.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    x, W, U, V = x.to(dtype), W.to(dtype), U.to(dtype), V.to(dtype)
    b = None if b is None else b.to(dtype)
    if folded is None:
        exact = torch.finfo(dtype).bits >= 32 and not dropout
        folded = exact and folding_pays(x.numel() // x.shape[-1], W.shape[1], W.shape[0])
    keep = None
    if dropout:
        keep, scale = kept(x, dropout)
        U, start = U * scale, start and (start[0] * scale, start[1])
    both = U, V
    if start is not None:
        # Zero to the last bit where nothing has been learnt: differences of small numbers, see `Adapter.factors`.
        U0, V0 = (factor.to(dtype) for factor in start)
        both = torch.cat([U - U0, U0], 1), torch.cat([V, V - V0], 0)
        if not folded:
            U, V = both
    Uf, Vf = both if folded else (None, None)
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in (x, U, V)):
        return _forward(x, W, b, U, V, Uf, Vf, keep)[0]  # which vmap can follow, and a Function cannot
    if Uf is not None and Vf is not None:
        Uf, Vf = Uf.detach(), Vf.detach()
    return _AdaptedLinear.apply(x, W, b, U, V, Uf, Vf, keep)


# Products with one side of size m are fastest, by factors of two to five on a CPU, where that side's rows are long:
# (m, n) and (m, d), never (n, m) and (d, m).


def _forward(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    U: Tensor,
    V: Tensor,
    Uf: Tensor | None,
    Vf: Tensor | None,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The output, and V xᵀ where it was computed; folded where there is something to fold."""
    if Uf is not None and Vf is not None:
        return F.linear(x, torch.addmm(W, Uf, Vf), b), None
    y = F.linear(x, W, b)
    rows = (x if keep is None else x * keep).reshape(-1, x.shape[-1])
    h = V @ rows.T
    y.view(-1, y.shape[-1]).addmm_(h.T, U.T)
    return y, h


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        U: Tensor,
        V: Tensor,
        Uf: Tensor | None,
        Vf: Tensor | None,
        keep: Tensor | None,
    ) -> Tensor:
        y, h = _forward(x, W, b, U, V, Uf, Vf, keep)
        ctx.save_for_backward(x, W, U, V, h, Uf, Vf, keep)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, W, U, V, h, Uf, Vf, keep = ctx.saved_tensors
        of_x, _, _, of_U, of_V, *_ = ctx.needs_input_grad
        g = gradient.reshape(-1, gradient.shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        gh = U.T.contiguous() @ g.T
        gx = gU = gV = None
        if of_x:
            gx = g @ W if Uf is None else g @ torch.addmm(W, Uf, Vf)
            if keep is not None:
                gx.add_((gh.T @ V).mul_(keep.view(rows.shape)))
            elif Uf is None:
                gx.addmm_(gh.T, V)
            gx = gx.view(x.shape)
        if of_U:
            gU = ((V @ rows.T if h is None else h) @ g).T
        if of_V:
            gV = gh @ (rows if keep is None else rows * keep.view(rows.shape))
        return gx, None, None, gU, gV, None, None, None
