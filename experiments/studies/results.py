"""What the stored rows of a study say about its arms."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from pages.report import first_crossing
from studies import protocol
from studies.arms import ARMS, UNIFORM, Arm
from studies.intervals import Paired, above, equivalence, holm, paired
from studies.problem import Problem
from studies.problems import PROBLEMS
from tasks.task import read_rows

Row = Mapping[str, Any]
LEVEL = 0.05
FEWEST = 5
"""The number of seeds that two arms must share before they are compared."""


@dataclass(frozen=True)
class Comparison:
    """`arm` against `other`. `found`: the differences, positive where the arm is better; `adjusted`: its p after Holm's
    method over all comparisons of a problem; `same`: p of a difference within the margin."""

    arm: str
    other: str
    found: Paired
    adjusted: float
    same: float

    @property
    def verdict(self) -> str:
        if self.adjusted < LEVEL:
            return "better" if self.found.mean > 0 else "worse"
        return "on par" if self.same < LEVEL else "undecided"


@dataclass(frozen=True)
class Study:
    """The stored rows of one problem."""

    problem: Problem
    rows: Sequence[Row]

    @property
    def arms(self) -> tuple[Arm, ...]:
        return ARMS[self.problem.name]

    @cached_property
    def quarters(self) -> dict[str, int]:
        """Chosen rates by arm, see `protocol.rates`."""
        return protocol.rates(self.problem, self.arms, self.rows)

    def of(self, name: str) -> dict[int, Row]:
        """The judged rows of an arm by seed, at its chosen rate, without runs that diverged."""
        return {row["seed"]: row for row in self._judged(name) if not row["failed"]}

    def diverged(self, name: str) -> list[int]:
        """The seeds of an arm's judged runs that diverged at its chosen rate."""
        return sorted(row["seed"] for row in self._judged(name) if row["failed"])

    def lost(self, name: str) -> list[int]:
        """The seeds of an arm's judged runs whose curve ends more than ten margins above its lowest point."""
        curves = {seed: [value for _, value in row["curve"]] for seed, row in self.of(name).items()}
        return sorted(seed for seed, c in curves.items() if c[-1] - min(c) > 10 * self.problem.margin)

    def constant(self, name: str) -> list[int]:
        """The seeds of an arm's judged runs that ended no better than the best constant answer."""
        return sorted(seed for seed, row in self.of(name).items() if row["metric"] >= self.problem.constant - 1e-9)

    def _judged(self, name: str) -> list[Row]:
        chosen = [row for row in self.rows if row["arm"] == name and row["quarter"] == self.quarters.get(name)]
        return [row for row in chosen if row["seed"] in self.problem.seeds]

    def metrics(self, name: str) -> dict[int, float]:
        """By seed. Empty where a run diverged: without the seeds that an arm fails on it would be judged too well."""
        return {} if self.diverged(name) else {seed: row["metric"] for seed, row in self.of(name).items()}

    def shuffles(self, name: str) -> dict[int, float]:
        """By seed the mean metric over the shuffles of an arm's pattern; only seeds for which all shuffles were run."""
        shuffled = [self.metrics(arm.name) for arm in self.arms if arm.pattern == name and arm.shuffle is not None]
        seeds = set.intersection(*map(set, shuffled)) if shuffled else set()
        return {seed: statistics.fmean(metrics[seed] for metrics in shuffled) for seed in sorted(seeds)}

    def comparisons(self) -> list[Comparison]:
        """Every arm that was judged and did not diverge against uniform LoRA; in addition each arm that finds a
        pattern, and plain LoRA trained anew with that pattern, against the pattern shuffled; and arms against their
        controls."""
        metrics = {arm.name: self.metrics(arm.name) for arm in self.arms}
        pairs = [(name, UNIFORM.name, metrics[UNIFORM.name]) for name in metrics if name != UNIFORM.name]
        for arm in self.arms:
            if arm.pattern is not None and arm.shuffle is None:
                other = self.shuffles(arm.pattern)
                pairs += [(name, pattern_shuffled(arm.pattern), other) for name in (arm.pattern, arm.name)]
            if arm.control is not None:
                pairs.append((arm.name, arm.control, metrics[arm.control]))
        found = []
        for name, other_name, other in pairs:
            seeds = sorted(metrics[name].keys() & other.keys())
            if len(seeds) >= FEWEST:
                differences = [other[seed] - metrics[name][seed] for seed in seeds]
                found.append((name, other_name, paired(differences), equivalence(differences, self.problem.margin)))
        adjusted = holm([pair[2].p for pair in found])
        return [Comparison(a, b, got, p, same) for (a, b, got, same), p in zip(found, adjusted, strict=True)]

    def void(self) -> list[str]:
        """Tuned arms whose best rate is the lowest or highest that may be tried."""
        asked = {trial.arm.name for trial in protocol.tuning_trials(self.problem, self.arms, self.rows)}
        return [arm.name for arm in protocol.tuned(self.arms) if arm.name not in {*self.quarters, *asked}]

    def not_run(self) -> list[str]:
        """Arms that are not void, did not diverge, and have too few judged seeds."""
        void, names = set(self.void()), [arm.name for arm in self.arms]
        return [n for n in names if len(self.of(n)) < FEWEST and n not in void and not self.diverged(n)]


def pattern_shuffled(name: str) -> str:
    """What comparisons call the mean over the shuffles of an arm's pattern."""
    return f"{name}'s pattern shuffled"


def read(folder: Path) -> list[Study]:
    """The stored studies, in the problems' order."""
    studies = []
    for name, problem in PROBLEMS.items():
        path = folder / f"{name}.jsonl.gz"
        if path.exists():
            studies.append(Study(problem, read_rows(path)))
    return studies


def area(row: Row) -> float:
    """Mean of the curve over the run, by trapezoids: lower is faster."""
    points = row["curve"]
    whole = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))
    return float(whole / (points[-1][0] - points[0][0]))


def steps_to(row: Row, goal: float) -> float | None:
    """The step at which the curve first reaches the goal, interpolated; None if it never does."""
    return first_crossing(row["curve"], goal)


def mean_of(rows: Mapping[int, Row], value: Callable[[Row], float | None]) -> float | None:
    """The mean over the seeds; None if a seed has no value."""
    values = [v for row in rows.values() if (v := value(row)) is not None]
    return statistics.fmean(values) if values and len(values) == len(rows) else None


def puts_it_there(rows: Mapping[int, Row]) -> tuple[float, float] | None:
    """The mean share of the rank that is in the layers that can help, and p for a share above a half, which equal ranks
    have."""
    shares = [row["planted"] for row in rows.values() if row["planted"] is not None]
    return (statistics.fmean(shares), above(shares, 0.5)) if len(shares) >= FEWEST else None
