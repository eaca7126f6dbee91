"""`with` blocks for a layer's weights: replace their values, onload offloaded ones, gather sharded ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from lorafamily.layers.sharded import is_sharded, whole


@contextmanager
def replaced_values(layer: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block the layer has these values in place of its parameters, by name."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for path, value in values.items():
            at, _, name = path.rpartition(".")
            parameters: dict[str, Any] = layer.get_submodule(at)._parameters
            before.append((parameters, name, parameters[name]))
            parameters[name] = value
        yield
    finally:
        for parameters, name, old in before:
            parameters[name] = old


def onloaded(layer: nn.Module) -> AbstractContextManager[Any]:
    """A block in which an offloaded layer has its weights on its device."""
    if "_hf_hook" not in vars(layer):
        return nullcontext()
    from accelerate.utils import align_module_device  # type: ignore[import-untyped, unused-ignore]

    return align_module_device(layer)


@contextmanager
def whole_weights(layer: nn.Module) -> Iterator[None]:
    """Inside the block a layer has its whole weights. Where they are sharded, every process must enter the block."""
    sharded = {name: p for name, p in layer.named_parameters() if is_sharded(p)}
    with onloaded(layer), replaced_values(layer, {n: nn.Parameter(whole(p), False) for n, p in sharded.items()}):
        yield
