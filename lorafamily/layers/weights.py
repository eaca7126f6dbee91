"""A layer's weights inside a `with` block: other values in their place, brought in, gathered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lorafamily.layers.sharded import is_sharded, whole


@contextmanager
def replaced_values(layer: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block the layer finds these values in the place of its parameters, by name."""
    paths = {name: name.rpartition(".") for name in values}
    places: dict[str, dict[str, Any]] = {name: layer.get_submodule(at)._parameters for name, (at, *_) in paths.items()}
    before = {name: place[paths[name][2]] for name, place in places.items()}
    try:
        for name, value in values.items():
            places[name][paths[name][2]] = value
        yield
    finally:
        for name, value in before.items():
            places[name][paths[name][2]] = value


@contextmanager
def onloaded(layer: nn.Module) -> Iterator[None]:
    """Inside the block an offloaded layer has its weights."""
    if "_hf_hook" not in vars(layer):
        yield
        return
    from accelerate.utils import align_module_device  # type: ignore[import-untyped, unused-ignore]

    with align_module_device(layer):
        yield


@contextmanager
def whole_weights(layer: nn.Module) -> Iterator[None]:
    """Inside the block a layer has its weights, sharded ones gathered: every process must enter the block then."""
    sharded = {name: p for name, p in layer.named_parameters() if is_sharded(p)}
    with onloaded(layer), replaced_values(layer, {n: nn.Parameter(whole(p), False) for n, p in sharded.items()}):
        yield
