"""Names in Hugging Face `peft`'s folders: of the files, of the layers, and what a pattern matches."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from lorafamily.layers.kinds import kind_of
from lorafamily.layers.rows import Rows
from lorafamily.layers.standard import Convolution
from lorafamily.layers.target import Target

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FOLDER = f"what peft saves is a folder with {CONFIG} and {TENSORS}"
PREFIX = "base_model.model."
INSIDE = ".base_layer.out_proj"
"""Where the output projection of an nn.MultiheadAttention is in the layer that peft puts around that."""
NAMES_OF_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
"""What peft maps to fused experts; parts of names before transformers 5."""


def layer_name(at: str, target: Target) -> str:
    """What peft calls the layer of a target."""
    return at.rpartition(".")[0] if isinstance(target.kind, Rows) else at


def groups_of(layer: nn.Module) -> int:
    """How many times peft's rank is that of the update."""
    return layer.groups if isinstance(layer, Convolution) else 1


def whole_layers(model: nn.Module) -> dict[str, Target]:
    """Whole layers that can carry an adapter, also those that have adapters on parts."""
    found = {}
    for at, module in model.named_modules():
        kind = kind_of(module)
        if kind is not None:
            found[at] = Target(module, kind)
    return found


def pattern_of(at: str) -> str:
    """Matches the full name of one layer; of one that may be named as a parameter, that too."""
    return f"^{re.escape(at)}" + (r"(\.weight)?" if at.rpartition(".")[2] in NAMES_OF_EXPERTS else "")


def by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """peft's rule: the first pattern that matches the end of the name, at a dot."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default
