"""Layer kinds: how adapters compute on a class of layers, and which layers can carry one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lorafamily.adapter import Adapter
from lorafamily.functional import low_rank_linear
from lorafamily.layers.wrapper import ForwardWrapper

Acting = Sequence[tuple["LayerKind", Adapter]]
"""The active adapters of one layer, each with its layer kind: one for the whole weight, or one per adapted part."""


class LayerKind(ABC):
    """How adapters compute on a class of layers. To add such a class, pass an instance to `register_layer_kind`."""

    name: ClassVar[str]
    """The layer kind in files."""
    linear: ClassVar[bool] = False
    """Whether `targets="all-linear"` includes these layers; otherwise they must be named."""
    additive: ClassVar[bool] = True
    """Whether an adapter adds to the layer's output; False where the layer reads W + ΔW instead of W."""
    in_place: ClassVar[bool] = False
    """Whether `changed` writes into the weight it is given, as where one parameter holds many experts."""

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether the module is of this layer kind."""

    def matrix(self, weight: Tensor) -> Float[Tensor, "d_out d_in"]:
        """The module's weight as (d_out, d_in), a view."""
        return weight

    def restore(self, matrix: Float[Tensor, "d_out d_in"], weight: Tensor) -> Tensor:
        """A (d_out, d_in) matrix in the shape of the module's weight; the inverse of `matrix`."""
        return matrix

    def added(self, module: nn.Module, adapter: Adapter, x: Tensor) -> Tensor:
        """What the adapter adds to the layer's output for input x: the output with W + ΔW minus the output with W."""
        return adapter(x)

    def output(self, wrapper: ForwardWrapper, acting: Acting, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The layer's output with its adapters: the base forward's, plus what the adapters add."""
        return self.updated(wrapper, acting, wrapper.base_forward(*args, **kwargs), args, kwargs)

    def updated(
        self, wrapper: ForwardWrapper, acting: Acting, y: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """The layer's output with its adapters, given the base forward's output y."""
        x, (kind, adapter) = wrapper.input_of(args, kwargs), acting[0]
        if not self.by_sample:
            return y + kind.added(wrapper.module, adapter, x)
        U, V, scale = whole_update(acting, dropping=True)
        kept = F.dropout(x, adapter.drops("entries")) if adapter.drops("entries") else x
        return y + low_rank_linear(kept, U, V, scale)

    def spread(self, U: Float[Tensor, "rows m"]) -> Float[Tensor, "d_out m"]:
        """U for the layer's whole weight, from U for the rows that the adapter is for; the other rows are zero."""
        return U

    def changed(self, weight: Tensor, U: Tensor, V: Tensor, scale: float) -> Tensor:
        """W + s U V, in the shape of the module's weight."""
        return self.restore(torch.addmm(self.matrix(weight), U, V, alpha=scale), weight)

    @property
    def by_sample(self) -> bool:
        """Whether each sample's update is U (V x) of that sample alone, so that samples can be routed to adapters."""
        return self.linear and type(self).added is LayerKind.added

    def why_not(self, module: nn.Module) -> str | None:
        """Why this module cannot carry an adapter although it matches; None where it can."""
        return None

    def parameter(self, module: nn.Module) -> nn.Parameter:
        """The parameter that holds the weight; merging replaces it."""
        return module.get_parameter("weight")

    def weight(self, module: nn.Module) -> Tensor:
        """The weight's value now, even where it is computed from other parameters."""
        try:
            return self.parameter(module)
        except AttributeError:
            return cast(Tensor, module.weight)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(d_out, d_in) of the weight."""
        d_out, d_in = self.matrix(self.weight(module)).shape
        return d_out, d_in

    def stored(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors that store the weight, by name: several where it is quantised, otherwise the weight itself."""
        return {"weight": self.weight(module)}

    def stored_as(self, at: str) -> str:
        """The weight's name in a state dict; `at`: the target's full name."""
        return f"{at}.weight"

    def described(self) -> dict[str, Any]:
        """What a file notes of this layer kind."""
        return {"kind": self.name}


class Part(LayerKind):
    """The layer kind of a part of a layer: some rows of a weight, or one expert."""

    held_in: str
    """The name of the parameter that holds the part's weight."""

    @property
    @abstractmethod
    def path(self) -> str:
        """The part's name in its layer, as users write it."""

    @classmethod
    @abstractmethod
    def from_record(cls, entry: Mapping[str, Any]) -> Part | None:
        """The inverse of `described`; None where a file's entry is damaged."""

    @abstractmethod
    def fitted(self, layer: nn.Module) -> Part | None:
        """This layer kind, read from a file, as it is for a layer; None where the layer has no such part."""

    def matches(self, module: nn.Module) -> bool:
        return False

    def parameter(self, module: nn.Module) -> nn.Parameter:
        return module.get_parameter(self.held_in)

    def weight(self, module: nn.Module) -> Tensor:
        return cast(Tensor, attrgetter(self.held_in)(module))

    def stored_as(self, at: str) -> str:
        return at.removesuffix(self.path) + self.held_in


def whole_update(acting: Acting, *, dropping: bool = False) -> tuple[Tensor, Tensor, float]:
    """U, V and s of the layer's whole ΔW: its adapter's, or those of all parts side by side."""
    if len(acting) == 1 and type(acting[0][0]).spread is LayerKind.spread:
        adapter = acting[0][1]
        return *adapter.factors(dropping=dropping), adapter.scale
    Us, Vs = zip(*(adapter.factors(dropping=dropping) for _, adapter in acting), strict=True)
    spread = [kind.spread(adapter.scale * U) for (kind, adapter), U in zip(acting, Us, strict=True)]
    return torch.cat(spread, 1), torch.cat(Vs, 0), 1.0


_KINDS: list[LayerKind] = []


def register_layer_kind(kind: LayerKind) -> None:
    """Let `apply` adapt another class of layers. The layer kind registered last is asked first."""
    _KINDS.insert(0, kind)


def kind_of(module: nn.Module) -> LayerKind | None:
    """The layer kind of a module; None where it cannot carry an adapter."""
    kind = next((kind for kind in _KINDS if kind.matches(module)), None)
    return None if kind is None or kind.why_not(module) is not None else kind


def why_not(module: nn.Module) -> str | None:
    """Why a module of a known layer kind cannot carry an adapter; None where it can, or where no layer kind matches."""
    return next((kind.why_not(module) for kind in _KINDS if kind.matches(module)), None)


def kind_named(name: str) -> LayerKind | None:
    """The registered layer kind of that name, None where there is none."""
    return next((kind for kind in _KINDS if kind.name == name), None)
