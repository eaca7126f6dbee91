"""Experts in peft's files, as `target_parameters`: one lora_A, one lora_B and one rank for all experts of a parameter.

lora_A is (E r, d_in), expert by expert; lora_B is (d_out, r E), slice by slice. peft wraps a layer once for each of its
parameters, the last one outermost: the key of each parameter says `base_layer` once for every wrapper around it.
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
from lorafamily.deploy.peft_names import ends_like
from lorafamily.deploy.plain import padded
from lorafamily.errors import FileError
from lorafamily.layers.experts import Expert, expert_kinds, expert_weights
from lorafamily.layers.target import Target
from lorafamily.names import join

Stack = tuple[Float[Tensor, "E d_out r"], Float[Tensor, "E r d_in"], float]


@torch.no_grad()
def stacked(adapters: Mapping[str, Adapter], targets: Mapping[str, Target]) -> dict[str, Stack]:
    """U, V and scale of all experts, by the full name of their parameter; parameters without any rank are left out.

    Experts whose rank is below the largest of the parameter, or that have no adapter, are padded with zeros. Where
    scales differ they are multiplied into U.
    """
    by_parameter: dict[str, dict[int, Adapter]] = defaultdict(dict)
    sizes: dict[str, int] = {}
    for at, adapter in adapters.items():
        kind = targets[at].kind
        if isinstance(kind, Expert):
            name = kind.stored_as(at)
            by_parameter[name][kind.index], sizes[name] = adapter, len(targets[at].parameter)
    found: dict[str, Stack] = {}
    for name, experts in by_parameter.items():
        factors = {index: tuple(factor.cpu() for factor in a.factors()) for index, a in experts.items()}
        most = max(len(V) for _, V in factors.values())
        scales = {adapter.scale for adapter in experts.values()}
        scale = scales.pop() if len(scales) == 1 else 1.0
        if most:
            some_U, some_V = next(iter(factors.values()))
            Us = some_U.new_zeros(sizes[name], len(some_U), most)
            Vs = some_V.new_zeros(sizes[name], most, some_V.shape[1])
            for index, (U, V) in factors.items():
                scaled = U if scale == experts[index].scale else experts[index].scale * U
                Us[index], Vs[index] = padded(scaled, V, most)
            found[name] = Us, Vs, scale
    return found


def stored(model: nn.Module, stacks: Mapping[str, Stack]) -> dict[str, Tensor]:
    """The tensors of stacked experts, under peft's keys without its prefix."""
    tensors = {}
    for name, key in _keys(model, stacks).items():
        U, V, _ = stacks[name]
        tensors[f"{key}.lora_A.weight"] = V.flatten(0, 1)
        tensors[f"{key}.lora_B.weight"] = U.permute(1, 2, 0).flatten(1)
    return tensors


def shared_out(
    model: nn.Module,
    target_parameters: Iterable[str],
    factors: dict[str, Any],
    rank_of: Callable[[str], int],
    path: Path,
) -> tuple[dict[str, Target], dict[str, str]]:
    """Divide a file's factors of whole parameters, in `factors`, among their experts.

    Returns the experts as targets, and for each expert the full name of its parameter, which ranks and scales go by.
    `target_parameters`: those in the file's settings, names or ends of names; `rank_of`: by a parameter's full name.

    Raises:
        FileError: factors of a parameter are missing, or not of the size that all its experts need.
    """
    present = [
        join(at, name)
        for at, module in model.named_modules()
        for name in expert_weights(module)
        if ends_like(join(at, name), target_parameters)
    ]
    stacks: dict[str, tuple[Tensor, Tensor]] = {}
    for name, key in _keys(model, present).items():
        U, V = factors.pop(key, (None, None))
        if U is None or V is None:
            missing = "B" if U is None else "A"
            raise FileError(f"{path}: lora_{missing} of {name} is missing, which target_parameters list")
        rank, experts = int(rank_of(name)), len(model.get_parameter(name))
        if len(V) != rank * experts or U.shape[1] != rank * experts:
            raise FileError(
                f"{path}: lora_A and lora_B of {name} are {tuple(V.shape)} and {tuple(U.shape)}; for {experts} "
                f"experts of rank {rank} they need {rank * experts} rows and columns"
            )
        stacks[name] = U.unflatten(1, (rank, experts)), V.unflatten(0, (experts, rank))
    targets: dict[str, Target] = {}
    parameter_of: dict[str, str] = {}
    for at, layer in model.named_modules():
        for kind in expert_kinds(layer):
            expert, parameter = join(at, kind.path), join(at, kind.held_in)
            if parameter in stacks:
                targets[expert], parameter_of[expert] = Target(layer, kind), parameter
                U, V = stacks[parameter]
                factors[expert] = U[..., kind.index].contiguous(), V[kind.index].contiguous()
    return targets, parameter_of


def _keys(model: nn.Module, parameters: Iterable[str]) -> dict[str, str]:
    """peft's key for each of these parameters, by its full name."""
    by_layer: dict[str, list[str]] = defaultdict(list)
    for full in parameters:
        at, _, name = full.rpartition(".")
        by_layer[at].append(name)
    keys: dict[str, str] = {}
    for at, names in by_layer.items():
        order = [name for name in model.get_submodule(at)._parameters if name in names]
        keys |= {join(at, name): at + ".base_layer" * (len(order) - 1 - i) for i, name in enumerate(order)}
    return keys
