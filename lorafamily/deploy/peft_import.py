"""Other people's LoRA files: read folders that `peft` saved, and state dicts of `loralib`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafamily.deploy.diffusers_files import DIFFUSERS, read_diffusers
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
from lorafamily.deploy.tied import one_of_tied
from lorafamily.errors import FileError
from lorafamily.layers.extra_trained import movable_buffers
from lorafamily.layers.placement import Model, check_can_place
from lorafamily.layers.rows import ReadRows
from lorafamily.layers.site import base_parameters
from lorafamily.layers.target import Target, possible_targets

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
NAMED = re.compile(
    r"(?P<at>.+\.lora_(?:A|B|embedding_A|embedding_B))\.(?!weight$)(?P<name>[^.]+)(?P<rest>\.weight)?"
    r"|(?P<head>.+)\.modules_to_save\.(?P<of>[^.]+)\.(?P<what>[^.]+)"
)
"""Keys with an adapter's name in them: of factors, and of modules that trained along."""
COPIED = re.compile(r"\.(base_layer|original_module)(?=\.)")
"""What peft puts around a layer, in the key of the layer's own weight."""
PRISTINE_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` with which peft left the base weights as they were."""


def import_peft(model: Model, path: str | os.PathLike[str], name: str = "default") -> Model:
    """Put a LoRA that `peft` saved into a model of the same architecture, and make it the active adapter.

    rsLoRA, rank and alpha patterns and `modules_to_save` are read. Nothing is changed if anything does not fit.

    `path`: a folder that peft saved, or a file of diffusers or kohya's trainers (`pytorch_lora_weights.safetensors` in
    a folder, or any safetensors file), of which the tensors for this model are read.

    Raises:
        FileError: the folder lacks a file, a file is damaged or made for another model, or it holds what LoRA of this
            package is not, such as DoRA; it is named.
        StateError: the name is taken, or the model is merged.
        TargetError: a layer cannot carry an adapter, as where it has an attribute "lorafamily" of its own.
    """
    owner = check_can_place(model, name)
    config, tensors, file = _read(owner, Path(path))
    factors: dict[str, Any] = _pairs(tensors)
    patterns, nominal = config.get("rank_pattern"), config["r"]
    experts, parameter_of = shared_out(
        owner,
        config.get("target_parameters"),
        factors,
        lambda parameter: int(by_pattern(patterns, parameter, nominal)),
        file,
    )
    listed_parameters = config.get("target_parameters") or ()
    named = {at: parameter_of.get(at) or _addressed_as(at.removesuffix(INSIDE), listed_parameters) for at in factors}
    ranks = {at: by_pattern(patterns, name, nominal) for at, name in named.items()}
    scaling = "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r"
    scales = {}
    for at, rank in ranks.items():
        alpha = by_pattern(config.get("alpha_pattern"), named[at], config["lora_alpha"])
        scales[at] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    targets = whole_layers(owner) | experts | _attention(owner, factors, ranks, scales, file)
    return place_plain(
        model,
        name,
        targets,
        _checked_factors(owner, targets, factors, ranks, file),
        scales,
        _checked_heads(owner, one_of_tied(owner, tensors, config, file), file),
        dropout=noted_dropout(config.get("lora_dropout") or 0.0, "entries", file),
        rank=int(config["r"]),
        options={"alpha": config["lora_alpha"], "scaling": scaling},
    )


def _read(model: nn.Module, path: Path) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    """Settings, tensors by peft's names without its prefix, and the file they are from."""
    alone = path if path.suffix == ".safetensors" else path / DIFFUSERS
    if alone.is_file() and not (path / CONFIG).is_file():
        config, tensors = read_diffusers(model, alone)
        config = {"peft_type": "LORA"} | config
        _check_config(config, alone)
        return config, tensors, alone
    config = read_json(path / CONFIG, FOLDER)
    _check_config(config, path / CONFIG)
    return config, _plain_names(model, read_tensors(path / TENSORS, FOLDER), path / TENSORS), path / TENSORS


def _plain_names(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors without peft's prefix, without the adapter's name in the keys, as it is in a state dict of the whole
    model, and without copies of the base's weights, which peft saves where an embedding or a head carries an adapter.

    Raises:
        FileError: adapters of several names, or a copy that is not what the model has.
    """
    plain: dict[str, Tensor] = {}
    names, wrong = set(), []
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, value in tensors.items():
        key = key.removeprefix(PREFIX)
        if match := NAMED.fullmatch(key):
            names.add(match["name"] or match["of"])
            key = f"{match['at']}{match['rest'] or ''}" if match["at"] else f"{match['head']}.{match['what']}"
        elif ".lora_" not in key and (copied := COPIED.sub("", key)) != key:
            own = parameters.get(copied)
            if own is None or not _same(own, value):
                wrong.append(f"{copied} is not what this {type(model).__name__} has")
            continue
        plain[key] = value
    if len(names) > 1:
        raise FileError(f"{path}: holds adapters of several names ({', '.join(sorted(names))}); save each to a folder")
    if wrong:
        raise FileError(f"{path}: holds weights of the base, and {listed(wrong)}; import it into the base it is from")
    return plain


@torch.no_grad()
def _same(own: Tensor, saved: Tensor) -> bool:
    """Whether one is the other, be it in the lower precision of the two."""
    own = own.detach().cpu()
    return own.shape == saved.shape and (
        torch.equal(own, saved.to(own.dtype)) or torch.equal(own.to(saved.dtype), saved)
    )


def _addressed_as(at: str, parameters: Sequence[str]) -> str:
    """The name that patterns mean: a layer's, or that of its weight where the file lists it as a parameter."""
    weight = f"{at}.weight"
    return weight if any(weight == one or weight.endswith(f".{one}") for one in parameters) else at


def import_loralib(model: Model, state: Mapping[str, Tensor], *, alpha: float, name: str = "default") -> Model:
    """Put the factors of an original `loralib` checkpoint into a model: keys `LAYER.lora_A`, `LAYER.lora_B`.

    Args:
        state: the checkpoint's state dict; what it holds besides the factors is not read.
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
    """What trained along with the adapters, by parameter or buffer of the model."""
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
