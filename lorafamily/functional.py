"""The arithmetic of "linear layer + low-rank update", free of modules:   y = x Wᵀ + b + s · (x Vᵀ) Uᵀ.

Axes: d_in, d_out of the weight; m = inner size of the factors; n = rows of x, tokens of all sequences.

The plain formulation adds `low_rank_linear` to the output of the layer; it is right everywhere. For frozen W and b
`adapted_linear` computes the same, up to rounding, without a further tensor of size n × d: the update is added in place
to the output and to the input's gradient, or *folded* into W before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lorafamily.dropout import Mask

PLAIN_TENSORS = (Tensor, torch.nn.Parameter, FakeTensor)
"""Tensor classes that compute as tensors do; the planner traces with fake ones."""


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device. The meta device has none: torch would raise."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A block in which products on this device keep the dtype of what they are given."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def computed_in(x: Tensor) -> torch.dtype:
    """The dtype of products with x: that of autocast, if it is on and x is not float64, else that of x."""
    casts = autocasts(x.device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if casts else x.dtype


def in_dtype(
    U: Float[Tensor, "*experts d_out r"], V: Float[Tensor, "*experts r d_in"], dtype: torch.dtype
) -> tuple[Float[Tensor, "*experts d_out r"], Float[Tensor, "*experts r d_in"]]:
    """U and V, of one weight or of many experts, in another dtype with the same product.

    float16 has few values below 6e-5 and none below 6e-8. LoRA²'s U, a product of four small factors, is that small for
    many steps, and A would get no gradient. So for float16 a power of two moves from V to U.
    """
    if dtype == torch.float16:
        larger = (V.detach().norm() / U.detach().norm()).nan_to_num(1.0, 1.0)  # 1 while U is zero
        power = (larger.log2() / 2).round().clamp(0, 10).exp2()
        U, V = U * power, V / power
    return U.to(dtype), V.to(dtype)


def low_rank_linear(
    x: Float[Tensor, "*batch d_in"],
    U: Float[Tensor, "d_out r"],
    V: Float[Tensor, "r d_in"],
    scale: float,
) -> Float[Tensor, "*batch d_out"]:
    """s · U (V x) from right to left, so that ΔW is never formed, in the dtype `computed_in(x)`. The factors are cast
    to it, because they are small; a float32 copy of the activations would not be."""
    U, V = in_dtype(U * scale, V, computed_in(x))
    return F.linear(F.linear(x, V), U)


_fast = {"on": True}


@contextmanager
def fast_path(on: bool) -> Iterator[None]:
    """If `on` is False, adapted layers use the plain formulation inside the block, for comparison. They always do so
    under `torch.func`, forward-mode differentiation, compilation, export and tracing."""
    before, _fast["on"] = _fast["on"], on
    try:
        yield
    finally:
        _fast["on"] = before


def can_be_fast(x: Tensor, W: Tensor, b: Tensor | None) -> bool:
    """Whether `adapted_linear` may replace the layer x Wᵀ + b and its update: W and b must be frozen, tensors plain,
    and nothing may trace or transform single operations, as `torch.compile` does."""
    return (
        _fast["on"]
        and not W.requires_grad
        and (b is None or not b.requires_grad)
        and type(x) in PLAIN_TENSORS
        and type(W) in PLAIN_TENSORS
        and (x.dtype == W.dtype or autocasts(x.device))
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
    )


def adapted_linear(
    x: Float[Tensor, "*batch d_in"],
    W: Float[Tensor, "d_out d_in"],
    b: Float[Tensor, " d_out"] | None,
    U: Float[Tensor, "d_out m"],
    V: Float[Tensor, "m d_in"],
    scale: float = 1.0,
    *,
    dropout: float = 0.0,
    folded: bool | None = None,
) -> Float[Tensor, "*batch d_out"]:
    """A frozen linear layer and its update in one function, with gradients for x, U and V.

    Under autocast all products are in its dtype; W is cast again in the backward, so that no copy is kept. `dropout`:
    probability with which an entry of the update's x is zero, see `Mask`. `folded`: whether W + s U V is formed; None:
    if that moves half as many numbers as adding to outputs and gradients (docs/performance.md has the times).
    """
    x = x.to(computed_in(x))
    mask = Mask.draw(_rows(x), dropout) if dropout else None
    scale = scale if mask is None else scale * mask.scale
    both = in_dtype(U, V, x.dtype)
    if folded is None:  # not in half precision, where W would round small updates away
        folded = mask is None and x.dtype.itemsize > 2 and x.numel() * sum(W.shape) > 4 * W.numel() * W.shape[1]
    if torch.is_grad_enabled():
        return _Adapted.apply(x, W, b, *both, scale, mask, folded)
    return _product(x, W, b, *both, scale, mask, folded)[0]


# On a CPU products with a side of size m are two to five times as fast with long rows: matrices are (m, n) and (m, d),
# never (n, m) and (d, m).


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
    """W + s U V, with the strides of W, so that products with it equal those with W to the last bit if U V is zero."""
    W = W.to(U.dtype)
    return torch.addmm(W, U, V, alpha=scale) if W.is_contiguous() else torch.addmm(W.T, V.T, U.T, alpha=scale).T


def _product(
    x: Tensor, W: Tensor, b: Tensor | None, U: Tensor, V: Tensor, scale: float, mask: Mask | None, folded: bool
) -> tuple[Tensor, Tensor | None]:
    """The output, and V xᵀ if it was computed."""
    b, h = None if b is None else b.to(x.dtype), None
    y = F.linear(x, _folded(W, U, V, scale) if folded else W.to(x.dtype), b)
    if not folded:
        h = _down(_rows(x), V, mask)
        y.view(-1, y.shape[-1]).addmm_(h.T, U.T, alpha=scale)
    # F.linear may return a view of its flat product. The model may write into the output in place, which autograd
    # forbids for views that a custom function returns.
    return torch.ops.aten._unsafe_view(y, y.shape), h


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, W, _, U, V, ctx.scale, ctx.mask, ctx.folded = given
        y, h = _product(*given)
        ctx.save_for_backward(x, W, U, V, h)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, W, U, V, h = ctx.saved_tensors
        wants_x, _, _, wants_U, wants_V, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True
            return _gradients_with_graph(x, W, U, V, ctx.scale, ctx.mask, gradient)
        g, rows, mask = _rows(gradient), _rows(x), ctx.mask
        gU = ((_down(rows, V, mask) if h is None else h) @ g).mul_(ctx.scale).T if wants_U else None
        gh = (U.T.contiguous() @ g.T).mul_(ctx.scale)
        gx = g @ (_folded(W, U, V, ctx.scale) if ctx.folded else W.to(g.dtype)) if wants_x else None
        if mask is None and gx is not None and not ctx.folded:
            gx.addmm_(gh.T, V)
        gV = (gh @ rows if mask is None else torch.zeros_like(V)) if wants_V else None
        for piece, numbers in () if mask is None else mask.pieces(len(rows)):
            if gV is not None:
                gV.addmm_(gh[:, piece], mask.kept(rows[piece], numbers))
            if gx is not None:
                gx[piece].add_(mask.kept(gh[:, piece].T @ V, numbers))
        return None if gx is None else gx.view(x.shape), None, None, gU, gV, None, None, None


def _gradients_with_graph(
    x: Tensor, W: Tensor, U: Tensor, V: Tensor, scale: float, mask: Mask | None, gradient: Tensor
) -> tuple[Tensor | None, ...]:
    """The same gradients by the plain formulation, which can be differentiated again."""
    x, U, V = (tensor.view_as(tensor) for tensor in (x, U, V))  # x may depend on U and V: stop at these three tensors
    y = F.linear(x, W.to(x.dtype)) + scale * F.linear(F.linear(x if mask is None else mask.applied(x), V), U)
    wanted = [tensor for tensor in (x, U, V) if tensor.requires_grad]
    found = dict(zip(map(id, wanted), torch.autograd.grad(y, wanted, gradient, create_graph=True), strict=True))
    gx, gU, gV = (found.get(id(tensor)) for tensor in (x, U, V))
    return gx, None, None, gU, gV, None, None, None
