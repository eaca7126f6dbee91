"""The repeated blocks of a model, and copies of the model on the meta device with fewer of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorafamily.layers.quantised import quantised_layers
from lorafamily.planner.stand_in import stand_in


@dataclass(frozen=True)
class Blocks:
    """The `count` entries of the `nn.ModuleList` at `path`, all built alike except perhaps the first."""

    path: str
    count: int

    def of(self, model: nn.Module) -> nn.ModuleList:
        return cast(nn.ModuleList, model.get_submodule(self.path))


def repeated_blocks(model: nn.Module, marked: Iterable[str] = ()) -> Blocks | None:
    """The longest outermost `nn.ModuleList` whose entries are built alike; None if there is none of more than two.

    Entries are built alike if their classes, shapes and settings are equal, and the same modules and parameters in them
    are `marked` (by full name). The first entry may differ.
    """
    marked = list(marked)
    lists = [(path, blocks) for path, blocks in _outermost_lists(model) if len(blocks) > 2]
    for path, blocks in sorted(lists, key=lambda found: -len(found[1])):
        prefixes = [f"{path}.{i}." for i in range(len(blocks))]
        inside = [{name.removeprefix(at) for name in marked if name.startswith(at)} for at in prefixes]
        if all(inside[i] == inside[1] and _built_alike(blocks[1], blocks[i], i) for i in range(2, len(blocks))):
            return Blocks(path, len(blocks))
    return None


def copy_on_meta(model: nn.Module, dtype: torch.dtype | None, blocks: Blocks | None, count: int) -> nn.Module:
    """A copy on the meta device, which allocates nothing; with floating-point tensors in `dtype`, if given, and only
    the first `count` of the `blocks`, if given."""
    found = [] if blocks is None else [*blocks.of(model)]
    left_out = {id(module) for block in found[count:] for module in block.modules()}
    memo: dict[int, Any] = {}
    for module in model.modules():
        if id(module) not in left_out:
            for _, _, tensor in _tensors(module):
                memo.setdefault(id(tensor), without_values(tensor, dtype))
    for _, layer, kind in quantised_layers(model):
        if id(layer) not in left_out:
            memo[id(layer)] = stand_in(kind, layer, dtype)
    if blocks is not None:
        memo[id(blocks.of(model))] = nn.ModuleList(copy.deepcopy(block, memo) for block in found[:count])
    return copy.deepcopy(model, memo)


def replace_tensors(model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Replace a model's parameters, buffers and tensors in plain attributes by `change` of them; shared ones stay
    shared."""
    changed: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for place, name, tensor in _tensors(module):
            if tensor not in changed:
                changed[tensor] = change(tensor)
            place[name] = changed[tensor]


def without_values(tensor: Tensor, dtype: torch.dtype | None = None, device: str = "meta") -> Tensor:
    """A tensor of the same shape; a floating-point one in `dtype`, if given; a parameter, if this is one."""
    dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    new = torch.empty_strided(tensor.size(), tensor.stride(), dtype=dtype, device=device)
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def _tensors(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """A module's own tensors, each with the dict that holds it and its name there."""
    places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
    return [(place, name, tensor) for place in places for name, tensor in place.items() if isinstance(tensor, Tensor)]


def _outermost_lists(module: nn.Module, at: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield at + name, child
        else:
            yield from _outermost_lists(child, f"{at}{name}.")


def _built_alike(second: nn.Module, other: nn.Module, index: int) -> bool:
    """Whether block `index` is built like block 1; a setting may be the block's own index."""
    built, other_built = ([_built(name, module) for name, module in block.named_modules()] for block in (second, other))
    if [structure for structure, _ in built] != [structure for structure, _ in other_built]:
        return False
    values = [pair for (_, a), (_, b) in zip(built, other_built, strict=True) for pair in zip(a, b, strict=True)]
    return all(one == two or (one, two) == (1, index) for one, two in values)


def _built(name: str, module: nn.Module) -> tuple[tuple[Any, ...], list[Any]]:
    """What must be equal in two modules that are built alike, and the values of the module's settings."""
    shapes = [(name, p.shape, p.dtype) for name, p in module._parameters.items() if p is not None]
    settings = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
    return (name, type(module), shapes, sorted(settings)), [settings[key] for key in sorted(settings)]
