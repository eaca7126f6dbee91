"""Copies of what a run changes in a model, from which it comes back to the last bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.allocation.surgery import exchange
from lorafamily.layers.extra_trained import movable_buffers
from lorafamily.layers.site import base_parameters
from lorafamily.training.checkpoints import Checkpoint


@dataclass(frozen=True)
class Kept:
    """On the CPU: the tensors of every adapter by its layer, whatever their ranks; what trains beside or without
    adapters; the buffers that training may move."""

    adapters: dict[str, dict[str, Tensor]]
    trained: dict[str, Tensor]
    buffers: dict[str, Tensor]

    @staticmethod
    def of(model: nn.Module, adapters: Mapping[str, Adapter]) -> Kept:
        """What the model has now. Under several processes the same in each of them."""
        trained = {name: p.data for name, p in base_parameters(model).items() if p.requires_grad}
        return Kept(_states(adapters), _copies(trained), _copies(movable_buffers(model)))

    @staticmethod
    def read(found: Checkpoint, model: nn.Module) -> Kept:
        """What the checkpoint of a model has."""
        buffers = {name: found.state["buffers"][name] for name in movable_buffers(model)}
        adapters = {} if found.adapters is None else found.adapters.adapters
        return Kept(_states(adapters), _copies(found.state["trained"]), _copies(buffers))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of them, by the names that a saved adapter's file has."""
        own = {f"{at}.{name}": value for at, state in self.adapters.items() for name, value in state.items()}
        return own | self.trained | self.buffers

    @torch.no_grad()
    def put_into(self, model: nn.Module, adapters: Mapping[str, Adapter], optimizer: torch.optim.Optimizer) -> None:
        """Give them back. Tensors of adapters are new parameters, which the optimiser takes without its old state."""
        for at, state in self.adapters.items():
            for old, new in adapters[at].take(state):
                exchange(optimizer, old, new)
                optimizer.state.pop(old, None)
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        for name, value in self.trained.items():
            parameters[name].copy_(value)
        for name, value in self.buffers.items():
            buffers[name].copy_(value)


def _states(adapters: Mapping[str, Adapter]) -> dict[str, dict[str, Tensor]]:
    return {at: _copies(adapter.state_dict()) for at, adapter in adapters.items()}


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
