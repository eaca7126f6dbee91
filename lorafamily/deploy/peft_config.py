"""Settings in a LoRA folder of `peft`: ranks and scales, how its layers are found, the class of the base."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from lorafamily.deploy.peft_names import NAMES_OF_EXPERTS, most_frequent, pattern_of
from lorafamily.errors import StateError
from lorafamily.layers.kinds import kind_of
from lorafamily.layers.site import base_parameters

TASKS = {
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "FEATURE_EXTRACTION": "MODEL_MAPPING_NAMES",
}
"""peft's tasks, each with the table in which transformers lists the model classes for it."""
MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}, {"out_proj", "conv1d"}
"""Model types, and layers that peft adapts in none of them, since fused kernels read their weights directly."""
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""The heads that peft expects in the file of such a task."""


def patterns(ranks: Mapping[str, int], scales: Mapping[str, float]) -> dict[str, Any]:
    """r and lora_alpha of most layers, and patterns for the others, each matching the full name of one layer."""
    products = {at: float(scales[at] * rank) for at, rank in ranks.items()}
    # peft declares lora_alpha as an int, and takes a float where that is needed.
    alphas = {at: int(alpha) if alpha.is_integer() else alpha for at, alpha in products.items()}
    r, alpha = most_frequent(ranks.values()), most_frequent(alphas.values())
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {pattern_of(at): rank for at, rank in ranks.items() if rank != r},
        "alpha_pattern": {pattern_of(at): other for at, other in alphas.items() if other != alpha},
    }


def target_settings(model: nn.Module, names: Sequence[str], experts: Sequence[str]) -> dict[str, Any]:
    """How peft finds the layers: as modules or, some of them in architectures with fused experts, as parameters.

    There peft takes a module with an expert's name for one of an older file's experts, and silently drops its adapter,
    even if it is a dense layer or a shared expert, and even if this model has no other. Listed as parameters, they are
    found.

    Of listed modules peft takes every one whose name ends like one of them: "fc" stands for "block.fc" as well. Where
    there are such others, a regular expression names the layers alone.
    """
    config: Any = getattr(model, "config", None)
    entries = config.to_dict() if hasattr(config, "to_dict") else {}
    settings = [*entries, *(entries.get("text_config") or ())]
    fused = any("expert" in name for name in settings) or any(
        parameter.ndim == 3 and "expert" in name for name, parameter in base_parameters(model).items()
    )
    mistaken = [name for name in names if fused and name.rpartition(".")[2] in NAMES_OF_EXPERTS]
    modules = [name for name in names if name not in mistaken]
    others = {name for name, _ in model.named_modules()} - set(modules)
    ends = {name.split(".", dots)[-1] for name in others for dots in range(1, name.count(".") + 1)}
    return {
        "target_modules": modules if ends.isdisjoint(modules) else f"({'|'.join(map(re.escape, modules))})",
        "target_parameters": [*(f"{name}.weight" for name in mistaken), *experts] or None,
    }


def refuse_kernels(model: nn.Module, names: Collection[str]) -> None:
    """Keep layers out of the file whose weights fused kernels read directly, since peft does not adapt these.

    Raises:
        StateError: `names` has such a layer.
    """
    models, layers = MAMBA
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in models and (found := sorted(at for at in names if at.rpartition(".")[2] in layers)):
        raise StateError(
            f"peft refuses adapters on {', '.join(found[:3])}{' and more' if found[3:] else ''} of a {model_type}, "
            'whose kernels read these weights without the layer; merge, or apply with exclude=r"(out_proj|conv1d)$"'
        )


def base_settings(
    model: nn.Module, layers: Sequence[nn.Module], heads: Collection[str], base: str | None
) -> dict[str, Any]:
    """Settings that say what the base is, and those that are the same in every file. `base`: where clients find it;
    None: where it was loaded from."""
    task = task_of(model, heads)
    kinds = [kind_of(layer) for layer in layers]
    transposed = bool(kinds) and all(kind is not None and kind.name == "conv1d" for kind in kinds)
    auto_mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return {
        "peft_type": "LORA",
        "task_type": task,
        "auto_mapping": None if task else auto_mapping,
        "base_model_name_or_path": base or found_at(model),
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "init_lora_weights": True,
        "fan_in_fan_out": transposed,
    }


def task_of(model: nn.Module, heads: Collection[str]) -> str | None:
    """peft's task type, by which `AutoPeftModelFor…` finds the class of the base; None where the class has no task.

    For a classification task peft expects the head in the file. For feature extraction it calls the model with all
    arguments of a text encoder, which models of images and sounds refuse. If `heads` lacks the head, or the model is no
    text encoder, the result is None too, and the file names the class itself (`auto_mapping`).
    """
    if not type(model).__module__.startswith("transformers."):
        return None
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    for task, names in TASKS.items():
        entries = getattr(auto, names).values()
        classes = [name for entry in entries for name in ([entry] if isinstance(entry, str) else entry)]
        if type(model).__name__ in classes:
            wanted = HEADS.get(task, ())
            present = {at for at, _ in model.named_modules() if at.rpartition(".")[2] in wanted}
            takes = inspect.signature(model.forward).parameters
            fits = task != "FEATURE_EXTRACTION" or takes.keys() >= {"input_ids", "attention_mask", "inputs_embeds"}
            return task if present <= set(heads) and fits else None
    return None


def found_at(model: nn.Module) -> str | None:
    """Where the model was loaded from: a folder, or a name on the Hub."""
    at = getattr(getattr(model, "config", None), "_name_or_path", None)
    return str(at) if at else None  # diffusers notes a Path where it was given one
