"""Adapters take the ranks of a state dict: frameworks load the model first, so its tensors must fit by then."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lorafamily.adapter import Adapter

Follow = Callable[[Mapping[str, Tensor], str], None]
"""Method of a session: called with a state dict and its prefix before these are loaded into the model."""

_FOLLOWING: weakref.WeakKeyDictionary[nn.Module, weakref.WeakMethod[Follow]] = weakref.WeakKeyDictionary()
"""By model that adapters were placed in the method of its newest session."""


def fit_ranks(
    model: nn.Module, adapters: Mapping[str, Adapter], state_dict: Mapping[str, Tensor], prefix: str
) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Give adapters the ranks of a state dict that is about to be loaded into their model: pairs of an old and a new
    parameter. Tensors that differ in more than their rank are left for torch to refuse."""
    names = {id(parameter): prefix + name for name, parameter in model.named_parameters()}
    replaced = []
    for adapter in adapters.values():
        full_names = {name: names[id(parameter)] for name, parameter in adapter.named_parameters()}
        if all(name in state_dict for name in full_names.values()):
            tensors = {name: state_dict[full_name] for name, full_name in full_names.items()}
            if adapter.differs_in_slices(tensors):
                replaced += adapter.take(tensors)
    return replaced


def follow_state_dicts(model: nn.Module, follow: Follow) -> None:
    """Call a session's method, as long as it is the newest session, before a state dict is loaded into the model."""
    if model not in _FOLLOWING:
        model.register_load_state_dict_pre_hook(_before_loading)
    _FOLLOWING[model] = weakref.WeakMethod(follow)


def _before_loading(model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
    """Looks the session up by the model: a hook that held the session could not be pickled with the model, and a copy
    of the model, which has no session, would resize the original's adapters."""
    follow = _FOLLOWING.get(model, lambda: None)()
    if follow is not None:
        follow(state_dict, prefix)
