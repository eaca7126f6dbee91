"""The pictures of a run, drawn from its decisions and steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from lorafamily.history import Decision, Step
from lorafamily.insight.curves import course, rank_history, score_histograms
from lorafamily.insight.drawing import save
from lorafamily.insight.heatmaps import expert_heatmap, rank_heatmap


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
