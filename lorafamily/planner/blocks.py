"""The repeated blocks of a model, and copies of the model on the meta device with fewer of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorafamily.insight.stand_in import stand_in
from lorafamily.layers.quantised import quantised_layers


@dataclass(frozen=True)
class Blocks:
    """The `count` entries of the `nn.ModuleList` at `path`, all of one kind but perhaps the first."""

    path: str
    count: int

    def of(self, model: nn.Module) -> nn.ModuleList:
        return cast(nn.ModuleList, model.get_submodule(self.path))


def repeated_blocks(model: nn.Module, marked: Iterable[str] = ()) -> Blocks | None:
    """The longest outermost `nn.ModuleList` whose entries are of one kind; None if there is none of more than two.

    Entries are of one kind if their classes, shapes and settings are equal, and the same modules and parameters in them
    are `marked` (by full name). The first entry may differ.
    """
    marked = list(marked)
    lists = [(path, blocks) for path, blocks in _outermost_lists(model) if len(blocks) > 2]
    for path, blocks in sorted(lists, key=lambda found: -len(found[1])):
        inside = [{name[len(at) :] for name in marked if name.startswith(at)} for at in _prefixes(path, len(blocks))]
        if all(inside[i] == inside[1] and _same_kind(blocks[1], blocks[i], i) for i in range(2, len(blocks))):
            return Blocks(path, len(blocks))
    return None


def copy_on_meta(
    model: nn.Module, dtype: torch.dtype | None = None, blocks: Blocks | None = None, count: int = 0
) -> nn.Module:
    """A copy on the meta device, which allocates nothing; with floating-point tensors in `dtype`, if given, and only
    the first `count` of the `blocks`, if given."""
    kept = [*blocks.of(model)][:count] if blocks is not None else []
    left_out = {id(m) for block in [*blocks.of(model)][count:] for m in block.modules()} if blocks is not None else ()
    memo: dict[int, Any] = {}
    for module in model.modules():
        if id(module) not in left_out:
            memo |= {id(tensor): on_meta(tensor, dtype) for tensor in _tensors(module) if id(tensor) not in memo}
    for _, layer, kind in quantised_layers(model):
        if id(layer) not in left_out:
            memo[id(layer)] = stand_in(kind, layer, dtype)
    if blocks is not None:
        memo[id(blocks.of(model))] = nn.ModuleList(copy.deepcopy(block, memo) for block in kept)
    return copy.deepcopy(model, memo)


def replace_tensors(model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Replace a model's parameters, buffers and tensors in plain attributes by `change` of them; shared ones stay
    shared."""
    changed: dict[int, Tensor] = {}
    alive: list[Tensor] = []  # so that no id is used twice
    for module in model.modules():
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for place in places:
            for name, tensor in list(place.items()):
                if not isinstance(tensor, Tensor):
                    continue
                if id(tensor) not in changed:
                    alive.append(tensor)
                    new = change(tensor)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    changed[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
                place[name] = changed[id(tensor)]


def on_meta(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the same shape on the meta device; a floating-point one in `dtype`, if given."""
    dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    new = torch.empty_strided(tensor.size(), tensor.stride(), dtype=dtype, device="meta")
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for place in (module._parameters, module._buffers, vars(module)):
        yield from (tensor for tensor in place.values() if isinstance(tensor, Tensor))


def _outermost_lists(module: nn.Module, at: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield at + name, child
        else:
            yield from _outermost_lists(child, f"{at}{name}.")


def _prefixes(path: str, count: int) -> list[str]:
    return [f"{path}.{i}." for i in range(count)]


def _same_kind(second: nn.Module, other: nn.Module, index: int) -> bool:
    """Whether block `index` is built like block 1; a setting may be the block's own index."""
    modules, others = (list(block.named_modules()) for block in (second, other))
    if len(modules) != len(others):
        return False
    for (name, a), (other_name, b) in zip(modules, others, strict=True):
        if name != other_name or type(a) is not type(b) or _shapes(a) != _shapes(b):
            return False
        settings, other_settings = _settings(a), _settings(b)
        if settings.keys() != other_settings.keys():
            return False
        pairs = [(settings[key], other_settings[key]) for key in settings]
        if any(one != two and (one, two) != (1, index) for one, two in pairs):
            return False
    return True


def _shapes(module: nn.Module) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, p.shape, p.dtype) for name, p in module._parameters.items() if p is not None]


def _settings(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
