"""Hugging Face `peft`'s folders: write what it and inference servers load.

A file is `adapter_model.safetensors` with `lora_A` (r, d_in) and `lora_B` (d_out, r) for every layer, and
`adapter_config.json`. Their scale is lora_alpha / r, or lora_alpha / √r with `use_rslora`; `rank_pattern` and
`alpha_pattern` give single layers other values.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.beside import trained_beside
from lorafamily.deploy.folder import write_json, write_tensors
from lorafamily.deploy.peft_experts import stacked, stored
from lorafamily.deploy.peft_names import (
    CONFIG,
    INSIDE,
    NAMES_OF_EXPERTS,
    PREFIX,
    TENSORS,
    groups_of,
    layer_name,
    pattern_of,
    whole_layers,
)
from lorafamily.deploy.plain import padded
from lorafamily.errors import StateError
from lorafamily.experts import Expert
from lorafamily.layers import Convolution, kind_of
from lorafamily.parts import Rows, Target
from lorafamily.placement import Placement, noted, placement_of, refuse_untold, targets_of, warn_of_no_session
from lorafamily.site import NAME, base_parameters

SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM accepts, but for 1, where other servers begin higher."""


def export_peft(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    layout: Literal["peft", "serving"] = "peft",
    ranks: Sequence[int] = SERVED_RANKS,
) -> Path:
    """Write the adapters of one name (default: the active ones) as a LoRA folder of `peft`; returns the folder.

    Every method becomes plain LoRA on the pristine base: a frozen start goes along as extra ranks, modules without
    rank are left out, and what trained beside the adapters goes into `modules_to_save`. Experts in 3-D parameters go
    out as `target_parameters`, for which peft has one rank: lower ones are filled up with zeros.

    Args:
        layout: "peft": true ranks and scales, by pattern. "serving": what needs nothing but r, lora_alpha and the
            tensors: one rank for all, padded with zeros to the next of `ranks`, the scale multiplied into lora_B and
            lora_alpha = r.
        ranks: those that the server accepts.

    Raises:
        StateError: nothing to export, or something that such a file cannot hold; it is named.
        FileError: a file cannot be written.
    """
    placement = placement_of(model, name)
    refuse_untold(model, placement)
    warn_of_no_session(placement)
    model, _ = noted(model)
    targets = targets_of(model)
    stacks = stacked(placement.adapters, targets)
    factors, scales = _by_layer(placement.adapters, targets)
    layers = {name: target.layer for at, target in targets.items() for name in [layer_name(at, target)]}
    largest = max([*(len(V) for _, V in factors.values()), *(V.shape[1] for _, V, _ in stacks.values())], default=0)
    if not largest:
        raise StateError(f'adapter "{placement.name}" has no rank left in any module: there is nothing to export')
    if layout == "peft":
        factors = {at: (U, V) for at, (U, V) in factors.items() if len(V)}
        scales = {at: scales[at] for at in factors}
        heads = _heads(model, placement)
        all_ranks = {at: len(V) * groups_of(layers[at]) for at, (_, V) in factors.items()}
        all_ranks |= {at: V.shape[1] for at, (_, V, _) in stacks.items()}
        config = _patterns(all_ranks, scales | {at: scale for at, (*_, scale) in stacks.items()})
        config |= _addressed(model, sorted(factors), sorted(stacks)) | {"modules_to_save": sorted(heads) or None}
    elif layout == "serving":
        if placement.parked:
            raise StateError(
                f"servers load no trained {', '.join(placement.parked)}, only low-rank tensors; export with "
                'layout="peft", or merge and save_pretrained'
            )
        if stacks:
            raise StateError(
                f"{', '.join(stacks)} hold experts in one parameter, which a file of plain layers cannot hold; export "
                'with layout="peft", or merge and save_pretrained'
            )
        rank = _served_rank(largest, ranks)
        factors = {at: padded(scales[at] * U, V, rank) for at, (U, V) in factors.items()}
        heads = {}
        config = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None}
        config["target_modules"] = _short_names(model, factors)
    else:
        raise StateError(f'layout={layout!r}: must be "peft" or "serving"')

    tensors = {f"{PREFIX}{key}": value for key, value in stored(model, stacks).items()}
    for at, (U, V) in factors.items():
        tensors |= _stored(at, layers[at], U, V, layout)
    for at, values in heads.items():
        tensors |= {f"{PREFIX}{at}.{key}": value for key, value in values.items()}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / TENSORS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, _fixed(model, [layers[at] for at in factors]) | config)
    return folder


def _stored(at: str, module: nn.Module, U: Tensor, V: Tensor, layout: str) -> dict[str, Tensor]:
    """The factors of one layer under peft's names and in its shapes."""
    kind = kind_of(module)
    if kind is not None and kind.linear:
        return {f"{PREFIX}{at}.lora_A.weight": V, f"{PREFIX}{at}.lora_B.weight": U}
    if layout == "serving":
        raise StateError(f"{at} is a {type(module).__name__}: servers load adapters of linear layers only")
    if isinstance(module, nn.MultiheadAttention):  # peft adapts both projections, at one rank
        none = {"A": V.new_zeros(V.shape), "B": U.new_zeros(module.embed_dim, len(V))}
        both = {f"{at}.lora_A": V, f"{at}.lora_B": U} | {f"{at}{INSIDE}.lora_{key}": zero for key, zero in none.items()}
        return {f"{PREFIX}{key}.weight": value for key, value in both.items()}
    if isinstance(module, nn.Embedding):
        return {f"{PREFIX}{at}.lora_embedding_A": V, f"{PREFIX}{at}.lora_embedding_B": U}
    if isinstance(module, Convolution):
        if set(module.dilation) != {1} or module.padding_mode != "zeros":
            raise StateError(
                f"{at} has dilation {module.dilation} and padding mode {module.padding_mode!r}, of which peft's LoRA "
                "knows nothing; merge it instead"
            )
        kernel = module.weight.shape[2:]
        # peft's A reads all channels; where groups read their own only, it has a block for each and zeros elsewhere.
        blocks = torch.block_diag(*[V] * module.groups).view(module.groups * len(V), module.in_channels, *kernel)
        return {
            f"{PREFIX}{at}.lora_A.weight": blocks,
            f"{PREFIX}{at}.lora_B.weight": U.view(*U.shape, *[1] * len(kernel)),
        }
    raise StateError(f"{at} is a {type(module).__name__}, which peft has no LoRA for")


@torch.no_grad()
def _by_layer(
    adapters: Mapping[str, Adapter], targets: Mapping[str, Target]
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    """(U, V) and scale by layer. Adapters on parts of a layer become one with their ranks side by side."""
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    scales: dict[str, float] = {}
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for at, adapter in adapters.items():
        if isinstance(targets[at].kind, Expert):
            continue
        kind, (U, V) = targets[at].kind, (factor.cpu() for factor in adapter.factors())
        if isinstance(kind, Rows):
            if kind.held_in not in ("weight", "in_proj_weight"):
                raise StateError(
                    f"{at} of an nn.MultiheadAttention: peft adds what it has for an output projection twice, and has "
                    f'nothing for keys of another width; apply with exclude=r"{re.escape(at)}$", or merge'
                )
            parts.setdefault(layer_name(at, targets[at]), []).append((kind.spread(adapter.scale * U), V))
        else:
            factors[at], scales[at] = (U, V), adapter.scale
    for at, pairs in parts.items():
        if at in factors:
            pairs.append((scales[at] * factors[at][0], factors[at][1]))
        Us, Vs = zip(*pairs, strict=True)
        factors[at], scales[at] = (torch.cat(Us, 1), torch.cat(Vs, 0)), 1.0
    return factors, scales


def _served_rank(needed: int, ranks: Sequence[int]) -> int:
    enough = [rank for rank in sorted(ranks) if rank >= needed]
    if not enough:
        raise StateError(
            f"the largest rank is {needed}, and the server accepts {', '.join(map(str, sorted(ranks)))}; compress the "
            "adapter first, or give ranks=[...] that it accepts"
        )
    return enough[0]


def _patterns(ranks: Mapping[str, int], scales: Mapping[str, float]) -> dict[str, Any]:
    """r and lora_alpha of most layers, and patterns for the others, each matching the full name of one layer."""
    alphas = {at: _whole(scales[at] * rank) for at, rank in ranks.items()}
    r = max(sorted(set(ranks.values())), key=list(ranks.values()).count)
    alpha = max(sorted(set(alphas.values())), key=list(alphas.values()).count)
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {pattern_of(at): rank for at, rank in ranks.items() if rank != r},
        "alpha_pattern": {pattern_of(at): own for at, own in alphas.items() if own != alpha},
    }


def _addressed(model: nn.Module, names: Sequence[str], experts: Sequence[str]) -> dict[str, Any]:
    """How peft finds the layers: as modules or, some of them in models of fused experts, as parameters.

    For such models peft takes a module of an expert's name for the experts of an older file, and lets its adapter go
    without a word, be it that of a dense layer or of shared experts. Named as parameters, they are what they are.
    """
    fused = any(parameter.ndim == 3 and "expert" in name for name, parameter in base_parameters(model).items())
    taken = [name for name in names if fused and name.rpartition(".")[2] in NAMES_OF_EXPERTS]
    return {
        "target_modules": [name for name in names if name not in taken],
        "target_parameters": [*(f"{name}.weight" for name in taken), *experts] or None,
    }


def _whole(value: float) -> float | int:
    """16.0 → 16: peft's alpha is an int by its type, and takes a float."""
    return int(value) if float(value).is_integer() else float(value)


def _short_names(model: nn.Module, factors: Mapping[str, Any]) -> list[str]:
    """The last components of the layers' names, as servers expect, where those name just these layers; else all."""
    short = {at.rpartition(".")[2] for at in factors}
    able = whole_layers(model)
    return sorted(short) if {at for at in able if at.rpartition(".")[2] in short} == set(factors) else sorted(factors)


def _fixed(model: nn.Module, layers: Sequence[nn.Module]) -> dict[str, Any]:
    kinds = [kind_of(layer) for layer in layers]
    transposed = bool(kinds) and all(kind is not None and kind.name == "conv1d" for kind in kinds)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "init_lora_weights": True,
        "fan_in_fan_out": transposed,
    }


def _heads(model: nn.Module, placement: Placement) -> dict[str, dict[str, Tensor]]:
    """Whole modules with what trained beside the adapters: peft saves no single parameters."""
    _, state = noted(model)
    assert state is not None
    trained = trained_beside(model, placement.parked, placement.buffers, state.active == placement.name)
    owners = {at.rpartition(".")[0] for at in trained}
    for owner in owners:
        if owner in placement.adapters or not owner or any(model.get_submodule(owner).children()):
            names = ", ".join(at for at in trained if at.rpartition(".")[0] == owner)
            raise StateError(f"{names} trained beside the adapters; peft's modules_to_save cannot hold it")
    # peft takes every module whose name ends like one of those listed.
    return {
        at: {key: trained.get(f"{at}.{key}", value) for key, value in module.state_dict().items() if NAME not in key}
        for at, module in model.named_modules()
        if at.endswith(tuple(owners))
    }
