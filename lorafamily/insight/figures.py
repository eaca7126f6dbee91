"""Pictures of a rank allocation. Figures are matplotlib's, made without its global state."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from lorafamily.names import place_of


def rank_grid(ranks: Mapping[str, int]) -> tuple[list[str], list[str], np.ndarray]:
    """Kinds of matrix, labels of layers, and ranks as (kinds, layers); nan where a layer has no such matrix."""
    places = {name: place_of(name) for name in ranks}
    kinds = list(dict.fromkeys(place.kind for place in places.values()))
    layers = sorted({place.layer for place in places.values()}, key=lambda layer: (layer is None, layer))
    grid = np.full((len(kinds), len(layers)), np.nan)
    for name, rank in ranks.items():
        row, column = kinds.index(places[name].kind), layers.index(places[name].layer)
        grid[row, column] = np.nansum([grid[row, column], rank])  # same kind twice in a layer: names with two numbers
    return kinds, ["–" if layer is None else str(layer) for layer in layers], grid


def rank_heatmap(ranks: Mapping[str, int], title: str, highest: int | None = None) -> Figure:
    """Layers × kinds of matrix, the rank in every cell. `highest`: top of the colour scale, else the largest rank."""
    kinds, layers, grid = rank_grid(ranks)
    figure = Figure(figsize=(max(4.8, 2.6 + 0.5 * len(layers)), 1.7 + 0.36 * len(kinds)), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    top = max(1.0, float(np.nanmax(grid)) if highest is None else highest)
    image = draw_grid(axes, kinds, layers, grid, top)
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, label="rank", shrink=0.9)
    return figure


def draw_grid(axes: Axes, kinds: list[str], layers: list[str], grid: np.ndarray, top: float) -> AxesImage:
    """Fill axes with a grid of ranks, each written in its cell, on a colour scale from 0 to `top`."""
    image = axes.imshow(grid, cmap="cividis", vmin=0, vmax=top, aspect="auto")
    axes.set_xticks(range(len(layers)), layers, fontsize=8)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axes.set_xlabel("layer", fontsize=8)
    for (row, column), rank in np.ndenumerate(grid):
        if not np.isnan(rank):
            shade = "black" if rank > 0.55 * top else "white"
            axes.text(column, row, f"{rank:.3g}", ha="center", va="center", color=shade, fontsize=7)
    return image


def pixels(figure: Figure) -> UInt8[np.ndarray, "height width 3"]:
    """The figure drawn."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
