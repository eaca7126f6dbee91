"""Merging into quantised layers: ordinary layers replace them, or W + ΔW is quantised again."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorafamily.errors import StateError
from lorafamily.layers.kinds import kind_of
from lorafamily.layers.quantised import Quantised, quantised_layers
from lorafamily.layers.site import NAME
from lorafamily.layers.wrapper import ForwardWrapper


def check_replacement(model: nn.Module, adapted: str | None, dtype: torch.dtype | None, again: bool) -> None:
    """Check that quantised layers can be merged as asked; `adapted`: the first that carries an adapter, if any.

    Raises:
        StateError: neither way was chosen, both were, or nothing is quantised; a layer's instance has a forward of its
            own, which the replacement would lack; a quantised layer is the model itself.
    """
    ways = "merge(model, dequantise=torch.bfloat16) replaces it by an ordinary layer, requantise=True quantises W + ΔW"
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise StateError(f"dequantise={dtype!r}: must be a floating-point torch.dtype, such as torch.bfloat16")
    if dtype is not None and again:
        raise StateError("dequantise and requantise exclude each other: give one")
    if adapted is not None and dtype is None and not again:
        raise StateError(f"{adapted} is quantised, so ΔW cannot be added to its weight; {ways}")
    if adapted is None and (again or (dtype is not None and next(quantised_layers(model), None) is None)):
        raise StateError(f"{'requantise' if again else 'dequantise'} is given, but no adapted layer is quantised")
    for at, layer, _ in quantised_layers(model) if dtype is not None or again else ():
        forward = vars(layer).get("forward")
        forward = forward.inner if isinstance(forward, ForwardWrapper) else forward
        if not at or (forward is not None and "_hf_hook" not in vars(layer)):
            raise StateError(
                f"{at or 'the model'} ({type(layer).__name__}) "
                + (f"has a forward of its own on the instance ({forward!r})" if at else "is a quantised layer itself")
                + ", so no other layer can take its place"
            )


def plain_layer(kind: Quantised, layer: Any, weight: Float[Tensor, "d_out d_in"], dtype: torch.dtype) -> nn.Module:
    """An ordinary layer with this weight: Conv1D if the layer was one before it was quantised, otherwise nn.Linear."""
    d_out, d_in = weight.shape
    with torch.device("meta"):
        biased = layer.bias is not None
        new = layer.source_cls(d_out, d_in) if kind.of == "conv1d" else nn.Linear(d_in, d_out, biased)
    as_stored = weight.T if kind.of == "conv1d" else weight
    new.weight = nn.Parameter(as_stored.to(dtype).contiguous(), requires_grad=False)
    if biased:
        new.bias = nn.Parameter(layer.bias.detach().to(dtype, copy=True), requires_grad=layer.bias.requires_grad)
    for name, hooks in vars(layer).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and "state_dict" not in name:
            vars(new)[name] = copy.copy(hooks)
    return new.train(layer.training)


def replace_layer(model: nn.Module, at: str, new: nn.Module, keep: str = "device") -> nn.Module:
    """Replace a layer, under all its names; the new one gets its site and its hook of accelerate.

    Returns the old layer. Its tensors stay on their device, move to CPU memory (`keep="cpu"`) or are dropped ("none").
    """
    old = model.get_submodule(at)
    for name, module in [*model.named_modules(remove_duplicate=False)]:
        if module is old:
            model.set_submodule(name, new)
    if (hook := vars(old).get("_hf_hook")) is not None and "_hf_hook" not in vars(new):
        from accelerate.hooks import add_hook_to_module  # type: ignore[import-untyped, unused-ignore]

        add_hook_to_module(new, copy.copy(hook))
    if NAME in vars(old):
        vars(new)[NAME] = vars(old)[NAME]
    if keep == "device":  # the model may have moved since `new` was made
        new.to(old.get_parameter("weight").device)
    elif keep == "cpu":
        old.to("cpu")
    elif isinstance(kind := kind_of(old), Quantised):
        kind.forget(old)
    return old


_MARKS = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")


def forget_quantised(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Remove the marks of quantisation from models of transformers, so that they are saved as ordinary ones.

    Returns the marks by module, for `remember_quantised`.
    """
    taken: dict[str, dict[str, Any]] = {}
    for at, module in model.named_modules():
        noted = {name: vars(module).pop(name) for name in _MARKS if name in vars(module)}
        config = vars(vars(module).get("config", nn.Module()))
        if "quantization_config" in config:
            noted["quantization_config"] = config.pop("quantization_config")
        if noted:
            taken[at] = noted
        conversions = vars(module).get("_weight_conversions")  # between disk and memory, as the model was loaded
        if noted and conversions is not None:
            noted["_weight_conversions"] = conversions
            vars(module)["_weight_conversions"] = [one for one in conversions if _has_way_back(one)]
    return taken


def _has_way_back(conversion: Any) -> bool:
    """Whether transformers can reverse a conversion when it saves; it cannot unpack quantised weights."""
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def remember_quantised(model: nn.Module, taken: dict[str, dict[str, Any]]) -> None:
    """Restore what `forget_quantised` returned."""
    for at, noted in taken.items():
        module: Any = model.get_submodule(at)
        if "quantization_config" in noted:
            module.config.quantization_config = noted.pop("quantization_config")
        vars(module).update(noted)
