"""Adapters whose ranks follow a state dict: frameworks load the model first, and its tensors must fit by then."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from lorafamily.adapter import Adapter


class Follows(Protocol):
    """What this file needs of a session."""

    adapters: dict[str, Adapter]

    def replace_parameters(self, replaced: list[tuple[nn.Parameter, nn.Parameter]]) -> None: ...

    def await_state(self) -> None: ...


_SESSIONS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Follows]] = weakref.WeakKeyDictionary()
"""The newest session of a model that adapters were placed in."""


def fit_ranks(
    model: nn.Module, adapters: Mapping[str, Adapter], state_dict: Mapping[str, Tensor], prefix: str = ""
) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Give adapters the ranks of a state dict that is about to be loaded into their model; returns which parameters
    were replaced by which. Tensors that differ in more than their rank are left for torch to refuse."""
    names = {id(parameter): prefix + name for name, parameter in model.named_parameters()}
    replaced = []
    for adapter in adapters.values():
        full_names = {name: names[id(parameter)] for name, parameter in adapter.named_parameters()}
        if all(name in state_dict for name in full_names.values()):
            tensors = {name: state_dict[full_name] for name, full_name in full_names.items()}
            if adapter.differs_in_rank(tensors):
                replaced += adapter.take(tensors)
    return replaced


def follow_state_dicts(model: nn.Module, session: Follows) -> None:
    """From now on fit the ranks of the session's adapters whenever a state dict is loaded into the model."""
    if model not in _SESSIONS:
        model.register_load_state_dict_pre_hook(_before_loading)
    _SESSIONS[model] = weakref.ref(session)


def _before_loading(model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
    """A function of the module, so that the model pickles and its copies, which have no session, are left alone."""
    session = _SESSIONS.get(model, lambda: None)()
    if session is not None and (replaced := fit_ranks(model, session.adapters, state_dict, prefix)):
        session.replace_parameters(replaced)
        session.await_state()
