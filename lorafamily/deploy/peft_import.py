"""Reads LoRA files that others wrote: folders of `peft`, files of diffusers and kohya, and state dicts of `loralib`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafamily.deploy import peft_names
from lorafamily.deploy.diffusers_files import DIFFUSERS, read_diffusers
from lorafamily.deploy.folder import listed, read_json, read_tensors
from lorafamily.deploy.peft_experts import shared_out
from lorafamily.deploy.peft_names import CONFIG, INSIDE, TENSORS, by_pattern, ends_like, groups_of, layer_name
from lorafamily.deploy.plain import noted_dropout, place_plain
from lorafamily.deploy.tied import one_of_tied
from lorafamily.errors import FileError
from lorafamily.layers.extra_trained import movable_buffers
from lorafamily.layers.placement import Model, check_can_place
from lorafamily.layers.rows import ReadRows
from lorafamily.layers.site import base_parameters
from lorafamily.layers.target import Target, possible_targets

Pairs = dict[str, tuple[Tensor | None, Tensor | None]]
"""(U, V) by layer; None for a factor that the file lacks."""
UNDERSTOOD = {
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save", "lora_dropout"),
    *("target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern"),
    *("fan_in_fan_out", "init_lora_weights"),
}
WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("runtime_config", "qalora_group_size", "ensure_weight_tying", "velora_config"),
}
"""Settings that say where a file comes from or how training went, and change nothing in what it computes."""
NAMED = re.compile(
    r"(?P<at>.+\.lora_(?:A|B|embedding_A|embedding_B))\.(?!weight$)(?P<name>[^.]+)(?P<rest>\.weight)?"
    r"|(?P<module>.+)\.modules_to_save\.(?P<of>[^.]+)\.(?P<parameter>[^.]+)"
)
"""Keys that hold an adapter's name: of factors, and of modules that trained along."""
COPIED = re.compile(r"\.(base_layer|original_module)(?=\.)")
"""What peft's wrapper of a layer adds to the key of the layer's own weight."""
PRISTINE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` with which peft leaves the base weights unchanged."""


def import_peft(model: Model, path: str | os.PathLike[str], name: str = "default") -> Model:
    """Put a LoRA that `peft` saved into a model of the same architecture, and make it the active adapter.

    rsLoRA, rank and alpha patterns and `modules_to_save` are read. If anything does not fit, the model stays unchanged.

    `path`: a folder that peft saved, or a file of diffusers or kohya's trainers (`pytorch_lora_weights.safetensors` in
    a folder, or any safetensors file), of which the tensors for this model are read.

    Raises:
        FileError: the folder lacks a file, a file is damaged or made for another model, or it uses something that LoRA
            here does not have, such as DoRA; the message names it.
        StateError: the name is taken, the model is merged, or it holds an adapted layer under two names.
        TargetError: a layer cannot carry an adapter, for example because it has an attribute "lorafamily" of its own.
    """
    owner = check_can_place(model, name)
    config, tensors, file = _read(owner, Path(path))
    parameters = config.get("target_parameters") or ()
    rank_of = partial(by_pattern, config.get("rank_pattern"), default=config["r"])
    alpha_of = partial(by_pattern, config.get("alpha_pattern"), default=config["lora_alpha"])
    factors = _pairs(tensors)
    experts, parameter_of = shared_out(owner, parameters, factors, rank_of, file)
    parts, layer_of = _attention(owner, factors, file)
    # Patterns match the name of a layer, or of its weight where the file lists that.
    named = {at: parameter_of.get(at) or layer_of.get(at, at) for at in factors}
    weights = {at: f"{name}.weight" for at, name in named.items() if at not in parameter_of}
    named |= {at: weight for at, weight in weights.items() if ends_like(weight, parameters)}
    ranks = {at: rank_of(named[at]) for at in factors}
    rslora = config.get("use_rslora")
    scales = {at: alpha_of(named[at]) / (math.sqrt(rank) if rslora else rank) for at, rank in ranks.items()}
    targets = peft_names.whole_layers(owner) | experts | parts
    peft_names.refuse_shared(owner, [targets[at].layer for at in factors if at in targets])
    return place_plain(
        model,
        name,
        targets,
        _checked_factors(owner, targets, factors, ranks, file),
        scales,
        _checked_extra(owner, one_of_tied(owner, tensors, config, file), file),
        dropout=noted_dropout(config.get("lora_dropout") or 0.0, "entries", file),
        rank=int(config["r"]),
        options={"alpha": config["lora_alpha"], "scaling": "alpha/sqrt(r)" if rslora else "alpha/r"},
    )


def _read(model: nn.Module, path: Path) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    """Settings, tensors under peft's names without its prefix, and the file that holds them."""
    single = path if path.suffix == ".safetensors" else path / DIFFUSERS
    if single.is_file() and not (path / CONFIG).is_file():
        settings, tensors = read_diffusers(model, single)
        config = {"peft_type": "LORA"} | settings
        _check_config(config, single)
        return config, tensors, single
    config, file = read_json(path / CONFIG, peft_names.FOLDER), path / TENSORS
    _check_config(config, path / CONFIG)
    return config, _bare(model, read_tensors(file, peft_names.FOLDER), file), file


def _bare(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of the adapter, under keys without peft's prefix and the adapter's name.

    The name is in the keys if the file is a state dict of the whole model. If an embedding or a head carries an
    adapter, peft saves copies of the base's weights too; these must equal the model's, and are left out.
    """
    bare: dict[str, Tensor] = {}
    names, wrong = set(), []
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, value in tensors.items():
        key = key.removeprefix(peft_names.PREFIX)
        if match := NAMED.fullmatch(key):
            names.add(match["name"] or match["of"])
            key = f"{match['at']}{match['rest'] or ''}" if match["at"] else f"{match['module']}.{match['parameter']}"
        elif ".lora_" not in key and (original := COPIED.sub("", key)) != key:
            if original not in parameters or not _same(parameters[original], value):
                wrong.append(f"{original} is not what this {type(model).__name__} has")
            continue
        bare[key] = value
    if len(names) > 1:
        raise FileError(f"{path}: holds adapters of several names ({', '.join(sorted(names))}); save each to a folder")
    if wrong:
        raise FileError(f"{path}: holds weights of the base, and {listed(wrong)}; import it into the base it is from")
    return bare


@torch.no_grad()
def _same(parameter: Tensor, saved: Tensor) -> bool:
    """Whether two tensors are equal, if need be after rounding one to the other's lower precision."""
    ours = parameter.detach().cpu()
    return ours.shape == saved.shape and (
        torch.equal(ours, saved.to(ours.dtype)) or torch.equal(ours.to(saved.dtype), saved)
    )


def import_loralib(model: Model, state: Mapping[str, Tensor], *, alpha: float, name: str = "default") -> Model:
    """Put the factors of an original `loralib` checkpoint into a model: keys `LAYER.lora_A`, `LAYER.lora_B`.

    Args:
        state: the checkpoint's state dict; other entries than factors are ignored.
        alpha: `lora_alpha` of the training script; the checkpoint does not say.

    Raises:
        FileError: no factors in it, or factors that do not fit the model's layers (`MergedLinear` has others).
        MethodError: alpha is no positive, finite number.
        StateError: the name is taken, the model is merged, or it holds an adapted layer under two names.
        TargetError: a layer cannot carry an adapter, for example because it has an attribute "lorafamily" of its own.
    """
    targets = peft_names.whole_layers(check_can_place(model, name))
    layers = {key.rpartition(".")[0] for key in state if key.endswith((".lora_A", ".lora_B"))}
    if not layers:
        raise FileError("no key of this state dict ends in .lora_A or .lora_B; it is no loralib checkpoint")
    factors = {at: (state.get(f"{at}.lora_B"), state.get(f"{at}.lora_A")) for at in layers}
    ranks = {at: len(A) for at, (_, A) in factors.items() if A is not None}
    checked = _checked_factors(model, targets, factors, ranks, Path("state dict"))
    scales = {at: alpha / rank for at, rank in ranks.items()}
    return place_plain(model, name, targets, checked, scales, {}, rank=max(ranks.values()), options={"alpha": alpha})


def _of_groups(at: str, U: Tensor, V: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The update of a grouped convolution's weight from peft's factors, which must not mix channels of its groups."""
    blocks = V.view(groups, len(V) // groups, groups, -1).movedim(2, 1)
    diagonal = torch.stack([blocks[g, g] for g in range(groups)])
    if not torch.equal(torch.block_diag(*diagonal), V):
        raise FileError(f"{at}.lora_A mixes channels of several of its {groups} groups, which no update of W does")
    if all(torch.equal(block, diagonal[0]) for block in diagonal):
        return U, diagonal[0]
    return torch.block_diag(*U.view(groups, -1, U.shape[1])), diagonal.flatten(0, 1)


def _pairs(tensors: dict[str, Tensor]) -> Pairs:
    """The factors in a file, which are taken out of `tensors`."""
    found: dict[str, dict[str, Tensor]] = {}
    for key in list(tensors):
        if match := re.fullmatch(r"(.+)\.lora_(?:(A|B)\.weight|embedding_(A|B))", key):
            at, letter = match[1], match[2] or match[3]
            found.setdefault(at, {})[letter] = tensors.pop(key).flatten(1)  # kernels of convolutions
    return {at: (factors.get("B"), factors.get("A")) for at, factors in found.items()}


def _attention(model: nn.Module, factors: Pairs, path: Path) -> tuple[dict[str, Target], dict[str, str]]:
    """Divide the factors of every nn.MultiheadAttention among its q, k and v. Returns these as targets, and for each
    the layer's name, which ranks and scales go by."""
    for at in [at for at in factors if at.endswith(INSIDE)]:
        U, V = factors.pop(at)
        if U is None or V is None or (U.any() and V.any()):
            raise FileError(f"{path}: {at} of an nn.MultiheadAttention, which peft applies twice, cannot be read")
    parts = {
        at: target
        for at, target in possible_targets(model).items()
        if isinstance(target.kind, ReadRows) and target.kind.held_in == "in_proj_weight"
    }
    layer_of = {at: name for at, target in parts.items() if (name := layer_name(at, target)) in factors}
    for at, name in layer_of.items():
        (U, V), rows = factors[name], len(parts[at].parameter)
        if U is None or V is None or len(U) != rows:
            raise FileError(f"{path}: {name} needs lora_A and a lora_B of {rows} rows, those of q, k and v")
        factors[at] = parts[at].kind.matrix(U), V
    for name in set(layer_of.values()):
        del factors[name]
    return parts, layer_of


def _check_config(config: Any, path: Path) -> None:
    """Refuse settings that are damaged, or that make more of the tensors than plain LoRA on the pristine base."""
    if not isinstance(config, dict) or not {"peft_type", "r", "lora_alpha"} <= set(config):
        raise FileError(f"{path}: no configuration of a LoRA by peft (peft_type, r and lora_alpha are needed)")
    if config["peft_type"] != "LORA":
        raise FileError(f"{path}: peft_type {config['peft_type']}; only LORA can be read")
    if (initialisation := config.get("init_lora_weights", True)) not in PRISTINE:
        raise FileError(
            f"{path}: init_lora_weights={initialisation!r} changed the base weights, and the file fits only those; "
            "save it with peft's path_initial_model_for_weight_conversion"
        )
    known = UNDERSTOOD | WITHOUT_EFFECT
    if unknown := {k: v for k, v in config.items() if k not in known and v and (k, v) != ("bias", "none")}:
        settings = ", ".join(f"{key}={value!r}" for key, value in unknown.items())
        raise FileError(f"{path}: {settings}; that is more than the low-rank update of a weight, and cannot be read")
    for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        values = [config[key], *(config.get(pattern) or {}).values()]
        numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
        if len(numbers) < len(values) or not all(0 < value < math.inf for value in numbers):
            raise FileError(f"{path}: {key} and its pattern must be positive numbers, not {values}")


def _checked_factors(
    model: nn.Module, targets: Mapping[str, Target], factors: Pairs, ranks: Mapping[str, int], path: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    """(U, V) by layer, which must be finite and of the shape that the layer and its rank need."""
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


def _checked_extra(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor]:
    """What a file holds besides the factors, which must be finite values of the model's parameters and buffers."""
    ours, wrong = {**base_parameters(model), **movable_buffers(model)}, []
    for at, value in tensors.items():
        if at not in ours:
            wrong.append(f"{at} is neither lora_A nor lora_B nor a parameter of this {type(model).__name__}")
        elif ours[at].shape != value.shape:
            wrong.append(f"{at} is {tuple(value.shape)}, not {tuple(ours[at].shape)}")
        elif not value.isfinite().all():
            wrong.append(f"{at} is not all finite numbers")
    if wrong:
        raise FileError(f"{path}: {listed(wrong)}")
    return tensors
