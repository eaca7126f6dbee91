"""The length of a run, and its learning rate at every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sized
from numbers import Integral, Real
from typing import Any, Literal, get_args

from torch.optim.lr_scheduler import LRScheduler

from lorafamily.errors import DataError, TrainingError

Named = Literal["linear", "cosine", "constant"]
Schedule = Named | Callable[[int], float] | LRScheduler
"""A name, a function from the step (from 1) to the share of the peak rate, or an LRScheduler of the given optimizer."""


def total_steps(data: Iterable[Any], steps: int | None, epochs: float | None, accumulate: int) -> int:
    """Optimizer steps of a run.

    Raises:
        DataError: a value that makes no sense, or epochs of data without a length.
    """
    if isinstance(accumulate, bool) or not isinstance(accumulate, Integral) or accumulate < 1:
        raise DataError(f"accumulate={accumulate!r}: must be a whole number of batches, at least 1")
    if (steps is None) == (epochs is None):
        raise DataError(f"steps={steps!r}, epochs={epochs!r}: give one of them")
    if steps is None:
        assert epochs is not None
        if not isinstance(data, Sized):
            raise DataError(f"epochs={epochs} needs data with a length; a {type(data).__name__} has none: give steps")
        steps = math.ceil(len(data) * epochs / accumulate)
        if steps < 1:
            raise DataError(f"{len(data)} batches and epochs={epochs!r} make no step; is the data empty?")
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
        raise DataError(f"steps={steps!r}: must be a whole number of optimizer steps, at least 1")
    return int(steps)


def warmup_steps(warmup: float, total: int) -> float:
    """The steps in which the rate rises: a whole number is steps, a fraction is of the run's `total`.

    Raises:
        TrainingError: it is neither.
    """
    if isinstance(warmup, Integral) and not isinstance(warmup, bool) and 0 <= warmup <= total:
        return float(warmup)
    if isinstance(warmup, Real) and not isinstance(warmup, (bool, Integral)) and 0 <= warmup < 1:
        return float(warmup) * total
    raise TrainingError(
        f"warmup={warmup!r}: must be a whole number of optimizer steps, no more than the run's {total}, or a fraction "
        "of the run in [0, 1)"
    )


def lr_factor(step: int, total: int, rising: float, schedule: Schedule) -> float:
    """The share of the peak learning rate at step `step` (from 1) of `total`, of which the first `rising` are warm-up.

    Raises:
        TrainingError: an unknown schedule.
    """
    if not callable(schedule) and schedule not in get_args(Named):  # checked during the warm-up, too
        raise TrainingError(
            f'schedule={schedule!r}: must be "linear", "cosine", "constant", a function of the step, or an LRScheduler'
        )
    done = step - 1
    if done < rising:
        return (done + 1) / (rising + 1)
    if callable(schedule):
        return float(schedule(step))
    if schedule == "constant":
        return 1.0
    left = (total - done) / max(1.0, total - rising)
    return left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))
