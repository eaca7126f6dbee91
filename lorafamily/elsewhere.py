"""Weights that are not whole in this process: spread over several by FSDP2, or offloaded by accelerate.

Sharded ones are gathered one at a time, which every process must take part in; offloaded ones are brought in by the
hooks that accelerate has put on their layers. Factors stay whole and where the layer computes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorafamily.errors import StateError

BACK = "accelerate.hooks.remove_hook_from_module(model, recurse=True) brings weights back"


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor, of which this process has a part."""
    return hasattr(tensor, "full_tensor")


@torch.no_grad()
def whole(tensor: Any) -> Tensor:
    """The tensor's value, gathered where it is sharded; every process must ask for it then."""
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor.data
    return gathered


@torch.no_grad()
def local(tensor: Any) -> Tensor:
    """The part of the tensor that is here, in the memory that it has."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor.data
    return part


@torch.no_grad()
def put_whole(parameter: Any, value: Tensor) -> None:
    """Give a parameter another value; of a sharded one each process takes its part."""
    if not is_sharded(parameter):
        parameter.data = value
        return
    from torch.distributed.tensor import distribute_tensor

    spread: Any = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    local(parameter).copy_(spread.to_local())  # FSDP gathers from this memory


def reshard(model: nn.Module) -> None:
    """Let go of what FSDP2 gathered for a forward and keeps for the next one: what is written there would be lost."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def class_of(model: nn.Module) -> type[nn.Module]:
    """The model's own class, which FSDP2 replaces by one with another name."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return next(cls for cls in type(model).__mro__ if fsdp is None or not issubclass(cls, fsdp.FSDPModule))


def _hooks_on(module: nn.Module) -> list[Any]:
    """Those of accelerate, one that holds several taken apart."""
    hook = vars(module).get("_hf_hook")
    return [] if hook is None else [hook, *getattr(hook, "hooks", ())]


def offloaded_value(model: nn.Module, name: str) -> Tensor | None:
    """The value of a parameter that accelerate keeps elsewhere, by full name; None where it does not."""
    at, _, own = name.rpartition(".")
    for one in _hooks_on(model.get_submodule(at)):
        values = getattr(one, "weights_map", None)
        if values is not None:
            value: Tensor = values[own]
            return value
    return None


def refuse_whole_blocks(model: nn.Module) -> None:
    """Refuse a model whose blocks accelerate brings in with all that is in them, by lists made before adapters came.

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
    """Refuse to train, merge or write adapters that are not here.

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


def refuse_elsewhere(tensors: Mapping[str, Tensor], names: Iterable[str], what: str) -> None:
    """Refuse values for parameters that are not here, or not whole: they would be lost.

    Raises:
        StateError: one of them is offloaded, or spread over processes.
    """
    for name in names:
        if name in tensors and tensors[name].is_meta:
            raise StateError(
                f"{name}, {what}, is offloaded (or on the meta device); keep its layer here, as by a device_map"
            )
        if name in tensors and is_sharded(tensors[name]):
            raise StateError(f"{name}, {what}, is spread over processes; do this before shard(model)")
