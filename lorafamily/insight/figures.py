"""Pictures of a rank allocation. Figures are matplotlib's, made without its global state.

Colours are Okabe and Ito's and the map cividis, which colour-blind readers tell apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from PIL import Image

from lorafamily.history import Decision, Step
from lorafamily.insight.costs import UNITS, Memory, in_units
from lorafamily.names import OUTSIDE, Place, by_stack, expert_of, kind_labels, place_of

T = TypeVar("T")
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000"]
KEPT, DROPPED, MARK = "#0072B2", "#D55E00", "#444444"
SIDE_BY_SIDE = 8
"""Layers up to which two grids stand beside each other; wider ones stand one above the other."""
ROWS, COLUMNS, STACKS = 96, 64, 6
"""What a picture has at most: rows in all its panels together (of start and now each), columns, stacks. Of a larger
model a cell stands for several modules."""
NUMBERED = 1200
"""Cells up to which the rank is written in each; a text costs a hundred times what a cell costs."""
POINTS, AREAS = 400, 32
"""Steps that a curve or a stack of areas has at most, and areas."""


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
            layers, grid = _in_chunks(layers, grid, max(4, ROWS // len(kinds)))
            experts, turned = _in_chunks(experts, grid.T, 2 * COLUMNS)
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


def _in_chunks(labels: list[str], grid: np.ndarray, most: int) -> tuple[list[str], np.ndarray]:
    """At most so many rows: where there are more, the means of neighbouring ones."""
    chunks = [chunk for chunk in np.array_split(np.arange(len(labels)), min(most, len(labels))) if len(chunk)]
    said = [labels[c[0]] if len(c) == 1 else f"{labels[c[0]]}–{labels[c[-1]]}" for c in chunks]
    sums = np.array([np.nansum(grid[c], 0) for c in chunks])
    counts = np.array([(~np.isnan(grid[c])).sum(0) for c in chunks])
    return said, np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


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


def rank_history(decisions: Sequence[Decision], last_step: int) -> Figure:
    """Rank by kind of matrix against step, stacked, with a mark above every decision that changed something; of more
    than `POINTS` decisions some, spread evenly, and of more than `AREAS` kinds alike ones together.

    The first of the decisions is the start.
    """
    changed = thinned([d for d in decisions[1:] if d.before != d.after])
    changes = sum(d.before != d.after for d in decisions[1:])
    decisions = thinned(decisions)
    shown_as = area_labels(decisions[0].after)
    ranks = [rank_by_kind(decision.after, shown_as) for decision in decisions]
    kinds = list(ranks[0])
    figure = Figure(figsize=(8.4, max(4.6, 1.0 + 0.18 * len(kinds))), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    steps = [decision.step for decision in decisions] + [last_step]
    by_kind = np.array([[at[kind] for at in [*ranks, ranks[-1]]] for kind in kinds])
    colours, hatches = cycle(COLOURS), [""] * len(COLOURS) + ["//"] * len(COLOURS) + [".."] * len(COLOURS)
    areas = axes.stackplot(
        steps,
        by_kind,
        labels=[f"{kind}: {own[0]} → {own[-1]}" for kind, own in zip(kinds, by_kind, strict=True)],
        colors=[next(colours) for _ in kinds],
        step="post",
        edgecolor="white",
        linewidth=0.4,
    )
    for area, hatch in zip(areas, cycle(hatches)):
        area.set_hatch(hatch)
    total = by_kind.sum(0)
    axes.plot(
        [d.step for d in changed],
        [d.total for d in changed],
        linestyle="",
        marker="v",
        color=MARK,
        markersize=4,
        label=f"decision that changed ranks ({changes} in all)",
    )
    axes.set_xlim(0, max(last_step, 1))
    axes.set_ylim(0, 1.08 * max(1, int(total.max())))
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("rank slices in use")
    figure.suptitle(
        f"Rank by kind of matrix during training: {total[0]} slices at the start, {total[-1]} at the end", fontsize=11
    )
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def thinned(entries: Sequence[T]) -> list[T]:
    """At most `POINTS` of them, spread evenly, with the first and the last."""
    if len(entries) <= POINTS:
        return list(entries)
    return [entries[round(i)] for i in np.linspace(0, len(entries) - 1, POINTS)]


def score_histograms(decisions: Sequence[Decision], panels: int = 3) -> Figure | None:
    """How slices were scored at the first, middle and last decision, and which of them fell; None without scores."""
    scored = [d for d in decisions if any(d.scores.values())]
    if not scored:
        return None
    chosen = [scored[i] for i in sorted({round(i) for i in np.linspace(0, len(scored) - 1, panels)})]
    figure = Figure(figsize=(1.0 + 3.4 * len(chosen), 3.6), dpi=100, layout="constrained")
    for axes, decision in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
        scores = np.array([value for own in decision.scores.values() for value in own])
        wide = scores.min() > 0 and scores.max() / scores.min() > 100  # sensitivities span orders of magnitude
        edges = np.geomspace(scores.min(), scores.max(), 31) if wide else np.histogram_bin_edges(scores, 30)
        threshold = -np.inf if decision.threshold is None else decision.threshold
        fallen = scores <= threshold
        axes.hist([scores[fallen], scores[~fallen]], edges, stacked=True, color=[DROPPED, KEPT], label=["off", "kept"])
        if fallen.any():
            axes.axvline(threshold, color=MARK, linestyle="--", linewidth=1, label="threshold")
        if wide:
            axes.set_xscale("log")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(f"step {decision.step}: {fallen.sum()} of {len(scores)} slices off", fontsize=9)
        axes.set_xlabel("score", fontsize=9)
        axes.tick_params(labelsize=8)
    figure.axes[0].set_ylabel("slices")
    figure.axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle("Scores of the rank slices when decisions were made (higher is worth more)", fontsize=10)
    return figure


def course(steps: Sequence[Step]) -> Figure:
    """Total rank, trainable numbers and, where frames should be orthonormal, their error, against step; of more than
    `POINTS` steps some, spread evenly."""
    steps = thinned(steps)
    measured = [(step.step, step.orthogonality) for step in steps if step.orthogonality is not None]
    curves: dict[str, tuple[list[int], Sequence[float]]] = {
        "rank slices in use": ([s.step for s in steps], [s.rank for s in steps]),
        "trainable numbers": ([s.step for s in steps], [s.trainable for s in steps]),
    }
    if measured:
        curves["mean ‖F Fᵀ − I‖ of the frames"] = ([s for s, _ in measured], [e for _, e in measured])
    figure = Figure(figsize=(7.2, 0.8 + 1.7 * len(curves)), dpi=100, layout="constrained")
    panels = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, (at, values)), colour in zip(panels, curves.items(), COLOURS, strict=False):
        # Counts change at a step; the error is measured now and then.
        style = "default" if "‖" in label else "steps-post"
        axes.plot(at, values, color=colour, linewidth=1.6, drawstyle=style)
        axes.set_ylabel(label, fontsize=8)
        axes.set_ylim(0, 1.08 * max(1e-12, *values))
        axes.ticklabel_format(axis="y", style="plain")
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("optimiser step")
    figure.suptitle("Rank, size and orthogonality during training" if measured else "Rank and size during training")
    return figure


def memory_bars(ways: Mapping[str, Memory], title: str) -> Figure:
    """Memory by part, one bar for each way to train; a mark at the peak, where that is less than the sum."""
    top = max(memory.peak for memory in ways.values())
    unit, of = next((unit, of) for unit, of in [*UNITS, ("B", 1)] if top >= of)
    figure = Figure(figsize=(9.0, 1.5 + 0.42 * len(ways)), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    names = list(ways)
    ends = np.zeros(len(ways))
    for part, colour in zip(("weights", "gradients", "optimiser", "activations"), COLOURS, strict=False):
        widths = np.array([getattr(memory, part) or 0 for memory in ways.values()]) / of
        if widths.any():
            axes.barh(names, widths, left=ends, color=colour, label=part, height=0.7)
        ends += widths
    peaks = np.array([memory.peak for memory in ways.values()]) / of
    earlier = peaks < 0.995 * ends  # where one sees the difference
    if earlier.any():
        at = [name for name, is_earlier in zip(names, earlier, strict=True) if is_earlier]
        axes.plot(peaks[earlier], at, linestyle="", marker="|", markersize=17, markeredgewidth=2, color="black",
                  label="peak: gradients come\nas activations go")  # fmt: skip
    for name, end, memory in zip(names, np.maximum(ends, peaks), ways.values(), strict=True):
        said = in_units(memory.peak) if memory.peak / of > 0.995 * end else f"peak {in_units(memory.peak)}"
        axes.annotate(said, (end, name), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlim(0, 1.2 * max(ends.max(), peaks.max()))
    axes.invert_yaxis()
    axes.set_xlabel(f"memory of a training step ({unit})")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    handles = sorted(zip(*axes.get_legend_handles_labels(), strict=True), key=lambda entry: entry[1].startswith("peak"))
    axes.legend(*zip(*handles, strict=True), fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Draw the figure into a file."""
    if path.suffix == ".png":
        Image.fromarray(pixels(figure)).save(path)
    else:
        figure.savefig(path)


def pixels(figure: Figure) -> UInt8[np.ndarray, "height width 3"]:
    """The figure drawn; asked a second time it is not drawn again."""
    canvas = figure.canvas
    if not isinstance(canvas, FigureCanvasAgg):  # matplotlib's own before the first time
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
