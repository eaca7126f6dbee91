"""The pictures of a run, drawn from its decisions and steps: heat-maps, and slices, scores and totals against steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TypeVar

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lorafamily.history import Decision, Step
from lorafamily.insight.drawing import COLOURS, save
from lorafamily.insight.grids import area_labels, slices_by_matrix
from lorafamily.insight.heatmaps import expert_heatmap, rank_heatmap

T = TypeVar("T")
KEPT, DROPPED, MARK = "#0072B2", "#D55E00", "#444444"
POINTS = 400
"""The most steps or decisions that a curve shows."""


def pictures_of(decisions: Sequence[Decision], steps: Sequence[Step]) -> dict[str, Figure]:
    """The pictures of a run, by file name: slices at the start and the end, also by expert if the model has experts;
    slices, scores and totals during training. Empty for a run without adapters."""
    start, end = decisions[0].after, decisions[-1].after
    if not start:
        return {}
    last = steps[-1].step if steps else decisions[-1].step
    title = "Slices by layer and {} after {} steps"
    found = {
        "rank-by-layer": rank_heatmap(start, end, title.format("matrix", last)),
        "rank-by-expert": expert_heatmap(start, end, title.format("expert", last)),
        "rank-history": rank_history(decisions, last),
        "scores": score_histograms(decisions),
        "course": course(steps) if steps else None,
    }
    return {name: figure for name, figure in found.items() if figure is not None}


def draw(folder: Path, drawn: Mapping[str, Figure]) -> list[Path]:
    """Write pictures into a folder; returns their files."""
    for name, figure in drawn.items():
        save(figure, folder / f"{name}.png")
    return [folder / f"{name}.png" for name in drawn]


def rank_history(decisions: Sequence[Decision], last_step: int) -> Figure:
    """Slices by matrix against step as stacked areas, with a mark above every decision that changed ranks. The first
    decision is the start. Of more than `POINTS` decisions an even selection is shown; of more than `AREAS` matrices,
    similar ones share an area."""
    changed = [d for d in decisions[1:] if d.before != d.after]
    label = f"decision that changed ranks ({len(changed)} in all)"
    changed, decisions = thinned(changed), thinned(decisions)
    shown_as = area_labels(decisions[0].after)
    ranks = [slices_by_matrix(decision.after, shown_as) for decision in decisions]
    matrices = list(ranks[0])
    figure = Figure(figsize=(8.4, max(4.6, 1.0 + 0.18 * len(matrices))), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    steps = [decision.step for decision in decisions] + [last_step]
    by_matrix = np.array([[at[matrix] for at in [*ranks, ranks[-1]]] for matrix in matrices])
    hatches = [hatch for hatch in ("", "//", "..") for _ in COLOURS]
    areas = axes.stackplot(
        steps,
        by_matrix,
        labels=[f"{matrix}: {slices[0]} → {slices[-1]}" for matrix, slices in zip(matrices, by_matrix, strict=True)],
        colors=COLOURS,
        step="post",
        edgecolor="white",
        linewidth=0.4,
    )
    for area, hatch in zip(areas, cycle(hatches)):
        area.set_hatch(hatch)
    total = by_matrix.sum(0)
    axes.plot([d.step for d in changed], [d.total for d in changed], "v", color=MARK, markersize=4, label=label)
    axes.set(xlim=(0, max(last_step, 1)), ylim=(0, 1.08 * max(1, int(total.max()))))
    axes.set(xlabel="optimizer step", ylabel="rank slices in use")
    title = f"Slices by matrix during training: {total[0]} at the start, {total[-1]} at the end"
    figure.suptitle(title, fontsize=11)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def thinned(entries: Sequence[T]) -> list[T]:
    """An even selection of at most `POINTS` entries, with the first and the last."""
    if len(entries) <= POINTS:
        return list(entries)
    return [entries[round(i)] for i in np.linspace(0, len(entries) - 1, POINTS)]


def score_histograms(decisions: Sequence[Decision], panels: int = 3) -> Figure | None:
    """Histograms of the slices' scores at the first, middle and last decision, by whether the decision dropped them;
    None without scores."""
    scored = [d for d in decisions if any(d.scores.values())]
    if not scored:
        return None
    chosen = [scored[i] for i in sorted({round(i) for i in np.linspace(0, len(scored) - 1, panels)})]
    figure = Figure(figsize=(1.0 + 3.4 * len(chosen), 3.6), dpi=100, layout="constrained")
    for axes, decision in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
        scores = np.array([score for slices in decision.scores.values() for score in slices])
        over_decades = scores.min() > 0 and scores.max() / scores.min() > 100  # sensitivities span orders of magnitude
        edges = np.geomspace(scores.min(), scores.max(), 31) if over_decades else np.histogram_bin_edges(scores, 30)
        threshold = -np.inf if decision.threshold is None else decision.threshold
        off = scores <= threshold
        axes.hist([scores[off], scores[~off]], edges, stacked=True, color=[DROPPED, KEPT], label=["off", "kept"])
        if off.any():
            axes.axvline(threshold, color=MARK, linestyle="--", linewidth=1, label="threshold")
        if over_decades:
            axes.set_xscale("log")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(f"step {decision.step}: {off.sum()} of {len(scores)} slices off", fontsize=9)
        axes.set_xlabel("score", fontsize=9)
        axes.tick_params(labelsize=8)
    figure.axes[0].set_ylabel("slices")
    figure.axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle("Scores of the rank slices when decisions were made (higher is worth more)", fontsize=10)
    return figure


def course(steps: Sequence[Step]) -> Figure:
    """Slices in use, trainable parameters and, if there are frames that should be orthonormal, their error, against
    step. Of more than `POINTS` steps an even selection is shown."""
    steps = thinned(steps)
    measured = [(step.step, step.orthogonality) for step in steps if step.orthogonality is not None]
    curves: dict[str, tuple[list[int], Sequence[float]]] = {
        "rank slices in use": ([s.step for s in steps], [s.slices for s in steps]),
        "trainable parameters": ([s.step for s in steps], [s.trainable for s in steps]),
    }
    if measured:
        curves["mean ‖F Fᵀ − I‖ of the frames"] = ([s for s, _ in measured], [e for _, e in measured])
    figure = Figure(figsize=(7.2, 0.8 + 1.7 * len(curves)), dpi=100, layout="constrained")
    panels = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, (at, values)), colour in zip(panels, curves.items(), COLOURS, strict=False):
        style = "default" if "‖" in label else "steps-post"  # counts jump at a step; the error is measured at some
        axes.plot(at, values, color=colour, linewidth=1.6, drawstyle=style)
        axes.set_ylabel(label, fontsize=8)
        axes.set_ylim(0, 1.08 * max(1e-12, *values))
        axes.ticklabel_format(axis="y", style="plain")
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("optimizer step")
    figure.suptitle(f"Slices{', parameters and orthogonality' if measured else ' and parameters'} during training")
    return figure
