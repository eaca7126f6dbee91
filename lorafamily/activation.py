"""Switching between the adapters of a model, and removing them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lorafamily.deploy.merge import unmerge
from lorafamily.layers.placement import (
    Model,
    activate,
    adapted,
    let_train,
    placement_of,
    refuse_merged,
    refuse_routed,
    state_of,
    targets_of,
)
from lorafamily.layers.site import keep_padding


def switch(model: Model, name: str | None) -> Model:
    """Make the adapters of another name the active and trainable ones; None: the base model, without adapters.

    Raises:
        StateError: no adapter has that name, one is merged, a layer that trains along was resized, or this is inside a
            block of `routing`.
    """
    if name is None and state_of(model) is None:
        return model
    placement = None if name is None else placement_of(model, name)
    owner, state = adapted(model)
    refuse_merged(state)
    refuse_routed(state)
    activate(owner, state, name)
    if placement is not None:
        for other in state.placements.values():
            if other is not placement:
                let_train(owner, other, False)
        let_train(owner, placement, True)
    return model


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Inside the block the model is the base model, with the head it had before training.

    If another adapter becomes active inside the block (`switch`, `apply`, `load`), it stays so.

    Raises:
        StateError: an adapter is merged, or a layer that trains along was resized.
    """
    state = state_of(model)
    if state is None:
        yield model
        return
    refuse_merged(state)
    before, routed = state.active, state.routed
    activate(*adapted(model), None)
    state.routed = None
    try:
        yield model
    finally:
        state.routed = routed
        if state.active is None and before in state.placements:
            activate(*adapted(model), before)


def remove(model: Model, name: str | None = None) -> Model:
    """Remove the adapters of one name, or all. A model without adapters is the base model, to the last bit.

    A merged adapter is unmerged first. Removing the last one restores `requires_grad` of the base parameters.

    Raises:
        StateError: no adapter has that name, this is inside a block of `routing`, or unmerging is refused.
    """
    if name is None and state_of(model) is None:
        return model
    owner, state = adapted(model)
    refuse_routed(state)
    removed = [*state.placements.values()] if name is None else [placement_of(model, name)]
    unmerge(owner)
    for placement in removed:
        if state.active == placement.name:
            activate(owner, state, None)
        targets = targets_of(owner)
        for path in placement.adapters:
            targets[path].site.drop(targets[path].part, placement.name)
        del state.placements[placement.name]
    keep_padding(owner)
    if not state.placements:
        for path, parameter in owner.named_parameters():
            parameter.requires_grad_(state.trained_before.get(path, parameter.requires_grad))
    return model
