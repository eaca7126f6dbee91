"""What a session must know of the loop it is used in, and which loops would break when ranks change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorafamily.deploy.folder import listed
from lorafamily.errors import StateError, TrainingError
from lorafamily.layers.sharded import is_sharded


@dataclass(frozen=True)
class LoopContext:
    """What a session must know of its loop; the defaults describe a plain one.

    `precision()`: makes the context of a forward. `scaler`: of float16. `reduces`: whether the loop adds up the
    gradients of new tensors over the processes. `last_backward()`: where DDP leaves the adapters' gradients to the
    session, whether this backward is a step's last, after which they are averaged. `progress`: show a bar while ranks
    are scored. `compiled`: the model runs through `torch.compile`.
    """

    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    scaler: torch.amp.GradScaler | None = None
    reduces: bool = False
    last_backward: Callable[[], bool] | None = None
    progress: bool = False
    compiled: bool = False

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times the scaler's factor, if there is a scaler."""
        return loss if self.scaler is None else self.scaler.scale(loss)


def check_optimizer_has(optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter]) -> None:
    """Compare what trains with what the optimizer has.

    Raises:
        TrainingError: the optimizer lacks something that trains.
    """
    present = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [at for at, p in trained.items() if p.requires_grad and p.numel() and id(p) not in present]
    if missing:
        raise TrainingError(
            f"the optimizer does not hold {len(missing)} of the tensors that train ({listed(missing)}): make it after "
            "lorafamily.apply, from all parameters with requires_grad"
        )


def refuse_holding_engine(model: nn.Module, optimizer: Any, loop: LoopContext) -> None:
    """Check that nothing holds on to the tensors that change with the ranks.

    Raises:
        StateError: an engine would go on with the old tensors.
    """
    engine = _holding_engine(model, optimizer)
    if engine is not None and (engine != "DDP" or loop.last_backward is None):
        raise StateError(
            f"{engine} holds on to the tensors it was given, and this method changes their size; use "
            "lorafamily.train under torchrun, or a method with fixed ranks"
        )


def _holding_engine(model: nn.Module, optimizer: Any) -> str | None:
    """The engine that keeps references to the tensors that train."""
    names = {type(module).__name__ for module in model.modules()}
    for engine, found in (("DDP", "DistributedDataParallel"), ("FSDP", "FullyShardedDataParallel")):
        if found in names:
            return engine
    if "deepspeed" in type(optimizer).__module__ or any("DeepSpeed" in name for name in names):
        return "DeepSpeed"
    if any(is_sharded(p) for p in model.parameters() if p.requires_grad):
        return "FSDP"
    return "DDP" if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else None
