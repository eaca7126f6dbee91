"""What can carry an adapter: kinds of layers, and what the package must know of each."""

from __future__ import annotations

import contextlib
import inspect
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lorafamily.adapter import Adapter, Factors
from lorafamily.functional import adapted_linear, can_be_fast, computed_in, in_dtype, low_rank_linear

if TYPE_CHECKING:
    from lorafamily.site import Site

Acting = Sequence[tuple["LayerKind", Adapter]]
"""The adapters of one layer that take effect now: one for its weight, or one for each of some parts of it."""


class LayerKind(ABC):
    """What the package must know of a class of layers. Make one instance and `register_layer_kind` it to add yours."""

    name: ClassVar[str]
    """What files call the kind."""
    linear: ClassVar[bool] = False
    """Whether `targets="all-linear"` takes such layers; others must be named."""
    additive: ClassVar[bool] = True
    """Whether an adapter adds to the layer's own output, as all do but those of nn.MultiheadAttention."""

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether this kind speaks for the module."""

    @abstractmethod
    def matrix(self, weight: Tensor) -> Float[Tensor, "d_out d_in"]:
        """The module's weight as (d_out, d_in), a view."""

    @abstractmethod
    def restore(self, matrix: Float[Tensor, "d_out d_in"], weight: Tensor) -> Tensor:
        """A (d_out, d_in) matrix in the shape of the module's weight; the inverse of `matrix`."""

    def added(self, module: nn.Module, adapter: Adapter, x: Tensor) -> Tensor:
        """What the adapter adds to the layer's output for input x: that of W + ΔW less that of W."""
        return adapter(x)

    def output(self, site: Site, acting: Acting, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The layer's output with its adapters: of the layer's own forward, and what they add to it."""
        y = site.base(*args, **kwargs)
        return self.updated(site, acting, y, args, kwargs)

    def updated(self, site: Site, acting: Acting, y: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The same where the layer's own forward has given y already."""
        x, (kind, adapter) = site.input_of(args, kwargs), acting[0]
        x = x.to(adapter.device)  # accelerate's hooks move it for the layer, later than this
        if not self.by_sample:
            return y + kind.added(site.layer, adapter, x).to(y.device)
        U, V, scale = whole_update(acting, dropping=True)
        kept = F.dropout(x, adapter.drops_entries) if adapter.drops_entries else x
        return y + low_rank_linear(kept, U, V, scale).to(y.device)

    def spread(self, U: Float[Tensor, "own m"]) -> Float[Tensor, "d_out m"]:
        """The up factor of the whole layer's weight from that of this kind's part of it."""
        return U

    def changed(self, weight: Tensor, U: Tensor, V: Tensor, scale: float) -> Tensor:
        """W + s U V, in the shape of the module's weight."""
        return self.restore(torch.addmm(self.matrix(weight), U, V, alpha=scale), weight)

    @property
    def by_sample(self) -> bool:
        """Whether what is added to a sample's output follows from that sample as from any input of a linear layer."""
        return self.linear and type(self).added is LayerKind.added

    def why_not(self, module: nn.Module) -> str | None:
        """Why this module cannot carry an adapter although the kind speaks for its class; None where it can."""
        return None

    def parameter(self, module: nn.Module) -> nn.Parameter:
        """What holds the weight and is replaced in merging."""
        return module.get_parameter("weight")

    def weight(self, module: nn.Module) -> Tensor:
        """The weight's present value; of a parametrised layer, what that computes."""
        parametrised = nn.utils.parametrize.is_parametrized(module, "weight")
        return cast(Tensor, module.weight) if parametrised else self.parameter(module)

    def stored_as(self, at: str) -> str:
        """The name of that parameter in a state dict, for a layer of the full name `at`."""
        return f"{at}.weight"

    def described(self) -> dict[str, Any]:
        """What a file says of the kind."""
        return {"kind": self.name}


class _Torch(LayerKind):
    """Layers whose class has the forward of a known one; others of its subclasses may do anything, and are tried."""

    @abstractmethod
    def forwards(self) -> tuple[Callable[..., Any], ...]:
        """Those that compute just the kind's product."""

    @abstractmethod
    def example(self, module: nn.Module) -> Tensor:
        """An input of the layer, on the CPU."""

    @abstractmethod
    def product(self, module: nn.Module, x: Tensor) -> Tensor:
        """What the kind says that the layer computes."""

    def why_not(self, module: nn.Module) -> str | None:
        weight = module._parameters.get("weight")
        if weight is not None and not (weight.is_floating_point() and weight.numel()):
            return f"its weight is {weight.dtype} of shape {tuple(weight.shape)}"
        if type(module).forward in self.forwards() or _computes(self, module):
            return None
        return f"the forward of {type(module).__name__} computes something else than the product with its weight"


_TRIED: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def _computes(kind: _Torch, module: nn.Module) -> bool:
    """Whether a forward of somebody's own is the kind's product: it takes one input, and gives that on random numbers.

    The layer's parameters are exchanged for random ones while it is tried: its own may be on the meta device, or zero.
    """
    if module not in _TRIED:
        _TRIED[module] = False  # whatever it wants or raises, it is not this
        takes = list(inspect.signature(type(module).forward).parameters.values())
        names = [name for name, parameter in module._parameters.items() if parameter is not None]
        if len(takes) == 2 and takes[1].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and "weight" in names:
            draw = torch.Generator().manual_seed(0)
            given = {
                name: torch.randn(module.get_parameter(name).shape, generator=draw, device="cpu") for name in names
            }
            with torch.no_grad(), torch.device("cpu"), holding(module, given), contextlib.suppress(Exception):
                x = kind.example(module)
                found, wanted = type(module).forward(module, x), kind.product(module, x)
                _TRIED[module] = torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)  # sums in any order
    return _TRIED[module]


@contextmanager
def holding(layer: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block the layer finds other values where its parameters are, by name."""
    places = {name: layer.get_submodule(name.rpartition(".")[0])._parameters for name in values}
    before = {name: place[name.rpartition(".")[2]] for name, place in places.items()}
    try:
        for name, place in places.items():
            place[name.rpartition(".")[2]] = cast(nn.Parameter, values[name])
        yield
    finally:
        for name, place in places.items():
            place[name.rpartition(".")[2]] = before[name]


class MultiplyingKind(LayerKind):
    """Layers that are a product with their weight, and nothing else: those with a fast path."""

    linear = True

    def output(self, site: Site, acting: Acting, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        layer, x = site.layer, site.input_of(args, kwargs)
        W, b = (layer._parameters.get(name) for name in ("weight", "bias"))
        if W is None or site.patched or not self.plain(type(layer)) or not can_be_fast(x, W, b):
            return super().output(site, acting, args, kwargs)
        U, V, scale = whole_update(acting, dropping=True)
        return adapted_linear(x, self.matrix(W), b, U, V, scale, dropout=acting[0][1].drops_entries)

    @abstractmethod
    def plain(self, cls: type[nn.Module]) -> bool:
        """Whether layers of that class compute x Wᵀ + b and no more; a subclass may do anything."""


def whole_update(acting: Acting, *, dropping: bool = False) -> tuple[Tensor, Tensor, float]:
    """U, V and s of the whole layer's ΔW: that of its adapter, or of those of its parts side by side."""
    if len(acting) == 1 and type(acting[0][0]).spread is LayerKind.spread:
        adapter = acting[0][1]
        return *adapter.factors(dropping=dropping), adapter.scale
    both: list[Factors] = []
    for kind, adapter in acting:
        U, V = adapter.factors(dropping=dropping)
        both.append((kind.spread(adapter.scale * U), V))
    Us, Vs = zip(*both, strict=True)
    return torch.cat(Us, 1), torch.cat(Vs, 0), 1.0


class _Linear(MultiplyingKind, _Torch):
    name = "linear"

    def matches(self, module: nn.Module) -> bool:
        # nn.MultiheadAttention reads its output projection's weight and never calls the module: an adapter on it
        # would be silently without effect.
        return isinstance(module, nn.Linear) and not isinstance(
            module, nn.modules.linear.NonDynamicallyQuantizableLinear
        )

    def matrix(self, weight: Tensor) -> Float[Tensor, "d_out d_in"]:
        return weight

    def restore(self, matrix: Float[Tensor, "d_out d_in"], weight: Tensor) -> Tensor:
        return matrix

    def plain(self, cls: type[nn.Module]) -> bool:
        return cls is nn.Linear

    def forwards(self) -> tuple[Callable[..., Any], ...]:
        return (nn.Linear.forward,)

    def example(self, module: nn.Module) -> Tensor:
        return torch.randn(3, cast(nn.Linear, module).weight.shape[1])

    def product(self, module: nn.Module, x: Tensor) -> Tensor:
        return F.linear(x, module.get_parameter("weight"), module._parameters.get("bias"))


class _Transposed(LayerKind):
    """Layers whose weight is stored as (d_in, d_out)."""

    def matrix(self, weight: Tensor) -> Float[Tensor, "d_out d_in"]:
        return weight.T

    def restore(self, matrix: Float[Tensor, "d_out d_in"], weight: Tensor) -> Tensor:
        return matrix.T


class _Conv1D(_Transposed, MultiplyingKind):
    """Hugging Face's Conv1D (GPT-2), a linear layer."""

    name = "conv1d"

    def matches(self, module: nn.Module) -> bool:
        # A model that has one has imported it; nobody else pays for importing transformers.
        home = sys.modules.get("transformers.pytorch_utils")
        return home is not None and isinstance(module, home.Conv1D)

    def why_not(self, module: nn.Module) -> str | None:
        own = type(module).forward is not sys.modules["transformers.pytorch_utils"].Conv1D.forward
        return f"{type(module).__name__} has a forward of its own" if own else None

    def plain(self, cls: type[nn.Module]) -> bool:
        return cls is sys.modules["transformers.pytorch_utils"].Conv1D


class _Embedding(_Transposed, _Torch):
    """A table of vectors, which is a linear layer on one-hot inputs: d_in numbers the entries.

    Dropout has no input of some size to act on. The padding entry is an entry like the others.
    """

    name = "embedding"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    def why_not(self, module: nn.Module) -> str | None:
        if cast(nn.Embedding, module).max_norm is not None:
            return "max_norm rescales its weight as it is read"
        return super().why_not(module)

    def added(self, module: nn.Module, adapter: Adapter, x: Tensor) -> Tensor:
        U, V = adapter.factors()
        U, V = in_dtype(U * adapter.scale, V, self.weight(module).dtype)
        return F.linear(F.embedding(x, V.T), U)

    def forwards(self) -> tuple[Callable[..., Any], ...]:
        return (nn.Embedding.forward,)

    def example(self, module: nn.Module) -> Tensor:
        return torch.arange(min(3, len(cast(nn.Embedding, module).weight)))

    def product(self, module: nn.Module, x: Tensor) -> Tensor:
        return F.embedding(x, module.get_parameter("weight"))


Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class _Convolution(_Torch):
    """nn.Conv1d, Conv2d, Conv3d: V is a convolution to r channels, U one of size 1 from there.

    With groups both act within each group: W and ΔW have the rows of all groups, and d_in is that of one.
    """

    name = "convolution"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, Convolution)

    def matrix(self, weight: Tensor) -> Float[Tensor, "d_out d_in"]:
        return weight.flatten(1)

    def restore(self, matrix: Float[Tensor, "d_out d_in"], weight: Tensor) -> Tensor:
        return matrix.view_as(weight)

    def added(self, module: nn.Module, adapter: Adapter, x: Tensor) -> Tensor:
        assert isinstance(module, Convolution)
        U, V = adapter.factors(dropping=True)
        x = F.dropout(x, adapter.drops_entries) if adapter.drops_entries else x
        U, V = in_dtype(U * adapter.scale, V, computed_in(x))
        kernel = V.view(len(V), *module.weight.shape[1:])
        groups, channels = module.groups, 1 - module.weight.ndim  # counted from the end: there may be no batch axis
        h = module._conv_forward(x, kernel.repeat(groups, *[1] * (kernel.ndim - 1)), None)  # stride, padding, dilation
        h = h.movedim(channels, -1).unflatten(-1, (groups, len(V)))
        U = U.unflatten(0, (groups, -1))
        return torch.einsum("...gr,gor->...go", h, U).flatten(-2).movedim(-1, channels)

    def forwards(self) -> tuple[Callable[..., Any], ...]:
        return nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward

    def example(self, module: nn.Module) -> Tensor:
        assert isinstance(module, Convolution)
        size = [d * (k - 1) + 2 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        return torch.randn(2, module.in_channels, *size)

    def product(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, Convolution)
        return module._conv_forward(x, module.get_parameter("weight"), module._parameters.get("bias"))


_KINDS: list[LayerKind] = [_Linear(), _Conv1D(), _Embedding(), _Convolution()]


def register_layer_kind(kind: LayerKind) -> None:
    """Let `apply` adapt a further class of layers. Later registrations are asked first."""
    _KINDS.insert(0, kind)


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind that speaks for a module, or None where no adapter can sit on it."""
    kind = next((kind for kind in _KINDS if kind.matches(module)), None)
    return None if kind is None or kind.why_not(module) is not None else kind


def why_not(module: nn.Module) -> str | None:
    """Why a module that some kind speaks for cannot carry an adapter, None where it can or none does."""
    return next((kind.why_not(module) for kind in _KINDS if kind.matches(module)), None)


def kind_named(name: str) -> LayerKind | None:
    """The kind of that name, None where no such kind is registered."""
    return next((kind for kind in _KINDS if kind.name == name), None)


@contextmanager
def onloaded(layer: nn.Module) -> Iterator[None]:
    """Inside the block a layer that accelerate keeps elsewhere has its weights."""
    if "_hf_hook" not in vars(layer):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(layer):
        yield
