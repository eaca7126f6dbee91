"""What can carry an adapter, and how the adapter sits on it."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lorafamily.adapter import Adapter
from lorafamily.functional import adapted_linear
from lorafamily.mixins import Mixin, add_mixin, drop_mixin


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


class _Linear(LayerKind):
    name = "linear"
    linear = True

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

    def output(self, module: Adapted, adapter: Adapter, x: Tensor, *more: Tensor) -> Tensor:
        W, b = cast(Tensor, module.weight), cast("Tensor | None", module.bias)
        plain = module.own_class is nn.Linear and module.mixins == (Adapted,) and not W.requires_grad
        if plain and adapter.ungated and (x.dtype == W.dtype or torch.is_autocast_enabled(x.device.type)):
            return adapted_linear(x, W, b, *adapter.scaled(), dropout=adapter.dropout_now)
        return super().output(module, adapter, x, *more)


class _Transposed(LayerKind):
    """Layers whose weight is stored as (d_in, d_out)."""

    def matrix(self, weight: Tensor) -> Float[Tensor, "d_out d_in"]:
        return weight.T

    def restore(self, matrix: Float[Tensor, "d_out d_in"], weight: Tensor) -> Tensor:
        return matrix.T


class _Conv1D(_Transposed):
    """Hugging Face's Conv1D (GPT-2), a linear layer."""

    name = "conv1d"
    linear = True

    def matches(self, module: nn.Module) -> bool:
        # A model that has one has imported it; nobody else pays for importing transformers.
        home = sys.modules.get("transformers.pytorch_utils")
        return home is not None and isinstance(module, home.Conv1D)


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
        kernel = V.view(len(V), *module.weight.shape[1:]).to(x.dtype)
        h = module._conv_forward(adapter.dropout(x), kernel, None)  # with the layer's own stride, padding and dilation
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
