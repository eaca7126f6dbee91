"""How long a run is, and its learning rate at every step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sized
from typing import Any, Literal, get_args

from lorafamily.errors import DataError, TrainingError

Schedule = Literal["linear", "cosine", "constant"]


def total_steps(data: Iterable[Any], steps: int | None, epochs: float | None, accumulate: int) -> int:
    """Optimiser steps of a run.

    Raises:
        DataError: numbers that make no sense, or epochs of data that has no length.
    """
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
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
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise DataError(f"steps={steps!r}: must be a whole number of optimiser steps, at least 1")
    return steps


def lr_factor(step: int, total: int, warmup: float, schedule: str) -> float:
    """The share of the peak learning rate that step `step` (from 1) of `total` uses.

    Raises:
        TrainingError: no such schedule.
    """
    if schedule not in get_args(Schedule):  # before the warm-up is over, too
        raise TrainingError(f'schedule={schedule!r}: must be "linear", "cosine" or "constant"')
    done, rising = step - 1, warmup * total
    if done < rising:
        return (done + 1) / (rising + 1)
    if schedule == "constant":
        return 1.0
    left = (total - done) / max(1.0, total - rising)
    if schedule == "linear":
        return left
    return 0.5 * (1 - math.cos(math.pi * left))
