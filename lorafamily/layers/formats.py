"""Which formats of quantised weights are adapted, and which are refused by name."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lorafamily.layers.bitsandbytes import EightBit, FourBit
from lorafamily.layers.kinds import LayerKind, register_layer_kind
from lorafamily.layers.torchao import TorchAO

_ADAPTED = "adapted are bitsandbytes' Linear4bit (nf4, fp4) and Linear8bitLt, and torchao's weight-only int8"


_OTHERS = {
    **{"hqq": "HQQ", "quanto": "quanto", "optimum": "quanto", "gptqmodel": "GPTQ", "auto_gptq": "GPTQ", "awq": "AWQ"},
    **{
        "eetq": "EETQ",
        "aqlm": "AQLM",
        "vptq": "VPTQ",
        "spqr_quant": "SpQR",
        "compressed_tensors": "compressed-tensors",
    },
}
"""Formats that are refused, by the package that their layers or weights come from."""


class OtherFormat(LayerKind):
    """A linear layer in a format that is not adapted, recognised by the package that its class, or the class of its
    weight, comes from, so that it can be refused by name."""

    name = "quantised otherwise"
    linear = True

    def matches(self, module: nn.Module) -> bool:
        return self._by(module) is not None

    def why_not(self, module: nn.Module) -> str | None:
        return f"it is quantised by {self._by(module)}; {_ADAPTED}: load the base so, or unquantised"

    def _by(self, module: nn.Module) -> str | None:
        """The name of what quantised it, None where nothing known did."""
        home, _, within = type(module).__module__.partition(".")
        if "Linear" in type(module).__name__:
            if home in _OTHERS:
                return _OTHERS[home]
            if home == "transformers" and within.startswith("integrations."):  # FP8Linear, BitLinear, HiggsLinear
                return f"transformers' {within.rpartition('.')[2]}"
            if hasattr(module, "quantization_scheme"):
                return _OTHERS["compressed_tensors"]
        weight = module._parameters.get("weight")
        if weight is None or not isinstance(module, nn.Linear):
            return None
        if (of := type(weight).__module__.partition(".")[0]) in _OTHERS:
            return _OTHERS[of]
        # nn.Linear with 8-bit floats or with bytes of somebody's
        small = weight.dtype.itemsize == 1 or not weight.is_floating_point()
        return f"something that stores it as {weight.dtype}" if small else None


_FORMATS: list[LayerKind] = [*(cls(of) for cls in (FourBit, EightBit) for of in ("linear", "conv1d"))]
_FORMATS += [TorchAO(), OtherFormat()]
for _kind in reversed(_FORMATS):  # the last one registered is asked first
    register_layer_kind(_kind)


def refused_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, LayerKind]]:
    """Every quantised layer that cannot carry an adapter, by name, with the kind that says why."""
    for at, module in model.named_modules():
        kind = next((kind for kind in _FORMATS if kind.matches(module)), None)
        if kind is not None and kind.why_not(module) is not None:
            yield at, module, kind
