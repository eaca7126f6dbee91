"""A copy of everything that a run changes in a model, to restore it bit by bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.allocation.surgery import replace_parameter
from lorafamily.layers.extra_trained import movable_buffers
from lorafamily.layers.site import base_parameters
from lorafamily.training.checkpoints import Checkpoint


class Snapshot:
    """Copies on the CPU. `adapters`: the tensors of every adapter, by layer, at the ranks it had; `base`: parameters of
    the model itself that train, and buffers that training may change, such as running statistics."""

    def __init__(self, adapters: Mapping[str, Adapter], base: Mapping[str, Tensor]):
        self.adapters = {at: _copies(adapter.state_dict()) for at, adapter in adapters.items()}
        self.base = _copies(base)

    @staticmethod
    def of(model: nn.Module, adapters: Mapping[str, Adapter]) -> Snapshot:
        """Copy the model as it is now; with several processes each keeps the same copy."""
        trained: dict[str, Tensor] = {n: p.data for n, p in base_parameters(model).items() if p.requires_grad}
        return Snapshot(adapters, trained | movable_buffers(model))

    @staticmethod
    def read(found: Checkpoint, model: nn.Module) -> Snapshot:
        """Copy what a checkpoint has."""
        buffers = {name: found.state["buffers"][name] for name in movable_buffers(model)}
        adapters = {} if found.adapters is None else found.adapters.adapters
        return Snapshot(adapters, found.state["trained"] | buffers)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All copies, by the names in a saved adapter's file."""
        factors = {f"{at}.{name}": value for at, state in self.adapters.items() for name, value in state.items()}
        return factors | self.base

    def put_into(self, model: nn.Module, adapters: Mapping[str, Adapter], optimizer: torch.optim.Optimizer) -> None:
        """Copy everything into the model. Adapters get new parameters, for which the optimizer has no state yet."""
        for at, state in self.adapters.items():
            for old, new in adapters[at].take(state):
                replace_parameter(optimizer, old, new)
                optimizer.state.pop(old, None)
        copy_into(model, self.base)


@torch.no_grad()
def copy_into(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into the model's parameters and buffers of these names."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in values.items():
        tensors[name].copy_(value)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
