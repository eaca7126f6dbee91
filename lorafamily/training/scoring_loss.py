"""The loss that ranks are scored by: the task's, on a few fixed rows of the validation data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lorafamily.batch import LossFn, gather_rows, loss_of, to_device
from lorafamily.training.execution import evaluating
from lorafamily.training.state import seed_all


class ScoringLoss:
    """Called with a number of rows: the task loss on the first so many rows of the validation data, in eval mode, with
    the gates' gradients if gradients are on. The rows are drawn once, by the seed, so that a resumed run scores on the
    same ones."""

    def __init__(
        self,
        model: nn.Module,
        validation: Iterable[Any],
        loss_fn: LossFn | None,
        weigh: Callable[[Any], float],
        precision: Callable[[], AbstractContextManager[Any]],
        seed: int,
    ):
        self.model, self.validation, self.loss_fn, self.seed = model, validation, loss_fn, seed
        self.weigh, self.precision = weigh, precision
        self._drawn: dict[int, list[tuple[Any, float]]] = {}

    def __call__(self, rows: int) -> Tensor:
        device = next(p for p in self.model.parameters() if p.requires_grad).device
        with evaluating(self.model, device), self.precision():
            losses = [share * loss_of(self.model, batch, self.loss_fn) for batch, share in self._batches(rows, device)]
            return torch.stack(losses).sum()

    def _batches(self, rows: int, device: torch.device) -> list[tuple[Any, float]]:
        """Batches, with the share that each has in the loss."""
        if rows not in self._drawn:
            seed_all(self.seed)  # `evaluating` puts the generators back
            pieces = gather_rows(self.validation, rows, self.weigh)
            self._drawn[rows] = [(to_device(piece, device), share) for piece, share in pieces]
        return self._drawn[rows]
