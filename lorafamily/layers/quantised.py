"""Quantised bases: linear layers whose weight is stored in fewer bits, by bitsandbytes or torchao.

The layer's own forward computes its product and the update is added to it, so in a training step only the layer's own
kernel dequantises. A `Quantised` kind knows what is needed of a weight elsewhere: its shape, its value for an
initialisation or a merge, its bytes. Neither library is imported: a model with such layers has done so.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorafamily.layers.kinds import LayerKind, kind_of
from lorafamily.layers.site import NAME, base_parameters
from lorafamily.names import join


class Quantised(LayerKind):
    """A linear layer whose weight is stored in fewer bits. `weight` is that weight dequantised, in float32: a tensor of
    the full size, for whoever needs the values of one layer; `stored` is what the layer holds of it."""

    linear = True
    of: str = "linear"
    """The kind of layer that was quantised, as which files speak of it: they fit the unquantised base too."""

    def matrix(self, weight: Tensor) -> Float[Tensor, "d_out d_in"]:
        return weight

    def restore(self, matrix: Float[Tensor, "d_out d_in"], weight: Tensor) -> Tensor:
        return matrix

    def shape(self, module: Any) -> tuple[int, int]:
        return module.out_features, module.in_features

    def described(self) -> dict[str, Any]:
        return {"kind": self.of}

    @abstractmethod
    def weight(self, module: Any) -> Float[Tensor, "d_out d_in"]:
        """The dequantised weight, in float32; nothing else refers to it."""

    @abstractmethod
    def stored(self, module: Any) -> dict[str, Tensor]:
        """Every tensor that the weight follows from; the first one is the parameter."""

    @abstractmethod
    def rounding(self, module: Any) -> Float[Tensor, "d_out d_in"]:
        """The mean square of what rounding to the levels around each entry takes from it."""

    @abstractmethod
    def requantised(self, module: Any, weight: Float[Tensor, "d_out d_in"]) -> nn.Module:
        """A layer like this one, its weight quantised from another with the same settings."""

    def forget(self, module: Any) -> None:
        """Let go of the weight; the layer keeps its settings and shape."""
        old = module.weight
        module._parameters["weight"] = nn.Parameter(torch.empty(old.shape, dtype=old.dtype, device="meta"), False)


def shell_of(module: nn.Module) -> Any:
    """A layer like another, that shares its tensors and may be given others."""
    new = object.__new__(type(module))
    vars(new).update({key: copy.copy(value) if key.startswith("_") else value for key, value in vars(module).items()})
    for name in (NAME, "forward", "_hf_hook", "_old_forward"):  # what stands before the forward of that very layer
        vars(new).pop(name, None)
    new._modules.pop(NAME, None)
    if module._parameters.get("bias") is not None:
        new._parameters["bias"] = nn.Parameter(module.bias.detach().clone(), module.bias.requires_grad)  # type: ignore
    return new


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Quantised]]:
    """Every quantised layer of a kind that is adapted, by name."""
    for at, module in model.named_modules():
        if isinstance(kind := kind_of(module), Quantised):
            yield at, module, kind


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the base's parameters by name; of quantised weights those that they had before."""
    of_packed = {}
    for _, layer, kind in quantised_layers(model):
        shape = kind.shape(layer)
        of_packed[id(layer._parameters["weight"])] = shape[::-1] if kind.of == "conv1d" else shape
    return {name: of_packed.get(id(p), tuple(p.shape)) for name, p in base_parameters(model).items()}


def counts_of(model: nn.Module) -> dict[str, int]:
    """Parameters of the base by the name of the tensor; of quantised weights as many as they have entries."""
    return {name: math.prod(shape) for name, shape in shapes_of(model).items()}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The base's parameters by name; quantised weights as the tensors that they are stored in, scales and all."""
    parts = {
        id(layer._parameters["weight"]): {join(at, name): tensor for name, tensor in kind.stored(layer).items()}
        for at, layer, kind in quantised_layers(model)
    }
    found: dict[str, Tensor] = {}
    for name, parameter in base_parameters(model).items():
        found |= parts.get(id(parameter), {name: parameter})
    return found


def packed_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters that hold quantised weights, and cannot train."""
    return {id(layer._parameters["weight"]) for _, layer, _ in quantised_layers(model)}
