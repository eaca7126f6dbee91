"""Adapters on parts of layers: on q and v of a fused qkv, on the packed projections of nn.MultiheadAttention, on single
experts (`experts.py`).

A part is named after its layer, `c_attn.q`, and carries adapters like any layer. Those of a linear layer become one
update of the whole weight, whose up factor has zeros elsewhere. nn.MultiheadAttention reads its weights and calls no
layer: it reads others while its parts carry adapters.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lorafamily.dropout import feature_mask
from lorafamily.errors import TargetError
from lorafamily.experts import Expert, expert_kinds, is_expert_of
from lorafamily.layers import Acting, LayerKind, Part, holding, kind_named, kind_of
from lorafamily.names import join
from lorafamily.site import WHOLE, Site, site_on

Fused = Mapping[str, Sequence[str] | Mapping[str, int]]
"""Regular expression for layers -> names of their parts, of one size, or names with sizes in rows. Where the sizes add
up to less than the layer has, they repeat: {"q": 64, "k": 64, "v": 64} are the rows of one head after the other."""


@dataclass(frozen=True)
class Target:
    """A weight that can carry an adapter: that of a layer, or the rows of it that `kind` speaks for."""

    layer: nn.Module
    kind: LayerKind

    @property
    def part(self) -> str:
        return self.kind.part if isinstance(self.kind, Part) else WHOLE

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
    def held(self) -> Tensor:
        """What the layer holds of the weight: the parameter, where there is one."""
        return next(iter(self.kind.stored(self.layer).values()))

    @property
    def layer_kind(self) -> LayerKind:
        """The kind that computes the layer's output."""
        return self.kind.of if type(self.kind) is Rows else self.kind

    def full_name(self, at: str) -> str:
        """Of the target in a model where the layer is called `at`."""
        return join(at, self.kind.path) if isinstance(self.kind, Part) else at


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

    def output(self, site: Site, acting: Acting, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        read: dict[str, Tensor] = {}
        for kind, adapter in acting:
            name = cast(ReadRows, kind).held_in
            U, V = adapter.factors(dropping=True)
            V = V * feature_mask(V, adapter.drops("entries")) if adapter.drops("entries") else V
            weight = read.get(name, kind.weight(site.layer))
            read[name] = weight + (adapter.scale * kind.spread(U) @ V).to(weight.dtype)
        with holding(site.layer, read):
            return site.base(*args, **kwargs)


def possible_targets(model: nn.Module, fused: Fused | None = None) -> dict[str, Target]:
    """Every weight of a model that can carry an adapter, by name and in the model's order.

    Layers that are declared in `fused`, or that have adapters on parts already, every nn.MultiheadAttention and every
    layer of experts give their parts. Adapters of others, `peft`'s, are no part of the model.

    Raises:
        TargetError: a declaration that matches no linear layer, or does not fit one that it matches.
    """
    divided = {id(layer): rows for layer, rows in _divided(model, fused or {})}
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
    """The target that a file speaks of, where the model has a layer that it fits."""
    kind = kind_of_record(entry)
    if isinstance(kind, Expert):
        try:
            experts = model.get_submodule(at.removesuffix(kind.path).removesuffix("."))
        except AttributeError:
            return None
        return Target(experts, kind) if is_expert_of(kind, experts) else None
    modules = dict(model.named_modules())
    if not isinstance(kind, Rows):
        own = kind_of(modules[at]) if at in modules else None
        return None if own is None else Target(modules[at], own)
    layer = modules.get(at.rpartition(".")[0])
    if layer is None or at != join(at.rpartition(".")[0], kind.part):
        return None
    standing = _standing(layer)
    if isinstance(layer, nn.MultiheadAttention):
        fits = kind in _of_attention(layer)
    else:
        own = kind_of(layer)
        fits = own is not None and own.described() == kind.of.described() and _is_linear(layer)
        kind = kind if own is None else replace(kind, of=own)  # quantised, perhaps, where the file's was not
        fits = fits and kind.of.shape(layer)[0] % kind.period == 0
        fits = fits and (kind in standing if standing else not _taken(layer, dict(kind.sizes)))
    return Target(layer, kind) if fits else None


def kind_of_record(entry: Mapping[str, Any]) -> LayerKind | None:
    """The kind that `LayerKind.described` wrote, None where it is not known here."""
    for rows in (Rows, ReadRows):
        if entry.get("kind") == rows.name:
            of, sizes, part = kind_named(str(entry.get("of"))), entry.get("parts"), entry.get("part")
            if of is None or not isinstance(sizes, dict) or not _are_sizes(sizes) or part not in list(sizes):
                return None
            return rows(of, str(entry.get("held_in")), tuple(sizes.items()), str(part))
    if entry.get("kind") == Expert.name:
        index, transposed = entry.get("index"), entry.get("transposed")
        if not (isinstance(index, int) and index >= 0 and isinstance(transposed, bool)):
            return None
        return Expert(str(entry.get("held_in")), index, transposed)
    return kind_named(str(entry.get("kind")))


def _divided(model: nn.Module, fused: Fused) -> Iterator[tuple[nn.Module, list[Rows]]]:
    for _, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            yield module, [*_of_attention(module)]
        elif standing := _standing(module):
            yield module, standing
    for pattern, sizes in fused.items():
        layers = {at: m for at, m in model.named_modules() if re.search(pattern, at) and _is_linear(m)}
        if not layers:
            raise TargetError(f"fused={pattern!r} matches no linear layer of this {type(model).__name__}")
        for at, layer in layers.items():
            yield layer, _declared(at, layer, sizes)


def _standing(layer: nn.Module) -> list[Rows]:
    """The kinds of all parts of a layer of which some carries an adapter."""
    site = site_on(layer)
    kinds = [] if site is None else [kind for kind in site.kinds.values() if isinstance(kind, Rows)]
    return [replace(kinds[0], part=name) for name, _ in kinds[0].sizes] if kinds else []


def _of_attention(layer: nn.MultiheadAttention) -> list[Rows]:
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
    standing = _standing(layer)
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


def _factors_in(module: nn.Module) -> Iterator[nn.Module]:
    """What belongs to adapters: a site of ours; of a layer of `peft`'s all but the base."""
    if isinstance(module, Site):
        yield module
    theirs = sys.modules.get("peft.tuners.tuners_utils")
    if theirs is not None and isinstance(module, theirs.BaseTunerLayer):
        yield from (child for name, child in module.named_children() if name != "base_layer")
