"""Targets: the weights of a model that can carry adapters, by name.

A target is a layer's weight or a part of it: rows of a fused projection (`c_attn.q`), an expert (`experts.3.up_proj`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn

from lorafamily.layers.experts import Expert, expert_kinds
from lorafamily.layers.kinds import LayerKind, Part, kind_named, kind_of
from lorafamily.layers.rows import Fused, ReadRows, Rows, divided_layers
from lorafamily.layers.site import WHOLE, Site, site_on
from lorafamily.names import join


@dataclass(frozen=True)
class Target:
    """A weight that can carry an adapter: a layer's, or the part of it that `kind` is for."""

    layer: nn.Module
    kind: LayerKind

    @property
    def part(self) -> str:
        """The weight's name in the layer's site, where names of modules have no dots."""
        return self.kind.path.replace(".", "_") if isinstance(self.kind, Part) else WHOLE

    @property
    def site(self) -> Site:
        """The layer's site; only while it carries an adapter."""
        return cast(Site, site_on(self.layer))

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the weight, and perhaps the weights of other parts."""
        return self.kind.parameter(self.layer)

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """The weight's value now: a view of the parameter, or a new tensor where it is quantised."""
        return self.kind.matrix(self.kind.weight(self.layer))

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.kind.shape(self.layer)

    @property
    def stored(self) -> Tensor:
        """The first tensor that stores the weight: the parameter, where there is one."""
        return next(iter(self.kind.stored(self.layer).values()))

    @property
    def layer_kind(self) -> LayerKind:
        """The layer kind that computes the layer's output."""
        return self.kind.of if type(self.kind) is Rows else self.kind

    def full_name(self, at: str) -> str:
        """The target's name in a model where its layer's name is `at`."""
        return join(at, self.kind.path) if isinstance(self.kind, Part) else at


def possible_targets(model: nn.Module, fused: Fused | None = None) -> dict[str, Target]:
    """Every weight of a model that can carry an adapter, by name and in the model's order.

    Some layers give their parts instead: those that `fused` declares, those that have adapters on parts already, every
    nn.MultiheadAttention and every layer of experts. `peft`'s adapters do not count as part of the model. Raises
    TargetError if an entry of `fused` matches no linear layer, or does not fit one that it matches.
    """
    divided = dict(divided_layers(model, fused or {}))
    of_adapters: set[nn.Module] = set()
    peft = sys.modules.get("peft.tuners.tuners_utils")
    for module in model.modules():
        if isinstance(module, Site):
            of_adapters.update(module.modules())
        elif peft is not None and isinstance(module, peft.BaseTunerLayer):  # all but its base are adapters
            others = (child for name, child in module.named_children() if name != "base_layer")
            of_adapters.update(inner for child in others for inner in child.modules())
    found: dict[str, Target] = {}
    for at, module in model.named_modules():
        if module in of_adapters:
            continue
        whole: Sequence[LayerKind | None] = expert_kinds(module) or [kind_of(module)]
        targets = [Target(module, kind) for kind in divided.get(module, whole) if kind is not None]
        found |= {target.full_name(at): target for target in targets}
    return found


def target_of_record(model: nn.Module, at: str, entry: Mapping[str, Any]) -> Target | None:
    """The target that a file's entry describes; None where the model has no layer that fits it."""
    recorded, layers = kind_of_record(entry), dict(model.named_modules())
    layer_name = at.removesuffix(recorded.path).removesuffix(".") if isinstance(recorded, Part) else at
    layer = layers.get(layer_name)
    if layer is None or (isinstance(recorded, Part) and at != join(layer_name, recorded.path)):
        return None
    kind = recorded.fitted(layer) if isinstance(recorded, Part) else kind_of(layer)
    return None if kind is None else Target(layer, kind)


def kind_of_record(entry: Mapping[str, Any]) -> LayerKind | None:
    """The layer kind that `LayerKind.described` wrote into a file, None where it is not known here."""
    for cls in (Rows, ReadRows, Expert):
        if entry.get("kind") == cls.name:
            return cls.from_record(entry)
    return kind_named(str(entry.get("kind")))
