"""Layers that bitsandbytes quantises to 4 or 8 bits. A model that has one has imported the library."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorafamily.layers.quantised import Quantised, shell_of


@dataclass(frozen=True)
class _BitsAndBytes(Quantised):
    """A layer of the library's class `library_class`, made from a layer of kind `of`."""

    of: str
    library_class: ClassVar[str]

    def matches(self, module: nn.Module) -> bool:
        library = sys.modules.get("bitsandbytes.nn")
        if library is None or not isinstance(module, getattr(library, self.library_class)):
            return False
        source = getattr(module, "source_cls", None)  # set by transformers: GPT-2's Conv1D becomes a linear layer too
        return ("conv1d" if getattr(source, "__name__", None) == "Conv1D" else "linear") == self.of


class FourBit(_BitsAndBytes):
    """bitsandbytes' Linear4bit: packed pairs of indices into 16 levels, and a factor `absmax` for each block of them.
    With double quantisation these factors are quantised themselves, with levels and factors of their own."""

    name = "4-bit linear (bitsandbytes)"
    library_class = "Linear4bit"

    def weight(self, module: Any) -> Float[Tensor, "d_out d_in"]:
        state = _state(module)
        if state is None:  # bitsandbytes quantises when a layer moves to its device
            return module.weight.detach().float()
        functional, data = sys.modules["bitsandbytes.functional"], module.weight.data
        if getattr(state, "packing_format_for_cpu", False):  # packed for AVX512's inference kernel
            data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
        state.dtype = torch.float32
        return functional.dequantize_4bit(data, state)

    def stored(self, module: Any) -> dict[str, Tensor]:
        found, state = {"weight": module.weight}, _state(module)
        if state is not None:
            found |= {"weight.absmax": state.absmax, "weight.quant_map": state.code}
            if state.nested:
                found |= {"weight.nested_absmax": state.state2.absmax, "weight.nested_quant_map": state.state2.code}
                found |= {"weight.nested_offset": state.offset}
        return found

    def rounding(self, module: Any) -> Float[Tensor, "d_out d_in"]:
        W, state = self.weight(module), _state(module)
        if state is None:
            return torch.zeros_like(W)
        factors = state.absmax
        if state.nested:
            functional = sys.modules["bitsandbytes.functional"]
            factors = functional.dequantize_blockwise(factors, state.state2) + state.offset
        factors = factors.float().repeat_interleave(state.blocksize)[: W.numel()].view_as(W)
        levels = state.code.float().unique()  # fp4 has two zeros
        between = (levels[1:] + levels[:-1]) / 2
        edges = torch.cat([levels[:1], between, levels[-1:]])
        below, above = levels - edges[:-1], edges[1:] - levels  # the values rounded to a level lie between its edges
        error = (below**3 + above**3) / (3 * (below + above))
        at = torch.bucketize(W / factors.clamp_min(torch.finfo(torch.float32).tiny), between)
        return error[at] * factors**2

    def forget(self, module: Any) -> None:
        super().forget(module)
        module.quant_state = None

    def requantised(self, module: Any, weight: Float[Tensor, "d_out d_in"]) -> nn.Module:
        new, old, state = shell_of(module), module.weight, _state(module)
        settings = {"blocksize": old.blocksize, "compress_statistics": old.compress_statistics}
        settings |= {"quant_type": old.quant_type, "quant_storage": old.quant_storage, "module": new}
        weight = weight.to(weight.dtype if state is None else state.dtype)
        new.weight = type(old)(weight, requires_grad=False, **settings).to(weight.device)
        return new


class EightBit(_BitsAndBytes):
    """bitsandbytes' Linear8bitLt: 8-bit integers and a factor `SCB` for each row; the first forward moves these factors
    from the weight into the layer's state."""

    name = "8-bit linear (bitsandbytes)"
    library_class = "Linear8bitLt"

    def why_not(self, module: Any) -> str | None:
        if module.state.has_fp16_weights:
            return "it keeps its weight in 16 bits and quantises it in every forward; has_fp16_weights=False stores 8"
        return None

    def weight(self, module: Any) -> Float[Tensor, "d_out d_in"]:
        scale, data = self._scale(module), module.weight.detach().float()
        return data if scale is None else data * (scale.float() / 127).unsqueeze(1)

    def stored(self, module: Any) -> dict[str, Tensor]:
        scale = self._scale(module)
        return {"weight": module.weight} | ({} if scale is None else {"SCB": scale})

    def rounding(self, module: Any) -> Float[Tensor, "d_out d_in"]:
        scale, shape = self._scale(module), self.shape(module)
        step = torch.zeros(1, 1) if scale is None else (scale.float() / 127).unsqueeze(1)
        return (step**2 / 12).expand(shape)

    def requantised(self, module: Any, weight: Float[Tensor, "d_out d_in"]) -> nn.Module:
        new = shell_of(module)
        new.state = copy.copy(module.state)
        new.state.CB = new.state.SCB = None
        cpu = weight.cpu()  # bitsandbytes quantises when a weight leaves the CPU
        new.weight = type(module.weight)(cpu, requires_grad=False, has_fp16_weights=False).to(weight.device)
        return new

    def forget(self, module: Any) -> None:
        super().forget(module)
        module.state.CB = module.state.SCB = None

    def _scale(self, module: Any) -> Tensor | None:
        scale: Tensor | None = getattr(module.weight, "SCB", None)
        return module.state.SCB if scale is None else scale


def _state(module: Any) -> Any:
    """A copy of a Linear4bit's quantisation state, None where it is not quantised yet. A wrapper that makes a new
    parameter loses the parameter's state; the layer keeps it."""
    state = getattr(module.weight, "quant_state", None) or module.quant_state
    return None if state is None else copy.copy(state)


@contextmanager
def scales_kept(model: nn.Module) -> Iterator[None]:
    """Inside the block bitsandbytes' 4-bit layers keep their scales. On CPUs with AVX512-BF16 such a layer would round
    them to bfloat16, for good, when it is first called in eval mode without a gradient: an evaluation would change the
    frozen base."""
    layers: list[Any] = [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    try:
        yield
    finally:
        for layer in layers:
            layer.support_avx512bf16_for_cpu = True
