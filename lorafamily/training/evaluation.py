"""Evaluation during a run: the metrics, and the loss that ranks are scored by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from lorafamily.batch import LossFn, gather_rows, loss_of, refuse_one_batch, to_device
from lorafamily.errors import DataError, TrainingError
from lorafamily.training.batches import mean_loss
from lorafamily.training.execution import evaluating
from lorafamily.training.processes import Processes
from lorafamily.training.state import seed_all


@dataclass(frozen=True)
class Evaluator:
    """Measures a model: by `evaluate` if there is one, otherwise by the mean loss on `validation`, where `weigh` gives
    batches their weights. `precision` makes the context of a forward."""

    evaluate: Callable[[nn.Module], Mapping[str, float]] | None
    validation: Iterable[Any] | None
    loss_fn: LossFn | None
    weigh: Callable[[Any], float]
    precision: Callable[[], AbstractContextManager[Any]]
    processes: Processes

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Metrics by name, the same in every process; the model is in eval mode meanwhile."""
        with evaluating(model, self.processes.device), torch.no_grad(), self.precision():
            if self.evaluate is not None:
                return self.processes.agreed(_as_floats(self.evaluate(model)))
            assert self.validation is not None
            loss = mean_loss(model, self.validation, self.loss_fn, self.weigh, self.processes)
        return self.processes.agreed({"loss": loss})


@dataclass
class ScoringLoss:
    """`Run.validation_loss`. The rows are drawn once, by the seed, so that a resumed run scores on the same ones."""

    model: nn.Module
    validation: Iterable[Any]
    loss_fn: LossFn | None
    weigh: Callable[[Any], float]
    precision: Callable[[], AbstractContextManager[Any]]
    seed: int
    drawn: dict[int, list[tuple[Any, float]]] = field(default_factory=dict)
    """By number of rows the batches, each with its share in the loss."""

    def __post_init__(self) -> None:
        refuse_one_batch(self.validation, "validation")
        if isinstance(self.validation, Iterator):
            raise DataError(
                f"validation is a {type(self.validation).__name__}, which gives its batches once, and every evaluation "
                "and every scoring reads them: pass a DataLoader or a list"
            )

    def __call__(self, rows: int) -> Tensor:
        device = next(p for p in self.model.parameters() if p.requires_grad).device
        with evaluating(self.model, device), self.precision():
            if rows not in self.drawn:
                seed_all(self.seed)  # `evaluating` restores the generators
                pieces = gather_rows(self.validation, rows, self.weigh)
                self.drawn[rows] = [(to_device(piece, device), share) for piece, share in pieces]
            losses = [share * loss_of(self.model, batch, self.loss_fn) for batch, share in self.drawn[rows]]
            return torch.stack(losses).sum()


def check_evaluation(evaluates: bool, every: int | None, patience: int | None, restore_best: bool) -> None:
    """Check the settings of evaluations.

    Raises:
        TrainingError: one has no effect or is no whole number.
    """
    for name, value in (("evaluate_every", every), ("patience", patience)):
        if value is None:
            continue
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise TrainingError(f"{name}={value!r}: must be a whole number, at least 1")
        if not evaluates:
            raise TrainingError(f"{name}={value!r} has no effect: nothing is evaluated; give validation or evaluate")
    if patience is not None and every is None:
        raise TrainingError(f"patience={patience!r} has no effect: evaluation is at the end only; give evaluate_every")
    if restore_best and not evaluates:
        raise TrainingError("restore_best=True has no effect: nothing is evaluated; give validation or evaluate")


def _as_floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Raise TrainingError if `evaluate` returned no mapping, or one with an entry that is no number."""
    if not isinstance(metrics, Mapping):
        raise TrainingError(f"evaluate gave a {type(metrics).__name__}; it must give metrics by name")
    found = {}
    for name, value in metrics.items():
        try:
            found[str(name)] = float(value)
        except (TypeError, ValueError):
            raise TrainingError(f"evaluate gave {name}={value!r}, which is no number") from None
    return found
