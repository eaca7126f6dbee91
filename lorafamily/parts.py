"""Adapters on some rows of a weight: on q and v of a fused qkv, on the packed projections of nn.MultiheadAttention.

A part is a module without parameters, which stands in the layer under its name, `c_attn.q`, and carries adapters like
any layer. While one of a layer's parts does, the layer asks its parts: a linear one for its outputs, piece by piece;
nn.MultiheadAttention, which calls no layer but reads weights, for those.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.dropout import feature_mask
from lorafamily.errors import TargetError
from lorafamily.layers import Adapted, LayerKind, kind_named, kind_of, weight_of
from lorafamily.mixins import Mixin, add_mixin, drop_mixin

Fused = Mapping[str, Sequence[str] | Mapping[str, int]]
"""Regular expression for layers -> names of their parts, of one size, or names with sizes in rows. Where the sizes add
up to less than the layer has, they repeat: {"q": 64, "k": 64, "v": 64} are the rows of one head after the other."""


@dataclass(frozen=True)
class Rows(LayerKind):
    """The kind of one part. `of`: the layer's kind; `held_in`: its parameter; `sizes`: of all parts, in order."""

    of: LayerKind
    held_in: str
    sizes: tuple[tuple[str, int], ...]
    part: str

    name = "rows"
    linear = True

    def matches(self, module: nn.Module) -> bool:
        return False  # a part says itself which kind it is of

    @property
    def period(self) -> int:
        """Rows after which the parts come again."""
        return sum(size for _, size in self.sizes)

    def matrix(self, weight: Tensor) -> Float[Tensor, "d_out d_in"]:
        return self.among(self.of.matrix(weight)).flatten(0, 1)

    def restore(self, matrix: Float[Tensor, "d_out d_in"], weight: Tensor) -> Tensor:
        whole = self.of.matrix(weight).to(matrix.dtype, copy=True)
        rows = self.among(whole)
        rows.copy_(matrix.view_as(rows))
        return self.of.restore(whole, weight)

    def among(self, rows: Float[Tensor, "all _"]) -> Float[Tensor, "periods size _"]:
        """The part's own rows among all of the layer, a view."""
        names, sizes = zip(*self.sizes, strict=True)
        at = names.index(self.part)
        return rows.unflatten(0, (-1, self.period)).narrow(1, sum(sizes[:at]), sizes[at])

    def siblings(self, layer: nn.Module) -> list[Rows]:
        """The kinds of all parts of the layer."""
        return [replace(self, part=name) for name, _ in self.sizes]

    def parameter(self, module: nn.Module) -> nn.Parameter:
        return cast(Part, module).layer.get_parameter(self.held_in)

    def stored_as(self, at: str) -> str:
        return _join(at.rpartition(".")[0], self.held_in)

    def described(self) -> dict[str, Any]:
        parts = dict(self.sizes)
        return {"kind": self.name, "of": self.of.name, "held_in": self.held_in, "parts": parts, "part": self.part}

    def occupied(self, module: nn.Module, carries: bool) -> None:
        layer = cast(Part, module).layer
        if carries:
            add_mixin(layer, self.asks)
        elif not any(isinstance(part, Adapted) for part in parts_of(layer)):
            drop_mixin(layer, self.asks)

    @property
    def asks(self) -> type[Mixin]:
        """What the layer becomes while a part of it carries an adapter."""
        return AskingForOutputs


@dataclass(frozen=True)
class ReadRows(Rows):
    """Rows of a weight that is read and not called: the adapter adds to the weight itself, s · U V.

    Dropout then acts on the columns of V, which are the features of the input, the same ones for a whole batch.
    """

    name = "read rows"

    def added(self, module: nn.Module, adapter: Adapter, x: Tensor) -> Tensor:
        U, V = adapter.factors()
        p = adapter.drops_entries or adapter.drops_features
        return (adapter.scale * U) @ (V * feature_mask(V, p) if p else V)

    def siblings(self, layer: nn.Module) -> list[Rows]:
        return [*_of_attention(cast(nn.MultiheadAttention, layer))]

    @property
    def asks(self) -> type[Mixin]:
        return AskingForWeights


class Part(nn.Module):
    """Stands for some rows of a layer. Called with what an adapter needs and with what the layer has for these rows."""

    def __init__(self, layer: nn.Module, kind: Rows):
        super().__init__()
        vars(self)["layer"] = layer  # not registered: it is the parent, not a child
        self.own_kind = kind

    layer: nn.Module

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        return rows

    def extra_repr(self) -> str:
        return f"{self.own_kind.part} of {', '.join(f'{name}: {size}' for name, size in self.own_kind.sizes)}"


class AskingForOutputs(Mixin):
    """A linear layer with adapters on parts: they get its input and their piece of its output."""

    def forward(self, x: Tensor) -> Tensor:
        parts = list(parts_of(self))
        sizes = [size for _, size in parts[0].own_kind.sizes]
        pieces = super().forward(x).unflatten(-1, (-1, sum(sizes))).split(sizes, -1)
        changed = [
            part(x, piece.flatten(-2)).unflatten(-1, piece.shape[-2:])
            for part, piece in zip(parts, pieces, strict=True)
        ]
        return torch.cat(changed, -1).flatten(-2)


class AskingForWeights(Mixin):
    """An nn.MultiheadAttention with adapters on parts: they get their rows of its weights, which it then reads."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        parts = list(parts_of(self))
        changing = {part.own_kind.held_in for part in parts if isinstance(part, Adapted)}
        changed: dict[str, list[Tensor]] = {name: [] for name in changing}
        for part in parts:
            if part.own_kind.held_in in changing:
                rows = weight_of(part)
                changed[part.own_kind.held_in].append(part(rows, rows).to(rows.dtype))
        with _holding(self, {name: torch.cat(pieces) for name, pieces in changed.items()}):
            return super().forward(*args, **kwargs)


@contextmanager
def _holding(layer: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block the layer finds other values where its parameters are."""
    places = {name: layer.get_submodule(name.rpartition(".")[0])._parameters for name in values}
    own = {name: place[name.rpartition(".")[2]] for name, place in places.items()}
    try:
        for name, place in places.items():
            place[name.rpartition(".")[2]] = cast(nn.Parameter, values[name])
        yield
    finally:
        for name, place in places.items():
            place[name.rpartition(".")[2]] = own[name]


def parts_of(layer: nn.Module) -> Iterator[Part]:
    """The parts that stand in a layer, in the order of their rows."""
    return (child for child in layer.children() if isinstance(child, Part))


def possible_parts(model: nn.Module, fused: Fused | None = None) -> dict[str, Part]:
    """The parts that could stand in a model, by full name: those declared, and those of every nn.MultiheadAttention.

    Raises:
        TargetError: a declaration that matches no linear layer, or does not fit one that it matches.
    """
    found: dict[str, Part] = {}
    for at, layer in model.named_modules():
        if isinstance(layer, nn.MultiheadAttention):
            found |= {_join(at, kind.part): Part(layer, kind) for kind in _of_attention(layer)}
    for pattern, sizes in (fused or {}).items():
        layers = {at: m for at, m in model.named_modules() if re.search(pattern, at) and _is_linear(m)}
        if not layers:
            raise TargetError(f"fused={pattern!r} matches no linear layer of this {type(model).__name__}")
        for at, layer in layers.items():
            found |= {_join(at, kind.part): Part(layer, kind) for kind in _declared(at, layer, sizes)}
    return found


def part_of_record(model: nn.Module, at: str, entry: Mapping[str, Any]) -> Part | None:
    """The part that a file speaks of, where the model has a layer that it fits."""
    modules, kind = dict(model.named_modules()), kind_of_record(entry)
    layer = modules.get(at.rpartition(".")[0])
    if layer is None or not isinstance(kind, Rows) or at != _join(at.rpartition(".")[0], kind.part):
        return None
    standing = [part.own_kind for part in parts_of(layer)]
    if isinstance(layer, nn.MultiheadAttention):
        fits = kind in _of_attention(layer)
    else:
        fits = _is_linear(layer) and kind_of(layer) == kind.of and len(weight_of(layer)) % kind.period == 0
        fits = fits and (kind in standing if standing else not _taken(layer, dict(kind.sizes)))
    return Part(layer, kind) if fits else None


def kind_of_record(entry: Mapping[str, Any]) -> LayerKind | None:
    """The kind that `LayerKind.described` wrote, None where it is not known here."""
    for rows in (Rows, ReadRows):
        if entry.get("kind") == rows.name:
            of, sizes, part = kind_named(str(entry.get("of"))), entry.get("parts"), entry.get("part")
            if of is None or not isinstance(sizes, dict) or not _are_sizes(sizes) or part not in list(sizes):
                return None
            return rows(of, str(entry.get("held_in")), tuple(sizes.items()), str(part))
    return kind_named(str(entry.get("kind")))


def hang(modules: Iterable[nn.Module]) -> None:
    """Let parts stand in their layers, with all their siblings."""
    for part in modules:
        if isinstance(part, Part) and not any(parts_of(part.layer)):
            for kind in part.own_kind.siblings(part.layer):
                part.layer.add_module(kind.part, Part(part.layer, kind))


def take_down(modules: Iterable[nn.Module]) -> None:
    """Take parts out of layers none of whose parts carries an adapter."""
    for layer in {id(m.layer): m.layer for m in modules if isinstance(m, Part)}.values():
        if not any(isinstance(part, Adapted) for part in parts_of(layer)):
            for part in list(parts_of(layer)):
                delattr(layer, part.own_kind.part)


def _of_attention(layer: nn.MultiheadAttention) -> list[ReadRows]:
    linear, width = kind_named("linear"), layer.embed_dim
    assert linear is not None
    out = ReadRows(linear, "out_proj.weight", (("out", width),), "out")
    if layer.in_proj_weight is None:  # keys or values have another width
        kinds = [ReadRows(linear, f"{own}_proj_weight", ((own, width),), own) for own in "qkv"]
    else:
        sizes = tuple((own, width) for own in "qkv")
        kinds = [ReadRows(linear, "in_proj_weight", sizes, own) for own in "qkv"]
    if not any(parts_of(layer)) and _taken(layer, ("q", "k", "v", "out")):
        return []  # a subclass with something of its own there
    return [*kinds, out]


def _declared(at: str, layer: nn.Module, given: Sequence[str] | Mapping[str, int]) -> list[Rows]:
    rows, of = len(weight_of(layer)), kind_of(layer)
    assert of is not None
    sizes = given if isinstance(given, Mapping) else dict.fromkeys(given, rows // max(1, len(given)))
    if isinstance(given, str) or not _are_sizes(sizes) or rows % sum(sizes.values()):
        raise TargetError(
            f"fused={given!r} does not fit {at}, which has {rows} rows: give the names of its parts, or their sizes, "
            "which must add up to its rows or, if they repeat, to a divisor"
        )
    kinds = [Rows(of, "weight", tuple(sizes.items()), name) for name in sizes]
    standing = [part.own_kind for part in parts_of(layer)]
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
    return kind is not None and kind.by_sample and not isinstance(layer, Part)


def _join(at: str, part: str) -> str:
    return f"{at}.{part}" if at else part
