"""A layer on the meta device that takes the memory that a quantised one takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorafamily.layers.quantised import Quantised
from lorafamily.layers.torchao import TorchAO


class _ByKernel(torch.autograd.Function):
    """x Wᵀ as kernels on a CPU compute it: W is dequantised for the product, and for its gradient again or still."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], keeps: bool) -> Tensor:
        W = x.new_empty(shape)
        ctx.shape, ctx.W = shape, W if keeps else None
        return x @ W.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient @ (gradient.new_empty(ctx.shape) if ctx.W is None else ctx.W), None, None


def stand_in(kind: Quantised, layer: Any, dtype: torch.dtype | None) -> nn.Linear:
    """A layer on the meta device that takes the memory in a training step that a quantised one takes."""
    shape, bias = kind.shape(layer), layer.bias
    new = nn.Linear(
        shape[1], shape[0], bias is not None, device="meta", dtype=dtype or (bias.dtype if bias is not None else None)
    )
    keeps = isinstance(kind, TorchAO)

    def forward(input: Tensor) -> Tensor:
        y: Tensor = _ByKernel.apply(input, shape, keeps)
        return y if new.bias is None else y + new.bias

    new.forward = forward  # type: ignore[method-assign]
    return new.requires_grad_(False)
