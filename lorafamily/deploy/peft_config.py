"""Settings of a LoRA folder of `peft`: ranks and scales, how its layers are found, what class the base is."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from lorafamily.deploy.peft_names import NAMES_OF_EXPERTS, pattern_of, whole_layers
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
"""peft's tasks, and where transformers lists the classes that its auto class for the task makes."""
MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}, {"out_proj", "conv1d"}
"""Models, by type, and their layers that peft adapts in none of them: fused kernels read the weights themselves."""
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Modules that peft expects in the file if the task is said."""


def patterns(ranks: Mapping[str, int], scales: Mapping[str, float]) -> dict[str, Any]:
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


def addressed(model: nn.Module, names: Sequence[str], experts: Sequence[str]) -> dict[str, Any]:
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


def refuse_foreign(model: nn.Module, names: Collection[str]) -> None:
    """Refuse layers that peft adapts by no name.

    Raises:
        StateError: there are some.
    """
    models, layers = MAMBA
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in models and (found := sorted(at for at in names if at.rpartition(".")[2] in layers)):
        raise StateError(
            f"peft refuses adapters on {', '.join(found[:3])}{' and more' if found[3:] else ''} of a {kind}, whose "
            'kernels read these weights without the layer; merge, or apply with exclude=r"(out_proj|conv1d)$"'
        )


def _whole(value: float) -> float | int:
    """16.0 → 16: peft's alpha is an int by its type, and takes a float."""
    return int(value) if float(value).is_integer() else float(value)


def short_names(model: nn.Module, factors: Mapping[str, Any]) -> list[str]:
    """The last components of the layers' names, as servers expect, where those name just these layers; else all."""
    short = {at.rpartition(".")[2] for at in factors}
    able = whole_layers(model)
    return sorted(short) if {at for at in able if at.rpartition(".")[2] in short} == set(factors) else sorted(factors)


def fixed(model: nn.Module, layers: Sequence[nn.Module], heads: Collection[str], base: str | None) -> dict[str, Any]:
    """What is the same for every file of a model. `base`: where clients find it, else where it was loaded from."""
    task = task_of(model, heads)
    kinds = [kind_of(layer) for layer in layers]
    transposed = bool(kinds) and all(kind is not None and kind.name == "conv1d" for kind in kinds)
    return {
        "peft_type": "LORA",
        "task_type": task,
        "auto_mapping": None if task else class_of(model),
        "base_model_name_or_path": base or found_at(model),
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "init_lora_weights": True,
        "fan_in_fan_out": transposed,
    }


def task_of(model: nn.Module, heads: Collection[str]) -> str | None:
    """peft's task type, by which `AutoPeftModelFor…` finds the class of the base; None where the class is of no task.

    With a task of classification peft looks for the head in the file. None, too, where the head is not there: the
    class itself is named then (`auto_mapping`).
    """
    if not type(model).__module__.startswith("transformers."):
        return None
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    for task, names in TASKS.items():
        classes = [name for of in getattr(auto, names).values() for name in ([of] if isinstance(of, str) else of)]
        if type(model).__name__ in classes:
            wanted = HEADS.get(task, ())
            present = {at for at, _ in model.named_modules() if at.rpartition(".")[2] in wanted}
            return task if present <= set(heads) else None
    return None


def class_of(model: nn.Module) -> dict[str, str]:
    """peft's `auto_mapping`: the class of the base, for `AutoPeftModel`."""
    return {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}


def found_at(model: nn.Module) -> str | None:
    """Where the model was loaded from: a folder, or a name on the Hub."""
    at = getattr(getattr(model, "config", None), "_name_or_path", None)
    return str(at) if at else None  # diffusers notes a Path where it was given one
