"""What a session must know of the loop around it, and what in it would break where ranks change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lorafamily.deploy.folder import listed
from lorafamily.errors import TrainingError
from lorafamily.layers.sharded import is_sharded


@dataclass(frozen=True)
class Surroundings:
    """What a loop knows and a session asks for; the defaults are right in a plain loop.

    `precision()`: the context of a forward. `scaler`: float16's. `agreed(value)`: what the first of several processes
    has. `reduces`: whether the loop adds up the gradients of new tensors over processes. `last_backward()`: where DDP
    leaves the adapters' gradients to the session, whether a backward is a step's last, after which they are averaged.
    `progress`: show a bar while ranks are scored. `compiled`: the model runs through `torch.compile`.
    """

    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    scaler: torch.amp.GradScaler | None = None
    agreed: Callable[[Any], Any] | None = None
    reduces: bool = False
    last_backward: Callable[[], bool] | None = None
    progress: bool = False
    compiled: bool = False


def check_held(optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter]) -> None:
    """The optimiser must hold everything that trains.

    Raises:
        TrainingError: it does not; the message names what is missing.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [at for at, p in trained.items() if p.requires_grad and p.numel() and id(p) not in held]
    if missing:
        raise TrainingError(
            f"the optimiser does not hold {len(missing)} of the tensors that train ({listed(missing)}): make it after "
            "lorafamily.apply, of all parameters with requires_grad"
        )


def holding_engine(model: nn.Module, optimizer: Any) -> str | None:
    """What keeps references to the tensors that train, so that they must not be replaced."""
    names = {type(module).__name__ for module in model.modules()}
    for engine, found in (("DDP", "DistributedDataParallel"), ("FSDP", "FullyShardedDataParallel")):
        if found in names:
            return engine
    if "deepspeed" in type(optimizer).__module__ or any("DeepSpeed" in name for name in names):
        return "DeepSpeed"
    if any(is_sharded(p) for p in model.parameters() if p.requires_grad):
        return "FSDP"
    return "DDP" if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else None
