"""The study's figures: every arm's effect, and where each arm puts the rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lorafamily.insight.drawing import COLOURS
from studies.results import Comparison, Row, Study

COLOUR = {"better": "#009E73", "on par": COLOURS[0], "undecided": "#777777", "worse": "#D55E00"}
"""By verdict."""


def forest(studies: Sequence[Study], compared: Sequence[Sequence[Comparison]]) -> Figure:
    """Every arm's difference from uniform LoRA with its interval, one panel for each problem, two beside each other."""
    chosen = [[c for c in found if c.other == "uniform" and "shuffled" not in c.arm] for found in compared]
    lines = [max(map(len, chosen[i : i + 2])) for i in range(0, len(chosen), 2)]
    heights = [0.9 + 0.27 * most for most in lines]
    figure = Figure(figsize=(14.0, 0.3 + sum(heights)), dpi=110, layout="constrained")
    panels = figure.subplots(len(heights), 2, squeeze=False, height_ratios=heights).flat
    for axes in panels[len(studies) :]:
        axes.remove()
    for axes, study, shown in zip(panels[: len(studies)], studies, chosen, strict=True):
        for place, c in enumerate(shown):
            axes.plot([c.found.low, c.found.high], [place] * 2, color=COLOUR[c.verdict], linewidth=2.2)
            axes.plot(c.found.mean, place, "o", color=COLOUR[c.verdict], markersize=5)
        axes.axvline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
        axes.set_yticks(range(len(shown)), [c.arm for c in shown], fontsize=7)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_title(f"{study.problem.name}: better than uniform LoRA to the right", fontsize=9)
        axes.set_xlabel(f"difference in {study.problem.metric}", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [figure.axes[0].plot([], [], "o-", color=colour)[0] for colour in COLOUR.values()]
    figure.legend(handles, list(COLOUR), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def patterns(studies: Sequence[Study], compared: Sequence[Sequence[Comparison]]) -> Figure:
    """Left, the mean rank by layer of every arm that finds a pattern; right, the arm's effect; one row for each
    problem.

    If it is known which layers can help, these come first.
    """
    arms = [[a.name for a in s.arms if a.pattern is None and a.size == 1.0 and s.of(a.name)] for s in studies]
    heights = [0.8 + 0.15 * max(len(names), 8) for names in arms]
    figure = Figure(figsize=(9.5, sum(heights)), dpi=110, layout="constrained")
    panels = figure.subplots(len(studies), 2, squeeze=False, width_ratios=[3, 2], height_ratios=heights)
    for (left, right), study, comparisons, names in zip(panels, studies, compared, arms, strict=True):
        image = [np.mean([_ordered(study, row) for row in study.of(name).values()], axis=0) for name in names]
        shown = left.imshow(np.array(image), aspect="auto", cmap="viridis", vmin=0)
        known = bool(study.problem.planted(study.problem.seeds[0]))
        if known:
            left.axvline(len(image[0]) / 2 - 0.5, color="white", linewidth=2)
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.set_title(
            f"{study.problem.name}: rank by layer" + (", those that can help first" if known else ""), fontsize=9
        )
        left.set_yticks(range(len(names)), names, fontsize=7)
        figure.colorbar(shown, ax=left, label="slices, mean over seeds")
        against = {c.arm: c for c in comparisons if c.other == "uniform"}
        for place, name in enumerate(names):
            if c := against.get(name):
                right.plot([c.found.low, c.found.high], [place] * 2, color=COLOUR[c.verdict], linewidth=2.2)
                right.plot(c.found.mean, place, "o", color=COLOUR[c.verdict], markersize=5)
        right.axvline(0, color="#bbbbbb", linewidth=0.8)
        right.set_ylim(len(names) - 0.5, -0.5)
        right.set_yticks([])
        right.xaxis.set_major_locator(MaxNLocator(4))  # five labels of three decimals run into each other
        right.set_title("better than uniform to the right", fontsize=9)
    return figure


def _ordered(study: Study, row: Row) -> list[int]:
    chosen = study.problem.planted(row["seed"])
    return [row["ranks_end"][name] for name in sorted(row["ranks_end"], key=lambda name: (name not in chosen, name))]
