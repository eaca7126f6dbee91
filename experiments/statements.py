"""What the papers claim, as statements with a test, and what the runs of a comparison say of them.

A statement compares two arms, seed by seed. Its verdict is about the setting that was run, nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import scipy.stats

from report import first_crossing

Row = Mapping[str, Any]
Size = Literal["small", "large"]
Verdict = Literal["holds", "does not hold", "undecided"]
LEVEL = 0.05
"""Of the family of all statements in a setting, by Holm's method."""
SEEDS = 5
"""The fewest that anything is said of."""


@dataclass(frozen=True)
class Arm:
    """One method at one size; None where there is no adapter."""

    method: str
    size: Size | None = "large"

    def __str__(self) -> str:
        return self.method if self.size is None else f"{self.method} ({self.size})"


@dataclass(frozen=True)
class Statement:
    """`claim` of `source`, said of `arm` against `other`.

    "better": the difference is above zero. "no worse": it is above −margin, the margin of the setting's metric.
    `measure`: the final metric, or the optimiser steps to the validation loss that both arms of a seed reach.
    """

    name: str
    claim: str
    source: str
    arm: Arm
    other: Arm
    kind: Literal["better", "no worse"] = "better"
    measure: Literal["metric", "steps"] = "metric"


@dataclass(frozen=True)
class Setting:
    """One comparison's rows. `margin`: the difference in the metric that nobody would mind, fixed before any run;
    `chance`: the metric of whoever learns nothing, the best constant answer or the model as it was."""

    name: str
    what: str
    metric: str
    higher_is_better: bool
    margin: float
    chance: float
    rows: Sequence[Row]

    @property
    def runs(self) -> list[Row]:
        """The rows that are judged; those of a seed that only chose rates are left out."""
        return [row for row in self.rows if row["seed"] not in self.tuning_seeds]

    @property
    def tuned(self) -> list[Row]:
        """The rows that only chose rates."""
        return [row for row in self.rows if row["seed"] in self.tuning_seeds]

    @property
    def tuning_seeds(self) -> set[int]:
        """Those at which a configuration was run with several rates."""
        seen: dict[tuple[Any, ...], set[float]] = {}
        for row in self.rows:
            seen.setdefault((row["method"], row["budget"], row["seed"]), set()).add(row["lr"])
        return {seed for (_, _, seed), rates in seen.items() if len(rates) > 1}

    def of(self, arm: Arm) -> dict[int, Row]:
        """The arm's rows by seed."""
        budgets = sorted({row["budget"] for row in self.rows if row["budget"] is not None})
        wanted = {"small": budgets[0], "large": budgets[-1], None: None}[arm.size]
        own = [row for row in self.runs if row["method"] == arm.method and row["budget"] == wanted]
        return {row["seed"]: row for row in own if not row["failed"]}


@dataclass(frozen=True)
class Outcome:
    """What a setting says of a statement.

    `difference`: mean over seeds, positive where the arm is better, in the metric's unit or as a share of the run's
    steps. `low`, `high`: its 95 % bootstrap interval. `effect`: Hedges' g of the paired differences, nan where they do
    not vary. `p`: two-sided, paired t-test against zero or −margin; `adjusted`: by Holm.
    `learnt`: whether the other arm is above chance at all; where it is not, whoever learns nothing equals it.
    """

    statement: Statement
    setting: Setting
    differences: tuple[float, ...]
    bound: float
    difference: float
    low: float
    high: float
    effect: float
    p: float
    learnt: bool
    adjusted: float = math.nan

    @property
    def verdict(self) -> Verdict:
        if not self.learnt or not self.adjusted < LEVEL:
            return "undecided"
        return "holds" if self.difference > self.bound else "does not hold"


STATEMENTS = (
    Statement(
        "LoRA² reaches LoRA with 8 times more",
        "0.17M trainable numbers come to about what baselines with eight times more reach",
        "LoRA², arXiv:2408.06854",
        Arm("lora2", "small"),
        Arm("lora"),
        kind="no worse",
    ),
    Statement(
        "LoRA² reaches AdaLoRA with 8 times more",
        "0.17M trainable numbers come to about what baselines with eight times more reach",
        "LoRA², arXiv:2408.06854",
        Arm("lora2", "small"),
        Arm("adalora"),
        kind="no worse",
    ),
    Statement(
        "LoRA² beats LoRA of its own size",
        "what the paper does not test: plain LoRA of rank 1, with the same number of trainable numbers",
        "the control",
        Arm("lora2", "small"),
        Arm("lora", "small"),
    ),
    Statement(
        "OLoRA converges faster than LoRA",
        "an orthonormal start converges faster at equal parameters",
        "OLoRA, arXiv:2406.01775",
        Arm("olora"),
        Arm("lora"),
        measure="steps",
    ),
    Statement(
        "OLoRA beats LoRA",
        "and ends better",
        "OLoRA, arXiv:2406.01775",
        Arm("olora"),
        Arm("lora"),
    ),
    Statement(
        "ALoRA beats LoRA",
        "moving ranks to where they are worth most beats equal ranks at one budget",
        "ALoRA, arXiv:2403.16187",
        Arm("alora"),
        Arm("lora"),
    ),
    Statement(
        "AdaLoRA beats LoRA",
        "pruning by importance beats equal ranks at one budget",
        "AdaLoRA, arXiv:2303.10512, Table 1",
        Arm("adalora"),
        Arm("lora"),
    ),
    Statement(
        "LoRA is on par with full fine-tuning",
        "performs on par or better than full fine-tuning",
        "LoRA, arXiv:2106.09685, Tables 2 to 4",
        Arm("lora"),
        Arm("full", None),
        kind="no worse",
    ),
    Statement(
        "Rank 1 suffices",
        "a very small rank already suffices",
        "LoRA, arXiv:2106.09685, Table 6",
        Arm("lora", "small"),
        Arm("lora"),
        kind="no worse",
    ),
)


def outcomes(settings: Sequence[Setting], statements: Sequence[Statement] = STATEMENTS) -> list[Outcome]:
    """Every statement in every setting, p-values adjusted over the statements of a setting.

    Raises:
        ValueError: fewer than five seeds that both arms ran.
    """
    found = []
    for setting in settings:
        own = [judge(statement, setting) for statement in statements]
        adjusted = holm([outcome.p for outcome in own])
        found += [replace(outcome, adjusted=p) for outcome, p in zip(own, adjusted, strict=True)]
    return sorted(found, key=lambda outcome: statements.index(outcome.statement))


def judge(statement: Statement, setting: Setting) -> Outcome:
    """One statement in one setting, not yet adjusted.

    Raises:
        ValueError: fewer than five seeds that both arms ran.
    """
    arm, other = setting.of(statement.arm), setting.of(statement.other)
    seeds = sorted(arm.keys() & other.keys())
    if len(seeds) < SEEDS:
        raise ValueError(
            f"{setting.name}: {statement.arm} and {statement.other} share {len(seeds)} seeds, {SEEDS} are the fewest"
        )
    differences = np.array([_difference(statement, setting, arm[seed], other[seed]) for seed in seeds])
    bound = -setting.margin if statement.kind == "no worse" else 0.0
    mean, deviation = float(differences.mean()), float(differences.std(ddof=1))
    if deviation == 0.0:  # a t-test has nothing to divide by; equal to the bound says nothing, all beyond it everything
        low = high = mean
        p = 1.0 if mean == bound else 0.0
    else:
        p = float(scipy.stats.ttest_1samp(differences, bound).pvalue)
        drawn = scipy.stats.bootstrap(
            (differences,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0)
        )
        low, high = (float(end) for end in drawn.confidence_interval)
    n = len(seeds)
    corrected = 1 - 3 / (4 * (n - 1) - 1)  # Hedges' correction of Cohen's d for few samples
    effect = (mean - bound) / deviation * corrected if deviation else math.nan
    learnt = _above_chance(setting, [other[seed]["metric"] for seed in seeds])
    return Outcome(statement, setting, tuple(differences.tolist()), bound, mean, low, high, effect, p, learnt)


def _above_chance(setting: Setting, metrics: Sequence[float]) -> bool:
    """One-sided t-test of the metric against chance; where it does not vary, whether it is better."""
    above = (np.array(metrics) - setting.chance) * (1 if setting.higher_is_better else -1)
    if above.std() == 0.0:
        return bool(above.mean() > 0)
    return bool(scipy.stats.ttest_1samp(above, 0.0, alternative="greater").pvalue < LEVEL)


def _difference(statement: Statement, setting: Setting, arm: Row, other: Row) -> float:
    """Positive where the arm is better."""
    if statement.measure == "steps":
        goal = max(arm["validation_loss"], other["validation_loss"])  # both reach it
        own, others = (first_crossing(row["loss_curve"], goal) for row in (arm, other))
        assert own is not None
        assert others is not None
        return (others - own) / arm["loss_curve"][-1][0]
    value = float(arm["metric"] - other["metric"])
    return value if setting.higher_is_better else -value


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted so that the chance of any false rejection among them is bounded (Holm 1979)."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, worst = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = worst
    return adjusted
