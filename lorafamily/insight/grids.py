"""Ranks laid out as grids: layers by kinds of matrix, or layers by experts; small ones for large models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lorafamily.names import Place, by_stack, expert_of, kind_labels, place_of

ROWS, COLUMNS, STACKS = 96, 64, 6
"""What a picture has at most: rows in all its panels together (of start and now each), columns, stacks. Of a larger
model a cell stands for several modules."""
AREAS = 32
"""Kinds of matrix that are told apart in one stack of areas, at most."""


def rank_grid(ranks: Mapping[str, float]) -> tuple[list[str], list[str], np.ndarray]:
    """Kinds of matrix, labels of layers, and ranks as (kinds, layers), of the modules of one stack (`by_stack`).

    nan where a layer has no such matrix.
    """
    places = {name: place_of(name) for name in ranks}
    kinds = list(dict.fromkeys(place.kind for place in places.values()))
    layers = sorted({place.layer for place in places.values()}, key=lambda layer: (layer is None, layer))
    grid = np.full((len(kinds), len(layers)), np.nan)
    for name, rank in ranks.items():
        cell = kinds.index(places[name].kind), layers.index(places[name].layer)
        assert np.isnan(grid[cell]), f"{name}: two matrices of one kind and layer are of two stacks"
        grid[cell] = rank
    return kinds, ["–" if layer is None else str(layer) for layer in layers], grid


def rank_by_kind(ranks: Mapping[str, int], labels: Mapping[str, str] | None = None) -> dict[str, int]:
    """Total rank of each kind of matrix, over all layers of its stack. `labels`: of every module, `kind_labels` where
    there are none; whoever asks often passes them."""
    totals: dict[str, int] = {}
    for name, kind in (kind_labels(ranks) if labels is None else labels).items():
        totals[kind] = totals.get(kind, 0) + ranks[name]
    return totals


def area_labels(names: Iterable[str]) -> dict[str, str]:
    """`kind_labels` with `AREAS` different ones at most, alike kinds together."""
    labels = kind_labels(names)
    together = merged(list(dict.fromkeys(labels.values())), AREAS)
    return {name: together[kind] for name, kind in labels.items()}


def merged(labels: Sequence[str], most: int) -> dict[str, str]:
    """For each label the one under which it is shown, `most` different ones at most: where there are more, those that
    differ in numbers alone are one (`experts.*.up`), and of what is still too many neighbours are (`a … d`)."""
    if len(labels) <= most:
        return {label: label for label in labels}
    shown = {label: re.sub(r"\d+", "*", label) for label in labels}
    kinds = list(dict.fromkeys(shown.values()))
    if 1 < len(kinds) <= most:
        return shown
    if len(kinds) == 1:
        shown, kinds = {label: label for label in labels}, list(labels)
    runs = [kinds[i * len(kinds) // most : (i + 1) * len(kinds) // most] for i in range(most)]
    name = {kind: run[0] if len(run) == 1 else f"{run[0]} … {run[-1]}" for run in runs for kind in run}
    return {label: name[kind] for label, kind in shown.items()}


class Grid(NamedTuple):
    """`ranks`: (kinds, layers), nan where no module is; `total`: of all modules."""

    kinds: list[str]
    layers: list[str]
    ranks: np.ndarray
    total: int


def small_grids(names: Sequence[str], shown: Sequence[Mapping[str, float]]) -> dict[str, list[Grid]]:
    """By stack one grid for each of the patterns in `shown`, within `ROWS`, `COLUMNS` and `STACKS`: where the
    model has more, a cell is the mean over the modules it stands for."""
    stacks = by_stack(names)
    alike = merged(list(stacks), STACKS)
    places: dict[str, dict[str, Place]] = {}
    for stack, own in stacks.items():
        for name in own:
            places.setdefault(alike[stack], {})[name] = place_of(name)
    grids: dict[str, list[Grid]] = {}
    for stack, of in places.items():
        kinds = list(dict.fromkeys(kind for _, _, kind in of.values()))
        rows = merged(kinds, max(4, ROWS // len(places)))
        layers = sorted({layer for _, layer, _ in of.values()}, key=lambda layer: (layer is None, layer))
        labels = ["–" if layer is None else str(layer) for layer in layers]
        wide = min(COLUMNS, len(layers))
        column = {layer: i * wide // len(layers) for i, layer in enumerate(layers)}
        chunks = [[labels[i] for i, layer in enumerate(layers) if column[layer] == at] for at in range(wide)]
        heads = [chunk[0] if len(chunk) == 1 else f"{chunk[0]}–{chunk[-1]}" for chunk in chunks]
        named = list(dict.fromkeys(rows[kind] for kind in kinds))
        index = {kind: named.index(rows[kind]) for kind in kinds}
        cells = np.array([(index[kind], column[layer]) for _, layer, kind in of.values()])
        modules = np.zeros((len(named), wide))
        np.add.at(modules, tuple(cells.T), 1)
        grids[stack] = []
        for ranks in shown:
            total = np.zeros_like(modules)
            np.add.at(total, tuple(cells.T), [ranks[name] for name in of])
            mean = np.divide(total, modules, out=np.full_like(total, np.nan), where=modules > 0)
            grids[stack].append(Grid(named, heads, mean, int(total.sum())))
    return grids


def expert_grids(ranks: Mapping[str, float]) -> dict[str, tuple[list[str], list[str], np.ndarray]]:
    """By kind of matrix (`mlp.experts.*.up_proj`): labels of layers, of experts, and ranks as (layers, experts).

    nan where a layer has no such expert; nothing where the model has none.
    """
    together: dict[str, list[tuple[int | None, int, float]]] = {}
    experts = {name: found for name in ranks if (found := expert_of(name)) is not None}
    labels = kind_labels(dict.fromkeys(of_all for of_all, _ in experts.values()))
    for name, (of_all, index) in experts.items():
        together.setdefault(labels[of_all], []).append((place_of(of_all).layer, index, ranks[name]))
    grids = {}
    for kind, cells in together.items():
        layers = sorted({layer for layer, _, _ in cells}, key=lambda layer: (layer is None, layer))
        wide = 1 + max(index for _, index, _ in cells)
        grid = np.full((len(layers), wide), np.nan)
        for layer, index, rank in cells:
            grid[layers.index(layer), index] = rank
        grids[kind] = ["–" if layer is None else str(layer) for layer in layers], [str(i) for i in range(wide)], grid
    return grids


def in_chunks(labels: list[str], grid: np.ndarray, most: int) -> tuple[list[str], np.ndarray]:
    """At most so many rows: where there are more, the means of neighbouring ones."""
    chunks = [chunk for chunk in np.array_split(np.arange(len(labels)), min(most, len(labels))) if len(chunk)]
    said = [labels[c[0]] if len(c) == 1 else f"{labels[c[0]]}–{labels[c[-1]]}" for c in chunks]
    sums = np.array([np.nansum(grid[c], 0) for c in chunks])
    counts = np.array([(~np.isnan(grid[c])).sum(0) for c in chunks])
    return said, np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
