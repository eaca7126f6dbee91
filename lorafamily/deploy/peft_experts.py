"""Experts in peft's files, where they are `target_parameters`: one lora_A, one lora_B and one rank for all experts of a
parameter.

lora_A is (E r, d_in), expert by expert; lora_B is (d_out, r E), slice by slice. Several parameters of one layer are
wrapped one around the other, the last one outermost: the others' keys say `base_layer` once for each around them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.deploy.plain import padded
from lorafamily.errors import FileError
from lorafamily.layers.experts import Expert, expert_kinds, expert_weights
from lorafamily.layers.target import Target
from lorafamily.names import join

Stack = tuple[Float[Tensor, "E d_out r"], Float[Tensor, "E r d_in"], float]


@torch.no_grad()
def stacked(adapters: Mapping[str, Adapter], targets: Mapping[str, Target]) -> dict[str, Stack]:
    """U, V and scale of all experts, by the full name of the parameter; those without any rank are left out.

    Ranks below the largest of the parameter are filled up with zeros, as are experts without an adapter. Where scales
    differ they are multiplied into U.
    """
    of: dict[str, dict[int, Adapter]] = defaultdict(dict)
    sizes: dict[str, int] = {}
    for at, adapter in adapters.items():
        kind = targets[at].kind
        if isinstance(kind, Expert):
            name = kind.stored_as(at)
            of[name][kind.index], sizes[name] = adapter, len(targets[at].parameter)
    found: dict[str, Stack] = {}
    for name, experts in of.items():
        factors = {index: tuple(factor.cpu() for factor in a.factors()) for index, a in experts.items()}
        most = max(len(V) for _, V in factors.values())
        scales = {adapter.scale for adapter in experts.values()}
        scale = scales.pop() if len(scales) == 1 else 1.0
        if most:
            some_U, some_V = next(iter(factors.values()))
            Us = some_U.new_zeros(sizes[name], len(some_U), most)
            Vs = some_V.new_zeros(sizes[name], most, some_V.shape[1])
            for index, (U, V) in factors.items():
                own = U if scale == experts[index].scale else experts[index].scale * U
                Us[index], Vs[index] = padded(own, V, most)
            found[name] = Us, Vs, scale
    return found


def stored(model: nn.Module, stacks: Mapping[str, Stack]) -> dict[str, Tensor]:
    """Their tensors, under peft's keys without its prefix."""
    tensors = {}
    for layer, names in _by_layer(model, stacks).items():
        for name, key in names.items():
            U, V, _ = stacks[join(layer, name)]
            tensors[f"{key}.lora_A.weight"] = V.flatten(0, 1)
            tensors[f"{key}.lora_B.weight"] = U.permute(1, 2, 0).flatten(1)
    return tensors


def shared_out(
    model: nn.Module,
    listed: Iterable[str] | None,
    factors: dict[str, Any],
    rank_of: Callable[[str], int],
    path: Path,
) -> tuple[dict[str, Target], dict[str, str]]:
    """The experts of the parameters that a configuration lists, as targets; what a file holds of a parameter is taken
    out of `factors` and shared out to them. Also the parameter of each expert, by which ranks and scales are noted.

    `rank_of`: the rank of a parameter, of its full name.

    Raises:
        FileError: a parameter's factors are missing, or not of the size that all its experts need.
    """
    listed = list(listed or [])
    present = [
        join(at, name)
        for at, module in model.named_modules()
        for name in expert_weights(module)
        if any(join(at, name) == one or join(at, name).endswith(f".{one}") for one in listed)
    ]
    targets: dict[str, Target] = {}
    parameter_of: dict[str, str] = {}
    for at, names in _by_layer(model, present).items():
        layer = model.get_submodule(at)
        pairs = {name: factors.pop(key, (None, None)) for name, key in names.items()}
        for kind in expert_kinds(layer):
            if kind.held_in in pairs:
                one, parameter = join(at, kind.path), join(at, kind.held_in)
                targets[one], parameter_of[one] = Target(layer, kind), parameter
                factors[one] = _of_expert(kind.index, len(layer.get_parameter(kind.held_in)), *pairs[kind.held_in],
                                          rank=rank_of(parameter), name=parameter, path=path)  # fmt: skip
    return targets, parameter_of


def _of_expert(
    index: int, experts: int, U: Tensor | None, V: Tensor | None, *, rank: int, name: str, path: Path
) -> tuple[Tensor, Tensor]:
    if U is None or V is None:
        raise FileError(f"{path}: lora_{'B' if U is None else 'A'} of {name} is missing, which target_parameters list")
    if len(V) != rank * experts or U.shape[1] != rank * experts:
        raise FileError(
            f"{path}: lora_A and lora_B of {name} are {tuple(V.shape)} and {tuple(U.shape)}; for {experts} experts of "
            f"rank {rank} they need {rank * experts} rows and columns"
        )
    return U.unflatten(1, (rank, experts))[..., index].contiguous(), V.unflatten(0, (experts, rank))[index].contiguous()


def _by_layer(model: nn.Module, parameters: Iterable[str]) -> dict[str, dict[str, str]]:
    """By layer, its own among the given parameters, with the key of what peft wraps around the layer for each."""
    of: dict[str, list[str]] = defaultdict(list)
    for full in parameters:
        at, _, name = full.rpartition(".")
        of[at].append(name)
    keys = {}
    for at, names in of.items():
        order = [name for name in model.get_submodule(at)._parameters if name in names]
        keys[at] = {name: at + ".base_layer" * (len(order) - 1 - i) for i, name in enumerate(order)}
    return keys
