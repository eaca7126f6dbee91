"""Heat-maps of ranks, with the rank in every cell."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from lorafamily.insight.grids import COLUMNS, ROWS, STACKS, expert_grids, in_chunks, small_grids
from lorafamily.names import OUTSIDE

SIDE_BY_SIDE = 8
"""Layers up to which two grids stand beside each other; wider ones stand one above the other."""
NUMBERED = 1200
"""Cells up to which the rank is written in each; a text costs a hundred times what a cell costs."""


def rank_heatmap(
    start: Mapping[str, int], now: Mapping[str, int] | None, title: str, highest: int | None = None
) -> Figure:
    """Layers × kinds of matrix with the rank in every cell, at the start and now, on one colour scale. A model with
    several stacks, such as an encoder and a decoder, has a panel for each, with its own kinds and layers. Of a model
    with more than `ROWS` kinds or `COLUMNS` layers a cell shows the mean of several modules, and the title says so.

    `now`: None shows the start alone. `highest`: top of the colour scale, else the largest rank there is.
    """
    shown = {"start": start} if now is None else {"start": start, "now": now}
    grids = small_grids(list(start), list(shown.values()))
    cells = sum(int((~np.isnan(own[0].ranks)).sum()) for own in grids.values())
    if cells < len(start):
        title += f"\n{len(start):,} modules in {cells:,} cells, each the mean of those it stands for"
    largest = max(float(np.nanmax(grid)) for own in grids.values() for _, _, grid, _ in own)
    top = max(1.0, largest) if highest is None else max(1, highest)
    longest = max(len(layers) for own in grids.values() for _, layers, _, _ in own)
    beside = longest <= SIDE_BY_SIDE
    tall = [len(own[0][0]) for own in grids.values() for _ in (shown if not beside else ["start"])]
    wide = len(shown) if beside else 1
    numbers = cells * len(shown) <= NUMBERED
    row, column = (0.32, 0.45) if numbers else (0.18, 0.2)
    room = 2.2 if len(grids) == 1 else max(2.2, 0.08 * len(f"{max(grids, key=len)}, start: 1234 in all"))
    size = (3.0 + wide * max(room, column * longest), 1.3 + sum(0.7 + row * kinds for kinds in tall))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    panels = figure.subplots(len(tall), wide, squeeze=False, gridspec_kw={"height_ratios": tall}).flat
    for stack, own in grids.items():
        for number, (when, (kinds, layers, grid, total)) in enumerate(zip(shown, own, strict=True)):
            axes = next(panels)
            named = kinds if number == 0 or not beside else [""] * len(kinds)
            image = draw_grid(axes, named, layers, grid, top, longest, numbers)
            said = f"{when}: {total} in all"
            axes.set_title(f"{stack}, {said}" if stack else said, fontsize=9, loc="left" if stack else "center")
            if stack == OUTSIDE:
                axes.set_xticks([]), axes.set_xlabel("")
    figure.suptitle(title, fontsize=10)
    beyond = largest > top  # a module that grew past the scale's top
    extend = "max" if beyond else "neither"
    figure.colorbar(image, ax=figure.axes, label="rank", shrink=0.9, extend=extend, aspect=20 * len(grids))
    return figure


def expert_heatmap(
    start: Mapping[str, int], now: Mapping[str, int] | None, title: str, highest: int | None = None
) -> Figure | None:
    """Layers × experts with the rank of each expert, one panel for each kind of matrix, at the start and now on one
    colour scale; None for a model without experts. Of many layers or experts a cell is the mean of neighbours.
    Arguments as of `rank_heatmap`."""
    shown = {"start": start} if now is None else {"start": start, "now": now}
    grids = {when: expert_grids(ranks) for when, ranks in shown.items()}
    kinds = list(grids["start"])[:STACKS]
    if not kinds:
        return None
    if left := len(grids["start"]) - len(kinds):
        title += f"\n{left} more kinds of matrix are not shown"
    panels = []
    for kind in kinds:
        for when, own in grids.items():
            layers, experts, grid = own[kind]
            said = f"{kind}, {when}: {int(np.nansum(grid))} in all"
            layers, grid = in_chunks(layers, grid, max(4, ROWS // len(kinds)))
            experts, turned = in_chunks(experts, grid.T, 2 * COLUMNS)
            panels.append((said, layers, experts, turned.T))
    largest = max(float(np.nanmax(grid)) for *_, grid in panels)
    top = max(1.0, largest) if highest is None else max(1, highest)
    tall, wide = [len(layers) for _, layers, _, _ in panels], max(len(experts) for _, _, experts, _ in panels)
    numbers = sum(grid.size for *_, grid in panels) <= NUMBERED and wide <= COLUMNS
    row, column = (0.32, 0.4) if numbers else (0.18, 0.1)
    size = (2.5 + max(4.0, column * wide), 1.0 + sum(0.8 + row * layers for layers in tall))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    all_axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": tall})[:, 0]
    for axes, (said, layers, experts, grid) in zip(all_axes, panels, strict=True):
        image = draw_grid(axes, layers, experts, grid, top, numbers=numbers)
        axes.set_title(said, fontsize=9)
        axes.set_xlabel("expert", fontsize=8)
        axes.set_ylabel("layer", fontsize=8)
    figure.suptitle(title, fontsize=10)
    extend = "max" if largest > top else "neither"
    figure.colorbar(image, ax=figure.axes, label="rank", shrink=0.9, extend=extend)
    return figure


def draw_grid(
    axes: Axes,
    kinds: list[str],
    layers: list[str],
    grid: np.ndarray,
    top: float,
    columns: int = 0,
    numbers: bool = True,
) -> AxesImage:
    """Fill axes with a grid of ranks, each written in its cell, on a colour scale from 0 to `top`.

    `columns`: how many layers the axes have room for, so that in panels of several stacks cells are of one width.
    `numbers`: whether there is room for ranks in cells and a label at every column.
    """
    image = axes.imshow(grid, cmap="cividis", vmin=0, vmax=top, aspect="auto")
    axes.set_xlabel("layer", fontsize=8)
    if columns > len(layers):
        end = len(layers) - 0.5
        axes.set_xlim(-0.5, columns - 0.5)
        axes.spines["right"].set_position(("data", end))  # forgets the labels of the ticks: these come after it
        axes.spines[["top", "bottom"]].set_bounds(-0.5, end)
        axes.xaxis.label.set_x(len(layers) / columns / 2)
    apart = 1 if numbers and max(map(len, layers)) < 5 else 2 if numbers else max(1, max(map(len, layers)) // 2)
    axes.set_xticks(range(0, len(layers), apart), layers[::apart], fontsize=8)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    for (row, column), rank in np.ndenumerate(grid) if numbers else ():
        if not np.isnan(rank):
            shade = "black" if rank > 0.55 * top else "white"
            text = axes.text(column, row, f"{rank:.3g}", ha="center", va="center", color=shade, fontsize=7)
            text.set_in_layout(False)  # it is inside its cell, and measuring it costs more than drawing it
    return image
