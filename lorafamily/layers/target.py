"""The weights of a model that can carry adapters, by name.

They belong to a layer or to a part of one: rows of a fused projection (`c_attn.q`), an expert (`experts.3.up_proj`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn

from lorafamily.layers.experts import Expert, expert_kinds, expert_of_record, is_expert_of
from lorafamily.layers.kinds import LayerKind, Part, kind_named, kind_of
from lorafamily.layers.rows import Fused, ReadRows, Rows, divided_layers, fitted_rows, rows_of_record
from lorafamily.layers.site import WHOLE, Site, site_on
from lorafamily.names import join


@dataclass(frozen=True)
class Target:
    """A weight that can carry an adapter: that of a layer, or the rows of it that `kind` speaks for."""

    layer: nn.Module
    kind: LayerKind

    @property
    def part(self) -> str:
        return self.kind.part if isinstance(self.kind, Part) else WHOLE

    @property
    def site(self) -> Site:
        """The layer's site, while it carries an adapter."""
        return cast(Site, site_on(self.layer))

    @property
    def parameter(self) -> nn.Parameter:
        """What holds the weight, with those of other parts perhaps."""
        return self.kind.parameter(self.layer)

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """The weight's present value, a view where it is a parameter, a new tensor where it is quantised."""
        return self.kind.matrix(self.kind.weight(self.layer))

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.kind.shape(self.layer)

    @property
    def stored(self) -> Tensor:
        """The tensor that stores the weight: the parameter, where there is one."""
        return next(iter(self.kind.stored(self.layer).values()))

    @property
    def layer_kind(self) -> LayerKind:
        """The kind that computes the layer's output."""
        return self.kind.of if type(self.kind) is Rows else self.kind

    def full_name(self, at: str) -> str:
        """Of the target in a model where the layer is called `at`."""
        return join(at, self.kind.path) if isinstance(self.kind, Part) else at


def possible_targets(model: nn.Module, fused: Fused | None = None) -> dict[str, Target]:
    """Every weight of a model that can carry an adapter, by name and in the model's order.

    Layers that are declared in `fused`, or that have adapters on parts already, every nn.MultiheadAttention and every
    layer of experts give their parts. Adapters of others, `peft`'s, are no part of the model.

    Raises:
        TargetError: a declaration that matches no linear layer, or does not fit one that it matches.
    """
    divided = {id(layer): rows for layer, rows in divided_layers(model, fused or {})}
    foreign = {id(inner) for module in model.modules() for own in _factors_in(module) for inner in own.modules()}
    found: dict[str, Target] = {}
    for at, module in model.named_modules():
        if id(module) in foreign:
            continue
        if (rows := divided.get(id(module))) is not None:
            found |= {join(at, kind.path): Target(module, kind) for kind in rows}
        elif experts := list(expert_kinds(module)):
            found |= {join(at, kind.path): Target(module, kind) for kind in experts}
        elif (kind := kind_of(module)) is not None:
            found[at] = Target(module, kind)
    return found


def target_of_record(model: nn.Module, at: str, entry: Mapping[str, Any]) -> Target | None:
    """The target that a file's entry describes; None where the model has no layer that fits it."""
    kind, modules = kind_of_record(entry), dict(model.named_modules())
    if isinstance(kind, Expert):
        experts = modules.get(at.removesuffix(kind.path).removesuffix("."))
        return None if experts is None or not is_expert_of(kind, experts) else Target(experts, kind)
    if isinstance(kind, Rows):
        inside = at.rpartition(".")[0]
        if inside not in modules or at != join(inside, kind.part):
            return None
        rows = fitted_rows(kind, modules[inside])
        return None if rows is None else Target(modules[inside], rows)
    of_layer = kind_of(modules[at]) if at in modules else None
    return None if of_layer is None else Target(modules[at], of_layer)


def kind_of_record(entry: Mapping[str, Any]) -> LayerKind | None:
    """The kind that `LayerKind.described` wrote, None where it is not known here."""
    for rows in (Rows, ReadRows):
        if entry.get("kind") == rows.name:
            return rows_of_record(entry, rows)
    return expert_of_record(entry) if entry.get("kind") == Expert.name else kind_named(str(entry.get("kind")))


def _factors_in(module: nn.Module) -> Iterator[nn.Module]:
    """What belongs to adapters: a site of ours; of a layer of `peft`'s all but the base."""
    if isinstance(module, Site):
        yield module
    theirs = sys.modules.get("peft.tuners.tuners_utils")
    if theirs is not None and isinstance(module, theirs.BaseTunerLayer):
        yield from (child for name, child in module.named_children() if name != "base_layer")
