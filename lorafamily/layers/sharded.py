"""Weights that FSDP2 shards: each process has a part of every weight; factors stay whole. Weights are gathered one at a
time, for which every process must take part."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has only a part of the tensor (a DTensor)."""
    return hasattr(tensor, "full_tensor")


@torch.no_grad()
def whole(tensor: Any) -> Tensor:
    """The tensor's whole value; of a sharded tensor every process must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor.data


@torch.no_grad()
def local(tensor: Any) -> Tensor:
    """The part of the tensor that this process has, not a copy."""
    return tensor.to_local() if is_sharded(tensor) else tensor.data


@torch.no_grad()
def put_whole(parameter: Any, value: Tensor) -> None:
    """Give a parameter another value; of a sharded parameter each process takes its part."""
    if not is_sharded(parameter):
        parameter.data = value
        return
    from torch.distributed.tensor import distribute_tensor

    distributed = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    local(parameter).copy_(distributed.to_local())  # FSDP gathers from this memory


def reshard(model: nn.Module) -> None:
    """Free the whole weights that FSDP2 keeps after a forward: what is written to them would be lost."""
    for module in model.modules():
        if _is_fsdp(type(module)):
            module.reshard()  # type: ignore[operator]


def class_of(model: nn.Module) -> type[nn.Module]:
    """The model's class before FSDP2 replaced it by one with another name."""
    return next(cls for cls in type(model).__mro__ if not _is_fsdp(cls))


def _is_fsdp(cls: type) -> bool:
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and issubclass(cls, fsdp.FSDPModule)
