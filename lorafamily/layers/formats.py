"""Which formats of quantised weights can carry adapters, and which are refused by name."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lorafamily.layers.bitsandbytes import EightBit, FourBit
from lorafamily.layers.kinds import LayerKind, register_layer_kind
from lorafamily.layers.torchao import TorchAO

_OTHERS = {"hqq": "HQQ", "quanto": "quanto", "optimum": "quanto", "eetq": "EETQ", "aqlm": "AQLM", "vptq": "VPTQ"}
_OTHERS |= {"gptqmodel": "GPTQ", "auto_gptq": "GPTQ", "awq": "AWQ", "spqr_quant": "SpQR"}
_OTHERS |= {"compressed_tensors": "compressed-tensors"}
"""Formats that are refused, by the package that defines their layers or weights."""


class OtherFormat(LayerKind):
    """A linear layer in a format that cannot carry adapters. The package that defines its class, or its weight's class,
    gives the format's name for the message."""

    name = "quantised otherwise"
    linear = True

    def matches(self, module: nn.Module) -> bool:
        return self._by(module) is not None

    def why_not(self, module: nn.Module) -> str | None:
        return (
            f"it is quantised by {self._by(module)}; adapted are bitsandbytes' Linear4bit (nf4, fp4) and Linear8bitLt, "
            "and torchao's weight-only int8: load the base so, or unquantised"
        )

    def _by(self, module: nn.Module) -> str | None:
        """The name of what quantised the layer, None where nothing known did."""
        package, _, inner = type(module).__module__.partition(".")
        if "Linear" in type(module).__name__:
            if package in _OTHERS:
                return _OTHERS[package]
            if package == "transformers" and inner.startswith("integrations."):  # FP8Linear, BitLinear, HiggsLinear
                return f"transformers' {inner.rpartition('.')[2]}"
            if hasattr(module, "quantization_scheme"):
                return _OTHERS["compressed_tensors"]
        weight = module._parameters.get("weight")
        if weight is None or not isinstance(module, nn.Linear):
            return None
        if (package := type(weight).__module__.partition(".")[0]) in _OTHERS:
            return _OTHERS[package]
        # nn.Linear with 8-bit floats, or with bytes in a format of somebody's own
        small = weight.dtype.itemsize == 1 or not weight.is_floating_point()
        return f"something that stores it as {weight.dtype}" if small else None


_FORMATS: list[LayerKind] = [cls(of) for cls in (FourBit, EightBit) for of in ("linear", "conv1d")]
_FORMATS += [TorchAO(), OtherFormat()]
for _kind in reversed(_FORMATS):  # the one registered last is asked first
    register_layer_kind(_kind)


def refused_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, LayerKind]]:
    """Every quantised layer that cannot carry an adapter: its name, itself, and the layer kind that knows why."""
    for at, module in model.named_modules():
        kind = next((kind for kind in _FORMATS if kind.matches(module)), None)
        if kind is not None and kind.why_not(module) is not None:
            yield at, module, kind
