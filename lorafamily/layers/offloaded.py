"""Weights that accelerate offloads: hooks on their layers bring them in. Adapters stay where the layer computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lorafamily.errors import StateError
from lorafamily.layers.sharded import is_sharded

BACK = "accelerate.hooks.remove_hook_from_module(model, recurse=True) brings weights back"


def _hooks_on(module: nn.Module) -> list[Any]:
    """accelerate's hooks on a module; one that holds several is followed by these."""
    hook = vars(module).get("_hf_hook")
    return [] if hook is None else [hook, *getattr(hook, "hooks", ())]


def offloaded_value(model: nn.Module, name: str) -> Tensor | None:
    """The value of an offloaded parameter, by full name; None where it is not offloaded."""
    at, _, own = name.rpartition(".")
    for one in _hooks_on(model.get_submodule(at)):
        values = getattr(one, "weights_map", None)
        if values is not None:
            value: Tensor = values[own]
            return value
    return None


def refuse_whole_blocks(model: nn.Module) -> None:
    """Refuse a model whose blocks accelerate brings in as a whole, from lists that were made before adapters came.

    Raises:
        StateError: it was offloaded with preload_module_classes.
    """
    for at, module in model.named_modules():
        for one in _hooks_on(module):
            if getattr(one, "offload", False) and getattr(one, "place_submodules", False):
                raise StateError(
                    f"{at or type(module).__name__} is offloaded as a whole (accelerate's preload_module_classes), by "
                    f"a hook that would look for the adapters inside, too, and not find them; {BACK}, then offload "
                    "without that argument"
                )


def refuse_offloaded_adapters(adapters: Mapping[str, nn.Module]) -> None:
    """Refuse to train, merge or save offloaded adapters.

    Raises:
        StateError: they were in the model when accelerate offloaded it.
    """
    for at, adapter in adapters.items():
        hooked = any(_hooks_on(module) for module in adapter.modules())
        if hooked and any(parameter.is_meta for parameter in adapter.parameters()):
            raise StateError(
                f"the adapter of {at} was offloaded along with its layer, and what trains must be here; {BACK}; "
                "offload the model before adapters come"
            )


def refuse_absent(tensors: Mapping[str, Tensor], names: Iterable[str], what: str) -> None:
    """Refuse values for parameters that are offloaded or sharded: they would be lost.

    Raises:
        StateError: one of them is.
    """
    for name in names:
        if name in tensors and tensors[name].is_meta:
            raise StateError(
                f"{name}, {what}, is offloaded (or on the meta device); keep its layer here, as by a device_map"
            )
        if name in tensors and is_sharded(tensors[name]):
            raise StateError(f"{name}, {what}, is spread over processes; do this before shard(model)")
