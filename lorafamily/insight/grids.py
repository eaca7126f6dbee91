"""Slices of every module as grids, layers by matrices or by experts, made smaller for large models."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lorafamily.names import Place, by_stack, expert_of, matrix_labels, place_of

ROWS, COLUMNS, STACKS = 96, 64, 6
"""The most rows (of all panels at one time together), columns and stacks of a picture. In a picture of a larger model a
cell stands for several modules."""
AREAS = 32
"""The most areas in a picture of stacked areas, one for each matrix."""


def rank_grid(ranks: Mapping[str, float]) -> tuple[list[str], list[str], np.ndarray]:
    """Matrices, labels of layers, and ranks as (matrices, layers), nan if a layer has no such matrix, for the
    modules of one stack (`by_stack`)."""
    places = {name: place_of(name) for name in ranks}
    matrices = list(dict.fromkeys(place.matrix for place in places.values()))
    layers = sorted({place.layer for place in places.values()}, key=lambda layer: (layer is None, layer))
    grid = np.full((len(matrices), len(layers)), np.nan)
    for name, rank in ranks.items():
        cell = matrices.index(places[name].matrix), layers.index(places[name].layer)
        assert np.isnan(grid[cell]), f"{name}: two modules of the same matrix and layer must be in two stacks"
        grid[cell] = rank
    return matrices, ["–" if layer is None else str(layer) for layer in layers], grid


def slices_by_matrix(ranks: Mapping[str, int], labels: Mapping[str, str] | None = None) -> dict[str, int]:
    """Slices of each matrix in all layers of its stack. `labels`: the matrix of every module; None computes them
    (`matrix_labels`), which takes longer."""
    totals: dict[str, int] = {}
    for name, matrix in (matrix_labels(ranks) if labels is None else labels).items():
        totals[matrix] = totals.get(matrix, 0) + ranks[name]
    return totals


def area_labels(names: Iterable[str]) -> dict[str, str]:
    """`matrix_labels` with at most `AREAS` different labels: if there are more matrices, similar ones share a label."""
    labels = matrix_labels(names)
    together = merged(list(dict.fromkeys(labels.values())), AREAS)
    return {name: together[matrix] for name, matrix in labels.items()}


def merged(labels: Sequence[str], most: int) -> dict[str, str]:
    """For each label the one it is shown under, with at most `most` different ones. Of more, those that differ only in
    digits share one (`experts.*.up`); if these are still too many, neighbours share one (`a … d`)."""
    if len(labels) <= most:
        return {label: label for label in labels}
    shown = {label: re.sub(r"\d+", "*", label) for label in labels}
    matrices = list(dict.fromkeys(shown.values()))
    if 1 < len(matrices) <= most:
        return shown
    if len(matrices) == 1:
        shown, matrices = {label: label for label in labels}, list(labels)
    runs = [matrices[i * len(matrices) // most : (i + 1) * len(matrices) // most] for i in range(most)]
    name = {matrix: run[0] if len(run) == 1 else f"{run[0]} … {run[-1]}" for run in runs for matrix in run}
    return {label: name[matrix] for label, matrix in shown.items()}


class Grid(NamedTuple):
    """`ranks`: (matrices, layers), nan where there is no module; `total`: the slices of all modules."""

    matrices: list[str]
    layers: list[str]
    ranks: np.ndarray
    total: int


def small_grids(names: Sequence[str], shown: Sequence[Mapping[str, float]]) -> dict[str, list[Grid]]:
    """For each stack a grid of each of the ranks in `shown`, within `ROWS`, `COLUMNS` and `STACKS`. In a larger model a
    cell is the mean of the modules it stands for."""
    stacks = by_stack(names)
    shown_as = merged(list(stacks), STACKS)
    places: dict[str, dict[str, Place]] = defaultdict(dict)
    for stack, members in stacks.items():
        places[shown_as[stack]] |= {name: place_of(name) for name in members}
    grids: dict[str, list[Grid]] = {}
    for stack, modules_at in places.items():
        matrices = list(dict.fromkeys(matrix for _, _, matrix in modules_at.values()))
        rows = merged(matrices, max(4, ROWS // len(places)))
        layers = sorted({layer for _, layer, _ in modules_at.values()}, key=lambda layer: (layer is None, layer))
        labels = ["–" if layer is None else str(layer) for layer in layers]
        wide = min(COLUMNS, len(layers))
        column = {layer: i * wide // len(layers) for i, layer in enumerate(layers)}
        chunks = [[labels[i] for i, layer in enumerate(layers) if column[layer] == at] for at in range(wide)]
        heads = [chunk[0] if len(chunk) == 1 else f"{chunk[0]}–{chunk[-1]}" for chunk in chunks]
        named = list(dict.fromkeys(rows.values()))
        index = {matrix: named.index(rows[matrix]) for matrix in matrices}
        cells = np.array([(index[matrix], column[layer]) for _, layer, matrix in modules_at.values()])
        modules = np.zeros((len(named), wide))
        np.add.at(modules, tuple(cells.T), 1)
        grids[stack] = []
        for ranks in shown:
            total = np.zeros_like(modules)
            np.add.at(total, tuple(cells.T), [ranks[name] for name in modules_at])
            mean = np.divide(total, modules, out=np.full_like(total, np.nan), where=modules > 0)
            grids[stack].append(Grid(named, heads, mean, int(total.sum())))
    return grids


def expert_grids(ranks: Mapping[str, float]) -> dict[str, tuple[list[str], list[str], np.ndarray]]:
    """By matrix (`mlp.experts.*.up_proj`): labels of layers, labels of experts, and ranks as (layers, experts),
    nan if a layer has no such expert. Empty for a model without experts."""
    cells_of: dict[str, list[tuple[int | None, int, float]]] = defaultdict(list)
    experts = {name: found for name in ranks if (found := expert_of(name)) is not None}
    labels = matrix_labels(dict.fromkeys(of_all for of_all, _ in experts.values()))
    for name, (of_all, index) in experts.items():
        cells_of[labels[of_all]].append((place_of(of_all).layer, index, ranks[name]))
    grids = {}
    for matrix, cells in cells_of.items():
        layers = sorted({layer for layer, _, _ in cells}, key=lambda layer: (layer is None, layer))
        wide = 1 + max(index for _, index, _ in cells)
        grid = np.full((len(layers), wide), np.nan)
        for layer, index, rank in cells:
            grid[layers.index(layer), index] = rank
        grids[matrix] = ["–" if layer is None else str(layer) for layer in layers], [str(i) for i in range(wide)], grid
    return grids


def in_chunks(labels: list[str], grid: np.ndarray, most: int) -> tuple[list[str], np.ndarray]:
    """Labels and rows of a grid, at most `most`: if there are more, means of neighbouring rows."""
    chunks = [chunk for chunk in np.array_split(np.arange(len(labels)), min(most, len(labels))) if len(chunk)]
    heads = [labels[c[0]] if len(c) == 1 else f"{labels[c[0]]}–{labels[c[-1]]}" for c in chunks]
    sums = np.array([np.nansum(grid[c], 0) for c in chunks])
    counts = np.array([(~np.isnan(grid[c])).sum(0) for c in chunks])
    return heads, np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
