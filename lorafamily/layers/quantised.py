"""Quantised bases: linear layers whose weight is stored in fewer bits, by bitsandbytes or torchao.

The layer's own forward computes the product, and the update is added to it: in a training step only the layer's own
kernel dequantises. A `Quantised` layer kind gives what else is needed of a weight: its shape, its bytes, and its value
for an initialisation or a merge. It imports neither library, since a model with such layers has done so.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorafamily.layers.kinds import LayerKind, kind_of
from lorafamily.layers.site import NAME, base_parameters
from lorafamily.names import join


class Quantised(LayerKind):
    """A linear layer whose weight is stored in fewer bits."""

    linear = True
    of: str = "linear"
    """The layer kind before quantisation. Files note this one, so that they fit the unquantised base too."""
    keeps_dequantised: ClassVar[bool] = False
    """Whether its kernel on a CPU keeps the dequantised weight for the gradient."""

    def shape(self, module: Any) -> tuple[int, int]:
        return module.out_features, module.in_features

    def described(self) -> dict[str, Any]:
        return {"kind": self.of}

    @abstractmethod
    def weight(self, module: Any) -> Float[Tensor, "d_out d_in"]:
        """The dequantised weight in float32, a new tensor."""

    @abstractmethod
    def stored(self, module: Any) -> dict[str, Tensor]:
        """The tensors that store the weight; the first is the parameter."""

    @abstractmethod
    def rounding(self, module: Any) -> Float[Tensor, "d_out d_in"]:
        """For each entry the mean square error of rounding it to a level nearby."""

    @abstractmethod
    def requantised(self, module: Any, weight: Float[Tensor, "d_out d_in"]) -> nn.Module:
        """A layer like this one with another weight, quantised with the same settings."""

    def forget(self, module: Any) -> None:
        """Free the weight; the layer keeps its settings and shape."""
        old = module.weight
        module._parameters["weight"] = nn.Parameter(torch.empty(old.shape, dtype=old.dtype, device="meta"), False)


def shell_of(module: nn.Module) -> Any:
    """A copy of a layer to be given another weight. It shares the layer's tensors except the bias."""
    new = object.__new__(type(module))
    vars(new).update({key: copy.copy(value) if key.startswith("_") else value for key, value in vars(module).items()})
    for name in (NAME, "forward", "_hf_hook", "_old_forward"):  # these wrap the original's forward
        vars(new).pop(name, None)
    new._modules.pop(NAME, None)
    if module._parameters.get("bias") is not None:
        new._parameters["bias"] = nn.Parameter(module.bias.detach().clone(), module.bias.requires_grad)  # type: ignore
    return new


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Quantised]]:
    """Every quantised layer that can carry an adapter: its name, itself and its layer kind."""
    for at, module in model.named_modules():
        if isinstance(kind := kind_of(module), Quantised):
            yield at, module, kind


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the base's parameters by name; of quantised weights the shape before quantisation."""
    quantised = {}
    for _, layer, kind in quantised_layers(model):
        shape = kind.shape(layer)
        quantised[id(layer._parameters["weight"])] = shape[::-1] if kind.of == "conv1d" else shape
    return {name: quantised.get(id(p), tuple(p.shape)) for name, p in base_parameters(model).items()}


def counts_of(model: nn.Module) -> dict[str, int]:
    """Entries of the base's parameters by name; of quantised weights the number before quantisation."""
    return {name: math.prod(shape) for name, shape in shapes_of(model).items()}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The base's parameters by name; quantised weights as the tensors that store them, scales included."""
    stored = {
        id(layer._parameters["weight"]): {join(at, name): tensor for name, tensor in kind.stored(layer).items()}
        for at, layer, kind in quantised_layers(model)
    }
    found: dict[str, Tensor] = {}
    for name, parameter in base_parameters(model).items():
        found |= stored.get(id(parameter), {name: parameter})
    return found


def packed_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters that hold quantised weights: they cannot train."""
    return {id(layer._parameters["weight"]) for _, layer, _ in quantised_layers(model)}
