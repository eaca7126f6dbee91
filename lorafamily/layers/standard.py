"""The layer kinds of PyTorch's linear layers, embeddings and convolutions, and of Hugging Face's Conv1D."""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
import weakref
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lorafamily.adapter import Adapter
from lorafamily.functional import adapted_linear, can_be_fast, computed_in, in_dtype
from lorafamily.layers.kinds import Acting, LayerKind, register_layer_kind, whole_update
from lorafamily.layers.wrapper import ForwardWrapper


class Known(LayerKind):
    """Layers whose forward is the product with their weight: of known classes, or with a forward that is compared with
    a known class's on random inputs, since a subclass may compute anything."""

    @property
    @abstractmethod
    def classes(self) -> tuple[type[nn.Module], ...]: ...

    def example(self, module: Any) -> Tensor:
        """An input for the layer, on the CPU; here for a linear layer."""
        return torch.randn(3, self.matrix(module.weight).shape[1])

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, self.classes)

    def output(self, wrapper: ForwardWrapper, acting: Acting, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        layer, x = wrapper.module, wrapper.input_of(args, kwargs)
        W, b = (layer._parameters.get(name) for name in ("weight", "bias"))
        only_product = self.by_sample and type(layer) in self.classes and wrapper.inner is None  # x Wᵀ + b
        if W is None or not only_product or not can_be_fast(x, W, b):
            return super().output(wrapper, acting, args, kwargs)
        U, V, scale = whole_update(acting, dropping=True)
        return adapted_linear(x, self.matrix(W), b, U, V, scale, dropout=acting[0][1].drops("entries"))

    def why_not(self, module: nn.Module) -> str | None:
        weight = module._parameters.get("weight")
        if weight is not None and not (weight.is_floating_point() and weight.numel()):
            return f"its weight is {weight.dtype} of shape {tuple(weight.shape)}"
        known = next((cls for cls in self.classes if isinstance(module, cls)), self.classes[0])
        if type(module).forward is known.forward or self._same(module, known):
            return None
        return f"the forward of {type(module).__name__} computes something else than the product with its weight"

    def _same(self, module: nn.Module, known: type[nn.Module]) -> bool:
        """Whether the module's forward takes one input and returns what the known class's returns. Both get random
        weights, since the layer's may be on the meta device, or zero."""
        if module in _SAME:
            return _SAME[module]
        _SAME[module] = False  # also where it needs more arguments, or raises
        takes = list(inspect.signature(type(module).forward).parameters.values())
        shapes = {name: parameter.shape for name, parameter in module.named_parameters("", False)}
        if len(takes) == 2 and takes[1].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and "weight" in shapes:
            with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng([]), contextlib.suppress(Exception):
                torch.default_generator.manual_seed(0)
                parameters: dict[str, Any] = dict.fromkeys([*module._parameters, "bias"])
                parameters |= {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
                buffers, same = copy.deepcopy(module._buffers), True
                copied = object.__new__(type(module))
                for training in (True, False):
                    vars(copied).update(vars(module), _parameters=parameters, _buffers=buffers, training=training)
                    x = self.example(copied)
                    found, wanted = type(module).forward(copied, x), known.forward(copied, x)
                    same &= torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)  # sums in any order
                _SAME[module] = same
        return _SAME[module]


_SAME: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
"""What `Known._same` found, by module."""


class _Linear(Known):
    name = "linear"
    linear = True
    classes = (nn.Linear,)

    def matches(self, module: nn.Module) -> bool:
        if isinstance(module, nn.Linear):
            # nn.MultiheadAttention reads its output projection's weight and never calls the module.
            return not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        weight = module._parameters.get("weight")
        if weight is None or isinstance(weight, nn.parameter.UninitializedParameter) or weight.ndim != 2:
            return False
        # A class that is no subclass may compute the same, such as torch_geometric's Linear.
        return weight.is_floating_point() and not isinstance(module, nn.Embedding) and self._same(module, nn.Linear)


class _Transposed(Known):
    """Layers whose weight is stored as (d_in, d_out)."""

    def matrix(self, weight: Tensor) -> Float[Tensor, "d_out d_in"]:
        return weight.T

    def restore(self, matrix: Float[Tensor, "d_out d_in"], weight: Tensor) -> Tensor:
        return matrix.T


class _Conv1D(_Transposed):
    """Hugging Face's Conv1D (GPT-2), a linear layer."""

    name = "conv1d"
    linear = True

    @property
    def classes(self) -> tuple[type[nn.Module], ...]:
        # A model that has one has imported it; no other model should pay for importing transformers.
        home = sys.modules.get("transformers.pytorch_utils")
        return () if home is None else (home.Conv1D,)


class _Embedding(_Transposed):
    """A table of vectors is a linear layer on one-hot inputs: d_in counts the table's entries. The padding entry is
    adapted like the others. Dropout has no input to act on."""

    name = "embedding"
    classes = (nn.Embedding,)

    def why_not(self, module: Any) -> str | None:
        return super().why_not(module) if module.max_norm is None else "max_norm rescales its weight as it is read"

    def added(self, module: nn.Module, adapter: Adapter, x: Tensor) -> Tensor:
        U, V = adapter.factors()
        U, V = in_dtype(U * adapter.scale, V, self.weight(module).dtype)
        return F.linear(F.embedding(x, V.T), U)

    def example(self, module: Any) -> Tensor:
        return torch.arange(min(3, len(module.weight)))


Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class _Convolution(Known):
    """V is a convolution to r channels, U a convolution of size 1 from there. With groups both act within each group: W
    and ΔW have the rows of all groups, and d_in is that of one group."""

    name = "convolution"
    classes = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def matrix(self, weight: Tensor) -> Float[Tensor, "d_out d_in"]:
        return weight.flatten(1)

    def restore(self, matrix: Float[Tensor, "d_out d_in"], weight: Tensor) -> Tensor:
        return matrix.view_as(weight)

    def why_not(self, module: Any) -> str | None:
        inherited = type(module)._conv_forward in [cls._conv_forward for cls in self.classes]
        return super().why_not(module) if inherited else f"{type(module).__name__} has a _conv_forward of its own"

    def added(self, module: Any, adapter: Adapter, x: Tensor) -> Tensor:
        U, V = adapter.factors(dropping=True)
        x = F.dropout(x, adapter.drops("entries")) if adapter.drops("entries") else x
        U, V = in_dtype(U * adapter.scale, V, computed_in(x))
        kernel = V.view(len(V), *module.weight.shape[1:])
        groups, channels = module.groups, 1 - module.weight.ndim  # from the end: there may be no batch axis
        h = module._conv_forward(x, torch.cat([kernel] * groups), None)  # with the layer's stride, padding, dilation
        h = h.movedim(channels, -1).unflatten(-1, (groups, len(V)))
        U = U.unflatten(0, (groups, -1))
        return torch.einsum("...gr,gor->...go", h, U).flatten(-2).movedim(-1, channels)

    def example(self, module: Any) -> Tensor:
        size = [d * (k - 1) + 2 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        return torch.randn(2, module.in_channels, *size)


for _kind in (_Linear(), _Conv1D(), _Embedding(), _Convolution()):  # no layer matches two of these
    register_layer_kind(_kind)
