"""Adapters on single experts, where one 3-D parameter holds all of a layer's experts (transformers 5).

Every expert is a separate target, `experts.3.down_proj`, with a rank of its own. A layer of experts calls no module for
a single expert but reads the weights, so while adapters are active it gets an `UpdatedWeight` in place of each; its
routing, gates and biases stay its own.

Axes: E experts; d_in, d_out of one expert's weight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.functional import can_be_fast
from lorafamily.layers.expert_products import UpdatedWeight, factors_of_all
from lorafamily.layers.kinds import Acting, Part
from lorafamily.layers.weights import replaced_values
from lorafamily.layers.wrapper import ForwardWrapper

READ = ("gate_up_proj", "up_proj", "down_proj")
"""The weights that every implementation in transformers' registry reads."""

PRODUCTS = ("eager", "grouped_mm", "batched_mm")
"""Implementations made of PyTorch's own products. Others hand the weights to kernels, which need tensors."""


@dataclass(frozen=True)
class Expert(Part):
    """The layer kind of one expert's weight: entry `index` of the 3-D parameter `held_in`, (d_in, d_out) if
    `transposed`. Dropout drops columns of V, which are features of the expert's input, the same ones for a batch."""

    held_in: str
    index: int
    transposed: bool

    name = "expert"
    linear = True
    additive = False
    by_sample = False
    in_place = True

    @property
    def path(self) -> str:
        return f"{self.index}.{self.held_in}"

    def matrix(self, weight: Float[Tensor, "E _ _"]) -> Float[Tensor, "d_out d_in"]:
        return weight[self.index].T if self.transposed else weight[self.index]

    def restore(self, matrix: Float[Tensor, "d_out d_in"], weight: Tensor) -> Tensor:
        whole = weight.clone()
        self.matrix(whole).copy_(matrix)
        return whole

    def changed(self, weight: Tensor, U: Tensor, V: Tensor, scale: float) -> Tensor:
        self.matrix(weight).addmm_(U, V, alpha=scale)
        return weight

    def described(self) -> dict[str, Any]:
        return {"kind": self.name, "held_in": self.held_in, "index": self.index, "transposed": self.transposed}

    @classmethod
    def from_record(cls, entry: Mapping[str, Any]) -> Expert | None:
        index, transposed = entry.get("index"), entry.get("transposed")
        if not (isinstance(index, int) and index >= 0 and isinstance(transposed, bool)):
            return None
        return cls(str(entry.get("held_in")), index, transposed)

    def fitted(self, layer: nn.Module) -> Expert | None:
        weight = expert_weights(layer).get(self.held_in)
        fits = weight is not None and self.index < len(weight) and self.transposed == layer.is_transposed
        return self if fits else None

    def output(self, wrapper: ForwardWrapper, acting: Acting, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        by_parameter: dict[str, dict[int, Adapter]] = defaultdict(dict)
        for kind, adapter in cast(Sequence[tuple[Expert, Adapter]], acting):
            by_parameter[kind.held_in][kind.index] = adapter
        x, layer = wrapper.input_of(args, kwargs), wrapper.module
        updated: dict[str, Any] = {}
        for name, adapters in by_parameter.items():
            W = cast(Tensor, getattr(layer, name))
            fast = wrapper.inner is None and can_be_fast(x, W, None)
            weight = UpdatedWeight(W, *factors_of_all(W, adapters, bool(layer.is_transposed), fast))
            as_products = fast and implementation(layer) in PRODUCTS
            updated[name] = weight if as_products else weight.formed()
        with replaced_values(layer, updated):
            return wrapper.base_forward(*args, **kwargs)


def expert_weights(layer: nn.Module) -> dict[str, Tensor]:
    """The 3-D parameters of a layer of experts by name; none where the layer is not in transformers' registry."""
    if implementation(layer) is None:
        return {}
    weights: dict[str, Tensor] = {name: weight for name in READ if (weight := layer._parameters.get(name)) is not None}
    return weights if all(w.ndim == 3 and w.is_floating_point() for w in weights.values()) else {}


def expert_kinds(layer: nn.Module) -> list[Expert]:
    """The layer kinds of a layer's experts, expert by expert; none where it has no experts."""
    weights = expert_weights(layer)
    indices = range(max(map(len, weights.values()), default=0))
    return [Expert(name, index, bool(layer.is_transposed)) for index in indices for name in weights]


def implementation(layer: nn.Module) -> str | None:
    """Which of the registry's implementations computes the layer; None where it is not in the registry."""
    if not {"is_transposed", "has_gate", "has_bias", "config"} <= vars(layer).keys():
        return None
    return str(getattr(layer.config, "_experts_implementation", None) or "eager")


def why_no_experts(layer: nn.Module) -> str | None:
    """Why a layer's experts cannot carry adapters; None where they can, or where it has none in 3-D parameters."""
    stacked = {name: p for name, p in layer._parameters.items() if p is not None and p.ndim == 3}
    if not stacked or "expert" not in type(layer).__name__.lower() or expert_weights(layer):
        return None
    if implementation(layer) is None:
        return (
            f"{type(layer).__name__} holds experts in {', '.join(stacked)} and is not in transformers' registry of "
            "expert implementations (use_experts_implementation), which would say which axis is the input"
        )
    present = ", ".join(f"{name} {p.dtype} {tuple(p.shape)}" for name, p in stacked.items())
    return f"{type(layer).__name__} has {present}; experts need 3-D floating-point parameters"
