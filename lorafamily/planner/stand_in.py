"""A layer on the meta device that takes as much memory in a training step as a quantised one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorafamily.layers.quantised import Quantised


class _ByKernel(torch.autograd.Function):
    """x Wᵀ as kernels on a CPU compute it: W is dequantised for the product, and kept (`keeps`) or dequantised again
    for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], keeps: bool) -> Tensor:
        W = x.new_empty(shape)
        ctx.shape, ctx.W = shape, W if keeps else None
        return x @ W.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient @ (gradient.new_empty(ctx.shape) if ctx.W is None else ctx.W), None, None


def stand_in(kind: Quantised, layer: Any, dtype: torch.dtype | None) -> nn.Linear:
    """A layer on the meta device that takes as much memory in a training step as a quantised one. `dtype`: of its
    weight; None: the bias's, if there is one."""
    (d_out, d_in), bias = kind.shape(layer), layer.bias
    dtype = dtype or (None if bias is None else bias.dtype)
    new = nn.Linear(d_in, d_out, bias is not None, device="meta", dtype=dtype)

    def forward(input: Tensor) -> Tensor:
        y: Tensor = _ByKernel.apply(input, (d_out, d_in), kind.keeps_dequantised)
        return y if new.bias is None else y + new.bias

    new.forward = forward  # type: ignore[method-assign]
    return new.requires_grad_(False)
