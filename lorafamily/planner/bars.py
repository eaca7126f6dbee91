"""Memory of a training step as a picture: one bar for each way to train."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from lorafamily.insight.drawing import COLOURS
from lorafamily.planner.costs import Memory
from lorafamily.terminal import BYTES, in_units


def memory_bars(ways: Mapping[str, Memory], title: str) -> Figure:
    """Memory by part, one bar for each way to train; a mark at the peak where that is less than the sum."""
    top = max(memory.peak for memory in ways.values())
    unit, size = next((unit, size) for unit, size in [*BYTES, ("B", 1)] if top >= size)
    figure = Figure(figsize=(9.0, 1.5 + 0.42 * len(ways)), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    names = list(ways)
    ends = np.zeros(len(ways))
    for part, colour in zip(("weights", "gradients", "optimizer", "activations"), COLOURS, strict=False):
        widths = np.array([getattr(memory, part) or 0 for memory in ways.values()]) / size
        if widths.any():
            axes.barh(names, widths, left=ends, color=colour, label=part, height=0.7)
        ends += widths
    peaks = np.array([memory.peak for memory in ways.values()]) / size
    below = peaks < 0.995 * ends  # where one sees the difference
    if below.any():
        axes.plot(peaks[below], np.array(names)[below], linestyle="", marker="|", markersize=17, markeredgewidth=2,
                  color="black", label="peak: gradients come\nas activations go")  # fmt: skip
    for name, end, memory in zip(names, np.maximum(ends, peaks), ways.values(), strict=True):
        text = in_units(memory.peak) if memory.peak / size > 0.995 * end else f"peak {in_units(memory.peak)}"
        axes.annotate(text, (end, name), (5, 0), textcoords="offset points", va="center", fontsize=9)
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
