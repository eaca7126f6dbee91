"""Heat-maps of the slices of every module, with the number in every cell."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from lorafamily.insight.grids import COLUMNS, ROWS, STACKS, expert_grids, in_chunks, small_grids
from lorafamily.names import OUTSIDE

SIDE_BY_SIDE = 8
"""Up to so many layers the grids of the start and of now are side by side, otherwise one above the other."""
NUMBERED = 1200
"""Up to so many cells each shows its number: drawing a text takes a hundred times as long as drawing a cell."""


def rank_heatmap(
    start: Mapping[str, int], now: Mapping[str, int] | None, title: str, highest: int | None = None
) -> Figure:
    """Layers × matrices with the slices of each module, at the start and now, on one colour scale.

    A model with several stacks, such as an encoder and a decoder, has a panel for each, with its matrices and layers.
    If there are more than `ROWS` matrices or `COLUMNS` layers, a cell shows the mean of several modules, and the title
    says so. `now`: None shows the start only. `highest`: top of the colour scale; None: the most slices of any module.
    """
    shown = {"start": start} if now is None else {"start": start, "now": now}
    grids = small_grids(list(start), list(shown.values()))
    cells = sum(int((~np.isnan(of_stack[0].ranks)).sum()) for of_stack in grids.values())
    if cells < len(start):
        title += f"\n{len(start):,} modules in {cells:,} cells, each the mean of those it stands for"
    largest = max(float(np.nanmax(grid)) for of_stack in grids.values() for _, _, grid, _ in of_stack)
    top = max(1.0, largest) if highest is None else max(1, highest)
    longest = max(len(layers) for of_stack in grids.values() for _, layers, _, _ in of_stack)
    side_by_side = longest <= SIDE_BY_SIDE
    wide = len(shown) if side_by_side else 1
    tall = [len(grid.matrices) for of_stack in grids.values() for grid in of_stack[::wide]]
    numbered = cells * len(shown) <= NUMBERED
    row, column = (0.32, 0.45) if numbered else (0.18, 0.2)
    room = 2.2 if len(grids) == 1 else max(2.2, 0.08 * len(f"{max(grids, key=len)}, start: 1234 in all"))
    size = (3.0 + wide * max(room, column * longest), 1.3 + sum(0.7 + row * matrices for matrices in tall))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    panels = figure.subplots(len(tall), wide, squeeze=False, gridspec_kw={"height_ratios": tall}).flat
    for stack, of_stack in grids.items():
        for number, (when, (matrices, layers, grid, total)) in enumerate(zip(shown, of_stack, strict=True)):
            axes = next(panels)
            named = matrices if number == 0 or not side_by_side else [""] * len(matrices)
            image = draw_grid(axes, named, layers, grid, top, longest, numbered)
            total_at = f"{when}: {total} in all"
            axes.set_title(f"{stack}, {total_at}" if stack else total_at, fontsize=9, loc="left" if stack else "center")
            if stack == OUTSIDE:
                axes.set_xticks([]), axes.set_xlabel("")
    figure.suptitle(title, fontsize=10)
    extend = "max" if largest > top else "neither"  # for modules that grew beyond the scale
    figure.colorbar(image, ax=figure.axes, label="slices", shrink=0.9, extend=extend, aspect=20 * len(grids))
    return figure


def expert_heatmap(start: Mapping[str, int], now: Mapping[str, int] | None, title: str) -> Figure | None:
    """Layers × experts with the slices of each expert, a panel for each matrix, at the start and now, on one colour
    scale; None for a model without experts. A cell is the mean of neighbours if there are many layers or experts."""
    shown = {"start": start} if now is None else {"start": start, "now": now}
    grids = {when: expert_grids(ranks) for when, ranks in shown.items()}
    matrices = list(grids["start"])[:STACKS]
    if not matrices:
        return None
    if left := len(grids["start"]) - len(matrices):
        title += f"\n{left} more matrices are not shown"
    panels = []
    for matrix in matrices:
        for when, by_matrix in grids.items():
            layers, experts, grid = by_matrix[matrix]
            panel = f"{matrix}, {when}: {int(np.nansum(grid))} in all"
            layers, grid = in_chunks(layers, grid, max(4, ROWS // len(matrices)))
            experts, turned = in_chunks(experts, grid.T, 2 * COLUMNS)
            panels.append((panel, layers, experts, turned.T))
    top = max(1.0, *(float(np.nanmax(grid)) for *_, grid in panels))
    tall, wide = [len(layers) for _, layers, _, _ in panels], max(len(experts) for _, _, experts, _ in panels)
    numbered = sum(grid.size for *_, grid in panels) <= NUMBERED and wide <= COLUMNS
    row, column = (0.32, 0.4) if numbered else (0.18, 0.1)
    size = (2.5 + max(4.0, column * wide), 1.0 + sum(0.8 + row * layers for layers in tall))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    all_axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": tall})[:, 0]
    for axes, (panel, layers, experts, grid) in zip(all_axes, panels, strict=True):
        image = draw_grid(axes, layers, experts, grid, top, numbered=numbered)
        axes.set_title(panel, fontsize=9)
        axes.set_xlabel("expert", fontsize=8)
        axes.set_ylabel("layer", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.colorbar(image, ax=figure.axes, label="slices", shrink=0.9)
    return figure


def draw_grid(
    axes: Axes,
    matrices: list[str],
    layers: list[str],
    grid: np.ndarray,
    top: float,
    room: int = 0,
    numbered: bool = True,
) -> AxesImage:
    """Draw a grid into axes on a colour scale from 0 to `top`. `room`: how many layers the axes have room for, so that
    cells are equally wide in the panels of all stacks; `numbered`: whether cells have room for their numbers, and
    columns for a label each."""
    image = axes.imshow(grid, cmap="cividis", vmin=0, vmax=top, aspect="auto")
    axes.set_xlabel("layer", fontsize=8)
    if room > len(layers):
        end = len(layers) - 0.5
        axes.set_xlim(-0.5, room - 0.5)
        axes.spines["right"].set_position(("data", end))  # drops tick labels, so set these later
        axes.spines[["top", "bottom"]].set_bounds(-0.5, end)
        axes.xaxis.label.set_x(len(layers) / room / 2)
    longest = max(map(len, layers))
    stride = (1 if longest < 5 else 2) if numbered else max(1, longest // 2)
    axes.set_xticks(range(0, len(layers), stride), layers[::stride], fontsize=8)
    axes.set_yticks(range(len(matrices)), matrices, fontsize=8)
    for (row, column), rank in np.ndenumerate(grid) if numbered else ():
        if not np.isnan(rank):
            shade = "black" if rank > 0.55 * top else "white"
            text = axes.text(column, row, f"{rank:.3g}", ha="center", va="center", color=shade, fontsize=7)
            text.set_in_layout(False)  # it is inside its cell; measuring it takes longer than drawing it
    return image
