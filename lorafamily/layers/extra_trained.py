"""What goes along with adapters: parameters that train beside them, such as a head, and buffers that training may move.

While an adapter is active its values are in the model and the base's wait outside, *parked*; else the other way round.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lorafamily.names import join


def base_values(tensors: Mapping[str, Tensor], parked: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of parameters or buffers as the base has them; `parked`: by the active adapter."""
    return {path: parked.get(path, value.data).clone() for path, value in tensors.items()}


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """For every name of a parameter that has several all of them, in the model's order; the first is the one that
    `named_parameters` gives."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {name: together for together in names.values() if len(together) > 1 for name in together}


def movable_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers that a forward in training mode may move, by name: statistics and counters.

    Integers of more than one element are indices or packed weights, which nothing moves.
    """
    found = {}
    for at, module in model.named_modules():
        for name, buffer in module._buffers.items():
            moves = buffer is not None and (buffer.is_floating_point() or not buffer.ndim)
            if moves and name not in module._non_persistent_buffers_set:
                found[join(at, name)] = buffer
    return found


def trained_beside(
    model: nn.Module, parked: Mapping[str, Tensor], buffers: Mapping[str, Tensor], active: bool
) -> dict[str, Tensor]:
    """What an adapter's file holds beside the adapters: the values of what trains too, and buffers that moved.

    `parked`, `buffers`: what waits outside the model, the base's values while the adapter is active, else its own.
    """
    values = {path: model.get_parameter(path).data if active else v for path, v in parked.items()}
    heads = {path.rpartition(".")[0] for path in values}
    for path, waiting in buffers.items():
        own, base = (model.get_buffer(path), waiting) if active else (waiting, model.get_buffer(path))
        if path.rpartition(".")[0] in heads or not torch.equal(own.to(base), base):
            values[path] = own
    return values


def swap(parked: dict[str, Tensor], get: Callable[[str], Tensor]) -> None:
    """Put what is parked into the model, and park what was there."""
    for path, other in parked.items():
        tensor = get(path)
        tensor.data, parked[path] = other.to(tensor.device, tensor.dtype), tensor.data
