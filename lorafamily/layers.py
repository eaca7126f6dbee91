"""What can carry an adapter: kinds of layers, and what the package must know of each."""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lorafamily.adapter import Adapter, Factors
from lorafamily.elsewhere import is_sharded, whole
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
    """Whether an adapter adds to the layer's own output, as all do but those of weights that the layer reads."""
    in_place: ClassVar[bool] = False
    """Whether `changed` writes into the weight that it gets, as it must where that has many parts."""

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
        if not self.by_sample:
            return y + kind.added(site.layer, adapter, x)
        U, V, scale = whole_update(acting, dropping=True)
        kept = F.dropout(x, adapter.drops("entries")) if adapter.drops("entries") else x
        return y + low_rank_linear(kept, U, V, scale)

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
        """The weight's present value, also where it is computed from other parameters."""
        try:
            return self.parameter(module)
        except AttributeError:
            return cast(Tensor, module.weight)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(d_out, d_in) of the weight."""
        d_out, d_in = self.matrix(self.weight(module)).shape
        return d_out, d_in

    def stored(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors that the weight follows from: itself, where it is not quantised."""
        return {"weight": self.weight(module)}

    def stored_as(self, at: str) -> str:
        """The name of that parameter in a state dict, for a layer of the full name `at`."""
        return f"{at}.weight"

    def described(self) -> dict[str, Any]:
        """What a file says of the kind."""
        return {"kind": self.name}


class Part(LayerKind):
    """The kind of a part of a layer: some rows of a weight, or one expert. A target says itself which part it is.

    `held_in`: the parameter that has the part's weight; `part`: what the layer's site calls it.
    """

    held_in: str
    part: str

    @property
    def path(self) -> str:
        """The part's name in its layer, as users see it."""
        return self.part

    def matches(self, module: nn.Module) -> bool:
        return False

    def parameter(self, module: nn.Module) -> nn.Parameter:
        return module.get_parameter(self.held_in)

    def weight(self, module: nn.Module) -> Tensor:
        return cast(Tensor, attrgetter(self.held_in)(module))


class _Known(LayerKind):
    """Layers of known classes, whose forward is the product with their weight. A subclass may do anything; one with a
    forward of its own is tried."""

    @property
    @abstractmethod
    def classes(self) -> tuple[type[nn.Module], ...]:
        """The known ones."""

    @abstractmethod
    def example(self, module: Any) -> Tensor:
        """An input of the layer, on the CPU."""

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, self.classes)

    def output(self, site: Site, acting: Acting, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        layer, x = site.layer, site.input_of(args, kwargs)
        W, b = (layer._parameters.get(name) for name in ("weight", "bias"))
        alone = self.by_sample and type(layer) in self.classes and not site.patched  # just x Wᵀ + b
        if W is None or not alone or not can_be_fast(x, W, b):
            return super().output(site, acting, args, kwargs)
        U, V, scale = whole_update(acting, dropping=True)
        return adapted_linear(x, self.matrix(W), b, U, V, scale, dropout=acting[0][1].drops("entries"))

    def why_not(self, module: nn.Module) -> str | None:
        weight = module._parameters.get("weight")
        if weight is not None and not (weight.is_floating_point() and weight.numel()):
            return f"its weight is {weight.dtype} of shape {tuple(weight.shape)}"
        known = next(cls for cls in self.classes if isinstance(module, cls))
        if type(module).forward is known.forward or self._same(module, known):
            return None
        return f"the forward of {type(module).__name__} computes something else than the product with its weight"

    def _same(self, module: nn.Module, known: type[nn.Module]) -> bool:
        """Whether a forward of somebody's own takes one input and gives what the known class's gives, on random
        numbers: the layer's own parameters may be on the meta device, or zero."""
        if module not in _TRIED:
            _TRIED[module] = False  # whatever it wants or raises, it is not the same
            takes = list(inspect.signature(type(module).forward).parameters.values())
            shapes = {name: parameter.shape for name, parameter in module.named_parameters("", False)}
            if len(takes) == 2 and takes[1].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and "weight" in shapes:
                with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng([]), contextlib.suppress(Exception):
                    torch.default_generator.manual_seed(0)
                    given: dict[str, Any] = dict.fromkeys(module._parameters)
                    given |= {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
                    own = {name: copy.deepcopy(buffer) for name, buffer in module._buffers.items()}
                    tried, same = object.__new__(type(module)), True
                    for training in (True, False):
                        vars(tried).update(vars(module), _parameters=given, _buffers=own, training=training)
                        x = self.example(tried)
                        found, wanted = type(module).forward(tried, x), known.forward(tried, x)
                        same &= torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)  # sums in any order
                    _TRIED[module] = same
        return _TRIED[module]


_TRIED: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@contextmanager
def holding(layer: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block the layer finds other values where its parameters are, by name."""
    paths = {name: name.rpartition(".") for name in values}
    places: dict[str, dict[str, Any]] = {name: layer.get_submodule(at)._parameters for name, (at, *_) in paths.items()}
    before = {name: place[paths[name][2]] for name, place in places.items()}
    try:
        for name, value in values.items():
            places[name][paths[name][2]] = value
        yield
    finally:
        for name, value in before.items():
            places[name][paths[name][2]] = value


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


class _Linear(_Known):
    name = "linear"
    linear = True
    classes = (nn.Linear,)

    def matches(self, module: nn.Module) -> bool:
        # nn.MultiheadAttention reads its output projection's weight and never calls the module.
        return super().matches(module) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)

    def matrix(self, weight: Tensor) -> Float[Tensor, "d_out d_in"]:
        return weight

    def restore(self, matrix: Float[Tensor, "d_out d_in"], weight: Tensor) -> Tensor:
        return matrix

    def example(self, module: Any) -> Tensor:
        return torch.randn(3, module.weight.shape[1])


class _Transposed(_Known):
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
        # A model that has one has imported it; nobody else pays for importing transformers.
        home = sys.modules.get("transformers.pytorch_utils")
        return () if home is None else (home.Conv1D,)

    def example(self, module: Any) -> Tensor:
        return torch.randn(3, module.weight.shape[0])


class _Embedding(_Transposed):
    """A table of vectors, which is a linear layer on one-hot inputs: d_in numbers the entries, the padding entry is one
    like the others, and dropout has no input of some size to act on."""

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


class _Convolution(_Known):
    """V is a convolution to r channels, U one of size 1 from there. With groups both act within each group: W and ΔW
    have the rows of all groups, and d_in is that of one."""

    name = "convolution"
    classes = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def matrix(self, weight: Tensor) -> Float[Tensor, "d_out d_in"]:
        return weight.flatten(1)

    def restore(self, matrix: Float[Tensor, "d_out d_in"], weight: Tensor) -> Tensor:
        return matrix.view_as(weight)

    def why_not(self, module: Any) -> str | None:
        inherited = type(module)._conv_forward in [cls._conv_forward for cls in self.classes]
        return super().why_not(module) if inherited else f"{type(module).__name__} convolves in a way of its own"

    def added(self, module: Any, adapter: Adapter, x: Tensor) -> Tensor:
        U, V = adapter.factors(dropping=True)
        x = F.dropout(x, adapter.drops("entries")) if adapter.drops("entries") else x
        U, V = in_dtype(U * adapter.scale, V, computed_in(x))
        kernel = V.view(len(V), *module.weight.shape[1:])
        groups, channels = module.groups, 1 - module.weight.ndim  # there may be no batch axis
        h = module._conv_forward(x, torch.cat([kernel] * groups), None)  # with the layer's stride, padding, dilation
        h = h.movedim(channels, -1).unflatten(-1, (groups, len(V)))
        U = U.unflatten(0, (groups, -1))
        return torch.einsum("...gr,gor->...go", h, U).flatten(-2).movedim(-1, channels)

    def example(self, module: Any) -> Tensor:
        size = [d * (k - 1) + 2 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        return torch.randn(2, module.in_channels, *size)


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
    from accelerate.utils import align_module_device  # type: ignore[import-untyped, unused-ignore]

    with align_module_device(layer):
        yield


@contextmanager
def whole_weights(layer: nn.Module) -> Iterator[None]:
    """Inside the block a layer has its weights, and has them whole where they are spread over processes: all of these
    must come here."""
    spread = {name: p for name, p in layer.named_parameters() if is_sharded(p)}
    with onloaded(layer), holding(layer, {name: nn.Parameter(whole(p), False) for name, p in spread.items()}):
        yield
