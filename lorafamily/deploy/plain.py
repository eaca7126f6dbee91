"""Adapters of plain LoRA from given factors: what other people's files hold, and what algebra on updates gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.budget import Sizing
from lorafamily.layers import base_parameters, weight_of
from lorafamily.method import Method
from lorafamily.placement import Model, Placement, place
from lorafamily.registry import find

PLAIN = "lora"


def place_plain(
    model: Model,
    name: str,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    scales: Mapping[str, float],
    beside: Mapping[str, Tensor],
    *,
    rank: int,
    options: Mapping[str, Any],
    dropout: float = 0.0,
) -> Model:
    """Place plain LoRA adapters ΔW = s · U V under a new name. Everything was checked before.

    `factors`: (U, V) by layer; `scales`: s by layer; `beside`: values of parameters that train beside the adapters;
    `rank`: the nominal one; `options`: of the method, for whoever reads the settings.
    """
    method, adapters = plain_adapters(model, factors, scales, dropout=dropout, options=options)
    parameters = base_parameters(model)
    parked = {at: value.to(parameters[at].device, parameters[at].dtype) for at, value in beside.items()}
    place(model, Placement(name, PLAIN, method, sizing_of(adapters, rank), dropout, adapters, parked))
    return model


@torch.no_grad()
def plain_adapters(
    model: nn.Module,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    scales: Mapping[str, float],
    *,
    dropout: float,
    options: Mapping[str, Any],
) -> tuple[Method, dict[str, Adapter]]:
    """The method and its adapters, in the model's order, each on its layer's device; float32 or higher."""
    method = find(PLAIN).with_options(**options)
    adapters = {}
    for at in [at for at, _ in model.named_modules() if at in factors]:
        (U, V), weight = factors[at], weight_of(model.get_submodule(at))
        dtype = torch.promote_types(U.dtype, torch.float32)
        update = method.parametrisation(weight.shape[1], weight.shape[0], **{"rank": len(V)}).to(dtype)
        update.represent(U.to("cpu", dtype), V.to("cpu", dtype))
        adapters[at] = Adapter(update, scale=scales[at], dropout=dropout).to(weight.device)
    return method, adapters


def sizing_of(adapters: Mapping[str, Adapter], rank: int) -> Sizing:
    """Of adapters that no budget was asked for."""
    return Sizing(None, "peak", rank, sum(adapter.trainable() for adapter in adapters.values()))
