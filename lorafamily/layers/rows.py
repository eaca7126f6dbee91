"""Adapters on some rows of a weight: on q and v of a fused qkv, on the packed projections of nn.MultiheadAttention.

The parts of a linear layer become one update of the whole weight, whose up factor has zeros in the other rows.
nn.MultiheadAttention never calls its projections, it reads their weights: it finds updated ones there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
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
from lorafamily.names import join

Fused = Mapping[str, Sequence[str] | Mapping[str, int]]
"""Regular expression for layers -> names of their parts, of one size, or names with sizes in rows. Where the sizes add
up to less than the layer has, they repeat: {"q": 64, "k": 64, "v": 64} are the rows of one head after the other."""


@dataclass(frozen=True)
class Rows(Part):
    """The kind of some rows. `of`: the layer's kind; `held_in`: its parameter; `sizes`: of all parts, in order."""

    of: LayerKind
    held_in: str
    sizes: tuple[tuple[str, int], ...]
    part: str

    name = "rows"
    linear = True

    @property
    def period(self) -> int:
        """Rows after which the parts come again."""
        return sum(size for _, size in self.sizes)

    @property
    def _place(self) -> tuple[int, int]:
        """Of the part in a period: where it begins, and how long it is."""
        names, sizes = zip(*self.sizes, strict=True)
        at = names.index(self.part)
        return sum(sizes[:at]), sizes[at]

    def matrix(self, weight: Tensor) -> Float[Tensor, "own d_in"]:
        return self.of.matrix(weight).unflatten(0, (-1, self.period)).narrow(1, *self._place).flatten(0, 1)

    def restore(self, matrix: Float[Tensor, "own d_in"], weight: Tensor) -> Tensor:
        whole = self.of.matrix(weight).clone()
        rows = whole.unflatten(0, (-1, self.period)).narrow(1, *self._place)
        rows.copy_(matrix.view_as(rows))
        return self.of.restore(whole, weight)

    def spread(self, U: Float[Tensor, "own m"]) -> Float[Tensor, "d_out m"]:
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

    def stored_as(self, at: str) -> str:
        return join(at.rpartition(".")[0], self.held_in)

    def described(self) -> dict[str, Any]:
        of, parts = self.of.described()["kind"], dict(self.sizes)
        return {"kind": self.name, "of": of, "held_in": self.held_in, "parts": parts, "part": self.part}


@dataclass(frozen=True)
class ReadRows(Rows):
    """Rows of a weight that nn.MultiheadAttention reads: it finds W + ΔW there. Dropout acts on the columns of V, which
    are the features of the input, the same ones for a whole batch."""

    name = "read rows"
    additive = False
    by_sample = False
    shape, stored = LayerKind.shape, LayerKind.stored

    def weight(self, module: nn.Module) -> Tensor:
        return cast(Tensor, attrgetter(self.held_in)(module))

    def output(self, wrapper: ForwardWrapper, acting: Acting, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        read: dict[str, Tensor] = {}
        for kind, adapter in acting:
            name = cast(ReadRows, kind).held_in
            U, V = adapter.factors(dropping=True)
            V = V * feature_mask(V, adapter.drops("entries")) if adapter.drops("entries") else V
            weight = read.get(name, kind.weight(wrapper.module))
            read[name] = weight + (adapter.scale * kind.spread(U) @ V).to(weight.dtype)
        with replaced_values(wrapper.module, read):
            return wrapper.base_forward(*args, **kwargs)


def rows_of_record(entry: Mapping[str, Any], cls: type[Rows]) -> Rows | None:
    """The kind that `Rows.described` wrote; None where the entry is damaged."""
    of, sizes, part = kind_named(str(entry.get("of"))), entry.get("parts"), entry.get("part")
    if of is None or not isinstance(sizes, dict) or not _are_sizes(sizes) or part not in list(sizes):
        return None
    return cls(of, str(entry.get("held_in")), tuple(sizes.items()), str(part))


def fitted_rows(kind: Rows, layer: nn.Module) -> Rows | None:
    """The kind of a record for this layer; None where the layer has no such rows."""
    if isinstance(layer, nn.MultiheadAttention):
        return kind if kind in _attention_rows(layer) else None
    of = kind_of(layer)
    if of is None or of.described() != kind.of.described() or not _is_linear(layer):
        return None
    kind = replace(kind, of=of)  # perhaps quantised, where the file's was not
    if of.shape(layer)[0] % kind.period:
        return None
    present = _adapted_rows(layer)
    return kind if (kind in present if present else not _taken(layer, dict(kind.sizes))) else None


def divided_layers(model: nn.Module, fused: Fused) -> Iterator[tuple[nn.Module, list[Rows]]]:
    """Every layer that is divided into parts, with their kinds: nn.MultiheadAttention, those that have adapters on
    parts, and those that `fused` declares.

    Raises:
        TargetError: a declaration that matches no linear layer, or does not fit one that it matches.
    """
    for _, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            yield module, [*_attention_rows(module)]
        elif standing := _adapted_rows(module):
            yield module, standing
    for pattern, sizes in fused.items():
        layers = {at: m for at, m in model.named_modules() if re.search(pattern, at) and _is_linear(m)}
        if not layers:
            raise TargetError(f"fused={pattern!r} matches no linear layer of this {type(model).__name__}")
        for at, layer in layers.items():
            yield layer, _declared(at, layer, sizes)


def _adapted_rows(layer: nn.Module) -> list[Rows]:
    """The kinds of all parts of a layer of which some carries an adapter."""
    site = site_on(layer)
    kinds = [] if site is None else [kind for kind in site.kinds.values() if isinstance(kind, Rows)]
    return [replace(kinds[0], part=name) for name, _ in kinds[0].sizes] if kinds else []


def _attention_rows(layer: nn.MultiheadAttention) -> list[Rows]:
    linear, width = kind_named("linear"), layer.embed_dim
    assert linear is not None
    if site_on(layer) is None and _taken(layer, ("q", "k", "v", "out")):
        return []  # a subclass with something of its own there
    out = ReadRows(linear, "out_proj.weight", (("out", width),), "out")
    if layer.in_proj_weight is None:  # keys or values have another width
        kinds = [*(ReadRows(linear, f"{own}_proj_weight", ((own, width),), own) for own in "qkv"), out]
    else:
        sizes = tuple((own, width) for own in "qkv")
        kinds = [*(ReadRows(linear, "in_proj_weight", sizes, own) for own in "qkv"), out]
    # Another weight is put where a parameter is, which one that is computed has no place for.
    return [kind for kind in kinds if isinstance(kind.weight(layer), nn.Parameter)]


def _declared(at: str, layer: nn.Module, given: Sequence[str] | Mapping[str, int]) -> list[Rows]:
    of = kind_of(layer)
    assert of is not None
    rows, _ = of.shape(layer)
    sizes = given if isinstance(given, Mapping) else dict.fromkeys(given, rows // max(1, len(given)))
    if isinstance(given, str) or not _are_sizes(sizes) or rows % sum(sizes.values()):
        raise TargetError(
            f"fused={given!r} does not fit {at}, which has {rows} rows: give the names of its parts, or their sizes, "
            "which must add up to its rows or, if they repeat, to a divisor"
        )
    kinds = [Rows(of, "weight", tuple(sizes.items()), name) for name in sizes]
    standing = _adapted_rows(layer)
    if standing and standing != kinds:
        raise TargetError(f"{at} is divided into {dict(standing[0].sizes)} already; remove those adapters first")
    if not standing and (taken := _taken(layer, sizes)):
        raise TargetError(f'{at} has an attribute "{taken}"; call the part otherwise')
    return kinds


def _are_sizes(sizes: Any) -> bool:
    return (
        isinstance(sizes, Mapping)
        and bool(sizes)
        and all(isinstance(name, str) and re.fullmatch(r"\w+", name) for name in sizes)
        and all(isinstance(size, int) and size > 0 for size in sizes.values())
    )


def _taken(layer: nn.Module, names: Iterable[str]) -> str | None:
    return next((name for name in names if hasattr(layer, name)), None)


def _is_linear(layer: nn.Module) -> bool:
    kind = kind_of(layer)
    return kind is not None and kind.by_sample
