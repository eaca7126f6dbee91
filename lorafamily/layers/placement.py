"""Putting adapters into a model, and finding them again through the sites of its layers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from lorafamily.allocation.allocator import Fixed
from lorafamily.errors import StateError
from lorafamily.layers.extra_trained import base_values, movable_buffers, swap_values
from lorafamily.layers.offloaded import refuse_whole_blocks
from lorafamily.layers.site import Site, base_parameters, keep_padding, site_on, sites_in
from lorafamily.layers.state import ModelState, Placement
from lorafamily.layers.target import Target

Model = TypeVar("Model", bound=nn.Module)


def noted(model: nn.Module) -> tuple[nn.Module, ModelState | None]:
    """The model that `apply` was given, inside whatever wraps it, and its state, None if it has no adapters.

    Raises:
        StateError: this model is only a part of that one, or holds several such models.
    """
    found = list(sites_in(model))
    states = {id(site.state): (at, site) for at, site in found}
    if len(states) > 1:
        apart = " and ".join(at for at, _ in states.values())
        raise StateError(f"{apart} carry adapters that were placed apart; call lorafamily on each of these models")
    for _, first in states.values():
        placed = {name for placement in first.state.placements.values() for name in placement.adapters}
        gone = sorted(placed - targets_of(model).keys())
        for at, site in found:
            whole = at[: len(at) - len(site.at)]
            if not gone and at == whole + site.at and (not site.at or whole[-1:] in ("", ".")):
                return model.get_submodule(whole.removesuffix(".")), site.state
        raise StateError(
            f"this {type(model).__name__} is a part, or a copy of a part, of the model that adapters were placed in; "
            f"call lorafamily on that model, in which {(gone or [first.at])[0]} carries an adapter too"
            + (f" (or was {gone[0]} replaced since, as by resize_token_embeddings? resize first)" if gone else "")
        )
    return unwrapped(model), None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's wrappers."""
    inside = model._modules.get("_orig_mod")
    return model if inside is None or not isinstance(model, torch._dynamo.OptimizedModule) else unwrapped(inside)


def state_of(model: nn.Module) -> ModelState | None:
    """The model's state, None where it has no adapters."""
    return noted(model)[1]


def adapted(model: nn.Module) -> tuple[nn.Module, ModelState]:
    """As `noted`, for a model that must have adapters.

    Raises:
        StateError: it has none; or as `noted`.
    """
    owner, state = noted(model)
    if state is None:
        raise StateError(f"this {type(model).__name__} has no adapters; lorafamily.apply or load puts them in")
    return owner, state


def placement_of(model: nn.Module, name: str | None = None) -> Placement:
    """The placement of that name, or the active one.

    Raises:
        StateError: there is none.
    """
    _, state = adapted(model)
    name = state.active if name is None else name
    known = ", ".join(f'"{other}"' for other in state.placements)
    if name is None:
        raise StateError(f"no adapter is active; choose one with lorafamily.switch: {known}")
    if name not in state.placements:
        raise StateError(f'no adapter named "{name}"; this model has {known}')
    return state.placements[name]


def targets_of(model: nn.Module) -> dict[str, Target]:
    """The targets in a model that carry adapters, by full name in the model that `apply` was given."""
    targets = [(site.at, Target(site.layer, kind)) for _, site in sites_in(model) for kind in site.kinds.values()]
    return {target.full_name(at): target for at, target in targets}


def check_can_place(model: nn.Module, name: str) -> nn.Module:
    """The model to place adapters in: this one, or the one that torch.compile wrapped.

    Raises:
        StateError: the name is taken or not valid, an adapter is merged, samples are routed to adapters, or the model
            cannot have adapters: it is wrapped, or has lazy layers without weights.
    """
    if not isinstance(model, nn.Module):
        raise StateError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise StateError(f"name={name!r}: must be of letters, digits, _ and -, and no attribute of nn.ModuleDict")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise StateError(
            f"{type(model).__name__} knows only the parameters it was made with; place adapters in the model inside "
            "(model.module), and wrap it afterwards"
        )
    if lazy := [at for at, p in model.named_parameters() if isinstance(p, UninitializedParameter)]:
        raise StateError(f"{lazy[0]} has no shape yet, as its layer is lazy: run the model on one batch first")
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
    refuse_routed(state)
    refuse_whole_blocks(whole)
    return whole


def refuse_merged(state: ModelState | None) -> None:
    """Check that no adapter is merged, for what needs the base weights.

    Raises:
        StateError: an adapter is merged.
    """
    if state is not None and state.merged:
        raise StateError(f'adapter "{state.active}" is merged into the weights; lorafamily.unmerge(model) first')


def refuse_routed(state: ModelState | None) -> None:
    """Check that samples are not routed to adapters now, for what changes which adapters there are or act.

    Raises:
        StateError: this is inside a block of `routing`.
    """
    if state is not None and state.routed is not None:
        raise StateError("inside a block of lorafamily.routing every sample has its adapter; leave the block first")


def refuse_unsaved(model: nn.Module, placement: Placement) -> None:
    """Check that a file of an adapter would hold all that trains, and fit its layers.

    Raises:
        StateError: somebody unfroze other parameters of the base, which no file would hold; a layer was resized.
    """
    owner, state = noted(model)
    targets = targets_of(owner)
    for at, adapter in placement.adapters.items():
        if (shape := targets[at].shape) != (made := (adapter.update.d_out, adapter.update.d_in)):
            raise StateError(
                f"{at} is {list(shape)} as (d_out, d_in), and its adapter was made for {list(made)}: the layer was "
                "resized, and the file would fit no model; resize before you apply adapters"
            )
    refuse_resized(owner, placement)
    saved = {id(owner.get_parameter(path)) for path in placement.inactive_values}
    names = [name for name, p in base_parameters(model).items() if p.requires_grad and id(p) not in saved]
    if names and state is not None and state.active == placement.name:
        raise StateError(
            f"{', '.join(names[:3])}{' and more' if names[3:] else ''} would train, but not be saved with adapter "
            f'"{placement.name}": name it in apply(..., also_train="{names[0]}"), or set requires_grad to False'
        )


def refuse_resized(model: nn.Module, placement: Placement) -> None:
    """Check that extra trained parameters have the shapes of the values that take their place, and they the other's.

    Raises:
        StateError: one was resized since the adapters were placed, or its layer replaced by another.
    """
    now = dict(model.named_parameters(remove_duplicate=False)) if placement.inactive_values else {}
    for at, value in placement.inactive_values.items():
        if at not in now or now[at].shape != value.shape:
            found = "gone" if at not in now else f"{list(now[at].shape)}"
            raise StateError(
                f'{at} is {found}, and was {list(value.shape)} when adapter "{placement.name}" was placed, which '
                "trains it: the base's value would not fit there, nor the file into the base; resize before you apply "
                "adapters"
            )


def warn_of_no_session(placement: Placement) -> None:
    """Warn if adapters were trained in a loop without what their method does there, or if some of new ones are still
    zero: a session finds layers whose weights the model reads without calling them, where an adapter has no effect."""
    if placement.had_session:
        return
    method, adapters = placement.method, placement.adapters
    settled = isinstance(method.allocation, Fixed) or all(adapter.settled for adapter in adapters.values())
    missing = ([] if settled else ["rank allocation"]) + ([] if method.penalty is None else ["penalty"])
    if missing and has_moved(placement):
        warnings.warn(
            f'adapter "{placement.name}" was trained without the {" and ".join(missing)} of its method, '
            f"{placement.spec}: its loop made no lorafamily.session, nor did lorafamily.train or LoraFamilyCallback, "
            "which make one, run",
            stacklevel=3,
        )
    new = adapters if placement.file_fingerprints is None else {}
    norms = {at: adapter.norm() for at, adapter in new.items() if adapter.slices}
    idle = [at for at, norm in norms.items() if norm == 0]
    if 0 < len(idle) < len(norms):
        warnings.warn(
            f"of {len(norms)} adapters {len(idle)} are still zero, such as that of {idle[0]}: it took no part in the "
            "loss, or the model reads its layer's weight without calling the layer, where an adapter has no effect; "
            "apply(..., example=batch) finds out which",
            stacklevel=3,
        )


def warn_of_no_step(placement: Placement) -> None:
    """Warn if a loop without session, which would have looked at its optimizer, computed gradients of adapters and
    moved none."""
    parameters = (p for adapter in placement.adapters.values() for p in adapter.parameters())
    if not placement.had_session and any(p.grad is not None for p in parameters) and not has_moved(placement):
        warnings.warn(
            f'gradients reached adapter "{placement.name}", but no step moved it. An optimizer that is older than an '
            "adapter does not hold its parameters: make it after apply or load, of lorafamily.parameter_groups(model)",
            stacklevel=3,
        )


def has_moved(placement: Placement) -> bool:
    """Whether adapters are not as they were when they were new, with ΔW zero, or were read from a file."""
    if placement.file_fingerprints is None:
        return any(adapter.norm() > 0 for adapter in placement.adapters.values() if adapter.slices)
    now = placement.fingerprints()
    return any(now.get(name, value) != value for name, value in placement.file_fingerprints.items())


def warn_over_budget(placement: Placement) -> None:
    """Warn, where adapters leave training, of a budget for the end that was not reached."""
    sizing, has = placement.sizing, placement.trainable()
    if placement.had_session and sizing.budget_at == "end" and sizing.budget is not None and has > sizing.budget:
        warnings.warn(
            f'adapter "{placement.name}" has {has:,} parameters, more than its budget of {sizing.budget:,} for the '
            "end, since its run stopped before the ranks had settled; go on to the end of it",
            stacklevel=3,
        )


def place(model: nn.Module, placement: Placement, targets: Mapping[str, Target]) -> None:
    """Attach a placement that was built and checked, make it active, and freeze all else."""
    state = state_of(model)
    if state is None:
        state = ModelState({name: parameter.requires_grad for name, parameter in base_parameters(model).items()})
    names = {module: at for at, module in model.named_modules()}
    sites: dict[nn.Module, Site] = {}
    for target in map(targets.__getitem__, placement.adapters):
        layer = target.layer
        sites[layer] = sites.get(layer) or site_on(layer) or Site(layer, target.layer_kind, names[layer], state)
    activate(model, state, None)
    for path, adapter in placement.adapters.items():
        target = targets[path]
        sites[target.layer].put(target.part, target.kind, placement.name, adapter)
        sites[target.layer].attach()
    keep_padding(model)
    placement.inactive_buffers = base_values(movable_buffers(model), {}) | placement.inactive_buffers
    state.placements[placement.name] = placement
    activate(model, state, placement.name)
    model.requires_grad_(False)
    let_train(model, placement, True)


def let_train(model: nn.Module, placement: Placement, flag: bool) -> None:
    """Set requires_grad of a placement's adapters and extra trained parameters."""
    for adapter in placement.adapters.values():
        for parameter in adapter.update.tensors():
            parameter.requires_grad = flag
    for path in placement.inactive_values:
        model.get_parameter(path).requires_grad = flag


def activate(model: nn.Module, state: ModelState, name: str | None) -> None:
    """Make one placement take effect, with its extra trained parameters; None: the base model alone. Raises StateError
    if these were resized."""
    if state.active == name:
        return
    changing = [state.placements[one] for one in (state.active, name) if one is not None]
    for placement in changing:
        refuse_resized(model, placement)
    for placement in changing:  # the one that leaves, then the one that enters
        swap_values(placement.inactive_values, model.get_parameter)
        swap_values(placement.inactive_buffers, model.get_buffer)
    state.active = name
