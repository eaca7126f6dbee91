"""What an adapter brings along: extra trained parameters, such as a head, and buffers that training may move.

While an adapter is active, its own values of these are in the model, and the base's values are kept outside, inactive.
While it is not active, it is the other way round.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lorafamily.layers.offloaded import refuse_absent
from lorafamily.layers.site import base_parameters, sites_in
from lorafamily.layers.state import ModelState, Placement
from lorafamily.names import join


def base_values(tensors: Mapping[str, Tensor], inactive: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of parameters or buffers as the base has them; `inactive`: the base's values of the active adapter's."""
    return {path: inactive.get(path, value.data).clone() for path, value in tensors.items()}


def parameter_names(model: nn.Module) -> dict[int, list[str]]:
    """The names of every parameter by its id: several where weights are tied. A shared module counts once."""
    names: dict[int, list[str]] = defaultdict(list)
    for at, module in model.named_modules():
        for name, parameter in module._parameters.items():
            names[id(parameter)].append(join(at, name))
    return names


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """For every name of a tied parameter all of its names, in the model's order; the first is the one that
    `named_parameters` gives."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {name: together for together in names.values() if len(together) > 1 for name in together}


def movable_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers that a forward in training mode may move, by name: statistics and counters. Those of
    adapters are the adapters'.

    Integers of more than one element are indices or packed weights, which nothing moves.
    """
    inside = {id(module) for _, site in sites_in(model) for module in site.modules()}
    found = {}
    for at, module in model.named_modules():
        for name, buffer in () if id(module) in inside else module._buffers.items():
            moves = buffer is not None and (buffer.is_floating_point() or not buffer.ndim)
            if moves and name not in module._non_persistent_buffers_set:
                found[join(at, name)] = buffer
    return found


def extra_trained_values(model: nn.Module, state: ModelState, placement: Placement) -> dict[str, Tensor]:
    """What an adapter's file holds besides the adapters: its extra trained parameters, and the buffers that moved."""
    active = state.active == placement.name
    values = {path: model.get_parameter(path).data if active else v for path, v in placement.inactive_values.items()}
    heads = {path.rpartition(".")[0] for path in values}
    for path, outside in placement.inactive_buffers.items():
        moved, base = (model.get_buffer(path), outside) if active else (outside, model.get_buffer(path))
        if path.rpartition(".")[0] in heads or not torch.equal(moved.to(base), base):
            values[path] = moved
    return values


def take_values(model: nn.Module, placement: Placement, values: Mapping[str, Tensor]) -> None:
    """Give a placement, before it is put into the model, the values that a file holds besides the adapters.

    Raises:
        StateError: a parameter is offloaded or sharded.
    """
    parameters, buffers = base_parameters(model), movable_buffers(model)
    both: dict[str, Tensor] = {**parameters, **buffers}
    refuse_absent(both, values, "which the file has values for")
    for at, value in values.items():
        outside = placement.inactive_values if at in parameters else placement.inactive_buffers
        outside[at] = value.to(both[at].device, both[at].dtype)


def swap_values(inactive: dict[str, Tensor], get: Callable[[str], Tensor]) -> None:
    """Put the inactive values into the model, and keep those that were there."""
    for path, other in inactive.items():
        tensor = get(path)
        tensor.data, inactive[path] = other.to(tensor.device, tensor.dtype), tensor.data
