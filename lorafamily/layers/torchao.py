"""Layers that torchao quantises. A model that has one has imported the library."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorafamily.layers.quantised import Quantised, shell_of


class TorchAO(Quantised):
    """nn.Linear whose weight is of one of torchao's tensor classes, which dequantise themselves."""

    name = "linear of torchao"
    keeps_dequantised = True

    def matches(self, module: nn.Module) -> bool:
        library, weight = sys.modules.get("torchao.utils"), module._parameters.get("weight")
        return library is not None and isinstance(module, nn.Linear) and isinstance(weight, library.TorchAOBaseTensor)

    def why_not(self, module: Any) -> str | None:
        for settings in ("act_quant_kwargs", "activation_quantization"):
            if getattr(module.weight, settings, None) is not None:
                return "torchao quantises its inputs too, through which no gradient flows; quantise weights only (int8)"
        return None if hasattr(module.weight, "dequantize") else f"{type(module.weight).__name__} does not dequantise"

    def weight(self, module: Any) -> Float[Tensor, "d_out d_in"]:
        return module.weight.detach().dequantize().float()

    def stored(self, module: Any) -> dict[str, Tensor]:
        weight = module.weight
        inner = {name: getattr(weight, name) for name in weight.__tensor_flatten__()[0]}
        return {f"weight.{name}": tensor for name, tensor in inner.items() if isinstance(tensor, Tensor)}

    def rounding(self, module: Any) -> Float[Tensor, "d_out d_in"]:
        shape, scale = self.shape(module), getattr(module.weight, "scale", None)
        if scale is None or scale.ndim != 2 or shape[0] % len(scale) or shape[1] % scale.shape[1]:
            return torch.full((1, 1), math.nan).expand(shape)  # the steps of other formats are not known here
        for axis, size in enumerate(shape):
            scale = scale.repeat_interleave(size // scale.shape[axis], axis)
        return scale.float() ** 2 / 12

    def forget(self, module: Any) -> None:
        module.to("meta")  # where the weight keeps its class, by which the layer is recognised

    def requantised(self, module: Any, weight: Float[Tensor, "d_out d_in"]) -> nn.Module:
        old, granularity = module.weight, sys.modules["torchao.quantization.granularity"]
        if type(old).__name__ not in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
            raise NotImplementedError(f"{type(old).__name__} cannot be quantised again here; merge with dequantise=...")
        block = tuple(old.block_size)
        types = sys.modules["torchao.quantization.quant_primitives"].MappingType
        mapping = types.ASYMMETRIC if old.zero_point.any() else types.SYMMETRIC
        weight = weight.to(old.dtype)
        if hasattr(old, "target_dtype"):
            quantised = type(old).from_hp(weight, block, old.target_dtype, mapping_type=mapping)
        else:
            rows = granularity.PerRow() if block[-1] == weight.shape[1] else granularity.PerGroup(block[-1])
            quantised = type(old).from_hp(weight, rows, reduce_range=old.reduce_range, mapping_type=mapping)
        new = shell_of(module)
        new.weight = nn.Parameter(quantised, requires_grad=False)
        return new
