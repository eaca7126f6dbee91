"""Names in Hugging Face `peft`'s folders: of files and layers, those that a pattern matches, and that servers fuse."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from lorafamily.errors import StateError
from lorafamily.layers.kinds import kind_of
from lorafamily.layers.rows import Rows
from lorafamily.layers.standard import Convolution
from lorafamily.layers.target import Target
from lorafamily.names import join

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FOLDER = f"what peft saves is a folder with {CONFIG} and {TENSORS}"
PREFIX = "base_model.model."
INSIDE = ".base_layer.out_proj"
"""Where an nn.MultiheadAttention's output projection is, seen from the layer that peft wraps around the attention."""
NAMES_OF_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
"""Names that experts had before transformers 5, which peft maps to fused experts."""
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_q", "in_proj_k", "in_proj_v", "in_proj_z"),
)
"""Groups of layers that SGLang fuses. It assumes that an adapter on the first is on the others too."""
_EXPERTS = re.compile(r"(.*experts)\.\d+\..+")


def layer_name(at: str, target: Target) -> str:
    """peft's name for the layer of a target: that of the whole layer, where the target is a part."""
    return at.rpartition(".")[0] if isinstance(target.kind, Rows) else at


def groups_of(layer: nn.Module) -> int:
    """The ratio of peft's rank to that of the update: the groups of a grouped convolution, otherwise 1."""
    return layer.groups if isinstance(layer, Convolution) else 1


def whole_layers(model: nn.Module) -> dict[str, Target]:
    """Whole layers that can carry an adapter, including those whose parts have adapters."""
    return {at: Target(layer, kind) for at, layer in model.named_modules() if (kind := kind_of(layer)) is not None}


def refuse_shared(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Check that each layer has one name, since peft puts an adapter on the first name of a layer alone.

    Raises:
        StateError: the model holds a layer under two names.
    """
    names: dict[nn.Module, list[str]] = {layer: [] for layer in layers}
    for at, module in model.named_modules(remove_duplicate=False):
        if module in names:
            names[module].append(at)
    if shared := next((at for at in names.values() if len(at) > 1), None):
        raise StateError(
            f"{' and '.join(shared)} are one layer: peft puts an adapter on {shared[0]} alone, and other calls would "
            "go without; merge instead, or give each place a layer of its own"
        )


def pattern_of(at: str) -> str:
    """Matches the full name of one layer and, if the layer may be listed as a parameter, that name too."""
    return f"^{re.escape(at)}" + (r"(\.weight)?" if at.rpartition(".")[2] in NAMES_OF_EXPERTS else "")


def by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """peft's rule: the value of the first pattern that matches the whole name, or its end after a dot."""
    matching = (value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return next(matching, default)


def ends_like(name: str, ends: Iterable[str]) -> bool:
    """peft's rule for `target_parameters`: whether the name is one of these, or ends like one after a dot."""
    return any(f".{name}".endswith(f".{end}") for end in ends)


def most_frequent(values: Iterable[Any]) -> Any:
    """The most frequent of some ranks or alphas, the lowest of several such; 1 if there are none."""
    counted = list(values)
    return max(sorted(set(counted)), key=counted.count, default=1)


def left_out(able: Mapping[str, Target], adapted: Collection[str]) -> Iterator[str]:
    """Layers without an adapter that a server fuses with adapted ones: SGLang the groups in `FUSED`, vLLM all experts
    of a list. `able`: every layer that can carry an adapter."""
    lists = {match[1] for at in adapted if (match := _EXPERTS.fullmatch(at))}
    for at in able:
        parent, _, name = at.rpartition(".")
        fused = {join(parent, member) for group in FUSED if name in group for member in group}
        match = _EXPERTS.fullmatch(at)
        if at not in adapted and (fused & set(adapted) or (match and match[1] in lists)):
            yield at
