"""Hugging Face `peft`'s folders: write what it and inference servers load, read what it saved.

A file is `adapter_model.safetensors` with `lora_A` (r, d_in) and `lora_B` (d_out, r) for every layer, and
`adapter_config.json`. Their scale is lora_alpha / r, or lora_alpha / √r with `use_rslora`; `rank_pattern` and
`alpha_pattern` give single layers other values.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.beside import movable_buffers, trained_beside
from lorafamily.deploy.folder import listed, read_json, read_tensors, write_json, write_tensors
from lorafamily.deploy.peft_experts import shared_out, stacked, stored
from lorafamily.deploy.plain import noted_dropout, padded, place_plain
from lorafamily.deploy.tied import one_of_tied, tying, under_all_names
from lorafamily.errors import FileError, StateError
from lorafamily.experts import Expert
from lorafamily.layers import Convolution, kind_of
from lorafamily.parts import ReadRows, Rows, Target, possible_targets
from lorafamily.placement import (
    Model,
    Placement,
    check_can_place,
    noted,
    placement_of,
    refuse_untold,
    targets_of,
    warn_of_no_session,
)
from lorafamily.site import NAME, base_parameters

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FOLDER = f"what peft saves is a folder with {CONFIG} and {TENSORS}"
PREFIX = "base_model.model."
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM accepts, but for 1, where other servers begin higher."""

INSIDE = ".base_layer.out_proj"
"""Where the output projection of an nn.MultiheadAttention is in the layer that peft puts around that."""
NAMES_OF_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
"""What peft maps to fused experts; parts of names before transformers 5."""

UNDERSTOOD = {
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save", "lora_dropout"),
    *(
        "target_modules",
        "exclude_modules",
        "target_parameters",
        "layers_to_transform",
        "layers_pattern",
        "fan_in_fan_out",
    ),
}
WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("runtime_config", "qalora_group_size", "ensure_weight_tying", "velora_config"),
}
"""Settings that say where a file comes from or how training went, not what it computes."""
PRISTINE_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` with which peft left the base weights as they were."""


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
    layers = {name: target.layer for at, target in targets.items() for name in [_layer_name(at, target)]}
    largest = max([*(len(V) for _, V in factors.values()), *(V.shape[1] for _, V, _ in stacks.values())], default=0)
    if not largest:
        raise StateError(f'adapter "{placement.name}" has no rank left in any module: there is nothing to export')
    if layout == "peft":
        factors = {at: (U, V) for at, (U, V) in factors.items() if len(V)}
        scales = {at: scales[at] for at in factors}
        heads = _heads(model, placement)
        all_ranks = {at: len(V) * _groups(layers[at]) for at, (_, V) in factors.items()}
        all_ranks |= {at: V.shape[1] for at, (_, V, _) in stacks.items()}
        config = _patterns(all_ranks, scales | {at: scale for at, (*_, scale) in stacks.items()})
        config |= _addressed(model, sorted(factors), sorted(stacks)) | {"modules_to_save": sorted(heads) or None}
        config |= tying(model, heads)
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


def import_peft(model: Model, path: str | os.PathLike[str], name: str = "default") -> Model:
    """Put a LoRA that `peft` saved into a model of the same architecture, and make it the active adapter.

    rsLoRA, rank and alpha patterns and `modules_to_save` are read. Nothing is changed if anything does not fit.

    Raises:
        FileError: the folder lacks a file, a file is damaged or made for another model, or it holds what LoRA of this
            package is not, such as DoRA; it is named.
        StateError: the name is taken, or the model is merged.
        TargetError: a layer cannot carry an adapter, as where it has an attribute "lorafamily" of its own.
    """
    owner = check_can_place(model, name)
    folder = Path(path)
    config = read_json(folder / CONFIG, FOLDER)
    _check_config(config, folder / CONFIG)
    tensors = {key.removeprefix(PREFIX): v for key, v in read_tensors(folder / TENSORS, FOLDER).items()}
    factors: dict[str, Any] = _pairs(tensors)
    patterns, nominal = config.get("rank_pattern"), config["r"]
    experts, parameter_of = shared_out(
        owner,
        config.get("target_parameters"),
        factors,
        lambda parameter: int(_by_pattern(patterns, parameter, nominal)),
        folder / TENSORS,
    )
    named = {at: parameter_of.get(at, at.removesuffix(INSIDE)) for at in factors}
    ranks = {at: _by_pattern(patterns, name, nominal) for at, name in named.items()}
    scaling = "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r"
    scales = {}
    for at, rank in ranks.items():
        alpha = _by_pattern(config.get("alpha_pattern"), named[at], config["lora_alpha"])
        scales[at] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    targets = _whole_layers(owner) | experts | _attention(owner, factors, ranks, scales, folder / TENSORS)
    return place_plain(
        model,
        name,
        targets,
        _checked_factors(owner, targets, factors, ranks, folder / TENSORS),
        scales,
        _checked_heads(owner, one_of_tied(owner, tensors, config, folder / TENSORS), folder / TENSORS),
        dropout=noted_dropout(config.get("lora_dropout") or 0.0, "entries", folder / CONFIG),
        rank=int(config["r"]),
        options={"alpha": config["lora_alpha"], "scaling": scaling},
    )


def import_loralib(model: Model, state: Mapping[str, Tensor], *, alpha: float, name: str = "default") -> Model:
    """Put the factors of an original `loralib` checkpoint into a model: keys `LAYER.lora_A`, `LAYER.lora_B`.

    Args:
        state: the checkpoint's state dict; what it holds beside the factors is not read.
        alpha: `lora_alpha` of the training script; the checkpoint does not say.

    Raises:
        FileError: no factors in it, or factors that do not fit the model's layers (`MergedLinear` has others).
        MethodError: alpha is no positive, finite number.
        StateError: the name is taken, or the model is merged.
        TargetError: a layer cannot carry an adapter, as where it has an attribute "lorafamily" of its own.
    """
    targets = _whole_layers(check_can_place(model, name))
    pairs = {key.rpartition(".")[0] for key in state if key.endswith((".lora_A", ".lora_B"))}
    if not pairs:
        raise FileError("no key of this state dict ends in .lora_A or .lora_B; it is no loralib checkpoint")
    factors = {at: (state.get(f"{at}.lora_B"), state.get(f"{at}.lora_A")) for at in pairs}
    ranks = {at: len(A) for at, (_, A) in factors.items() if A is not None}
    checked = _checked_factors(model, targets, factors, ranks, Path("state dict"))
    scales = {at: alpha / rank for at, rank in ranks.items()}
    largest = max(ranks.values())
    return place_plain(model, name, targets, checked, scales, {}, rank=largest, options={"alpha": alpha})


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


def _groups(layer: nn.Module) -> int:
    """How many times peft's rank is that of the update."""
    return layer.groups if isinstance(layer, Convolution) else 1


def _of_groups(at: str, U: Tensor, V: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The update of a grouped convolution from peft's factors of it.

    Raises:
        FileError: they mix the channels of several groups, as no update of its weight does.
    """
    blocks = V.view(groups, len(V) // groups, groups, -1).movedim(2, 1)
    own = torch.stack([blocks[g, g] for g in range(groups)])
    if not torch.equal(torch.block_diag(*own), V):
        raise FileError(f"{at}.lora_A mixes channels of several of its {groups} groups, which no update of W does")
    if all(torch.equal(one, own[0]) for one in own):
        return U, own[0]
    return torch.block_diag(*U.view(groups, -1, U.shape[1])), own.flatten(0, 1)


def _pairs(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """(U, V) by layer, taken out of what a file holds."""
    found: dict[str, dict[str, Tensor]] = {}
    for key in list(tensors):
        if match := re.fullmatch(r"(.+)\.lora_(?:(A|B)\.weight|embedding_(A|B))", key):
            at, letter = match[1], match[2] or match[3]
            found.setdefault(at, {})[letter] = tensors.pop(key).flatten(1)  # kernels of convolutions
    return {at: (own.get("B"), own.get("A")) for at, own in found.items()}


def _whole_layers(model: nn.Module) -> dict[str, Target]:
    """Whole layers that can carry an adapter, also those that have adapters on parts."""
    found = {}
    for at, module in model.named_modules():
        kind = kind_of(module)
        if kind is not None:
            found[at] = Target(module, kind)
    return found


def _attention(
    model: nn.Module, factors: dict[str, Any], ranks: dict[str, int], scales: dict[str, float], path: Path
) -> dict[str, Target]:
    """q, k and v of every nn.MultiheadAttention; what a file holds of one is shared out to them.

    Raises:
        FileError: the file adapts an output projection, whose update peft adds twice.
    """
    for at in [at for at in factors if at.endswith(INSIDE)]:
        U, V = factors.pop(at)
        ranks.pop(at), scales.pop(at)
        if U is None or V is None or (U.any() and V.any()):
            raise FileError(f"{path}: {at} of an nn.MultiheadAttention, which peft adds twice, cannot be read")
    parts = {
        at: target
        for at, target in possible_targets(model).items()
        if isinstance(target.kind, ReadRows) and target.kind.held_in == "in_proj_weight"
    }
    for at, target in parts.items():
        name = _layer_name(at, target)
        U, V = factors.get(name, (None, None))
        if U is not None and V is not None and len(U) == len(target.parameter):
            factors[at], ranks[at], scales[at] = (target.kind.matrix(U), V), ranks[name], scales[name]
    for name in {_layer_name(at, target) for at, target in parts.items()} & factors.keys():
        del factors[name], ranks[name], scales[name]
    return parts


def _layer_name(at: str, target: Target) -> str:
    """What peft calls the layer of a target."""
    return at.rpartition(".")[0] if isinstance(target.kind, Rows) else at


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
            parts.setdefault(_layer_name(at, targets[at]), []).append((kind.spread(adapter.scale * U), V))
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
        "rank_pattern": {_pattern(at): rank for at, rank in ranks.items() if rank != r},
        "alpha_pattern": {_pattern(at): own for at, own in alphas.items() if own != alpha},
    }


def _pattern(at: str) -> str:
    """Matches the full name of one layer; of one that may be named as a parameter, that too."""
    return f"^{re.escape(at)}" + (r"(\.weight)?" if at.rpartition(".")[2] in NAMES_OF_EXPERTS else "")


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
    able = _whole_layers(model)
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
    trained = under_all_names(model, trained)
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


def _check_config(config: Any, path: Path) -> None:
    if not isinstance(config, dict) or not {"peft_type", "r", "lora_alpha"} <= set(config):
        raise FileError(f"{path}: no configuration of a LoRA by peft (peft_type, r and lora_alpha are needed)")
    if config["peft_type"] != "LORA":
        raise FileError(f"{path}: peft_type {config['peft_type']}; only LORA can be read")
    if (start := config.get("init_lora_weights", True)) not in PRISTINE_STARTS:
        raise FileError(
            f"{path}: init_lora_weights={start!r} changed the base weights, and the file fits only those; save it with "
            "peft's path_initial_model_for_weight_conversion"
        )
    known = UNDERSTOOD | WITHOUT_EFFECT | {"init_lora_weights"}
    if strange := {k: v for k, v in config.items() if k not in known and v and (k, v) != ("bias", "none")}:
        said = ", ".join(f"{key}={value!r}" for key, value in strange.items())
        raise FileError(f"{path}: {said}; that is more than the low-rank update of a weight, and cannot be read")
    for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        values = [config[key], *(config.get(pattern) or {}).values()]
        if not all(_positive(value) for value in values):
            raise FileError(f"{path}: {key} and its pattern must be positive numbers, not {values}")


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """peft's rule: the first pattern that matches the end of the name, at a dot."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _checked_factors(
    model: nn.Module,
    targets: Mapping[str, Target],
    factors: Mapping[str, tuple[Tensor | None, Tensor | None]],
    ranks: Mapping[str, int],
    path: Path,
) -> dict[str, tuple[Tensor, Tensor]]:
    """(U, V) by layer, each of the shape the layer needs."""
    if not factors:
        raise FileError(f"{path}: holds no pair of lora_A and lora_B")
    checked: dict[str, tuple[Tensor, Tensor]] = {}
    wrong = []
    for at, (U, V) in factors.items():
        if at not in targets:
            wrong.append(f"{at} is no layer of this {type(model).__name__} that can carry an adapter")
            continue
        if U is None or V is None:
            wrong.append(f"{at}.lora_{'B' if U is None else 'A'} is missing")
            continue
        d_out, d_in = targets[at].shape
        groups = _groups(targets[at].layer)
        wanted = {"B": (U, (d_out, ranks[at] // groups)), "A": (V, (ranks[at], d_in * groups))}
        for letter, (factor, shape) in wanted.items():
            if tuple(factor.shape) != shape:
                wrong.append(f"{at}.lora_{letter} is {tuple(factor.shape)}, not {shape}")
            elif not factor.is_floating_point() or not factor.isfinite().all():
                wrong.append(f"{at}.lora_{letter} is not all finite floating-point numbers")
        checked[at] = U, V
    if wrong:
        raise FileError(f"{path}: {listed(wrong)}")
    grouped = {at: groups for at in checked if (groups := _groups(targets[at].layer)) > 1}
    return checked | {at: _of_groups(at, *checked[at], groups) for at, groups in grouped.items()}


def _checked_heads(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """What trained beside the adapters, by parameter or buffer of the model."""
    parameters, wrong = {**base_parameters(model), **movable_buffers(model)}, []
    for at, value in tensors.items():
        if at not in parameters:
            wrong.append(f"{at} is neither lora_A nor lora_B nor a parameter of this {type(model).__name__}")
        elif parameters[at].shape != value.shape:
            wrong.append(f"{at} is {tuple(value.shape)}, not {tuple(parameters[at].shape)}")
        elif not value.isfinite().all():
            wrong.append(f"{at} is not all finite numbers")
    if wrong:
        raise FileError(f"{path}: {listed(wrong)}")
    return dict(tensors)
