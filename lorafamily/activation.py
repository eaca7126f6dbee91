"""Choosing between the adapters of a model, and taking them out again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from lorafamily.deploy.merge import unmerge
from lorafamily.layers.placement import (
    Model,
    activate,
    let_train,
    noted,
    placement_of,
    refuse_merged,
    state_of,
    targets_of,
)
from lorafamily.layers.site import keep_padding, site_on
from lorafamily.layers.state import ModelState


def switch(model: Model, name: str | None) -> Model:
    """Make another of the model's adapters the active and trainable one; None switches all of them off.

    Raises:
        StateError: no adapter of that name, or one is merged.
    """
    owner, state = noted(model)
    if state is None and name is None:
        return model
    placement = None if name is None else placement_of(owner, name)
    refuse_merged(state)
    assert state is not None
    activate(owner, name)
    if placement is not None:
        for other in state.placements.values():
            if other is not placement:
                let_train(owner, other, False)
        let_train(owner, placement, True)
    return model


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Inside the block the model is the base model, with the head it had before training.

    Raises:
        StateError: an adapter is merged.
    """
    state = state_of(model)
    if state is None:
        yield model
        return
    refuse_merged(state)
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
    owner, state = noted(model)
    if name is None and state is None:
        return model
    leaving = [placement_of(owner, name)] if name is not None else list(cast(ModelState, state).placements.values())
    assert state is not None
    unmerge(owner)
    for placement in leaving:
        if state.active == placement.name:
            activate(owner, None)
        targets = targets_of(owner)
        for path in placement.adapters:
            target = targets[path]
            site = site_on(target.layer)
            assert site is not None
            site.drop(target.part, placement.name)
        del state.placements[placement.name]
    keep_padding(owner)
    if not state.placements:
        for path, parameter in owner.named_parameters():
            parameter.requires_grad_(state.trained_before.get(path, parameter.requires_grad))
    return model
