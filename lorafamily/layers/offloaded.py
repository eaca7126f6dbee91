"""Weights that accelerate offloads: hooks on their layers onload them. Adapters stay on the device that computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lorafamily.errors import StateError
from lorafamily.layers.sharded import is_sharded

BACK = "accelerate.hooks.remove_hook_from_module(model, recurse=True) brings weights back"
"""How to undo the offloading, for messages."""


def _hooks_on(module: nn.Module) -> list[Any]:
    """accelerate's hooks on a module; a hook that holds several is followed by them."""
    hook = vars(module).get("_hf_hook")
    return [] if hook is None else [hook, *getattr(hook, "hooks", ())]


def offloaded_value(model: nn.Module, name: str) -> Tensor | None:
    """The value of an offloaded parameter, by full name; None where it is not offloaded."""
    at, _, inside = name.rpartition(".")
    maps = (getattr(hook, "weights_map", None) for hook in _hooks_on(model.get_submodule(at)))
    return next((values[inside] for values in maps if values is not None), None)


def refuse_whole_blocks(model: nn.Module) -> None:
    """Check that accelerate onloads layer by layer, if at all.

    Raises:
        StateError: accelerate onloads whole blocks, by lists of weights that were made before adapters came.
    """
    for at, module in model.named_modules():
        if any(getattr(h, "offload", False) and getattr(h, "place_submodules", False) for h in _hooks_on(module)):
            raise StateError(
                f"{at or type(module).__name__} is offloaded as a whole (accelerate's preload_module_classes), by a "
                "hook that would look for the adapters among the offloaded weights and not find them; "
                f"{BACK}, then offload without that argument"
            )


def refuse_offloaded_adapters(adapters: Mapping[str, nn.Module]) -> None:
    """Check that adapters are where they train.

    Raises:
        StateError: adapters are offloaded, since they were in the model when accelerate offloaded it.
    """
    for at, adapter in adapters.items():
        hooked = any(_hooks_on(module) for module in adapter.modules())
        if hooked and any(parameter.is_meta for parameter in adapter.parameters()):
            raise StateError(
                f"the adapter of {at} was offloaded with its layer, and cannot be trained, merged or saved; {BACK}; "
                "offload the model before you apply adapters"
            )


def refuse_absent(tensors: Mapping[str, Tensor], names: Iterable[str], what: str) -> None:
    """Look whether tensors can get new values; `what` says in the message why they should.

    Raises:
        StateError: a named tensor is offloaded or sharded, so that new values would be lost.
    """
    for name in names:
        if name in tensors and tensors[name].is_meta:
            raise StateError(
                f"{name}, {what}, is offloaded (or on the meta device); keep its layer loaded, as by a device_map"
            )
        if name in tensors and is_sharded(tensors[name]):
            raise StateError(f"{name}, {what}, is sharded over processes; do this before shard(model)")
