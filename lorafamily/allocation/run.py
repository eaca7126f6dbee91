"""The training run, as an allocator and its scorer see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.allocation.surgery import follow_resize


@dataclass(frozen=True)
class Run:
    """What an allocator may look at and change.

    `adapters`: by the name of their layer in `model`. `steps`: of the optimizer in the whole run. `limit`,
    `slice_limit`: the most trainable adapter parameters and slices at any step; None: no limit.
    `validation_loss(rows)`: the task loss on the first `rows` rows of the validation data, always the same ones, in
    eval mode, with the gates' gradients if gradients are on; None without validation data.
    `task_gradient(parameter)`: `parameter.grad` of the step just made without the penalty's share; None if the loop
    does not keep the two apart. `agreed(value)`: the first process's value. `reached(name)`: whether the task had a
    gradient for that adapter at the step just made. `start`: slices by module when the run began, if the adapters have
    others by now. `again`: whether ranks that an earlier run settled may move once more.
    """

    model: nn.Module
    adapters: Mapping[str, Adapter]
    steps: int
    limit: int | None = None
    slice_limit: int | None = None
    optimizer: torch.optim.Optimizer | None = None
    validation_loss: Callable[[int], Tensor] | None = None
    task_gradient: Callable[[nn.Parameter], Tensor | None] | None = None
    reached: Callable[[str], bool] = lambda name: True
    generator: torch.Generator = field(default_factory=torch.Generator)
    progress: bool = False
    agreed: Callable[[Any], Any] = lambda value: value
    start: Mapping[str, int] | None = None
    again: bool = False

    @property
    def settled(self) -> bool:
        """Whether an earlier run settled the ranks, and they may not move again."""
        return not self.again and bool(self.adapters) and all(adapter.settled for adapter in self.adapters.values())

    def resize(self, name: str, keep: Tensor, add: int = 0) -> None:
        """`Adapter.resize` of one module; the optimizer's state follows."""
        adapter = self.adapters[name]
        for change in adapter.resize(keep.to(adapter.device), add, generator=self.generator):
            if self.optimizer is not None:
                follow_resize(self.optimizer, change)

    def has_room(self, name: str) -> bool:
        """Whether a module may get one more slice, by the limits and the largest rank of its ΔW."""
        update = self.adapters[name].update
        slices = sum(adapter.slices for adapter in self.adapters.values())
        return (
            update.slices < update.largest_rank
            and (self.limit is None or self.trainable() + update.slice_cost <= self.limit)
            and (self.slice_limit is None or slices < self.slice_limit)
        )

    def trainable(self) -> int:
        """Trainable adapter parameters now."""
        return sum(adapter.trainable() for adapter in self.adapters.values())

    def unsliced(self) -> int:
        """Trainable adapter parameters that belong to no slice and are never dropped, such as LoRA²'s outer factors."""
        return sum(a.trainable() - a.slices * a.update.slice_cost for a in self.adapters.values())
