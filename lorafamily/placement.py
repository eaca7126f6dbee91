"""What lorafamily notes on a model: which adapters were placed under which name, and which of them is in effect."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar, cast

from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.budget import Sizing
from lorafamily.errors import StateError
from lorafamily.layers import Adapted, attach, base_parameters, keep_padding
from lorafamily.method import Method

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Placement:
    """Everything placed in a model under one name.

    `adapters`: by full name of their layer. `parked`: for each parameter trained beside the adapters the values that
    are not in the model now: the base's while this placement is active, the trained ones while it is not.
    """

    name: str
    spec: str
    method: Method
    sizing: Sizing
    adapters: dict[str, Adapter]
    parked: dict[str, Tensor]

    def trainable(self) -> int:
        """Trainable adapter numbers at the present ranks; what trains beside them is not counted."""
        return sum(adapter.trainable() for adapter in self.adapters.values())


@dataclass
class ModelState:
    """What lorafamily notes on a model: placements by name, the active one, which base parameters trained before, and
    while a placement is merged the original weights by module name (None for those that were not kept)."""

    trained_before: frozenset[str]
    placements: dict[str, Placement] = field(default_factory=dict)
    active: str | None = None
    originals: dict[str, Tensor | None] | None = None

    @property
    def merged(self) -> bool:
        return self.originals is not None


_ATTRIBUTE = "_lorafamily"


def state_of(model: nn.Module) -> ModelState | None:
    """What is noted on the model, None where nothing was ever placed or all was removed."""
    return cast("ModelState | None", model.__dict__.get(_ATTRIBUTE))


def forget(model: nn.Module) -> None:
    """Take the note off the model."""
    delattr(model, _ATTRIBUTE)


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


def check_can_place(model: nn.Module, name: str) -> None:
    """Refuse a name that is taken or cannot be one, and a model whose adapters are merged.

    Raises:
        StateError: one of these.
    """
    if not isinstance(model, nn.Module):
        raise StateError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise StateError(f"name={name!r}: must be of letters, digits, _ and -, and no attribute of a module")
    state = state_of(model)
    if state is not None and name in state.placements:
        raise StateError(
            f'an adapter named "{name}" is already there; give another name=..., or lorafamily.remove(model) first'
        )
    refuse_merged(state)
    if state is None and (inside := next((n for n, m in model.named_modules() if isinstance(m, Adapted)), None)):
        raise StateError(
            f"{inside} carries an adapter placed through another model object; call lorafamily on that one"
        )


def refuse_merged(state: ModelState | None) -> None:
    """Refuse what would have to happen on top of merged weights.

    Raises:
        StateError: an adapter is merged.
    """
    if state is not None and state.merged:
        raise StateError(f'adapter "{state.active}" is merged into the weights; lorafamily.unmerge(model) first')


def base_values(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies of the parameters as the base has them, also while another adapter's trained values are in effect."""
    state = state_of(model)
    parked = state.placements[state.active].parked if state is not None and state.active is not None else {}
    return {path: parked.get(path, parameter.data).clone() for path, parameter in parameters.items()}


def trained_beside(model: nn.Module, placement: Placement) -> dict[str, Tensor]:
    """The trained values of what trains beside a placement's adapters: in the model while it is active, else parked."""
    state = state_of(model)
    if state is None or state.active != placement.name:
        return dict(placement.parked)
    return {path: model.get_parameter(path).data for path in placement.parked}


def place(model: nn.Module, placement: Placement) -> None:
    """Attach what was built and checked, make it the active one, freeze the rest."""
    state = state_of(model)
    if state is None:
        state = ModelState(frozenset(n for n, p in base_parameters(model).items() if p.requires_grad))
        setattr(model, _ATTRIBUTE, state)
    activate(model, None)
    for path, adapter in placement.adapters.items():
        attach(model.get_submodule(path), placement.name, adapter)
    keep_padding(model)
    state.placements[placement.name] = placement
    activate(model, placement.name)
    model.requires_grad_(False)
    let_train(model, placement, True)


def exchange(model: nn.Module, placement: Placement, adapters: dict[str, Adapter]) -> None:
    """Put other adapters into the layers of a placement, in the place of its own."""
    for path, adapter in adapters.items():
        attach(model.get_submodule(path), placement.name, adapter)
    placement.adapters = adapters
    state = state_of(model)
    assert state is not None
    let_train(model, placement, state.active == placement.name)


def let_train(model: nn.Module, placement: Placement, flag: bool) -> None:
    """Set requires_grad of a placement's adapters and of what trains beside them."""
    for adapter in placement.adapters.values():
        for parameter in vars(adapter.update)["_parameters"].values():  # `parameters()` takes a millisecond for all
            parameter.requires_grad = flag
    for path in placement.parked:
        model.get_parameter(path).requires_grad = flag


def activate(model: nn.Module, name: str | None) -> None:
    """Let one placement take effect, with what was trained beside it; None is the base model."""
    state = state_of(model)
    assert state is not None
    if state.active == name:
        return
    for leaving_or_entering in (state.active, name):
        if leaving_or_entering is not None:
            _swap_parked(model, state.placements[leaving_or_entering])
    state.active = name
    point_modules(adapted_modules(model, state), state)


def adapted_modules(model: nn.Module, state: ModelState) -> dict[str, nn.Module]:
    """Every layer that some placement adapts, by name; looked up once, for walking down names is slow."""
    paths = dict.fromkeys(path for placement in state.placements.values() for path in placement.adapters)
    return {path: model.get_submodule(path) for path in paths}


def point_modules(modules: Mapping[str, nn.Module], state: ModelState) -> None:
    """Tell every adapted layer which of its adapters is active."""
    for module in modules.values():
        if isinstance(module, Adapted):
            module.active = state.active if state.active is not None and state.active in module.adapters else None


def _swap_parked(model: nn.Module, placement: Placement) -> None:
    for path, other in placement.parked.items():
        parameter = model.get_parameter(path)
        parameter.data, placement.parked[path] = other.to(parameter.device), parameter.data


def _known(state: ModelState) -> str:
    return ", ".join(f'"{name}"' for name in state.placements)
