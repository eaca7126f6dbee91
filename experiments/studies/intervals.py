"""Statistics of the differences between two arms, seed by seed: intervals, tests, effect sizes, equivalence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit  # Student's t; scipy.stats takes a millisecond a call

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Paired:
    """A summary of paired differences. `low`, `high`: the interval of their mean, Student's t. `effect`: Hedges' g, nan
    where the differences do not vary. `p`: two-sided, for a mean equal to `bound`."""

    n: int
    mean: float
    low: float
    high: float
    effect: float
    p: float


def paired(differences: Sequence[float], bound: float = 0.0, confidence: float = CONFIDENCE) -> Paired:
    """The mean of differences with its t interval, and a t-test against `bound`.

    A t-test cannot judge differences that do not vary. Their interval is their value, and p is 1 if that is the bound;
    otherwise p is the sign test's, the smallest that n pairs can give without an assumption on their spread.

    Raises:
        ValueError: fewer than two.
    """
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    if n < 2:
        raise ValueError(f"{n} differences: an interval needs at least two")
    mean, deviation = float(values.mean()), float(values.std(ddof=1))
    if deviation == 0.0:
        return Paired(n, mean, mean, mean, math.nan, 1.0 if mean == bound else 0.5 ** (n - 1))
    error = deviation / math.sqrt(n)
    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * error
    corrected = 1 - 3 / (4 * (n - 1) - 1)  # Hedges' correction of Cohen's d for few samples
    p = float(2 * stdtr(n - 1, -abs(mean - bound) / error))
    return Paired(n, mean, mean - half, mean + half, (mean - bound) / deviation * corrected, p)


def equivalence(differences: Sequence[float], margin: float) -> float:
    """p of "the mean is within ± margin": two one-sided t-tests, of which the larger p counts (Schuirmann 1987).

    Raises:
        ValueError: the margin is not positive, or there are fewer than two differences.
    """
    if not margin > 0:
        raise ValueError(f"margin={margin!r}: must be positive")
    return max(above(differences, -margin), above([-value for value in differences], -margin))


def above(differences: Sequence[float], bound: float) -> float:
    """p of the mean being above `bound`, one-sided t-test; for values that do not vary, the sign test's.

    Raises:
        ValueError: fewer than two differences.
    """
    found = paired(differences, bound)
    if found.mean > bound:
        return found.p / 2
    return 1.0 if math.isnan(found.effect) else 1 - found.p / 2


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted so that the chance of any false rejection among them is bounded (Holm 1979)."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, worst = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = worst
    return adjusted


def p_text(p: float) -> str:
    """A p-value for a table: one significant digit where it is small."""
    return f"{p:.1g}" if p < 0.095 else f"{p:.2f}"


def effect_text(effect: float) -> str:
    """An effect size for a table."""
    return "–" if math.isnan(effect) else f"{effect:+.1f}"
