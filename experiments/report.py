"""From rows of results to what people look at: a table, `report.md` and three plots."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cell import FULL, NONE
from lorafamily.insight.figures import draw_grid, rank_grid, save

Row = Mapping[str, Any]
# Okabe and Ito's colours, told apart by colour-blind readers; markers say the same a second time.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"]
MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Group:
    """The seeds of one method at one budget, at the learning rate that did best."""

    method: str
    budget: int | None
    lr: float
    rows: tuple[Row, ...]

    def mean(self, key: str) -> float | None:
        values = [row[key] for row in self.rows if row[key] is not None]
        return statistics.fmean(values) if values else None

    def deviation(self, key: str) -> float | None:
        """Standard deviation over the seeds, None for a single one."""
        values = [row[key] for row in self.rows if row[key] is not None]
        return statistics.stdev(values) if len(values) > 1 else None


def grouped(rows: Iterable[Row], higher_is_better: bool) -> list[Group]:
    """Rows by method and budget, in their order; of several learning rates the one with the best mean metric."""
    cells: dict[tuple[str, int | None], dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row["method"], row["budget"]][row["lr"]].append(row)
    sign = 1 if higher_is_better else -1
    best = []
    for (method, budget), by_lr in cells.items():
        lr = max(by_lr, key=lambda lr: sign * statistics.fmean(row["metric"] for row in by_lr[lr]))
        best.append(Group(method, budget, lr, tuple(by_lr[lr])))
    return best


def steps_to_reach(groups: Sequence[Group], group: Group) -> str:
    """Steps until the validation loss is where plain LoRA of the same budget ends, mean over seeds.

    The same seed is held against the same seed, the loss is interpolated between evaluations, and methods without a
    budget are held against the largest one.
    """
    lora = {(g.budget, row["seed"]): row["validation_loss"] for g in groups if g.method == "lora" for row in g.rows}
    budget = group.budget
    if budget is None:
        budget = max((b for b, _ in lora if b is not None), default=None)
    goals = [lora.get((budget, row["seed"])) for row in group.rows]
    if any(goal is None or len(row["loss_curve"]) < 2 for goal, row in zip(goals, group.rows, strict=True)):
        return "–"
    reached = [_first_crossing(row["loss_curve"], goal) for goal, row in zip(goals, group.rows, strict=True)]
    there = [step for step in reached if step is not None]
    if not there:
        return "not reached"
    note = "" if len(there) == len(reached) else f" ({len(there)} of {len(reached)} seeds)"
    return f"{statistics.fmean(there):.0f}{note}"


def _first_crossing(curve: Sequence[tuple[int, float]], goal: Any) -> float | None:
    for (step, loss), (next_step, next_loss) in pairwise(curve):
        if next_loss <= goal:
            share = 1.0 if loss == next_loss else min(1.0, max(0.0, (loss - goal) / (loss - next_loss)))
            return step + share * (next_step - step)
    return None


def table(groups: Sequence[Group], metric: str) -> list[list[str]]:
    """The comparison as text, the header first."""
    lines = [
        [
            "method",
            "budget",
            "trainable",
            "rank start → end",
            "train loss (nats)",
            metric,
            "steps to LoRA's loss",
            "s/step",
            "peak MiB",
            "file KiB",
            "merged − unmerged",
        ]
    ]
    for group in groups:
        metric_mean, metric_deviation = group.mean("metric"), group.deviation("metric")
        assert metric_mean is not None
        start, end = _ranks(group, "ranks_start"), _ranks(group, "ranks_end")
        lines.append(
            [
                group.method,
                "–" if group.budget is None else f"{group.budget:,}",
                f"{group.mean('trainable'):,.0f}",
                "–" if start is None or end is None else f"{start:g} → {end:g}",
                _or_dash(group.mean("train_loss"), "{:.3f}".format),
                f"{metric_mean:.4f}" + ("" if metric_deviation is None else f" ± {metric_deviation:.4f}"),
                steps_to_reach(groups, group),
                _or_dash(group.mean("seconds_per_step"), "{:.3f}".format),
                _or_dash(group.mean("peak_mib"), "{:.0f}".format),
                _or_dash(group.mean("file_bytes"), lambda size: f"{size / 1024:.0f}"),
                _or_dash(max(r["merge_difference"] or 0 for r in group.rows) or None, "{:.0e}".format),
            ]
        )
    return lines


def as_text(lines: Sequence[Sequence[str]]) -> str:
    """Aligned columns for a terminal."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [
        "  ".join(
            f"{text:<{w}}" if i == 0 else f"{text:>{w}}" for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([padded[0], "─" * len(padded[0]), *padded[1:]])


def as_markdown(lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(lines[0]) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def write(
    folder: Path, rows: Sequence[Row], *, metric: str, higher_is_better: bool, about: str, facts: Mapping[str, str]
) -> str:
    """Write `report.md` and the plots into `folder`; returns the table as text for the terminal."""
    groups = grouped(rows, higher_is_better)
    lines = table(groups, metric)
    save(quality_by_step(groups, metric), folder / "quality-by-step.png")
    save(quality_by_size(groups, metric), folder / "quality-by-size.png")
    pictures = ["quality-by-step", "quality-by-size"]
    if any(row["ranks_end"] for row in rows):
        save(allocation(groups), folder / "allocation.png")
        pictures.append("allocation")
    better = "higher" if higher_is_better else "lower"
    text = [
        f"# {folder.name}",
        about,
        f"Metric: {metric}, {better} is better; mean ± standard deviation over {len({r['seed'] for r in rows})} seeds. "
        f"{_about_rates(rows, groups)}",
        as_markdown(lines),
        "Trainable: adapter numbers at the start, task heads not counted. Rank: slices in all modules; LoRA² counts "
        "its singular values, the rank of its ΔW is at most k a module. Train loss: mean of the last 10 steps. Steps "
        "to LoRA's loss: until the validation loss is where plain LoRA of that budget ends (full: of the largest one). "
        "Peak memory: of tensors on a GPU, of the whole process otherwise. Merged − unmerged: largest difference in "
        "the logits.",
        *(f"![{name.replace('-', ' ')}]({name}.png)" for name in pictures),
        "## Settings",
        as_markdown([["setting", "value"], *([key, value.replace("|", "\\|")] for key, value in facts.items())]),
    ]
    (folder / "report.md").write_text("\n\n".join(text) + "\n")
    return as_text(lines)


def _about_rates(rows: Sequence[Row], groups: Sequence[Group]) -> str:
    """How many learning rates were tried and which are shown."""
    tried: dict[str, set[float]] = defaultdict(set)
    for row in rows:
        if row["train_loss"] is not None:
            tried[row["method"]].add(row["lr"])
    number = max((len(rates) for rates in tried.values()), default=1)
    every = set().union(*tried.values())
    if number == 1 and len(every) <= 1:
        return f"One learning rate, {min(every, default=math.nan):g}, was used for every method; none was tuned here."
    if number == 1:
        own = ", ".join(f"{method} {min(rates):g}" for method, rates in tried.items())
        return f"Each method was run at one learning rate: {own}."
    best = ", ".join(
        f"{g.method}{'' if g.budget is None else f' @ {g.budget:,}'} {g.lr:g}"
        for g in groups
        if g.rows[0]["train_loss"] is not None
    )
    return (
        f"{number} learning rates were tried for every method ({', '.join(f'{lr:g}' for lr in sorted(every))}); "
        f"each is shown at the one with the best validation mean: {best}."
    )


def quality_by_step(groups: Sequence[Group], metric: str) -> Figure:
    """Validation metric against step, a panel a budget; lines are means over seeds, bands one standard deviation."""
    budgets = _budgets(groups)
    figure = Figure(figsize=(1.5 + 4.8 * len(budgets), 4.4), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    for axes, budget in zip(panels, budgets, strict=True):
        shown = [g for g in groups if g.budget == budget or g.method == FULL]
        for group in shown:
            steps = [step for step, _ in group.rows[0]["curve"]]
            values = np.array([[value for _, value in row["curve"]] for row in group.rows])
            mean, deviation = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0 * values[0]
            colour, marker = _look(groups, group.method)
            line = "--" if group.method == FULL else "-"
            axes.plot(steps, mean, line, color=colour, marker=marker, markersize=4, linewidth=1.5, label=group.method)
            axes.fill_between(steps, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
        _no_adaptation_line(axes, groups)
        axes.set_xlabel("optimiser steps")
        axes.set_title(f"budget {budget:,} trainable numbers" if budget else "no budget", fontsize=10)
        axes.grid(alpha=0.3)
        unadapted = [row["metric"] for g in groups if g.method == NONE for row in g.rows]
        _zoom(axes, [*unadapted, *(value for g in shown for row in g.rows for _, value in row["curve"][1:])])
    panels[0].set_ylabel(f"validation {metric}")
    panels[-1].legend(fontsize=8)
    figure.suptitle("Validation quality during training (mean and standard deviation over seeds)", fontsize=11)
    return figure


def quality_by_size(groups: Sequence[Group], metric: str) -> Figure:
    """Final metric against trainable numbers."""
    figure = Figure(figsize=(6.4, 4.4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for method in dict.fromkeys(g.method for g in groups if g.method != NONE):
        own = sorted((g for g in groups if g.method == method), key=lambda g: g.mean("trainable") or 0)
        colour, marker = _look(groups, method)
        axes.errorbar(
            [g.mean("trainable") or math.nan for g in own],
            [g.mean("metric") or math.nan for g in own],
            yerr=[g.deviation("metric") or 0 for g in own],
            color=colour,
            marker=marker,
            capsize=3,
            linewidth=1.2,
            label=method,
        )
    _no_adaptation_line(axes, groups)
    axes.set_xscale("log")
    axes.set_xlabel("trainable numbers (task head not counted)")
    axes.set_ylabel(f"validation {metric}")
    axes.set_title("Quality against size (bars: standard deviation over seeds)", fontsize=11)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    return figure


def allocation(groups: Sequence[Group]) -> Figure:
    """Where the rank ended up: layers × kinds of matrix, a panel a method and budget, mean over seeds; one colour
    scale a budget."""
    budgets = [budget for budget in _budgets(groups) if budget is not None]
    shown = {b: [g for g in groups if g.budget == b and g.rows[0]["ranks_end"]] for b in budgets}
    columns = max(len(own) for own in shown.values())
    kinds, layers, _ = rank_grid(next(iter(shown.values()))[0].rows[0]["ranks_end"])
    size = (1.8 + columns * (0.9 + 0.34 * len(layers)), len(budgets) * (0.9 + 0.3 * len(kinds)))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    panels = figure.subplots(len(budgets), columns, squeeze=False)
    for row, budget in enumerate(budgets):
        grids = [np.mean([rank_grid(r["ranks_end"])[2] for r in g.rows], axis=0) for g in shown[budget]]
        top = max(1.0, *(float(np.nanmax(grid)) for grid in grids))
        for axes in panels[row][len(grids) :]:
            axes.axis("off")
        for column, (group, grid) in enumerate(zip(shown[budget], grids, strict=True)):
            axes = panels[row][column]
            image = draw_grid(axes, kinds if column == 0 else [""] * len(kinds), layers, grid, top)
            axes.set_title(f"{group.method} @ {budget:,}", fontsize=9)
        figure.colorbar(image, ax=list(panels[row]), label="rank", shrink=0.9)
    figure.suptitle("Final rank by layer and matrix (mean over seeds; LoRA² counts its singular values)", fontsize=11)
    return figure


def _budgets(groups: Sequence[Group]) -> list[int | None]:
    found = sorted({g.budget for g in groups if g.budget is not None}, reverse=True)
    return [*found] or [None]


def _look(groups: Sequence[Group], method: str) -> tuple[str, str]:
    methods = list(dict.fromkeys(g.method for g in groups if g.method not in (NONE, FULL)))
    if method not in methods:
        return "#555555", "x"
    index = methods.index(method)
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]


def _no_adaptation_line(axes: Any, groups: Sequence[Group]) -> None:
    for group in groups:
        if group.method == NONE:
            axes.axhline(group.mean("metric"), color="#555555", linestyle=":", linewidth=1.2, label="no adaptation")


def _zoom(axes: Any, values: Sequence[float]) -> None:
    """Show what happens after the first evaluation; with a new task head the start is noise and far away."""
    if values:
        low, high = min(values), max(values)
        margin = 0.08 * (high - low) or 0.01
        axes.set_ylim(low - margin, high + margin)


def _ranks(group: Group, key: str) -> float | None:
    totals = [sum(row[key].values()) for row in group.rows if row[key]]
    return statistics.fmean(totals) if totals else None


def _or_dash(value: float | None, form: Callable[[float], str]) -> str:
    return "–" if value is None else form(value)
