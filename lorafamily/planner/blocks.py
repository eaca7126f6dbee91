"""The repeated blocks of a model, and copies of it that have fewer of them and no numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorafamily.quantised import quantised_layers, stand_in


@dataclass(frozen=True)
class Blocks:
    """The entries of the `nn.ModuleList` at `path`, `count` of them, all alike but perhaps the first."""

    path: str
    count: int

    def of(self, model: nn.Module) -> nn.ModuleList:
        return cast(nn.ModuleList, model.get_submodule(self.path))


def alike_blocks(model: nn.Module, marked: Iterable[str] = ()) -> Blocks | None:
    """The longest outermost `nn.ModuleList` of alike entries, None where there is none of more than two.

    Alike are the same classes, shapes and settings, and in each the same modules and parameters among those `marked`
    by full name. The first entry may differ.
    """
    marked = list(marked)
    lists = [(path, blocks) for path, blocks in _outermost_lists(model) if len(blocks) > 2]
    for path, blocks in sorted(lists, key=lambda found: -len(found[1])):
        inside = [{name[len(at) :] for name in marked if name.startswith(at)} for at in _prefixes(path, len(blocks))]
        if all(inside[i] == inside[1] and _alike(blocks[1], blocks[i], i) for i in range(2, len(blocks))):
            return Blocks(path, len(blocks))
    return None


def copy_on_meta(
    model: nn.Module, dtype: torch.dtype | None = None, blocks: Blocks | None = None, count: int = 0
) -> nn.Module:
    """A copy on the meta device, which allocates nothing; floating-point tensors in another dtype where one is given,
    and with the first `count` of the blocks where these are given."""
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
    """Put other tensors in the place of a model's parameters, buffers and plain attributes; shared ones stay shared."""
    changed: dict[int, Tensor] = {}
    held: list[Tensor] = []  # so that no id is given twice
    for module in model.modules():
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for place in places:
            for name, tensor in list(place.items()):
                if not isinstance(tensor, Tensor):
                    continue
                if id(tensor) not in changed:
                    held.append(tensor)
                    new = change(tensor)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    changed[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
                place[name] = changed[id(tensor)]


def on_meta(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of that shape on the meta device; in that dtype, if it is one of floating point."""
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


def _alike(second: nn.Module, other: nn.Module, index: int) -> bool:
    """Whether the block of that index is made as the one of index 1; a setting may be the block's own index."""
    own, its = (list(block.named_modules()) for block in (second, other))
    if len(own) != len(its):
        return False
    for (name, a), (other_name, b) in zip(own, its, strict=True):
        if name != other_name or type(a) is not type(b) or _shapes(a) != _shapes(b):
            return False
        ours, theirs = _settings(a), _settings(b)
        if ours.keys() != theirs.keys():
            return False
        if any(ours[key] != theirs[key] and (ours[key], theirs[key]) != (1, index) for key in ours):
            return False
    return True


def _shapes(module: nn.Module) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, p.shape, p.dtype) for name, p in module._parameters.items() if p is not None]


def _settings(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
