"""A batch: to the device, its first rows, into the model, its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorafamily.errors import DataError

LossFn = Callable[[nn.Module, Any], Tensor]


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on the device; copies overlap with computation where memory is pinned."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [to_device(value, device) for value in batch]
    return batch


def first_rows(batch: Any, rows: int) -> Any:
    """The first rows of every tensor in the batch."""
    if isinstance(batch, Tensor):
        return batch[:rows] if batch.ndim else batch
    if isinstance(batch, Mapping):
        return {key: first_rows(value, rows) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [first_rows(value, rows) for value in batch]
    return batch


def loss_of(model: nn.Module, batch: Any, loss_fn: LossFn | None = None) -> Tensor:
    """The task loss of one batch: `loss_fn(model, batch)`, or the `.loss` of what the model returns for it.

    Raises:
        DataError: the model returned no loss.
    """
    if loss_fn is not None:
        return loss_fn(model, batch)
    output = call(model, batch)
    loss = getattr(output, "loss", None)
    if loss is None:
        given = f"a {type(batch).__name__}"
        if isinstance(batch, Mapping):
            given = f"the keys {', '.join(batch)}"
        elif isinstance(batch, (list, tuple)):
            given = f"{len(batch)} tensors"
        raise DataError(
            f"{type(model).__name__} returned a {type(output).__name__} without a loss for a batch of {given}; "
            "put the labels the model knows into the batch, or pass loss_fn=lambda model, batch: ..."
        )
    return loss


def call(model: nn.Module, batch: Any) -> Any:
    """What the model returns for a batch: a mapping goes to it as keywords, a tuple or list as positions."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (list, tuple)) else model(batch)
