"""What comes with an adapter: its extra trained parameters, such as a head, and the buffers that training may move.

While the adapter is active, the model has the adapter's values of these, and the base's values are kept outside the
model as inactive values. While it is not active, it is the other way round.
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
    """Copies of parameters or buffers with the base's values; `inactive`: those that the active adapter replaced."""
    return {path: inactive.get(path, value.data).clone() for path, value in tensors.items()}


def parameter_names(model: nn.Module) -> dict[int, list[str]]:
    """The names of every parameter, by id: several where weights are tied. A shared module counts once."""
    names: dict[int, list[str]] = defaultdict(list)
    for at, module in model.named_modules():
        for name, parameter in module._parameters.items():
            names[id(parameter)].append(join(at, name))
    return names


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """By each name of a tied parameter, all its names in the model's order; `named_parameters` gives the first."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {name: together for together in names.values() if len(together) > 1 for name in together}


def movable_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The base's persistent buffers that a forward in training mode may move, by name: statistics and counters.

    Integers of more than one element are indices or packed weights, which do not move.
    """
    of_adapters = {module for _, site in sites_in(model) for module in site.modules()}
    found = {}
    for at, module in model.named_modules():
        for name, buffer in () if module in of_adapters else module._buffers.items():
            moves = buffer is not None and (buffer.is_floating_point() or not buffer.ndim)
            if moves and name not in module._non_persistent_buffers_set:
                found[join(at, name)] = buffer
    return found


def extra_trained_values(model: nn.Module, state: ModelState, placement: Placement) -> dict[str, Tensor]:
    """What a file holds besides the adapters' tensors: extra trained parameters, and the buffers that moved."""
    active = state.active == placement.name
    values = {path: model.get_parameter(path).data if active else v for path, v in placement.inactive_values.items()}
    heads = {path.rpartition(".")[0] for path in values}
    moved = moved_buffers(model, placement, active)
    for path, inactive in placement.inactive_buffers.items():
        if path.rpartition(".")[0] in heads or path in moved:
            values[path] = model.get_buffer(path) if active else inactive
    return values


def moved_buffers(model: nn.Module, placement: Placement, active: bool) -> dict[str, Tensor]:
    """The adapter's buffers that differ from the base's; `active`: whether the model has the adapter's values now, and
    not the base's."""
    moved = {}
    for path, inactive in placement.inactive_buffers.items():
        ours, base = (model.get_buffer(path), inactive) if active else (inactive, model.get_buffer(path))
        if not torch.equal(ours.to(base), base):
            moved[path] = ours
    return moved


def take_values(model: nn.Module, placement: Placement, values: Mapping[str, Tensor]) -> None:
    """Give a placement that is not in the model yet the values that a file holds besides the adapters' tensors. Raises
    StateError if one of them is offloaded or sharded in the model."""
    parameters, buffers = base_parameters(model), movable_buffers(model)
    both: dict[str, Tensor] = {**parameters, **buffers}
    refuse_absent(both, values, "which the file has values for")
    for at, value in values.items():
        inactive = placement.inactive_values if at in parameters else placement.inactive_buffers
        inactive[at] = value.to(both[at].device, both[at].dtype)


def swap_values(inactive: dict[str, Tensor], get: Callable[[str], Tensor]) -> None:
    """Put the inactive values into the model, and keep the values that were there as the inactive ones."""
    for path, other in inactive.items():
        tensor = get(path)
        tensor.data, inactive[path] = other.to(tensor.device, tensor.dtype), tensor.data
