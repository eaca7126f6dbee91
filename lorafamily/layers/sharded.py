"""Weights that FSDP2 shards: each process has a part of them, and factors stay whole.

They are gathered one at a time, in which every process must take part.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor, of which this process has a part."""
    return hasattr(tensor, "full_tensor")


@torch.no_grad()
def whole(tensor: Any) -> Tensor:
    """The tensor's value, gathered where it is sharded; every process must ask for it then."""
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor.data
    return gathered


@torch.no_grad()
def local(tensor: Any) -> Tensor:
    """The part of the tensor that is here, in the memory that it has."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor.data
    return part


@torch.no_grad()
def put_whole(parameter: Any, value: Tensor) -> None:
    """Give a parameter another value; of a sharded one each process takes its part."""
    if not is_sharded(parameter):
        parameter.data = value
        return
    from torch.distributed.tensor import distribute_tensor

    spread: Any = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    local(parameter).copy_(spread.to_local())  # FSDP gathers from this memory


def reshard(model: nn.Module) -> None:
    """Let go of what FSDP2 gathered for a forward and keeps for the next one: what is written there would be lost."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def class_of(model: nn.Module) -> type[nn.Module]:
    """The model's own class, which FSDP2 replaces by one with another name."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return next(cls for cls in type(model).__mro__ if fsdp is None or not issubclass(cls, fsdp.FSDPModule))
