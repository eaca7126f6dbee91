"""Plots of a comparison: quality against steps, quality against size, and the final ranks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cells.cell import FULL, NONE
from lorafamily.insight.grids import rank_grid
from lorafamily.insight.heatmaps import draw_grid
from lorafamily.names import by_stack
from pages.groups import Group

# Okabe and Ito's colours, which colour-blind readers can tell apart; the markers repeat the distinction.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"]
MARKERS = "osD^vPX*"
LINES = ("-", "--", ":", "-.")
PANELS, ACROSS, MANY = 3, 6, 18
"""At most so many panels for sizes; panels of an allocation in one row; the largest number of panels still readable."""


def quality_by_step(groups: Sequence[Group], metric: str) -> Figure:
    """Validation metric against step, one panel for each size; lines are means over seeds, bands one standard
    deviation.

    Of many sizes only the largest, the middle and the smallest are drawn.
    """
    sizes = _sizes(groups)
    drawn = sizes if len(sizes) <= PANELS else [sizes[0], sizes[len(sizes) // 2], sizes[-1]]
    looks = Looks(groups)
    figure = Figure(figsize=(1.5 + 4.8 * len(drawn), 4.4), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, drawn, strict=True):
        shown = [g for g in groups if g.runs and (g.size == size or g.method == FULL)]
        for group in shown:
            steps = [step for step, _ in group.runs[0]["curve"]]
            values = np.array([[value for _, value in row["curve"]] for row in group.runs])
            mean, deviation = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0 * values[0]
            colour, marker, line = looks.of(group)
            name = looks.label(group)
            axes.plot(steps, mean, line, color=colour, marker=marker, markersize=4, linewidth=1.5, label=name)
            axes.fill_between(steps, mean - deviation, mean + deviation, color=colour, alpha=0.12, linewidth=0)
        _no_adaptation_line(axes, groups)
        axes.set_xlabel("optimizer steps")
        if size is not None:
            axes.set_title(size if size.startswith("rank") else f"{size} trainable parameters", fontsize=10)
        axes.grid(alpha=0.3)
        unadapted = [row["metric"] for g in groups if g.method == NONE for row in g.runs]
        _zoom(axes, [*unadapted, *(value for g in shown for row in g.runs for _, value in row["curve"][1:])])
    panels[0].set_ylabel(f"validation {metric}")
    _legend(panels[-1])
    figure.suptitle("Validation quality during training (mean and standard deviation over seeds)", fontsize=11)
    return figure


def quality_by_size(groups: Sequence[Group], metric: str) -> Figure:
    """Final metric against trainable parameters."""
    looks = Looks(groups)
    figure = Figure(figsize=(7.2, 4.4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for label in dict.fromkeys(looks.label(g) for g in groups if g.method != NONE and g.runs):
        line_groups = [g for g in groups if g.runs and looks.label(g) == label]
        line_groups.sort(key=lambda g: g.mean("trainable") or 0)
        colour, marker, line = looks.of(line_groups[0])
        axes.errorbar(
            [g.mean("trainable") or math.nan for g in line_groups],
            [g.mean("metric") or math.nan for g in line_groups],
            yerr=[g.deviation("metric") or 0 for g in line_groups],
            color=colour,
            marker=marker,
            linestyle=line,
            capsize=3,
            linewidth=1.2,
            label=label,
        )
    _no_adaptation_line(axes, groups)
    axes.set_xscale("log")
    axes.set_xlabel("trainable parameters (task head not counted)")
    axes.set_ylabel(f"validation {metric}")
    axes.set_title("Quality against size (bars: standard deviation over seeds)", fontsize=11)
    axes.grid(alpha=0.3, which="both")
    _legend(axes)
    return figure


def allocation(groups: Sequence[Group]) -> Figure:
    """The final ranks, mean over seeds: layers × matrices, one panel for each method, size and targets, one colour
    scale for each size. If there are many groups, only those whose ranks moved are shown. Several stacks, such as an
    encoder and a decoder, are drawn one below the other."""
    ranked = [g for g in groups if g.runs and g.runs[0]["ranks_end"]]
    moved = [g for g in ranked if any(row["ranks_end"] != row["ranks_start"] for row in g.runs)]
    shown = ranked if len(ranked) <= MANY or not moved else moved
    ranks = {g.name: _mean_ranks(g) for g in shown}
    stacks = by_stack(dict.fromkeys(name for mean in ranks.values() for name in mean))
    grids = {
        (g.name, stack): rank_grid({name: ranks[g.name][name] for name in names if name in ranks[g.name]})
        for g in shown
        for stack, names in stacks.items()
        if not ranks[g.name].keys().isdisjoint(names)
    }
    rows: list[tuple[list[Group], float]] = []
    for size in dict.fromkeys(g.size for g in shown):
        same = [g for g in shown if g.size == size]
        top = max(1.0, *(max(ranks[g.name].values()) for g in same))
        rows += [(same[i : i + ACROSS], top) for i in range(0, len(same), ACROSS)]
    columns = max(len(groups) for groups, _ in rows)
    tall = {stack: max(len(kinds) for (_, of), (kinds, _, _) in grids.items() if of == stack) for stack in stacks}
    wide = max(len(layers) for _, layers, _ in grids.values())
    lines = [(stack, *row) for row in rows for stack in stacks]
    width, height = 1.8 + columns * (0.9 + 0.34 * wide), 0.6 + sum(0.9 + 0.3 * tall[stack] for stack, _, _ in lines)
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    ratios = {"height_ratios": [tall[stack] for stack, _, _ in lines]}
    panels = figure.subplots(len(lines), columns, squeeze=False, gridspec_kw=ratios)
    for line, (stack, same, top) in zip(panels, lines, strict=True):
        drawn = [g for g in same if (g.name, stack) in grids]
        for axes, group in zip_longest(line, same):
            if group not in drawn:
                axes.axis("off")
                continue
            kinds, layers, grid = grids[group.name, stack]
            same_labels = group is not drawn[0] and group.targets == drawn[0].targets
            # Cells of all stacks are equally wide; a model with one stack fills its panel.
            image = draw_grid(
                axes, [""] * len(kinds) if same_labels else kinds, layers, grid, top, wide if stack else 0
            )
            title = group.name.replace(":", "\n:") + (f"\n{stack}" if stack else "")
            axes.set_title(title, fontsize=9 if len(shown) <= MANY else 7, loc="left" if stack else "center")
        if drawn:
            figure.colorbar(image, ax=list(line), label="rank", shrink=0.9)
    figure.suptitle("Final rank by layer and matrix (mean over seeds; LoRA² counts its singular values)", fontsize=11)
    return figure


def _mean_ranks(group: Group) -> dict[str, float]:
    return {name: statistics.fmean(row["ranks_end"][name] for row in group.runs) for name in group.runs[0]["ranks_end"]}


def _sizes(groups: Sequence[Group]) -> list[str | None]:
    """Sizes by trainable parameters, the largest first."""
    trainable: dict[str, float] = {}
    for group in groups:
        if group.size is not None:
            trainable[group.size] = max(trainable.get(group.size, 0), group.mean("trainable") or 0)
    return [*sorted(trainable, key=lambda size: -trainable[size])] or [None]


class Looks:
    """Colour, marker, line style and label of every line, the same in all plots."""

    def __init__(self, groups: Sequence[Group]):
        self.methods = list(dict.fromkeys(g.method for g in groups if g.method not in (NONE, FULL)))
        self.targets = list(dict.fromkeys(g.targets for g in groups if g.targets is not None))
        self.labels = list(dict.fromkeys(self.label(g) for g in groups if g.method not in (NONE, FULL)))

    def label(self, group: Group) -> str:
        """The label of a line: what distinguishes it in this comparison."""
        if len(self.targets) < 2 or group.targets is None:
            return group.method
        return group.targets if len(self.methods) == 1 else f"{group.method} on {group.targets}"

    def of(self, group: Group) -> tuple[str, str, str]:
        """(colour, marker, line style)."""
        if group.method in (NONE, FULL):
            return "#555555", "x", "--"
        index = self.labels.index(self.label(group))
        turn = index // len(COLOURS)  # where the colours are used up, the lines change
        return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)], LINES[turn % len(LINES)]


def _legend(axes: Any) -> None:
    """Beside the panel, because the search for the best place inside takes seconds for long lines."""
    number = len(axes.get_legend_handles_labels()[1])
    size = 8 if number <= 8 else 6
    axes.legend(fontsize=size, loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=1 + number // 24, frameon=False)


def _no_adaptation_line(axes: Any, groups: Sequence[Group]) -> None:
    for group in groups:
        if group.method == NONE and group.runs:
            axes.axhline(group.mean("metric"), color="#555555", linestyle=":", linewidth=1.2, label="no adaptation")


def _zoom(axes: Any, values: Sequence[float]) -> None:
    """Limit the axis to values after the first evaluation: with a new task head the start is noise and far away."""
    if values:
        low, high = min(values), max(values)
        margin = 0.08 * (high - low) or 0.01
        axes.set_ylim(low - margin, high + margin)
