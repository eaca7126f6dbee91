"""The arithmetic of "frozen linear + low-rank update", free of modules:   y = x Wᵀ + b + s · (x Vᵀ) Uᵀ.

Axes: d_in, d_out of the weight; m = inner size of the factors; n = rows of x, tokens of all sequences. Two ways, equal
up to rounding:

factored: the update is added into the output, and its share of the input's gradient into that, in place: nothing of
    size n × d is made beside what the frozen layer makes. It reads and writes y once more, and the gradient of x.
folded: W + s U V is formed for the forward and again for the backward, in place of that; one read and write of W each.
    Cheaper from so many rows on, and exact only where W has the precision for it: not in half precision.

Layers that read the same x do so together: their V, one below the other, are one product with x, and their shares of
the gradient of x another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lorafamily.dropout import Mask


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
    """Whether n rows are enough: adding in place moves 2 n (d_in + d_out) numbers, folding twice 4 d_in d_out, and must
    move half as many to be worth a temporary of the weight's size (docs/performance.md has the times).

    Of layers that read the same x, d_out is that of all together.
    """
    return n * (d_in + d_out) > 4 * d_in * d_out


class Layer(NamedTuple):
    """A frozen weight and bias, and s (U V − U0 V0), its update; `start`: frozen (U0, V0), None for zero."""

    W: Float[Tensor, "d_out d_in"]
    b: Float[Tensor, " d_out"] | None
    U: Float[Tensor, "d_out m"]
    V: Float[Tensor, "m d_in"]
    scale: float
    start: tuple[Float[Tensor, "d_out m"], Float[Tensor, "m d_in"]] | None = None


class Reading:
    """What some layers read of the same x, done at once; `output(i)` is then what layer i makes of it.

    Gradients for x, U and V; it cannot be differentiated twice. Under autocast all products are in its dtype, and
    nothing else is cast but the factors.

    Args:
        dropout: probability with which an entry of the updates' x is zero, one mask for all; see `Mask`. An update of
            an x with zeros is not folded.
        folded: which way; None takes the cheaper one.
    """

    def __init__(
        self,
        x: Float[Tensor, "*batch d_in"],
        layers: Sequence[Layer],
        *,
        dropout: float = 0.0,
        folded: bool | None = None,
    ):
        device, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
        if folded is None:
            n, d_in = x.numel() // x.shape[-1], x.shape[-1]
            folded = (
                dtype.itemsize >= 4 and not dropout and folding_pays(n, d_in, sum(len(layer.W) for layer in layers))
            )
        mask = Mask.draw(_rows(x), dropout) if dropout else None
        self._layers = [_in_products(layer, dtype, folded, mask) for layer in layers]
        Vs = [V for _, _, _, V, *_ in self._layers]
        self._learns = torch.is_grad_enabled() and (
            x.requires_grad or any(U.requires_grad or V.requires_grad for _, _, U, V, *_ in self._layers)
        )
        if self._learns:
            x, *self._read = _Read.apply(x, mask, not folded, *Vs)
        else:
            self._read = [None if folded else _down(_rows(x), V, mask) for V in Vs]
        self._x = x

    def output(self, i: int) -> Float[Tensor, "*batch d_out"]:
        """x Wᵀ + b + s · (x Vᵀ) Uᵀ of layer i."""
        W, b, U, _, scale, Uf, Vf = self._layers[i]
        return (_Write.apply if self._learns else _write)(self._x, self._read[i], W, b, U, scale, Uf, Vf)


def adapted_linear(
    x: Float[Tensor, "*batch d_in"],
    W: Float[Tensor, "d_out d_in"],
    b: Float[Tensor, " d_out"] | None,
    U: Float[Tensor, "d_out m"],
    V: Float[Tensor, "m d_in"],
    scale: float = 1.0,
    start: tuple[Float[Tensor, "d_out m"], Float[Tensor, "m d_in"]] | None = None,
    *,
    dropout: float = 0.0,
    folded: bool | None = None,
) -> Float[Tensor, "*batch d_out"]:
    """One layer that reads x alone, see `Reading`."""
    return Reading(x, [Layer(W, b, U, V, scale, start)], dropout=dropout, folded=folded).output(0)


InProducts = tuple[Tensor, Tensor | None, Tensor, Tensor, float, Tensor | None, Tensor | None]
"""W, b, U, V in the dtype of the products, s; where folded, detached factors whose product is added to W."""


def _in_products(layer: Layer, dtype: torch.dtype, folded: bool, mask: Mask | None) -> InProducts:
    W, b, U, V, scale, start = layer
    scale = scale if mask is None else scale * mask.scale
    W, b, U, V = W.to(dtype), None if b is None else b.to(dtype), U.to(dtype), V.to(dtype)
    both = U, V
    if start is not None:
        # Zero to the last bit where nothing has been learnt: differences of small numbers, see `Adapter.factors`.
        U0, V0 = start[0].to(dtype), start[1].to(dtype)
        both = torch.cat([U - U0, U0], 1), torch.cat([V, V - V0], 0)
    if folded:
        return W, b, U, V, scale, both[0].detach(), both[1].detach()
    return W, b, *both, scale, None, None


# Products with one side of size m are fastest, by factors of two to five on a CPU, where that side's rows are long:
# (m, n) and (m, d), never (n, m) and (d, m).


def _rows(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "n d"]:
    return x.reshape(-1, x.shape[-1])


def _down(rows: Float[Tensor, "n d"], V: Float[Tensor, "m d"], mask: Mask | None) -> Float[Tensor, "m n"]:
    if mask is None:
        return V @ rows.T
    h = rows.new_empty(len(V), len(rows))
    for piece, numbers in mask.pieces(len(rows)):
        torch.mm(V, mask.kept(rows[piece], numbers).T, out=h[:, piece])
    return h


def _folded(W: Tensor, U: Tensor, V: Tensor, scale: float) -> Tensor:
    """W + s U V, lying in memory as W does: the product with it is then that of W to the last bit where U V is zero."""
    return torch.addmm(W, U, V, alpha=scale) if W.is_contiguous() else torch.addmm(W.T, V.T, U.T, alpha=scale).T


def _write(
    x: Tensor,
    h: Tensor | None,
    W: Tensor,
    b: Tensor | None,
    U: Tensor,
    scale: float,
    Uf: Tensor | None,
    Vf: Tensor | None,
) -> Tensor:
    if Uf is not None and Vf is not None:
        return F.linear(x, _folded(W, Uf, Vf, scale), b)
    assert h is not None
    y = F.linear(x, W, b)
    y.view(-1, y.shape[-1]).addmm_(h.T, U.T, alpha=scale)
    return y


class _Read(torch.autograd.Function):
    """x itself, and V xᵀ for several V. x is handed through so that its gradient comes back here, once the frozen
    products have theirs in it, and the updates can add theirs in place: nobody else has seen that gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Mask | None, adds: bool, *Vs: Tensor) -> tuple[Tensor, ...]:
        V = torch.cat(Vs) if len(Vs) > 1 else Vs[0]
        ctx.save_for_backward(x, *Vs)  # parameters as a rule, where the stack of them is one tensor more to keep
        ctx.mask, ctx.adds, ctx.sizes = mask, adds, [len(each) for each in Vs]
        ctx.set_materialize_grads(False)
        same = x.view_as(x)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(same)
        h = _down(_rows(x), V, mask)
        return (same, h) if len(Vs) == 1 else (same, *h.split(ctx.sizes))

    @staticmethod
    def backward(ctx: Any, gx: Tensor | None, *of_h: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        x, *Vs = ctx.saved_tensors
        V = torch.cat(Vs) if len(Vs) > 1 else Vs[0]
        rows, mask = _rows(x), ctx.mask
        given = [V.new_zeros(size, len(rows)) if g is None else g for g, size in zip(of_h, ctx.sizes, strict=True)]
        gh = torch.cat(given) if len(given) > 1 else given[0]
        into = None
        if ctx.adds and ctx.needs_input_grad[0]:
            gx = torch.zeros_like(x) if gx is None else gx
            into = gx.view(rows.shape)
        if mask is None:
            gV = gh @ rows
            if into is not None:
                into.addmm_(gh.T, V)
        else:
            gV = torch.zeros_like(V)
            for piece, numbers in mask.pieces(len(rows)):
                gV.addmm_(gh[:, piece], mask.kept(rows[piece], numbers))
                if into is not None:
                    into[piece].add_(mask.kept(gh[:, piece].T @ V, numbers))
        return gx, None, None, *([gV] if len(given) == 1 else gV.split(ctx.sizes))


class _Write(torch.autograd.Function):
    """The output of one layer from x and what was read of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, *layer: Any) -> Tensor:
        W, _, U, ctx.scale, Uf, Vf = layer
        ctx.save_for_backward(h, W, U, Uf, Vf)
        return _write(x, h, *layer)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        (h, W, U, Uf, Vf), scale = ctx.saved_tensors, ctx.scale
        of_x, of_h, _, _, of_U, *_ = ctx.needs_input_grad
        g = _rows(gradient)
        gh = (U.T.contiguous() @ g.T).mul_(scale) if of_h else None
        gU = (h @ g).mul_(scale).T if of_U else None
        gx = (g @ (W if Uf is None else _folded(W, Uf, Vf, scale))).view(*gradient.shape[:-1], -1) if of_x else None
        return gx, gh, None, None, gU, None, None, None


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "adapted layers cannot be differentiated twice, which create_graph=True prepares: their backward gives "
            "first derivatives only"
        )
