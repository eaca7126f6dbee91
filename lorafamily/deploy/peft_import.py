"""Other people's LoRA files: read folders that `peft` saved, and state dicts of `loralib`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafamily.beside import movable_buffers
from lorafamily.deploy.folder import listed, read_json, read_tensors
from lorafamily.deploy.peft_experts import shared_out
from lorafamily.deploy.peft_names import (
    CONFIG,
    FOLDER,
    INSIDE,
    PREFIX,
    TENSORS,
    by_pattern,
    groups_of,
    layer_name,
    whole_layers,
)
from lorafamily.deploy.plain import noted_dropout, place_plain
from lorafamily.errors import FileError
from lorafamily.parts import ReadRows, Target, possible_targets
from lorafamily.placement import Model, check_can_place
from lorafamily.site import base_parameters

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
        lambda parameter: int(by_pattern(patterns, parameter, nominal)),
        folder / TENSORS,
    )
    named = {at: parameter_of.get(at, at.removesuffix(INSIDE)) for at in factors}
    ranks = {at: by_pattern(patterns, name, nominal) for at, name in named.items()}
    scaling = "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r"
    scales = {}
    for at, rank in ranks.items():
        alpha = by_pattern(config.get("alpha_pattern"), named[at], config["lora_alpha"])
        scales[at] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    targets = whole_layers(owner) | experts | _attention(owner, factors, ranks, scales, folder / TENSORS)
    return place_plain(
        model,
        name,
        targets,
        _checked_factors(owner, targets, factors, ranks, folder / TENSORS),
        scales,
        _checked_heads(owner, tensors, folder / TENSORS),
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
    targets = whole_layers(check_can_place(model, name))
    pairs = {key.rpartition(".")[0] for key in state if key.endswith((".lora_A", ".lora_B"))}
    if not pairs:
        raise FileError("no key of this state dict ends in .lora_A or .lora_B; it is no loralib checkpoint")
    factors = {at: (state.get(f"{at}.lora_B"), state.get(f"{at}.lora_A")) for at in pairs}
    ranks = {at: len(A) for at, (_, A) in factors.items() if A is not None}
    checked = _checked_factors(model, targets, factors, ranks, Path("state dict"))
    scales = {at: alpha / rank for at, rank in ranks.items()}
    largest = max(ranks.values())
    return place_plain(model, name, targets, checked, scales, {}, rank=largest, options={"alpha": alpha})


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
        name = layer_name(at, target)
        U, V = factors.get(name, (None, None))
        if U is not None and V is not None and len(U) == len(target.parameter):
            factors[at], ranks[at], scales[at] = (target.kind.matrix(U), V), ranks[name], scales[name]
    for name in {layer_name(at, target) for at, target in parts.items()} & factors.keys():
        del factors[name], ranks[name], scales[name]
    return parts


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
        groups = groups_of(targets[at].layer)
        wanted = {"B": (U, (d_out, ranks[at] // groups)), "A": (V, (ranks[at], d_in * groups))}
        for letter, (factor, shape) in wanted.items():
            if tuple(factor.shape) != shape:
                wrong.append(f"{at}.lora_{letter} is {tuple(factor.shape)}, not {shape}")
            elif not factor.is_floating_point() or not factor.isfinite().all():
                wrong.append(f"{at}.lora_{letter} is not all finite floating-point numbers")
        checked[at] = U, V
    if wrong:
        raise FileError(f"{path}: {listed(wrong)}")
    grouped = {at: groups for at in checked if (groups := groups_of(targets[at].layer)) > 1}
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
