"""Writes Hugging Face `peft`'s folders, which peft and inference servers load.

A folder holds `adapter_model.safetensors`, with `lora_A` (r, d_in) and `lora_B` (d_out, r) for every layer, and
`adapter_config.json`. The scale is lora_alpha / r, or lora_alpha / √r with `use_rslora`; `rank_pattern` and
`alpha_pattern` give single layers other values.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.deploy.diffusers_files import prefix_of, write_diffusers
from lorafamily.deploy.folder import write_json, write_tensors
from lorafamily.deploy.model_card import write_card
from lorafamily.deploy.peft_config import base_settings, patterns, refuse_kernels, target_settings
from lorafamily.deploy.peft_experts import Stack, stacked, stored
from lorafamily.deploy.peft_names import (
    CONFIG,
    INSIDE,
    PREFIX,
    TENSORS,
    groups_of,
    layer_name,
    left_out,
    refuse_shared,
    whole_layers,
)
from lorafamily.deploy.plain import padded
from lorafamily.deploy.tied import tying, under_all_names
from lorafamily.deploy.writable import refuse_not_finite
from lorafamily.errors import StateError
from lorafamily.layers.experts import Expert
from lorafamily.layers.extra_trained import extra_trained_values
from lorafamily.layers.kinds import LayerKind, kind_of, whole_update
from lorafamily.layers.placement import (
    adapted,
    noted,
    placement_of,
    refuse_unsaved,
    targets_of,
    warn_of_no_session,
    warn_of_no_step,
    warn_over_budget,
)
from lorafamily.layers.rows import Rows
from lorafamily.layers.site import NAME
from lorafamily.layers.standard import Convolution
from lorafamily.layers.state import Placement
from lorafamily.layers.target import Target

Layout = Literal["peft", "serving", "diffusers"]
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM accepts, without 1, which other servers do not accept."""
Tensors = dict[str, Tensor]
Update = tuple[Tensor, Tensor, float]
"""U, V and s of a layer's ΔW."""


@dataclass(frozen=True)
class _PlainLoRA:
    """Adapters as plain LoRA: modules and updates by layer, and experts in 3-D parameters by the parameter's name."""

    model: nn.Module
    placement: Placement
    layers: dict[str, nn.Module]
    updates: dict[str, Update]
    stacks: dict[str, Stack]


def export_peft(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    layout: Layout = "peft",
    ranks: Sequence[int] = SERVED_RANKS,
    base: str | None = None,
    card: bool = True,
) -> Path:
    """Write the adapters of one name (default: the active ones) as a LoRA folder that others read; returns the folder.

    Every method becomes plain LoRA on the pristine base: a frozen initial update becomes extra ranks, modules
    without rank are left out, and extra trained parameters go into `modules_to_save`. Experts in 3-D parameters become
    `target_parameters`, for which peft has one rank: lower ones are padded with zeros.

    Args:
        layout: "peft": true ranks and scales, by pattern. "serving": for servers that read only r, lora_alpha and the
            tensors: one rank for all, padded with zeros to the next of `ranks`, the scale multiplied into lora_B and
            lora_alpha = r; layers that SGLang or vLLM fuse with adapted ones get factors of zeros. "diffusers": one
            file for `load_lora_adapter` and `load_lora_weights`, the scale multiplied into lora_B.
        ranks: those that the server accepts; only for "serving".
        base: name on the Hub or folder where clients find the base; default: where the model was loaded from.
        card: also write a model card (`README.md` with the method, the budget and what the Hub asks for, `ranks.png`);
            drawing takes a second. A `README.md` that somebody else wrote there stays.

    Raises:
        StateError: nothing to export, something that such a file cannot hold, or a number that is not finite; the
            message names it.
        FileError: a file cannot be written.
    """
    if layout not in ("peft", "serving", "diffusers"):
        raise StateError(f'layout={layout!r}: must be "peft", "serving" or "diffusers"')
    if layout != "serving" and ranks is not SERVED_RANKS:
        raise StateError(f'ranks={list(ranks)} are those of a server; layout="{layout}" keeps the true ranks')
    if base is not None and layout == "diffusers" and not card:
        raise StateError(f"base={base!r}: a file of diffusers does not name the base, only its card does; leave it out")
    lora = _as_plain(model, name)
    folder = Path(path)
    if layout == "diffusers":
        tensors, config = _for_diffusers(lora)
    else:
        tensors, config = _for_peft(lora, base) if layout == "peft" else _for_servers(lora, ranks, base)
    refuse_not_finite(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "diffusers":
        write_diffusers(folder, lora.model, tensors, config)
    else:
        write_tensors(folder / TENSORS, {f"{PREFIX}{key}": value for key, value in tensors.items()}, {"format": "pt"})
        write_json(folder / CONFIG, config)
    if card:
        write_card(folder, lora.model, lora.placement, layout, base)
    return folder


def _as_plain(model: nn.Module, name: str | None) -> _PlainLoRA:
    placement = placement_of(model, name)
    refuse_unsaved(model, placement)
    warn_of_no_session(placement)
    warn_of_no_step(placement)
    warn_over_budget(placement)
    model, _ = noted(model)
    targets = targets_of(model)
    refuse_shared(model, [targets[at].layer for at in placement.adapters])
    stacks = stacked(placement.adapters, targets)
    updates = _by_layer(placement.adapters, targets)
    layers = {layer_name(at, target): target.layer for at, target in targets.items()}
    if not stacks and not any(len(V) for _, V, _ in updates.values()):
        raise StateError(f'adapter "{placement.name}" has no rank left in any module: there is nothing to export')
    return _PlainLoRA(model, placement, layers, updates, stacks)


def _for_peft(lora: _PlainLoRA, base: str | None) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and settings for `layout="peft"`."""
    model, layers, stacks = lora.model, lora.layers, lora.stacks
    updates = {at: (U, V, s) for at, (U, V, s) in lora.updates.items() if len(V)}
    refuse_kernels(model, updates)
    heads = _heads(model, lora.placement)
    ranks = {at: len(V) * groups_of(layers[at]) for at, (_, V, _) in updates.items()}
    ranks |= {at: V.shape[1] for at, (_, V, _) in stacks.items()}
    scales = {at: s for at, (_, _, s) in (updates | stacks).items()}
    config = base_settings(model, [layers[at] for at in updates], heads, base) | patterns(ranks, scales)
    config |= target_settings(model, sorted(updates), sorted(stacks)) | {"modules_to_save": sorted(heads) or None}
    config |= tying(model, heads)
    tensors = stored(model, stacks)
    for at, (U, V, _) in updates.items():
        tensors |= _stored(at, layers[at], U, V)
    return tensors | {f"{at}.{key}": value for at, values in heads.items() for key, value in values.items()}, config


def _for_servers(lora: _PlainLoRA, ranks: Sequence[int], base: str | None) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and settings for `layout="serving"`."""
    _refuse_more_than_layers(lora, "servers load", "a file of plain layers")
    largest = max(len(V) for _, V, _ in lora.updates.values())
    rank = min((rank for rank in ranks if rank >= largest), default=None)
    if rank is None:
        raise StateError(
            f"the largest rank is {largest}, and the server accepts {', '.join(map(str, sorted(ranks)))}; compress the "
            "adapter first, or give ranks=[...] that it accepts"
        )
    able = whole_layers(lora.model)
    factors = {at: padded(s * U, V, rank) for at, (U, V, s) in lora.updates.items()}
    some, _ = next(iter(factors.values()))
    for at in left_out(able, lora.updates):
        d_out, d_in = able[at].shape
        factors[at] = some.new_zeros(d_out, rank), some.new_zeros(rank, d_in)
    tensors: Tensors = {}
    for at, (U, V) in factors.items():
        layer = able[at].layer
        kind = kind_of(layer)
        if kind is None or not kind.linear:
            raise StateError(f"{at} is a {type(layer).__name__}: servers load adapters of linear layers only")
        tensors |= _stored(at, layer, U, V)
    config = base_settings(lora.model, [able[at].layer for at in factors], (), base)
    config |= {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None}
    # Servers expect the last components of names, which must match no other layers.
    short = {at.rpartition(".")[2] for at in factors}
    only_these = factors.keys() == {at for at in able if at.rpartition(".")[2] in short}
    return tensors, config | {"target_modules": sorted(short if only_these else factors)}


def _for_diffusers(lora: _PlainLoRA) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and settings for `layout="diffusers"`."""
    if prefix_of(lora.model) is None:
        raise StateError(
            f'a {type(lora.model).__name__} is no model of diffusers; layout="diffusers" is for a UNet or a '
            "transformer of one of its pipelines"
        )
    _refuse_more_than_layers(lora, "diffusers loads", "diffusers' LoRA files")
    tensors: Tensors = {}
    ranks: dict[str, int] = {}
    for at, (U, V, s) in lora.updates.items():
        layer = lora.layers[at]
        if isinstance(layer, nn.MultiheadAttention | nn.Embedding):
            raise StateError(
                f"{at} is a {type(layer).__name__}: diffusers loads adapters of linear layers and convolutions"
            )
        if len(V):
            tensors |= _stored(at, layer, s * U, V)
            ranks[at] = len(V) * groups_of(layer)
    return tensors, patterns(ranks, dict.fromkeys(ranks, 1.0)) | {"target_modules": sorted(ranks)}


def _refuse_more_than_layers(lora: _PlainLoRA, they_load: str, their_file: str) -> None:
    instead = 'export with layout="peft", or merge and save_pretrained'
    if trained := lora.placement.inactive_values:
        raise StateError(f"{they_load} no trained {', '.join(trained)}, only low-rank tensors; {instead}")
    if lora.stacks:
        names = ", ".join(lora.stacks)
        raise StateError(f"{names} hold experts in one parameter, which {their_file} cannot hold; {instead}")


def _stored(at: str, module: nn.Module, U: Tensor, V: Tensor) -> Tensors:
    """The factors of one layer under peft's names and in its shapes."""
    kind = kind_of(module)
    if kind is not None and kind.linear:
        return {f"{at}.lora_A.weight": V, f"{at}.lora_B.weight": U}
    if isinstance(module, nn.MultiheadAttention):  # peft adapts both projections, at one rank
        none = {"A": V.new_zeros(V.shape), "B": U.new_zeros(module.embed_dim, len(V))}
        both = {f"{at}.lora_A": V, f"{at}.lora_B": U} | {f"{at}{INSIDE}.lora_{key}": zero for key, zero in none.items()}
        return {f"{key}.weight": value for key, value in both.items()}
    if isinstance(module, nn.Embedding):
        return {f"{at}.lora_embedding_A": V, f"{at}.lora_embedding_B": U}
    if isinstance(module, Convolution):
        if set(module.dilation) != {1} or module.padding_mode != "zeros":
            raise StateError(
                f"{at} has dilation {module.dilation} and padding mode {module.padding_mode!r}, which peft's LoRA "
                "ignores; merge it instead"
            )
        kernel = module.weight.shape[2:]
        # peft's A reads all channels. A group reads only its own, so A has a block for each group and zeros elsewhere.
        blocks = torch.block_diag(*[V] * module.groups).view(module.groups * len(V), module.in_channels, *kernel)
        return {f"{at}.lora_A.weight": blocks, f"{at}.lora_B.weight": U.view(*U.shape, *[1] * len(kernel))}
    raise StateError(f"{at} is a {type(module).__name__}, which peft has no LoRA for")


@torch.no_grad()
def _by_layer(adapters: Mapping[str, Adapter], targets: Mapping[str, Target]) -> dict[str, Update]:
    """The update of every layer, on the CPU. Adapters on parts of a layer become one with their ranks side by side;
    experts are left to `stacked`."""
    acting: dict[str, list[tuple[LayerKind, Adapter]]] = defaultdict(list)
    for at, adapter in adapters.items():
        kind = targets[at].kind
        if isinstance(kind, Rows) and kind.held_in not in ("weight", "in_proj_weight"):
            raise StateError(
                f"{at} of an nn.MultiheadAttention: peft applies an update of the output projection twice, and has "
                f'none for keys of another width; apply with exclude=r"{re.escape(at)}$", or merge'
            )
        if not isinstance(kind, Expert):
            acting[layer_name(at, targets[at])].append((kind, adapter))
    updates = {}
    # Whole layers come first in a file, as do the parts in a layer that has adapters on both.
    for at, of_layer in sorted(acting.items(), key=lambda item: all(isinstance(kind, Rows) for kind, _ in item[1])):
        U, V, s = whole_update(sorted(of_layer, key=lambda item: not isinstance(item[0], Rows)))
        updates[at] = U.cpu(), V.cpu(), s
    return updates


def _heads(model: nn.Module, placement: Placement) -> dict[str, dict[str, Tensor]]:
    """State dicts by name of the modules whose parameters trained along: peft saves whole modules only, and none that
    carry an adapter or have modules inside."""
    _, state = adapted(model)
    trained = under_all_names(model, extra_trained_values(model, state, placement))
    owners = {at.rpartition(".")[0] for at in trained}
    for owner in owners:
        if owner in placement.adapters or not owner or any(model.get_submodule(owner).children()):
            names = ", ".join(at for at in trained if at.rpartition(".")[0] == owner)
            raise StateError(f"{names} trained along with the adapters; peft's modules_to_save cannot hold it")
    # peft takes every module whose name ends like one of those listed.
    return {
        at: {key: trained.get(f"{at}.{key}", value) for key, value in module.state_dict().items() if NAME not in key}
        for at, module in model.named_modules()
        if at.endswith(tuple(owners))
    }
