"""What can carry an adapter, and how the adapter sits on it."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from lorafamily.adapter import Adapter
from lorafamily.functional import Layer, Reading
from lorafamily.mixins import Mixin, add_mixin, drop_mixin

PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor)
"""Classes of weights that are nothing but numbers, or, in the fake ones that plans are made with, not even these."""


class LayerKind(ABC):
    """What the package must know of a class of layers. Make one instance and `register_layer_kind` it to add yours."""

    name: ClassVar[str]
    """What files call the kind."""
    linear: ClassVar[bool] = False
    """Whether `targets="all-linear"` takes such layers; others must be named."""

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

    def output(self, module: Adapted, adapter: Adapter, x: Tensor, *more: Tensor) -> Tensor:
        """The layer's output with its adapter; a kind that knows a faster way to the same gives it here."""
        return module.own(x, *more) + self.added(module, adapter, x)

    @property
    def by_sample(self) -> bool:
        """Whether what is added to a sample's output follows from that sample as from any input of a linear layer."""
        return self.linear and type(self).added is LayerKind.added

    def parameter(self, module: nn.Module) -> nn.Parameter:
        """What holds the weight and is replaced in merging."""
        return module.get_parameter("weight")

    def stored_as(self, at: str) -> str:
        """The name of that parameter in a state dict, for a layer of the full name `at`."""
        return f"{at}.weight"

    def described(self) -> dict[str, Any]:
        """What a file says of the kind."""
        return {"kind": self.name}

    def occupied(self, module: nn.Module, carries: bool) -> None:
        """Called when a layer gets its first adapter and when it has lost its last."""


class MultiplyingKind(LayerKind):
    """Layers that are a product with their weight, and nothing else: those with a fast path."""

    linear = True

    @abstractmethod
    def plain(self, own_class: type[nn.Module]) -> bool:
        """Whether layers of that class compute x Wᵀ + b and no more; a subclass may do anything."""

    def fast(self, module: Adapted, x: Tensor) -> Layer | None:
        """What the fast path needs of a layer, None where the layer must go the plain way.

        While `torch.compile` traces, that is so everywhere: it fuses what the fast path saves.
        """
        adapter, weight = module.acting, cast(Tensor, module.weight)
        if torch.compiler.is_compiling() or adapter is None or not adapter.ungated or weight.requires_grad:
            return None
        if not self.plain(module.own_class) or module.mixins[-1] is not Adapted:
            return None
        if type(weight) not in PLAIN_TENSORS:  # sharded, quantised: its products are its own matter
            return None
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            return None
        return Layer(self.matrix(weight), cast("Tensor | None", module.bias), *adapter.parts())

    def output(self, module: Adapted, adapter: Adapter, x: Tensor, *more: Tensor) -> Tensor:
        if module.together is not None and torch.is_grad_enabled():
            return module.together(module, x)
        return self.alone(module, adapter, x)

    def alone(self, module: Adapted, adapter: Adapter, x: Tensor) -> Tensor:
        """The output of a layer that shares nothing with others."""
        layer = self.fast(module, x)
        if layer is None:
            return super().output(module, adapter, x)
        return Reading(x, [layer], dropout=adapter.drops_entries).output(0)


class _Linear(MultiplyingKind):
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

    def plain(self, own_class: type[nn.Module]) -> bool:
        return own_class is nn.Linear


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

    def plain(self, own_class: type[nn.Module]) -> bool:
        return own_class is sys.modules["transformers.pytorch_utils"].Conv1D


class _Embedding(_Transposed):
    """A table of vectors, which is a linear layer on one-hot inputs: d_in numbers the entries.

    Dropout has no input of some size to act on. The padding entry is an entry like the others.
    """

    name = "embedding"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding) and module.max_norm is None  # which rescales the weight as it reads it

    def added(self, module: nn.Module, adapter: Adapter, x: Tensor) -> Tensor:
        U, V = adapter.factors()
        like = cast(Tensor, module.weight).dtype
        return F.linear(F.embedding(x, V.T.to(like)), (U * adapter.scale).to(like))


class _Convolution(LayerKind):
    """nn.Conv1d, Conv2d, Conv3d without groups: V is a convolution to r channels, U one of size 1 from there."""

    name = "convolution"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1

    def matrix(self, weight: Tensor) -> Float[Tensor, "d_out d_in"]:
        return weight.flatten(1)

    def restore(self, matrix: Float[Tensor, "d_out d_in"], weight: Tensor) -> Tensor:
        return matrix.view_as(weight)

    def added(self, module: nn.Module, adapter: Adapter, x: Tensor) -> Tensor:
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        U, V = adapter.factors()
        x, V = adapter.without_dropped(x, V)
        kernel = V.view(len(V), *module.weight.shape[1:]).to(x.dtype)
        h = module._conv_forward(x, kernel, None)  # with the layer's own stride, padding and dilation
        channels = 1 - module.weight.ndim  # counted from the end: the batch axis may be missing
        return F.linear(h.movedim(channels, -1), (U * adapter.scale).to(h.dtype)).movedim(-1, channels)


_KINDS: list[LayerKind] = [_Linear(), _Conv1D(), _Embedding(), _Convolution()]


def register_layer_kind(kind: LayerKind) -> None:
    """Let `apply` adapt a further class of layers. Later registrations are asked first."""
    _KINDS.insert(0, kind)


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind that speaks for a module, or None where no adapter can sit on it."""
    noted = vars(module).get("own_kind")  # that of one module only
    return noted if isinstance(noted, LayerKind) else next((kind for kind in _KINDS if kind.matches(module)), None)


def kind_named(name: str) -> LayerKind | None:
    """The kind of that name, None where no such kind is registered."""
    return next((kind for kind in _KINDS if kind.name == name), None)


def kind_for(module: nn.Module) -> LayerKind:
    """The kind of a layer that is known to have one."""
    kind = kind_of(module)
    assert kind is not None
    return kind


def weight_of(module: nn.Module) -> Float[Tensor, "d_out d_in"]:
    """The weight of a layer that can carry an adapter, as (d_out, d_in), a view."""
    kind = kind_for(module)
    return kind.matrix(kind.parameter(module))


class Adapted(Mixin):
    """What a layer with adapters has besides its own: the adapters, by name, and which of them is active."""

    adapters: nn.ModuleDict
    active: str | None
    kind: LayerKind
    route: Callable[[Tensor], Tensor] | None = None
    """Adds to the output what each sample's own adapter gives, see `deploy/routing.py`; then none is active."""
    together: Callable[[Adapted, Tensor], Tensor] | None = None
    """Gives the output where the layer reads the same input as others, see `sharing.py`."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        made, of, state = super().__reduce_ex__(protocol)
        return made, of, {key: value for key, value in state.items() if key != "together"}  # the copy of one is alone

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        adapter = self.acting
        if adapter is None:
            return self.updated(self.own(x, *more), x)
        return self.kind.output(self, adapter, x, *more)

    @property
    def acting(self) -> Adapter | None:
        """The adapter that takes effect for all samples alike."""
        if self.active is None:
            return None
        adapter = cast(Adapter, self.adapters[self.active])
        return None if adapter.off else adapter

    def own(self, x: Tensor, *more: Tensor) -> Tensor:
        """What the layer computes without adapter."""
        return super().forward(x, *more)

    def updated(self, y: Tensor, x: Tensor, *more: Tensor) -> Tensor:
        """The layer's output, from what it computes without adapter and its input."""
        if self.route is not None:
            return y + self.route(x)
        adapter = self.acting
        return y if adapter is None else y + self.kind.added(self, adapter, x)


def attach(module: nn.Module, name: str, adapter: Adapter) -> None:
    """Put an adapter on a layer; it takes effect when `module.active` is its name."""
    add_mixin(module, Adapted)
    adapted = cast(Adapted, module)
    if "adapters" not in adapted._modules:
        adapted.adapters, adapted.active, adapted.kind = nn.ModuleDict(), None, kind_for(module)
        # In eval mode nn.TransformerEncoderLayer hands its weights to a fused kernel and calls no submodule, unless
        # some submodule has a hook. The container is never called, so this one costs nothing.
        adapted.adapters.register_forward_pre_hook(_no_fused_kernel)
        adapted.kind.occupied(module, True)
    adapted.adapters[name] = adapter.train(module.training)


def _no_fused_kernel(module: nn.Module, inputs: Any) -> None:
    return None


def detach(module: nn.Module, name: str) -> None:
    """Take an adapter off a layer; with the last one the layer's own class comes back."""
    assert isinstance(module, Adapted)
    del module.adapters[name]
    if module.active == name:
        module.active = None
    if not module.adapters:
        kind = module.kind
        del module.adapters, module.active, module.kind
        vars(module).pop("together", None)
        drop_mixin(module, Adapted)
        kind.occupied(module, False)


class Padded(Mixin):
    """An nn.TransformerEncoder that keeps padded batches padded. In eval mode it would pack them for fused kernels,
    which know no adapters, and give zeros where the padding was."""

    use_nested_tensor = property(lambda self: False)


def keep_padding(model: nn.Module) -> None:
    """Let every nn.TransformerEncoder keep padded batches padded if, and only if, a layer of it carries an adapter."""
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            carries = any(isinstance(module, Adapted) for module in encoder.modules())
            (add_mixin if carries else drop_mixin)(encoder, Padded)


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own parameters by name, without those of adapters."""
    inside = {id(p) for m in model.modules() if isinstance(m, Adapted) for p in m.adapters.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in inside}
