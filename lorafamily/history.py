"""The record of a run: values by step, evaluations, and decisions of the allocation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Decision:
    """One change of ranks. Slices and scores are by module name; `threshold`: the highest score that was dropped."""

    step: int
    before: dict[str, int]
    after: dict[str, int]
    reason: str
    threshold: float | None = None
    scores: dict[str, list[float]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Slices left in all modules."""
        return sum(self.after.values())


@dataclass(frozen=True)
class Step:
    """One optimizer step. `loss`: mean task loss of its batches, without penalty (nats for cross-entropy);
    `gradient`: norm before clipping; `slices`: in use; `trainable`: all parameters that train, a head included;
    `orthogonality`: mean ‖F Fᵀ − I‖_F of the adapters' frames, None without frames or where it was not measured."""

    step: int
    loss: float
    penalty: float
    lr: float
    gradient: float
    slices: int
    trainable: int
    orthogonality: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Validation metrics after `step` optimizer steps; 0 is before training."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Weights:
    """Where the weights after a step are. `metrics`: of the evaluation after that step, if any. `folder`: of the
    checkpoint, inside `log_dir`, such as "checkpoints/step-00000200", for `lorafamily.load(model, log_dir / folder)`;
    None where none was written. `tensors`: if they were asked for, copies on the CPU, named as in a saved adapter's
    file; their shapes have the ranks.
    """

    step: int
    metrics: dict[str, float]
    folder: str | None = None
    tensors: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)


@dataclass
class History:
    """The record that `train` returns.

    `seconds`: time of the training steps, without evaluation and logging. `slices_start`, `slices_end`: by module.
    `stopped`: why the run ended; `skipped`: steps left out because a loss or gradient was not finite. `best`: weights
    of the best evaluation since the allocation settled, None without one; `last`: those at the end, in the model.
    """

    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    slices_start: dict[str, int] = field(default_factory=dict)
    slices_end: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    stopped: str = ""
    skipped: int = 0
    best: Weights | None = None
    last: Weights | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the last evaluation; empty without one."""
        return self.evaluations[-1].metrics if self.evaluations else {}

    def smoothed_loss(self, window: int = 10) -> list[float]:
        """The loss by step as the mean of the last `window` steps."""
        losses = [step.loss for step in self.steps]
        return [sum(w) / len(w) for i in range(len(losses)) if (w := losses[max(0, i + 1 - window) : i + 1])]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without tensors."""
        best, last = (weights and dataclasses.replace(weights, tensors=None) for weights in (self.best, self.last))
        return dataclasses.asdict(dataclasses.replace(self, best=best, last=last))
