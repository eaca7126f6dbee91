"""The papers' claims as statements with a test, and the verdicts of a comparison's runs.

A statement compares two arms, seed by seed. Its verdict holds for the setting that was run, and for no other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pages.report import first_crossing
from studies.intervals import above, holm, paired

Row = Mapping[str, Any]
Size = Literal["small", "large"]
Verdict = Literal["holds", "does not hold", "undecided", "void"]
LEVEL = 0.05
"""Significance level for all statements of a setting together, by Holm's method."""
SEEDS = 5
"""The smallest number of seeds for a verdict."""
EVALUATIONS = 15
"""The smallest number of evaluations in a run for a verdict about steps."""


@dataclass(frozen=True)
class Arm:
    """One method at one size; the size is None if there is no adapter."""

    method: str
    size: Size | None = "large"

    def __str__(self) -> str:
        return self.method if self.size is None else f"{self.method} ({self.size})"


@dataclass(frozen=True)
class Statement:
    """`claim` of `source`: `arm` is better than `other`, or no worse.

    `relation`: "better" asks for a difference above zero, "no worse" for one above −margin, the margin of the setting's
    metric. `measure`: the final metric, or the optimizer steps to the validation loss that both arms of a seed reach.
    `budget_at`: when the paper's budget must hold. Runs that held it at another time cannot judge the claim.
    """

    name: str
    claim: str
    source: str
    arm: Arm
    other: Arm
    relation: Literal["better", "no worse"] = "better"
    measure: Literal["metric", "steps"] = "metric"
    budget_at: Literal["peak", "end"] = "peak"


@dataclass(frozen=True)
class Setting:
    """One comparison's rows. `margin`: the largest difference in the metric that does not matter, fixed before any run;
    `chance`: the metric without learning, of the best constant answer or of the unadapted model; `budget_at`: when the
    budget held in these runs."""

    name: str
    what: str
    metric: str
    higher_is_better: bool
    margin: float
    chance: float
    rows: Sequence[Row]
    budget_at: Literal["peak", "end"] = "peak"

    @property
    def runs(self) -> list[Row]:
        """The rows that are judged, without those of the tuning seeds."""
        return [row for row in self.rows if row["seed"] not in self.tuning_seeds]

    @property
    def tuned(self) -> list[Row]:
        """The rows that chose the learning rates."""
        return [row for row in self.rows if row["seed"] in self.tuning_seeds]

    @property
    def tuning_seeds(self) -> set[int]:
        """Seeds at which a configuration was run with several rates."""
        seen: dict[tuple[Any, ...], set[float]] = {}
        for row in self.rows:
            seen.setdefault((row["method"], row["budget"], row["seed"]), set()).add(row["lr"])
        return {seed for (_, _, seed), rates in seen.items() if len(rates) > 1}

    def of(self, arm: Arm) -> dict[int, Row]:
        """The arm's rows by seed."""
        return {row["seed"]: row for row in self._rows(self.runs, arm) if not row["failed"]}

    def diverged(self, arm: Arm) -> bool:
        """Whether one of the arm's judged runs diverged."""
        return any(row["failed"] for row in self._rows(self.runs, arm))

    def at_an_edge(self, arm: Arm) -> bool:
        """Whether the arm was judged at the lowest or the highest rate that it was tried at."""
        rates = {row["lr"] for row in self._rows(self.tuned, arm)}
        return bool(rates) and any(row["lr"] in (min(rates), max(rates)) for row in self.of(arm).values())

    def _rows(self, rows: Sequence[Row], arm: Arm) -> list[Row]:
        """Those of the rows that are the arm's."""
        budgets = sorted({row["budget"] for row in self.rows if row["budget"] is not None})
        budget = {"small": budgets[0], "large": budgets[-1], None: None}[arm.size]
        return [row for row in rows if row["method"] == arm.method and row["budget"] == budget]


@dataclass(frozen=True)
class Outcome:
    """The verdict of a setting on a statement.

    `difference`: mean over seeds, positive where the arm is better, in the metric's unit or as a share of the run's
    steps. `low`, `high`: its 95 % interval, Student's t. `effect`: Hedges' g of the paired differences, nan where they
    do not vary. `p`: two-sided, paired t-test against zero or −margin; `adjusted`: by Holm. `learnt`: whether the other
    arm is above chance; if it is not, being no worse proves nothing. `void`: why the runs cannot judge the claim; empty
    if they can.
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
    void: str = ""
    adjusted: float = math.nan

    @property
    def verdict(self) -> Verdict:
        if self.void:
            return "void"
        if not self.learnt or not self.adjusted < LEVEL:
            return "undecided"
        return "holds" if self.difference > self.bound else "does not hold"


STATEMENTS = (
    Statement(
        "LoRA² reaches LoRA with 8 times more",
        "0.17M trainable parameters come to about what baselines with eight times more reach",
        "LoRA², arXiv:2408.06854",
        Arm("lora2", "small"),
        Arm("lora"),
        relation="no worse",
    ),
    Statement(
        "LoRA² reaches AdaLoRA with 8 times more",
        "0.17M trainable parameters come to about what baselines with eight times more reach",
        "LoRA², arXiv:2408.06854",
        Arm("lora2", "small"),
        Arm("adalora"),
        relation="no worse",
        budget_at="end",
    ),
    Statement(
        "LoRA² beats LoRA of its own size",
        "what the paper does not test: plain LoRA of rank 1, with the same number of trainable parameters",
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
        "ALoRA, first-order scores, beats LoRA",
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
        budget_at="end",
    ),
    Statement(
        "LoRA is on par with full fine-tuning",
        "performs on par or better than full fine-tuning",
        "LoRA, arXiv:2106.09685, Tables 2 to 4",
        Arm("lora"),
        Arm("full", None),
        relation="no worse",
    ),
    Statement(
        "Rank 1 suffices",
        "a very small rank already suffices",
        "LoRA, arXiv:2106.09685, Table 6",
        Arm("lora", "small"),
        Arm("lora"),
        relation="no worse",
    ),
)


def outcomes(settings: Sequence[Setting], statements: Sequence[Statement] = STATEMENTS) -> list[Outcome]:
    """Every statement in every setting, p-values adjusted over those statements of a setting that are not void.

    Raises:
        ValueError: fewer than five seeds that both arms ran.
    """
    found = []
    for setting in settings:
        judged = [judge(statement, setting) for statement in statements]
        valid = [outcome for outcome in judged if not outcome.void]
        adjusted = dict(zip(map(id, valid), holm([outcome.p for outcome in valid]), strict=True))
        found += [replace(outcome, adjusted=adjusted.get(id(outcome), math.nan)) for outcome in judged]
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
    differences = [_difference(statement, setting, arm[seed], other[seed]) for seed in seeds]
    bound = -setting.margin if statement.relation == "no worse" else 0.0
    found = paired(differences, bound)
    learnt = _above_chance(setting, [other[seed]["metric"] for seed in seeds])
    evaluations = min(len(row["loss_curve"]) - 1 for row in (*arm.values(), *other.values()))
    return Outcome(
        statement,
        setting,
        tuple(differences),
        bound,
        found.mean,
        found.low,
        found.high,
        found.effect,
        found.p,
        learnt,
        _void(statement, setting, evaluations),
    )


def _void(statement: Statement, setting: Setting, evaluations: int) -> str:
    """Why the runs cannot judge a claim; empty if they can."""
    if diverged := [str(arm) for arm in (statement.arm, statement.other) if setting.diverged(arm)]:
        return f"a run diverged, and the others would be judged alone: {', '.join(diverged)}"
    if edges := [str(arm) for arm in (statement.arm, statement.other) if setting.at_an_edge(arm)]:
        return f"best at an edge of the rates: {', '.join(edges)}"
    if statement.budget_at != setting.budget_at:
        return f"the paper's budget is that of the {statement.budget_at}, the runs' that of the {setting.budget_at}"
    if statement.measure == "steps" and evaluations < EVALUATIONS:
        return f"{evaluations} evaluations a run, {EVALUATIONS} are the fewest to read steps from"
    return ""


def _above_chance(setting: Setting, metrics: Sequence[float]) -> bool:
    """One-sided t-test of the metric against chance; a metric that does not vary is just compared."""
    sign = 1 if setting.higher_is_better else -1
    return above([sign * (value - setting.chance) for value in metrics], 0.0) < LEVEL


def _difference(statement: Statement, setting: Setting, arm: Row, other: Row) -> float:
    """Positive where the arm is better."""
    if statement.measure == "steps":
        goal = max(arm["validation_loss"], other["validation_loss"])  # both reach it
        steps, steps_of_other = (first_crossing(row["loss_curve"], goal) for row in (arm, other))
        assert steps is not None
        assert steps_of_other is not None
        return (steps_of_other - steps) / arm["loss_curve"][-1][0]
    value = float(arm["metric"] - other["metric"])
    return value if setting.higher_is_better else -value
