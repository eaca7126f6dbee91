"""What can carry an adapter: a `LayerKind` says what the package must know of a class of layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lorafamily.adapter import Adapter, Factors
from lorafamily.functional import low_rank_linear
from lorafamily.layers.wrapper import ForwardWrapper

Acting = Sequence[tuple["LayerKind", Adapter]]
"""The active adapters of one layer, each with its kind: one for the whole weight, or one for each of some parts."""


class LayerKind(ABC):
    """What the package must know of a class of layers. Make one instance and `register_layer_kind` it to add yours."""

    name: ClassVar[str]
    """The kind's name in files."""
    linear: ClassVar[bool] = False
    """Whether `targets="all-linear"` includes such layers; others must be named."""
    additive: ClassVar[bool] = True
    """Whether an adapter adds to the layer's output; False where the layer reads an updated weight instead."""
    in_place: ClassVar[bool] = False
    """Whether `changed` writes into the weight that it gets, as it does where one parameter has many parts."""

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether the module is of this kind."""

    def matrix(self, weight: Tensor) -> Float[Tensor, "d_out d_in"]:
        """The module's weight as (d_out, d_in), a view."""
        return weight

    def restore(self, matrix: Float[Tensor, "d_out d_in"], weight: Tensor) -> Tensor:
        """A (d_out, d_in) matrix in the shape of the module's weight; the inverse of `matrix`."""
        return matrix

    def added(self, module: nn.Module, adapter: Adapter, x: Tensor) -> Tensor:
        """What the adapter adds to the layer's output for input x: that of W + ΔW less that of W."""
        return adapter(x)

    def output(self, wrapper: ForwardWrapper, acting: Acting, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The layer's output with its adapters: that of its own forward, and what they add to it."""
        return self.updated(wrapper, acting, wrapper.base_forward(*args, **kwargs), args, kwargs)

    def updated(
        self, wrapper: ForwardWrapper, acting: Acting, y: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """The layer's output with its adapters, from that of its own forward, y."""
        x, (kind, adapter) = wrapper.input_of(args, kwargs), acting[0]
        if not self.by_sample:
            return y + kind.added(wrapper.module, adapter, x)
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
        """Whether the layer computes U (V x) for every sample by itself, so that samples can be routed."""
        return self.linear and type(self).added is LayerKind.added

    def why_not(self, module: nn.Module) -> str | None:
        """Why this module of the kind cannot carry an adapter; None where it can."""
        return None

    def parameter(self, module: nn.Module) -> nn.Parameter:
        """The parameter that holds the weight, and is replaced in merging."""
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
        """The tensors that store the weight: itself, where it is not quantised."""
        return {"weight": self.weight(module)}

    def stored_as(self, at: str) -> str:
        """The name of the weight in a state dict, for a target of the full name `at`."""
        return f"{at}.weight"

    def described(self) -> dict[str, Any]:
        """The entries of the kind in a file."""
        return {"kind": self.name}


class Part(LayerKind):
    """The kind of a part of a layer: some rows of a weight, or one expert.

    `held_in`: the parameter that holds the part's weight; `part`: its name in the layer's site.
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


def whole_update(acting: Acting, *, dropping: bool = False) -> tuple[Tensor, Tensor, float]:
    """U, V and s of the whole layer's ΔW: its adapter's, or those of its parts side by side."""
    if len(acting) == 1 and type(acting[0][0]).spread is LayerKind.spread:
        adapter = acting[0][1]
        return *adapter.factors(dropping=dropping), adapter.scale
    both: list[Factors] = []
    for kind, adapter in acting:
        U, V = adapter.factors(dropping=dropping)
        both.append((kind.spread(adapter.scale * U), V))
    Us, Vs = zip(*both, strict=True)
    return torch.cat(Us, 1), torch.cat(Vs, 0), 1.0


_KINDS: list[LayerKind] = []


def register_layer_kind(kind: LayerKind) -> None:
    """Let `apply` adapt a further class of layers. Later registrations are asked first."""
    _KINDS.insert(0, kind)


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of a module; None where it cannot carry an adapter."""
    kind = next((kind for kind in _KINDS if kind.matches(module)), None)
    return None if kind is None or kind.why_not(module) is not None else kind


def why_not(module: nn.Module) -> str | None:
    """Why a module of some kind cannot carry an adapter; None where it can, or is of no kind."""
    return next((kind.why_not(module) for kind in _KINDS if kind.matches(module)), None)


def kind_named(name: str) -> LayerKind | None:
    """The kind of that name, None where no such kind is registered."""
    return next((kind for kind in _KINDS if kind.name == name), None)
