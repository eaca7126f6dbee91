"""From rows of results to a table, `report.md`, `report.html` and three plots."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lorafamily.insight.drawing import save
from lorafamily.terminal import aligned
from pages import page
from pages.groups import Group, Row, grouped, size_of
from pages.page import Heading, Part, Picture, Table, Text
from pages.plots import allocation, quality_by_size, quality_by_step


def steps_to_reach(groups: Sequence[Group], group: Group) -> str:
    """Steps until the validation loss is as low as plain LoRA's of the same budget at its end, mean over seeds.

    Each seed is compared with the same seed, the loss is interpolated between evaluations, and methods without a budget
    are compared with the largest LoRA.
    """
    lora = {
        (g.size, g.targets, row["seed"]): row["validation_loss"] for g in groups if g.method == "lora" for row in g.runs
    }
    size, targets = group.size, group.targets
    if size is None:  # full fine-tuning: compared with the largest
        largest = max((g for g in groups if g.method == "lora"), key=lambda g: g.mean("trainable") or 0, default=None)
        size, targets = (largest.size, largest.targets) if largest else (None, None)
    goals = [lora.get((size, targets, row["seed"])) for row in group.runs]
    if not goals or any(g is None or len(r["loss_curve"]) < 2 for g, r in zip(goals, group.runs, strict=True)):
        return "–"
    reached = [first_crossing(row["loss_curve"], goal) for goal, row in zip(goals, group.runs, strict=True)]
    there = [step for step in reached if step is not None]
    if not there:
        return "not reached"
    note = "" if len(there) == len(reached) else f" ({len(there)} of {len(reached)} seeds)"
    return f"{statistics.fmean(there):.0f}{note}"


def first_crossing(curve: Sequence[tuple[int, float]], goal: Any) -> float | None:
    """The step at which a curve of (step, loss) first reaches the goal, interpolated; None if it never does."""
    for (step, loss), (next_step, next_loss) in pairwise(curve):
        if next_loss <= goal:
            share = 1.0 if loss == next_loss else min(1.0, max(0.0, (loss - goal) / (loss - next_loss)))
            return step + share * (next_step - step)
    return None


def table(groups: Sequence[Group], metric: str, marks: Mapping[str, str] | None = None) -> list[list[str]]:
    """The comparison as text, the header first. `marks`: the paper's name for methods that a paper proposed."""
    several = len({g.targets for g in groups if g.targets is not None}) > 1
    lines = [
        [
            "method",
            *(["published as"] if marks else []),
            *(["targets"] if several else []),
            "size",
            "trainable",
            "slices start → end",
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
        start, end = _ranks(group, "ranks_start"), _ranks(group, "ranks_end")
        failed = len(group.rows) - len(group.runs)
        quality = "–" if metric_mean is None else f"{metric_mean:.4f}"
        quality += "" if metric_deviation is None else f" ± {metric_deviation:.4f}"
        lines.append(
            [
                group.method,
                *([marks.get(group.method, "no paper we know")] if marks else []),
                *([group.targets or "–"] if several else []),
                group.size or "–",
                or_dash(group.mean("trainable"), "{:,.0f}".format),
                "–" if start is None or end is None else f"{start:g} → {end:g}",
                or_dash(group.mean("train_loss"), "{:.3f}".format),
                quality + (f" ({failed} of {len(group.rows)} seeds failed)" if failed else ""),
                steps_to_reach(groups, group),
                or_dash(group.mean("seconds_per_step"), "{:.3f}".format),
                or_dash(group.mean("peak_mib"), "{:.0f}".format),
                or_dash(group.mean("file_bytes"), lambda size: f"{size / 1024:.0f}"),
                or_dash(_largest(group, "merge_difference"), lambda value: f"{value:.0e}" if value else "0"),
            ]
        )
    return lines


def crossed(groups: Sequence[Group]) -> list[list[str]]:
    """Quality by targets and size for one method, as in LoRA's Tables 5 and 6; empty unless there are several
    targets."""
    adapted = [g for g in groups if g.targets is not None]
    sizes, targets = dict.fromkeys(g.size for g in adapted), dict.fromkeys(g.targets for g in adapted)
    if len({g.method for g in adapted}) != 1 or len(targets) < 2:
        return []
    found = {(g.targets, g.size): g.mean("metric") for g in adapted}
    head = ["targets", *(str(size) for size in sizes)]
    return [head, *([str(t), *(or_dash(found.get((t, size)), "{:.4f}".format) for size in sizes)] for t in targets)]


def tuning(tried: Sequence[Row]) -> list[list[str]]:
    """The metric at every learning rate that was tried, for every row of the table; empty if none was tried."""
    rates = sorted({row["lr"] for row in tried})
    lines: dict[tuple[str, ...], dict[float, Row]] = defaultdict(dict)
    for row in tried:
        lines[row["method"], size_of(row) or "–", row.get("targets") or "–"][row["lr"]] = row
    if not lines:
        return []

    def cell(row: Row | None) -> str:
        return "" if row is None else "failed" if row["failed"] else f"{row['metric']:.4f}"

    head = ["method", "size", "targets", *map("{:g}".format, rates)]
    return [head, *([*line, *(cell(by_rate.get(lr)) for lr in rates)] for line, by_rate in lines.items())]


def as_text(lines: Sequence[Sequence[str]]) -> str:
    """The lines in aligned columns, for a terminal."""
    head, *rest = aligned(lines)
    return "\n".join([head, "─" * len(head), *rest])


def write(
    folder: Path,
    rows: Sequence[Row],
    *,
    metric: str,
    higher_is_better: bool,
    about: str,
    facts: Mapping[str, str],
    tried: Sequence[Row] = (),
    marks: Mapping[str, str] | None = None,
) -> str:
    """Write `report.md`, `report.html` and the plots into `folder`; returns the table as text for the terminal.

    `tried`: rows that only served to choose learning rates.
    """
    groups = grouped(rows, higher_is_better)
    lines, cross, rates = table(groups, metric, marks), crossed(groups), tuning(tried)
    about_tuning: list[Part] = [Heading("Learning rates"), Text(TRIED), Table(rates)] if rates else []
    figures = {"quality by step": quality_by_step(groups, metric), "quality by size": quality_by_size(groups, metric)}
    if any(group.runs and group.runs[0]["ranks_end"] for group in groups):
        figures["allocation"] = allocation(groups)
    pictures = {name: folder / f"{name.replace(' ', '-')}.png" for name in figures}
    for name, figure in figures.items():
        save(figure, pictures[name])
    better, seeds = "higher" if higher_is_better else "lower", len({row["seed"] for row in rows})
    over = f"mean ± standard deviation over {seeds} seeds"
    parts: list[Part] = [
        Text(about),
        Text(
            f"Metric: {metric}, {better} is better; {'one seed' if seeds == 1 else over}. "
            f"{_about_rates(rows, groups, tried)}"
        ),
        Table(lines),
        *([Table(cross)] if cross else []),
        Text(EXPLAINED + (CUT if any("train_times" in row["method"] for row in rows) else "")),
        *(Picture(name, path) for name, path in pictures.items()),
        *about_tuning,
        Heading("Settings"),
        Table([["setting", "value"], *([key, value] for key, value in facts.items())]),
    ]
    (folder / "report.md").write_text(page.markdown(folder.name, parts, folder))
    (folder / "report.html").write_text(page.html(folder.name, parts), encoding="utf-8")
    return as_text(lines)


EXPLAINED = (
    "Trainable: adapter parameters at the start, without task heads. Slices: of all modules together; LoRA² counts its "
    "singular values, and the rank of its ΔW is at most k in a module. Train loss: mean of the last 10 steps. Steps to "
    "LoRA's loss: until the validation loss is as low as that of plain LoRA of the same size at its end (full: of the "
    "largest LoRA). Peak MiB: of tensors on a GPU, of the whole process otherwise. Merged − unmerged: largest "
    "difference in the logits."
)
CUT = (
    " A row with train_times=N trains at N times its size and is cut to it at the end: curves, train loss and steps to "
    "LoRA's loss are from before the cut, everything else from after it."
)
TRIED = "The metric of the single run that tried each rate, with a seed that is used for nothing else."


def _about_rates(rows: Sequence[Row], groups: Sequence[Group], given: Sequence[Row]) -> str:
    """A sentence on how many learning rates were tried and which are shown."""
    if given:
        rates = ", ".join(f"{lr:g}" for lr in sorted({row["lr"] for row in given}))
        seeds = ", ".join(map(str, sorted({row["seed"] for row in given})))
        return f"Every row was tried at {rates} with seed {seeds} and is shown at its best rate, with other seeds."
    tried: dict[str, set[float]] = defaultdict(set)
    for row in rows:
        if row["train_loss"] is not None:
            tried[row["method"]].add(row["lr"])
    number = max((len(rates) for rates in tried.values()), default=1)
    every = set().union(*tried.values())
    if number == 1 and len(every) <= 1:
        return f"One learning rate, {min(every, default=math.nan):g}, was used for every method; none was tuned here."
    if number == 1:
        each = ", ".join(f"{method} {min(rates):g}" for method, rates in tried.items())
        return f"Each method was run at one learning rate: {each}."
    best = ", ".join(f"{g.name} {g.lr:g}" for g in groups if g.rows[0]["train_loss"] is not None)
    return (
        f"{number} learning rates were tried for every method ({', '.join(f'{lr:g}' for lr in sorted(every))}); "
        f"each is shown at the one with the best validation mean: {best}."
    )


def _ranks(group: Group, key: str) -> float | None:
    totals = [sum(row[key].values()) for row in group.runs if row[key]]
    return statistics.fmean(totals) if totals else None


def _largest(group: Group, key: str) -> float | None:
    return max((row[key] for row in group.runs if row[key] is not None), default=None)


def or_dash(value: float | None, form: Callable[[float], str]) -> str:
    """The value as text, a dash if there is none."""
    return "–" if value is None else form(value)
