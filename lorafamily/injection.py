"""Placing adapters in a model and taking them out again. The model is the state: what was placed is noted on it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from lorafamily import targets as targeting
from lorafamily.adapter import Adapter
from lorafamily.budget import Sizing, solve
from lorafamily.errors import MethodError, StateError, TargetError
from lorafamily.layers import Adapted, attach, base_parameters, detach, weight_of
from lorafamily.method import Method
from lorafamily.registry import find

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
    dropout: float
    adapters: dict[str, Adapter]
    parked: dict[str, Tensor]

    def trainable(self) -> int:
        """Trainable adapter numbers at the present ranks; what trains beside them is not counted."""
        return sum(adapter.trainable() for adapter in self.adapters.values())

    def rank(self) -> int:
        """Rank slices in all modules."""
        return sum(adapter.rank for adapter in self.adapters.values())


@dataclass
class ModelState:
    """What lorafamily notes on a model: placements by name, the active one, which base parameters trained before, and
    while a placement is merged the original weights by module name."""

    trained_before: frozenset[str]
    placements: dict[str, Placement] = field(default_factory=dict)
    active: str | None = None
    originals: dict[str, Tensor] | None = None

    @property
    def merged(self) -> bool:
        return self.originals is not None


_ATTRIBUTE = "_lorafamily"


def state_of(model: nn.Module) -> ModelState | None:
    """What is noted on the model, None where nothing was ever placed or all was removed."""
    return cast("ModelState | None", model.__dict__.get(_ATTRIBUTE))


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


def apply(
    model: Model,
    method: str = "lora",
    *,
    budget: float | None = None,
    rank: int | None = None,
    budget_at: Literal["peak", "end"] = "peak",
    targets: targeting.Targets = None,
    also_train: str | Sequence[str] | None = None,
    dropout: float = 0.0,
    name: str = "default",
    seed: int | None = None,
    **method_options: Any,
) -> Model:
    """Put adapters into a model, in place, and freeze everything else. Nothing is changed if anything is refused.

    Args:
        model: any `nn.Module`; it comes back as the same object, computing what it computed before.
        method: a name from `lorafamily.methods()`, or names joined by "+" that differ on their axes.
        budget: trainable adapter numbers (not bytes); the largest rank that fits is chosen. Exclusive with `rank`.
        rank: of every module, capped by the layer's size (LoRA²: the outer width k). Neither: the method's default.
        budget_at: "peak": the budget is never exceeded; "end": a method that prunes starts larger and ends within it.
        targets: layers to adapt: None or "all-linear" (without output head and pooler), "attention", regular
            expressions searched for in full module names, or a predicate of (name, module).
        also_train: regular expressions for parameters that train too, such as a task head; saved along, counted apart.
        dropout: probability with which an entry of an adapter's input is dropped in training.
        name: of this set of adapters; a model can hold several, the one placed last is active.
        seed: of the random start; None draws one from torch's global generator.
        **method_options: options of the method, such as `alpha`; an unknown one is refused with a list of those known.

    Raises:
        MethodError, TargetError, BudgetError, StateError: see the message; the model is untouched.
    """
    check_can_place(model, name)
    chosen = find(method).with_options(**method_options)
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise MethodError(f"dropout={dropout!r}: must be a probability in [0, 1)")
    modules = targeting.match(model, targets)
    beside = match_beside(model, also_train, modules)
    shapes = {path: (w.shape[1], w.shape[0]) for path, module in modules.items() for w in [weight_of(module)]}
    sizing = solve(chosen, shapes, budget=budget, rank=rank, budget_at=budget_at)

    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())) if seed is None else seed)
    adapters = {
        path: chosen.build(weight_of(module), sizing.rank, dropout=dropout, generator=generator)
        for path, module in modules.items()
    }
    place(
        model,
        Placement(name, method, chosen, sizing, dropout, adapters, {p: v.data.clone() for p, v in beside.items()}),
    )
    return model


def check_can_place(model: nn.Module, name: str) -> None:
    """Refuse a name that is taken or cannot be one, and a model whose adapters are merged."""
    if not isinstance(model, nn.Module):
        raise StateError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict, name):
        raise StateError(f"name={name!r}: must be of letters, digits, _ and -, and no attribute of a module")
    state = state_of(model)
    if state is not None and name in state.placements:
        raise StateError(
            f'an adapter named "{name}" is already there; give another name=..., or lorafamily.remove(model) first'
        )
    if state is not None and state.merged:
        raise StateError(f'adapter "{state.active}" is merged into the weights; lorafamily.unmerge(model) first')
    if state is None and (inside := next((n for n, m in model.named_modules() if isinstance(m, Adapted)), None)):
        raise StateError(
            f"{inside} carries an adapter placed through another model object; call lorafamily on that one"
        )


def match_beside(
    model: nn.Module, patterns: str | Sequence[str] | None, adapted: dict[str, nn.Module]
) -> dict[str, nn.Parameter]:
    """The parameters that train beside the adapters; never the weight of an adapted layer, which merging replaces."""
    beside = targeting.match_parameters(model, patterns)
    weights = {id(module.weight): path for path, module in adapted.items()}
    for name, parameter in beside.items():
        if id(parameter) in weights:
            raise TargetError(
                f"also_train names {name}, the weight of a layer that gets an adapter ({weights[id(parameter)]}); "
                "train one or the other"
            )
    return beside


def place(model: nn.Module, placement: Placement) -> None:
    """Attach what was built and checked, make it the active one, freeze the rest."""
    state = state_of(model)
    if state is None:
        state = ModelState(frozenset(n for n, p in base_parameters(model).items() if p.requires_grad))
        setattr(model, _ATTRIBUTE, state)
    activate(model, None)
    for path, adapter in placement.adapters.items():
        attach(model.get_submodule(path), placement.name, adapter)
    state.placements[placement.name] = placement
    activate(model, placement.name)
    train_only(model, placement)


def train_only(model: nn.Module, placement: Placement) -> None:
    """Leave requires_grad to one placement's adapters and what trains beside them."""
    model.requires_grad_(False)
    for adapter in placement.adapters.values():
        adapter.update.requires_grad_(True)
    for path in placement.parked:
        model.get_parameter(path).requires_grad_(True)


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
    point_modules(model, state)


def point_modules(model: nn.Module, state: ModelState) -> None:
    """Tell every adapted layer which of its adapters is active."""
    for path in {path for placement in state.placements.values() for path in placement.adapters}:
        module = model.get_submodule(path)
        if isinstance(module, Adapted):
            module.active = state.active if state.active is not None and state.active in module.adapters else None


def switch(model: Model, name: str | None) -> Model:
    """Make another of the model's adapters the active and trainable one; None switches all of them off.

    Raises:
        StateError: no adapter of that name, or one is merged.
    """
    state = state_of(model)
    if state is None and name is None:
        return model
    placement = None if name is None else placement_of(model, name)
    if state is not None and state.merged:
        raise StateError(f'adapter "{state.active}" is merged into the weights; lorafamily.unmerge(model) first')
    activate(model, name)
    if placement is not None:
        train_only(model, placement)
    return model


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Inside the block the model is the base model, with the head it had before training."""
    state = state_of(model)
    if state is None:
        yield model
        return
    if state.merged:
        raise StateError(f'adapter "{state.active}" is merged into the weights; lorafamily.unmerge(model) first')
    before = state.active
    activate(model, None)
    try:
        yield model
    finally:
        activate(model, before)


def remove(model: Model, name: str | None = None) -> Model:
    """Take adapters out: those of one name, or all. What is left is the base model, to the last bit.

    A merged adapter is unmerged first. With the last adapter go the frozen flags: `requires_grad` is what it was.

    Raises:
        StateError: no adapter of that name.
    """
    from lorafamily.deploy.merge import unmerge

    state = state_of(model)
    if name is None and state is None:
        return model
    leaving = [placement_of(model, name)] if name is not None else list(cast(ModelState, state).placements.values())
    assert state is not None
    unmerge(model)
    for placement in leaving:
        if state.active == placement.name:
            activate(model, None)
        for path in placement.adapters:
            detach(model.get_submodule(path), placement.name)
        del state.placements[placement.name]
    if not state.placements:
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(path in state.trained_before)
        delattr(model, _ATTRIBUTE)
    return model


def _swap_parked(model: nn.Module, placement: Placement) -> None:
    for path, other in placement.parked.items():
        parameter = model.get_parameter(path)
        parameter.data, placement.parked[path] = other.to(parameter.device), parameter.data


def _known(state: ModelState) -> str:
    return ", ".join(f'"{name}"' for name in state.placements)
