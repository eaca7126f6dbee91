"""Adapters on some rows of a weight: q and v of a fused qkv, or the packed projections of nn.MultiheadAttention.

A fused linear layer lets each part add to its slice of the output: the parts' factors, side by side, make one update of
the whole weight, where U is zero in the rows of other parts. nn.MultiheadAttention never calls its projections but
reads their weights, so it gets W + ΔW in place of W.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lorafamily.dropout import feature_mask
from lorafamily.errors import TargetError
from lorafamily.layers.kinds import Acting, LayerKind, Part, kind_named, kind_of
from lorafamily.layers.site import site_on
from lorafamily.layers.weights import replaced_values
from lorafamily.layers.wrapper import ForwardWrapper

Fused = Mapping[str, Sequence[str] | Mapping[str, int]]
"""By a regular expression for layers: the names of their parts, which have one size, or names with sizes in rows. Sizes
that add up to fewer rows than the layer has repeat: {"q": 64, "k": 64, "v": 64} are the rows of head after head."""


@dataclass(frozen=True)
class Rows(Part):
    """The layer kind of some rows. `of`: the whole layer's; `held_in`: the parameter; `sizes`: in rows, of all parts in
    their order."""

    of: LayerKind
    held_in: str
    sizes: tuple[tuple[str, int], ...]
    part: str

    name = "rows"
    linear = True

    @property
    def path(self) -> str:
        return self.part

    @property
    def period(self) -> int:
        """The number of rows after which the parts repeat."""
        return sum(size for _, size in self.sizes)

    @property
    def _place(self) -> tuple[int, int]:
        """The part's first row in a period, and its number of rows."""
        names, sizes = zip(*self.sizes, strict=True)
        at = names.index(self.part)
        return sum(sizes[:at]), sizes[at]

    def matrix(self, weight: Tensor) -> Float[Tensor, "rows d_in"]:
        return self.of.matrix(weight).unflatten(0, (-1, self.period)).narrow(1, *self._place).flatten(0, 1)

    def restore(self, matrix: Float[Tensor, "rows d_in"], weight: Tensor) -> Tensor:
        whole = self.of.matrix(weight).clone()
        rows = whole.unflatten(0, (-1, self.period)).narrow(1, *self._place)
        rows.copy_(matrix.view_as(rows))
        return self.of.restore(whole, weight)

    def spread(self, U: Float[Tensor, "rows m"]) -> Float[Tensor, "d_out m"]:
        before, size = self._place
        return F.pad(U.unflatten(0, (-1, size)), (0, 0, before, self.period - before - size)).flatten(0, 1)

    def changed(self, weight: Tensor, U: Tensor, V: Tensor, scale: float) -> Tensor:
        return self.of.changed(weight, self.spread(U), V, scale)

    def weight(self, module: nn.Module) -> Tensor:
        return self.of.weight(module)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        d_out, d_in = self.of.shape(module)
        return d_out // self.period * self._place[1], d_in

    def stored(self, module: nn.Module) -> dict[str, Tensor]:
        return self.of.stored(module)

    def described(self) -> dict[str, Any]:
        of, parts = self.of.described()["kind"], dict(self.sizes)
        return {"kind": self.name, "of": of, "held_in": self.held_in, "parts": parts, "part": self.part}

    @classmethod
    def from_record(cls, entry: Mapping[str, Any]) -> Rows | None:
        of, sizes, part = kind_named(str(entry.get("of"))), entry.get("parts"), entry.get("part")
        if of is None or not isinstance(sizes, dict) or not _are_sizes(sizes) or part not in list(sizes):
            return None
        return cls(of, str(entry.get("held_in")), tuple(sizes.items()), str(part))

    def fitted(self, layer: nn.Module) -> Rows | None:
        if isinstance(layer, nn.MultiheadAttention):
            return self if self in _attention_rows(layer) else None
        of = _linear_kind(layer)
        if of is None or of.described() != self.of.described() or of.shape(layer)[0] % self.period:
            return None
        kind, adapted = replace(self, of=of), _adapted_rows(layer)  # `of`: perhaps quantised, unlike the file's
        return kind if (kind in adapted if adapted else not _taken(layer, dict(self.sizes))) else None


@dataclass(frozen=True)
class ReadRows(Rows):
    """Rows of a weight that is read. Dropout drops columns of V: features of the input, the same for a whole batch."""

    name = "read rows"
    additive = False
    by_sample = False
    shape, stored, weight = LayerKind.shape, LayerKind.stored, Part.weight

    def output(self, wrapper: ForwardWrapper, acting: Acting, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        updated: dict[str, Tensor] = {}
        for kind, adapter in acting:
            name = cast(ReadRows, kind).held_in
            U, V = adapter.factors(dropping=True)
            V = V * feature_mask(V, adapter.drops("entries")) if adapter.drops("entries") else V
            weight = updated.get(name, kind.weight(wrapper.module))
            updated[name] = weight + (adapter.scale * kind.spread(U) @ V).to(weight.dtype)
        with replaced_values(wrapper.module, updated):
            return wrapper.base_forward(*args, **kwargs)


def divided_layers(model: nn.Module, fused: Fused) -> Iterator[tuple[nn.Module, list[Rows]]]:
    """Every layer that is divided into parts, with their layer kinds: each nn.MultiheadAttention, layers with adapters
    on parts, and those that `fused` declares.

    Raises:
        TargetError: a declaration in `fused` fits no layer; see `possible_targets`.
    """
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            yield module, _attention_rows(module)
        elif adapted := _adapted_rows(module):
            yield module, adapted
    for pattern, sizes in fused.items():
        named = {at: layer for at, layer in model.named_modules() if re.search(pattern, at)}
        layers = {at: (layer, of) for at, layer in named.items() if (of := _linear_kind(layer)) is not None}
        if not layers:
            raise TargetError(f"fused={pattern!r} matches no linear layer of this {type(model).__name__}")
        for at, (layer, of) in layers.items():
            yield layer, _declared(at, layer, of, sizes)


def _adapted_rows(layer: nn.Module) -> list[Rows]:
    """The layer kinds of all parts of a layer if any part carries an adapter."""
    site = site_on(layer)
    kinds = [] if site is None else [kind for kind in site.kinds.values() if isinstance(kind, Rows)]
    return [replace(kinds[0], part=name) for name, _ in kinds[0].sizes] if kinds else []


def _attention_rows(layer: nn.MultiheadAttention) -> list[Rows]:
    linear, width = kind_named("linear"), layer.embed_dim
    assert linear is not None
    if site_on(layer) is None and _taken(layer, ("q", "k", "v", "out")):
        return []  # a subclass that uses these names itself
    if layer.in_proj_weight is None:  # keys or values have another width
        kinds = [ReadRows(linear, f"{name}_proj_weight", ((name, width),), name) for name in "qkv"]
    else:
        sizes = tuple((name, width) for name in "qkv")
        kinds = [ReadRows(linear, "in_proj_weight", sizes, name) for name in "qkv"]
    kinds.append(ReadRows(linear, "out_proj.weight", (("out", width),), "out"))
    # W + ΔW replaces a parameter, so a weight that is computed from others cannot carry an adapter.
    return [kind for kind in kinds if isinstance(kind.weight(layer), nn.Parameter)]


def _declared(at: str, layer: nn.Module, of: LayerKind, given: Sequence[str] | Mapping[str, int]) -> list[Rows]:
    rows, _ = of.shape(layer)
    sizes = given if isinstance(given, Mapping) else dict.fromkeys(given, rows // max(1, len(given)))
    if isinstance(given, str) or not _are_sizes(sizes) or rows % sum(sizes.values()):
        raise TargetError(
            f"fused={given!r} does not fit {at}, which has {rows} rows: give the names of its parts, or their sizes, "
            "which must add up to its rows or, if they repeat, to a divisor of that number"
        )
    kinds = [Rows(of, "weight", tuple(sizes.items()), name) for name in sizes]
    adapted = _adapted_rows(layer)
    if adapted and adapted != kinds:
        raise TargetError(f"{at} is divided into {dict(adapted[0].sizes)} already; remove those adapters first")
    if not adapted and (taken := _taken(layer, sizes)):
        raise TargetError(f'{at} has an attribute "{taken}"; give the part another name')
    return kinds


def _are_sizes(sizes: Any) -> bool:
    return (
        isinstance(sizes, Mapping)
        and bool(sizes)
        and all(isinstance(name, str) and re.fullmatch(r"\w+", name) for name in sizes)
        and all(isinstance(size, int) and size > 0 for size in sizes.values())
    )


def _taken(layer: nn.Module, names: Iterable[str]) -> str | None:
    """The first of the names that is an attribute of the layer already."""
    return next((name for name in names if hasattr(layer, name)), None)


def _linear_kind(layer: nn.Module) -> LayerKind | None:
    """The layer kind of a linear layer, None for others."""
    kind = kind_of(layer)
    return kind if kind is not None and kind.by_sample else None
