"""How arms are tuned and judged: the same way for all, with nothing chosen on what is judged.

Rates are quarter decades. Every tuned arm begins with three around its start, and goes on outwards until the best lies
inside what was tried; an arm whose best is still at an edge at the limit is void, and judged nowhere. The best is the
lowest mean over the tuning seeds of the metric on the tuning split; arms are judged at it with other seeds, on the
other split.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from studies.arms import Arm
from studies.problem import Problem
from studies.trials import Trial, with_pattern

Row = Mapping[str, Any]
LOWEST, HIGHEST = -20, 0
"""Quarters beyond which no rate is tried: 1e-5 and 1."""


def tuned(arms: Iterable[Arm]) -> list[Arm]:
    """Arms with a rate of their own."""
    return [arm for arm in arms if arm.rates_of is None]


def qualities(arm: Arm, rows: Iterable[Row], seeds: Sequence[int]) -> dict[int, float]:
    """By quarter the mean metric on the tuning split; infinite where a seed's run diverged, absent where one is still
    to be run."""
    found: dict[int, dict[int, float]] = {}
    for row in rows:
        if row["arm"] == arm.name and row["seed"] in seeds:
            value = float("inf") if row["failed"] else row["tuning_metric"]
            found.setdefault(row["quarter"], {})[row["seed"]] = value
    return {quarter: statistics.fmean(own.values()) for quarter, own in found.items() if len(own) == len(seeds)}


def _best(tried: Mapping[int, float]) -> int:
    """The quarter with the lowest metric; of equal ones the lowest, in whatever order they were run or stored."""
    return min(tried, key=lambda quarter: (tried[quarter], quarter))


def to_try(start: int, tried: Mapping[int, float]) -> list[int]:
    """Quarters that must be tried next, beginning around `start`; empty where the best is inside, or nothing is left to
    try."""
    if missing := [quarter for quarter in (start - 1, start, start + 1) if quarter not in tried]:
        return missing
    best = _best(tried)
    if best == min(tried) and best > LOWEST:
        return [best - 1]
    if best == max(tried) and best < HIGHEST:
        return [best + 1]
    return []


def best_quarter(tried: Mapping[int, float]) -> int | None:
    """The best quarter, None where it lies at an edge: nobody knows what is beyond."""
    best = _best(tried)
    return best if min(tried) < best < max(tried) and tried[best] < float("inf") else None


def tuning_trials(problem: Problem, arms: Sequence[Arm], rows: Sequence[Row]) -> list[Trial]:
    """What must be run next to choose rates; empty once all are chosen or void."""
    found = []
    for arm in tuned(arms):
        for quarter in to_try(round(4 * arm.start), qualities(arm, rows, problem.tuning_seeds)):
            found += [Trial(problem.name, arm, quarter, seed) for seed in problem.tuning_seeds]
    return _missing(found, rows)


def rates(problem: Problem, arms: Sequence[Arm], rows: Sequence[Row]) -> dict[str, int]:
    """By arm's name the quarter at which it is judged; void arms, and those that take a void one's rate, have none."""
    found: dict[str, int] = {}
    for arm in tuned(arms):
        tried = qualities(arm, rows, problem.tuning_seeds)
        if tried and not to_try(round(4 * arm.start), tried) and (best := best_quarter(tried)) is not None:
            found[arm.name] = best
    for arm in arms:
        if arm.rates_of is not None and arm.rates_of in found:
            found[arm.name] = found[arm.rates_of]
    return found


def judging_trials(problem: Problem, arms: Sequence[Arm], rows: Sequence[Row]) -> list[Trial]:
    """What must be run next to judge: arms on their own, then those that need a pattern which these found. Seed by
    seed, so that a study that is stopped has whole seeds."""
    chosen = rates(problem, arms, rows)
    judged = [row for row in rows if row["quarter"] == chosen.get(row["arm"]) and not row["failed"]]
    ended = {(row["arm"], row["seed"]): row["ranks_end"] for row in judged}
    found = []
    for seed in problem.seeds:
        for arm in arms:
            if arm.name not in chosen:
                continue
            trial = Trial(problem.name, arm, chosen[arm.name], seed)
            if arm.pattern is None:
                found.append(trial)
            elif (arm.pattern, seed) in ended:
                found.append(with_pattern(trial, ended[arm.pattern, seed]))
    return _missing(found, rows)


def _missing(trials: Sequence[Trial], rows: Sequence[Row]) -> list[Trial]:
    done = {row["key"] for row in rows}
    return [trial for trial in trials if trial.key not in done]
