"""Adapters of plain LoRA from given factors, which come from other people's files or from algebra on updates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lorafamily.adapter import Adapter
from lorafamily.budget import Sizing
from lorafamily.dropout import Dropout
from lorafamily.errors import FileError, MethodError
from lorafamily.layers.extra_trained import take_values
from lorafamily.layers.placement import Model, noted, place
from lorafamily.layers.state import Placement
from lorafamily.layers.target import Target
from lorafamily.method import Method
from lorafamily.registry import find

PLAIN = "lora"


def place_plain(
    model: Model,
    name: str,
    targets: Mapping[str, Target],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    scales: Mapping[str, float],
    extra_trained: Mapping[str, Tensor],
    *,
    rank: int,
    options: Mapping[str, Any],
    dropout: Dropout = Dropout(),
) -> Model:
    """Place plain LoRA adapters ΔW = s · U V under a new name. The caller has checked everything.

    `targets`: those of the model, in its order; `factors`, `scales`: (U, V) and s by target; `extra_trained`: values of
    extra trained parameters and buffers; `rank`: the nominal one; `options`: the method's, as files record them.
    """
    owner, _ = noted(model)
    on_device = {}
    for at, target in targets.items():
        if at in factors:
            (U, V), device = factors[at], target.stored.device
            on_device[at] = U.to(device), V.to(device)
    method, adapters = plain_adapters(on_device, scales, dropout=dropout, options=options)
    sizing = Sizing(None, "peak", rank, sum(adapter.trainable() for adapter in adapters.values()))
    placement = Placement(name, PLAIN, method, sizing, adapters, {})
    placement.file_fingerprints = placement.fingerprints()
    take_values(owner, placement, extra_trained)
    place(owner, placement, targets)
    return model


@torch.no_grad()
def plain_adapters(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    scales: Mapping[str, float],
    *,
    dropout: Dropout,
    options: Mapping[str, Any],
) -> tuple[Method, dict[str, Adapter]]:
    """The method and its adapters, on the factors' device, in float32 or higher."""
    method = find(PLAIN).with_options(**options)
    adapters = {}
    for at, (U, V) in factors.items():
        dtype = torch.promote_types(U.dtype, torch.float32)
        with U.device:
            update = method.parametrisation(V.shape[1], U.shape[0], **{"rank": len(V)}).to(dtype)
        update.represent(U.to(dtype), V.to(dtype))
        adapters[at] = Adapter(update, scale=scales[at], dropout=dropout)
    return method, adapters


def noted_dropout(p: Any, kind: Any, where: Path) -> Dropout:
    """The dropout that a file records; `where`: the file, for the message.

    Raises:
        FileError: it is invalid.
    """
    try:
        return Dropout(p, kind)
    except MethodError as error:
        raise FileError(f"{where}: {error}") from None


def padded(
    U: Float[Tensor, "d_out r"], V: Float[Tensor, "r d_in"], rank: int
) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"]]:
    """The same U V at a higher rank, padded with zeros."""
    missing = rank - len(V)
    return F.pad(U, (0, missing)), F.pad(V, (0, 0, 0, missing))
