"""What lorafamily notes of a model: which adapters were placed under which name, and which of them is in effect.

The note hangs on the sites of the adapted layers, so that it is found through whatever wraps the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.budget import Sizing
from lorafamily.errors import StateError
from lorafamily.method import Method
from lorafamily.parts import Target, join
from lorafamily.site import Site, base_parameters, keep_padding, site_for, site_on, sites_in

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Placement:
    """Everything placed in a model under one name.

    `adapters`: by full name of what they adapt. `parked`: for each parameter that trains beside the adapters, and for
    each buffer that training may move, the values that are not in the model now: the base's while this placement is
    active, its own while it is not.
    """

    name: str
    spec: str
    method: Method
    sizing: Sizing
    adapters: dict[str, Adapter]
    parked: dict[str, Tensor]
    buffers: dict[str, Tensor] = field(default_factory=dict)
    by_default: bool = False
    """Whether nobody named the targets, so that one without effect may be left out."""

    def trainable(self) -> int:
        """Trainable adapter numbers at the present ranks; what trains beside them is not counted."""
        return sum(adapter.trainable() for adapter in self.adapters.values())


@dataclass
class ModelState:
    """What lorafamily notes of a model: placements by name, the active one, which base parameters trained before, and
    while a placement is merged the original weights by module name (None for those that were not kept)."""

    trained_before: dict[str, bool]
    placements: dict[str, Placement] = field(default_factory=dict)
    active: str | None = None
    originals: dict[str, Tensor | None] | None = None

    @property
    def merged(self) -> bool:
        return self.originals is not None


def noted(model: nn.Module) -> tuple[nn.Module, ModelState | None]:
    """The model that `apply` was given, inside of whatever wraps it, and what is noted of it.

    The model itself and None where nothing was ever placed or all was removed.

    Raises:
        StateError: only a part of the model that was given is in this one, or several that were given apart.
    """
    found = list(sites_in(model))
    states = {id(site.state): (at, site) for at, site in found}
    if len(states) > 1:
        apart = " and ".join(at for at, _ in states.values())
        raise StateError(f"{apart} carry adapters that were placed apart; call lorafamily on each of these models")
    here = {name for _, site in found for name in site.names()}
    placed = [name for _, site in found[:1] for of in site.state.placements.values() for name in of.adapters]
    if gone := [name for name in placed if name not in here]:
        raise StateError(
            f"{gone[0]} carries an adapter too, and is no part of this {type(model).__name__}; call lorafamily on the "
            "model that adapters were placed in"
        )
    for at, site in found:
        if not site.at:  # the layer itself was given
            return site.layer, site.state
        whole, _, tail = at.rpartition(site.at)
        if tail == "" and (whole == "" or whole.endswith(".")):
            return model.get_submodule(whole[:-1]), site.state
    if found:
        at, site = found[0]
        raise StateError(
            f'{at or type(model).__name__} is "{site.at}" of the model that adapters were placed in; call lorafamily '
            "on that one, of which this is a part or a copy of one"
        )
    return unwrapped(model), None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that torch.compile wrapped."""
    inside = model._modules.get("_orig_mod")
    return model if inside is None or not isinstance(model, torch._dynamo.OptimizedModule) else unwrapped(inside)


def state_of(model: nn.Module) -> ModelState | None:
    """What is noted of the model, None where nothing was ever placed or all was removed."""
    return noted(model)[1]


def placement_of(model: nn.Module, name: str | None = None) -> Placement:
    """The placement of that name, or the active one.

    Raises:
        StateError: the model has no adapters, none is active, or none of that name.
    """
    state = state_of(model)
    if state is None:
        raise StateError(f"this {type(model).__name__} has no adapters; lorafamily.apply or load puts them in")
    name = state.active if name is None else name
    if name is None:
        raise StateError(f"no adapter is active; choose one with lorafamily.switch: {_known(state)}")
    if name not in state.placements:
        raise StateError(f'no adapter named "{name}"; this model has {_known(state)}')
    return state.placements[name]


def targets_of(model: nn.Module) -> dict[str, Target]:
    """Every target in a model that carries an adapter, by full name in the model that `apply` was given."""
    found = {}
    for _, site in sites_in(model):
        for kind in site.kinds.values():
            target = Target(site.layer, kind)
            found[target.full_name(site.at)] = target
    return found


def check_can_place(model: nn.Module, name: str) -> nn.Module:
    """Refuse a name that is taken or cannot be one, and a model whose adapters are merged, or that cannot have any.

    Returns the model to place them in: this one, or the one that torch.compile wrapped.

    Raises:
        StateError: one of these.
    """
    if not isinstance(model, nn.Module):
        raise StateError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise StateError(f"name={name!r}: must be of letters, digits, _ and -, and no attribute of a module")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise StateError(
            f"{type(model).__name__} holds on to the parameters it was given; place adapters in the model first "
            "(model.module), and wrap it then"
        )
    whole = unwrapped(model)
    owner, state = noted(whole)
    if owner is not whole:
        at = next(at for at, _ in sites_in(whole))
        raise StateError(f"{at} carries an adapter placed through another model object; call lorafamily on that one")
    if state is not None and name in state.placements:
        raise StateError(
            f'an adapter named "{name}" is already there; give another name=..., or lorafamily.remove(model) first'
        )
    refuse_merged(state)
    return whole


def refuse_merged(state: ModelState | None) -> None:
    """Refuse what would have to happen on top of merged weights.

    Raises:
        StateError: an adapter is merged.
    """
    if state is not None and state.merged:
        raise StateError(f'adapter "{state.active}" is merged into the weights; lorafamily.unmerge(model) first')


def base_values(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of parameters or buffers as the base has them, also while another adapter's are in effect."""
    state = state_of(model)
    active = state.placements[state.active] if state is not None and state.active is not None else None
    parked = {} if active is None else active.parked | active.buffers
    return {path: parked.get(path, value.data).clone() for path, value in parameters.items()}


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


def trained_beside(model: nn.Module, placement: Placement) -> dict[str, Tensor]:
    """What an adapter's file holds beside the adapters: the values of what trains too, and buffers that moved."""
    state = state_of(model)
    active = state is not None and state.active == placement.name
    values = {path: model.get_parameter(path).data if active else v for path, v in placement.parked.items()}
    heads = {path.rpartition(".")[0] for path in values}
    for path, parked in placement.buffers.items():
        own, base = (model.get_buffer(path), parked) if active else (parked, model.get_buffer(path))
        if path.rpartition(".")[0] in heads or not torch.equal(own.to(base), base):
            values[path] = own
    return values


def refuse_untold(model: nn.Module, placement: Placement) -> None:
    """Refuse to go on where something trains that no file of the active adapter would hold.

    Raises:
        StateError: parameters of the base that somebody unfroze; they are named.
    """
    owner, state = noted(model)
    told = {id(owner.get_parameter(path)) for path in placement.parked}
    names = [name for name, p in base_parameters(model).items() if p.requires_grad and id(p) not in told]
    if names and state is not None and state.active == placement.name:
        raise StateError(
            f"{', '.join(names[:3])}{' and more' if names[3:] else ''} would train, and be lost, since adapter "
            f'"{placement.name}" does not know of it: name it in apply(..., also_train="{names[0]}"), or set '
            "requires_grad to False"
        )


def place(model: nn.Module, placement: Placement, targets: Mapping[str, Target]) -> None:
    """Attach what was built and checked, make it the active one, freeze the rest."""
    state = state_of(model)
    if state is None:
        state = ModelState({name: parameter.requires_grad for name, parameter in base_parameters(model).items()})
    names = {id(module): at for at, module in model.named_modules()}
    sites: dict[int, Site] = {}
    for target in map(targets.__getitem__, placement.adapters):
        layer = target.layer
        sites[id(layer)] = sites.get(id(layer)) or site_for(layer, target.layer_kind, names[id(layer)], state)
    _activate(model, state, None)
    for path, adapter in placement.adapters.items():
        target = targets[path]
        sites[id(target.layer)].put(target.part, target.kind, placement.name, adapter)
        sites[id(target.layer)].stand()
    keep_padding(model)
    placement.buffers = base_values(model, movable_buffers(model)) | placement.buffers
    state.placements[placement.name] = placement
    _activate(model, state, placement.name)
    model.requires_grad_(False)
    let_train(model, placement, True)


def exchange(model: nn.Module, placement: Placement, adapters: dict[str, Adapter]) -> None:
    """Put other adapters into the layers of a placement, in the place of its own."""
    owner, state = noted(model)
    assert state is not None
    targets = targets_of(owner)
    for path, adapter in adapters.items():
        site = site_on(targets[path].layer)
        assert site is not None
        site.put(targets[path].part, targets[path].kind, placement.name, adapter)
    placement.adapters = adapters
    let_train(owner, placement, state.active == placement.name)


def let_train(model: nn.Module, placement: Placement, flag: bool) -> None:
    """Set requires_grad of a placement's adapters and of what trains beside them."""
    for adapter in placement.adapters.values():
        for parameter in vars(adapter.update)["_parameters"].values():  # `parameters()` takes a millisecond for all
            parameter.requires_grad = flag
    for path in placement.parked:
        model.get_parameter(path).requires_grad = flag


def activate(model: nn.Module, name: str | None) -> None:
    """Let one placement take effect, with what was trained beside it; None is the base model."""
    owner, state = noted(model)
    assert state is not None
    _activate(owner, state, name)


def _activate(model: nn.Module, state: ModelState, name: str | None) -> None:
    if state.active == name:
        return
    for leaving_or_entering in (state.active, name):
        if leaving_or_entering is not None:
            placement = state.placements[leaving_or_entering]
            _swap(placement.parked, model.get_parameter)
            _swap(placement.buffers, model.get_buffer)
    state.active = name


def _swap(parked: dict[str, Tensor], get: Callable[[str], Tensor]) -> None:
    for path, other in parked.items():
        tensor = get(path)
        tensor.data, parked[path] = other.to(tensor.device, tensor.dtype), tensor.data


def _known(state: ModelState) -> str:
    return ", ".join(f'"{name}"' for name in state.placements)
