"""Hugging Face `peft`'s folders: write what it and inference servers load.

A file is `adapter_model.safetensors` with `lora_A` (r, d_in) and `lora_B` (d_out, r) for every layer, and
`adapter_config.json`. Their scale is lora_alpha / r, or lora_alpha / √r with `use_rslora`; `rank_pattern` and
`alpha_pattern` give single layers other values.
"""

from __future__ import annotations

import os
import re
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
from lorafamily.deploy.peft_config import addressed, fixed, patterns, refuse_foreign, short_names
from lorafamily.deploy.peft_experts import Stack, stacked, stored
from lorafamily.deploy.peft_names import (
    CONFIG,
    INSIDE,
    PREFIX,
    TENSORS,
    groups_of,
    layer_name,
    whole_layers,
)
from lorafamily.deploy.plain import padded
from lorafamily.deploy.serving import SERVED_RANKS, left_out, served_rank
from lorafamily.deploy.tied import tying, under_all_names
from lorafamily.errors import StateError
from lorafamily.layers.experts import Expert
from lorafamily.layers.extra_trained import extra_trained_values
from lorafamily.layers.kinds import kind_of
from lorafamily.layers.placement import adapted, noted, placement_of, refuse_unsaved, targets_of, warn_of_no_session
from lorafamily.layers.rows import Rows
from lorafamily.layers.site import NAME
from lorafamily.layers.standard import Convolution
from lorafamily.layers.state import Placement
from lorafamily.layers.target import Target

Layout = Literal["peft", "serving", "diffusers"]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class _Collected:
    """Adapters as plain LoRA. `factors`: (U, V) by layer, `scales`: s by layer, `layers`: the modules themselves,
    `stacks`: of experts in one parameter, by its name."""

    model: nn.Module
    placement: Placement
    layers: dict[str, nn.Module]
    factors: dict[str, tuple[Tensor, Tensor]]
    scales: dict[str, float]
    stacks: Mapping[str, Stack]
    largest: int


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
    without rank are left out, and what trained along with the adapters goes into `modules_to_save`. Experts in 3-D
    parameters become `target_parameters`, for which peft has one rank: lower ones are filled up with zeros.

    Args:
        layout: "peft": true ranks and scales, by pattern. "serving": what needs nothing but r, lora_alpha and the
            tensors: one rank for all, padded with zeros to the next of `ranks`, the scale multiplied into lora_B and
            lora_alpha = r; layers that SGLang or vLLM fuse with adapted ones get factors of zeros. "diffusers": one
            file for `load_lora_adapter` and `load_lora_weights`, the scale multiplied into lora_B.
        ranks: those that the server accepts; only for "serving".
        base: name on the Hub or folder where clients find the base; default: where the model was loaded from.
        card: write a model card along (`README.md` with the method, the budget and what the Hub asks for, `ranks.png`);
            drawing takes a second. A `README.md` that somebody else wrote there stays.

    Raises:
        StateError: nothing to export, or something that such a file cannot hold; it is named.
        FileError: a file cannot be written.
    """
    if layout not in ("peft", "serving", "diffusers"):
        raise StateError(f'layout={layout!r}: must be "peft", "serving" or "diffusers"')
    if layout != "serving" and ranks is not SERVED_RANKS:
        raise StateError(f'ranks={list(ranks)} are those of a server; layout="{layout}" keeps the true ranks')
    if base is not None and layout == "diffusers" and not card:
        raise StateError(f"base={base!r}: a file of diffusers says nothing of the base, only its card does")
    given = _collected(model, name)
    folder = Path(path)
    if layout == "diffusers":
        prefix, tensors, settings = _for_diffusers(given)
        folder.mkdir(parents=True, exist_ok=True)
        write_diffusers(folder, prefix, tensors, settings)
    else:
        tensors, config = _for_peft(given, base) if layout == "peft" else _for_servers(given, ranks, base)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / TENSORS, {f"{PREFIX}{key}": value for key, value in tensors.items()}, {"format": "pt"})
        write_json(folder / CONFIG, config)
    if card:
        write_card(folder, given.model, given.placement, layout, base)
    return folder


def _collected(model: nn.Module, name: str | None) -> _Collected:
    placement = placement_of(model, name)
    refuse_unsaved(model, placement)
    warn_of_no_session(placement)
    model, _ = noted(model)
    targets = targets_of(model)
    stacks = stacked(placement.adapters, targets)
    factors, scales = _by_layer(placement.adapters, targets)
    layers = {name: target.layer for at, target in targets.items() for name in [layer_name(at, target)]}
    largest = max([*(len(V) for _, V in factors.values()), *(V.shape[1] for _, V, _ in stacks.values())], default=0)
    if not largest:
        raise StateError(f'adapter "{placement.name}" has no rank left in any module: there is nothing to export')
    return _Collected(model, placement, layers, factors, scales, stacks, largest)


def _for_peft(given: _Collected, base: str | None) -> tuple[Tensors, dict[str, Any]]:
    model, layers, stacks = given.model, given.layers, given.stacks
    factors = {at: (U, V) for at, (U, V) in given.factors.items() if len(V)}
    refuse_foreign(model, factors)
    heads = _heads(model, given.placement)
    all_ranks = {at: len(V) * groups_of(layers[at]) for at, (_, V) in factors.items()}
    all_ranks |= {at: V.shape[1] for at, (_, V, _) in stacks.items()}
    all_scales = {at: given.scales[at] for at in factors} | {at: scale for at, (*_, scale) in stacks.items()}
    config = fixed(model, [layers[at] for at in factors], heads, base) | patterns(all_ranks, all_scales)
    config |= addressed(model, sorted(factors), sorted(stacks)) | {"modules_to_save": sorted(heads) or None}
    config |= tying(model, heads)
    tensors = stored(model, stacks)
    for at, (U, V) in factors.items():
        tensors |= _stored(at, layers[at], U, V)
    return tensors | {f"{at}.{key}": value for at, values in heads.items() for key, value in values.items()}, config


def _for_servers(given: _Collected, ranks: Sequence[int], base: str | None) -> tuple[Tensors, dict[str, Any]]:
    _refuse_more_than_layers(given, "servers load", "a file of plain layers")
    rank = served_rank(given.largest, ranks)
    able = whole_layers(given.model)
    factors = {at: padded(given.scales[at] * U, V, rank) for at, (U, V) in given.factors.items()}
    some, _ = next(iter(factors.values()))
    for at in left_out(able, given.factors):
        d_out, d_in = able[at].shape
        factors[at] = some.new_zeros(d_out, rank), some.new_zeros(rank, d_in)
    tensors: Tensors = {}
    for at, (U, V) in factors.items():
        layer = able[at].layer
        kind = kind_of(layer)
        if kind is None or not kind.linear:
            raise StateError(f"{at} is a {type(layer).__name__}: servers load adapters of linear layers only")
        tensors |= _stored(at, layer, U, V)
    config = fixed(given.model, [able[at].layer for at in factors], (), base)
    config |= {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None}
    return tensors, config | {"target_modules": short_names(given.model, factors)}


def _for_diffusers(given: _Collected) -> tuple[str, Tensors, dict[str, Any]]:
    """By which name the pipeline calls the model, the tensors without it, and settings of peft."""
    prefix = prefix_of(given.model)
    if prefix is None:
        raise StateError(
            f'a {type(given.model).__name__} is no model of diffusers; layout="diffusers" is for a UNet or a '
            "transformer of one of its pipelines"
        )
    _refuse_more_than_layers(given, "diffusers loads", "diffusers' LoRA files")
    tensors: Tensors = {}
    ranks: dict[str, int] = {}
    for at, (U, V) in given.factors.items():
        layer = given.layers[at]
        if isinstance(layer, nn.MultiheadAttention | nn.Embedding):
            raise StateError(
                f"{at} is a {type(layer).__name__}: diffusers loads adapters of linear layers and convolutions"
            )
        if len(V):
            tensors |= _stored(at, layer, given.scales[at] * U, V)
            ranks[at] = len(V) * groups_of(layer)
    return prefix, tensors, patterns(ranks, dict.fromkeys(ranks, 1.0)) | {"target_modules": sorted(ranks)}


def _refuse_more_than_layers(given: _Collected, they_load: str, their_file: str) -> None:
    if given.placement.inactive_values:
        raise StateError(
            f"{they_load} no trained {', '.join(given.placement.inactive_values)}, only low-rank tensors; export with "
            'layout="peft", or merge and save_pretrained'
        )
    if given.stacks:
        raise StateError(
            f"{', '.join(given.stacks)} hold experts in one parameter, which {their_file} cannot hold; export "
            'with layout="peft", or merge and save_pretrained'
        )


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
                f"{at} has dilation {module.dilation} and padding mode {module.padding_mode!r}, of which peft's LoRA "
                "knows nothing; merge it instead"
            )
        kernel = module.weight.shape[2:]
        # peft's A reads all channels; where groups read their own only, it has a block for each and zeros elsewhere.
        blocks = torch.block_diag(*[V] * module.groups).view(module.groups * len(V), module.in_channels, *kernel)
        return {
            f"{at}.lora_A.weight": blocks,
            f"{at}.lora_B.weight": U.view(*U.shape, *[1] * len(kernel)),
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


def _heads(model: nn.Module, placement: Placement) -> dict[str, dict[str, Tensor]]:
    """Whole modules with what trained along with the adapters: peft saves no single parameters."""
    _, state = adapted(model)
    trained = extra_trained_values(model, state, placement)
    trained = under_all_names(model, trained)
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
