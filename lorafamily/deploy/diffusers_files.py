"""LoRA files of diffusers: one safetensors file for a pipeline, whose keys say which of its models they are for.

Written are `PREFIX.LAYER.lora_A.weight` and `lora_B.weight`, with peft's settings in the file's metadata (read by
diffusers 0.34 and later). The scale is in lora_B and every alpha is the rank, so that older versions, which know
neither, compute the same where all ranks are one. Read are these and what other trainers write: `lora.down.weight`,
`lora.up.weight` of early diffusers, and kohya's `lora_unet_…` with `lora_down`, `lora_up` and `alpha`.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorafamily.deploy.folder import listed, read_tensors, write_tensors
from lorafamily.deploy.peft_names import pattern_of, whole_layers
from lorafamily.errors import FileError

DIFFUSERS = "pytorch_lora_weights.safetensors"
SETTINGS = "lora_adapter_metadata"
"""Where in the metadata diffusers looks for peft's settings."""
KOHYA = re.compile(r"(lora_(?:unet|transformer|te[12]?))_(.+)\.(lora_down\.weight|lora_up\.weight|alpha)")
EARLY = (
    (re.compile(r"(.+)\.processor\.to_out_lora\.(down|up)\.weight"), r"\1.to_out.0"),
    (re.compile(r"(.+)\.processor\.(to_[qkv])_lora\.(down|up)\.weight"), r"\1.\2"),
    (re.compile(r"(.+)\.lora\.(down|up)\.weight"), r"\1"),
)
"""Names before diffusers took peft's, and the layer's name in each."""
IMAGES, TEXTS = ("unet", "transformer", "lora_unet", "lora_transformer"), ("text_encoder", "lora_te")
"""What keys begin with for the model that makes images, and for a pipeline's only text encoder."""


def prefix_of(model: nn.Module) -> str | None:
    """What a pipeline calls a model of diffusers: "unet" or "transformer"; None for models of others."""
    if not hasattr(model, "load_lora_adapter"):
        return None
    return "unet" if type(model).__name__.startswith("UNet") else "transformer"


def write_diffusers(folder: Path, prefix: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Tensors by peft's names and peft's settings, as the file of a pipeline.

    Raises:
        FileError: it cannot be written.
    """
    said = json.dumps({f"{prefix}.{key}": value for key, value in settings.items()}, indent=1)
    named = {f"{prefix}.{key}": value for key, value in tensors.items()}
    write_tensors(folder / DIFFUSERS, named, {"format": "pt", SETTINGS: said})


def read_diffusers(model: nn.Module, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings as peft has them, and the tensors for this model by peft's names.

    Raises:
        FileError: not there, damaged, without tensors for this model, or with names that lead to none of its layers.
    """
    tensors = read_tensors(path, f"diffusers saves {DIFFUSERS}")
    own = IMAGES if prefix_of(model) else TEXTS
    kohya = {key: match for key in tensors if (match := KOHYA.fullmatch(key))}
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        prefix, rest = (kohya[key][1], f"{kohya[key][2]}.{kohya[key][3]}") if key in kohya else _split(key)
        groups[prefix][rest] = value
    ours = [prefix for prefix in groups if prefix in own or not prefix]
    others = {prefix: len(group) for prefix, group in groups.items() if prefix not in ours}
    if len(ours) != 1:
        found = ", ".join(prefix or "no prefix" for prefix in (ours or others))
        raise FileError(
            f"{path}: keys begin with {found}; for a {type(model).__name__} one of {', '.join(own)} is needed, or none"
        )
    if others:
        warnings.warn(
            f"{path}: {', '.join(others)} ({sum(others.values())} tensors) are for other models of the pipeline and "
            "are not read here",
            stacklevel=3,
        )
    group = _of_kohya(model, groups[ours[0]], path) if ours[0].startswith("lora_") else _of_early(groups[ours[0]])
    alphas = {key.removesuffix(".alpha"): float(group.pop(key)) for key in list(group) if key.endswith(".alpha")}
    settings = _settings(path, ours[0])
    return settings or _from_tensors(group, alphas), group


def _split(key: str) -> tuple[str, str]:
    prefix, _, rest = key.partition(".")
    known = prefix in IMAGES or prefix.startswith("text_encoder")
    return (prefix, rest) if known else ("", key)


def _of_kohya(model: nn.Module, group: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """kohya writes a layer's name with _ for every dot; which layer that is, only the model says."""
    names: dict[str, list[str]] = defaultdict(list)
    for at in whole_layers(model):
        names[at.replace(".", "_")].append(at)
    found, wrong = {}, []
    for key, value in group.items():
        written, _, what = key.partition(".")
        if len(names[written]) != 1:
            wrong.append(f"{written} could be any of {names[written]}" if names[written] else f"{written} is no layer")
            continue
        renamed = what.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
        found[f"{names[written][0]}.{renamed}"] = value
    if wrong:
        raise FileError(f"{path}: in this {type(model).__name__} {listed(list(dict.fromkeys(wrong)))}")
    return found


def _of_early(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for key, value in group.items():
        for pattern, layer in EARLY:
            if match := pattern.fullmatch(key):
                key = f"{match.expand(layer)}.lora_{'A' if match[match.lastindex or 0] == 'down' else 'B'}.weight"
                break
        found[key] = value
    return found


def _settings(path: Path, prefix: str) -> dict[str, Any] | None:
    """peft's settings from the file's metadata, if there are any for this model."""
    try:
        with safe_open(path, "pt") as file:
            said = json.loads((file.metadata() or {}).get(SETTINGS, "{}"))
        start = f"{prefix}." if prefix else ""
        return {key.removeprefix(start): v for key, v in said.items() if key.startswith(start)} or None
    except (ValueError, AttributeError, SafetensorError) as error:
        raise FileError(f"{path}: damaged, its metadata {SETTINGS} is not JSON ({error})") from None


def _from_tensors(tensors: Mapping[str, Tensor], alphas: Mapping[str, float]) -> dict[str, Any]:
    """Settings of a file that has none: ranks as they are, and every scale alpha / r, or 1 without alpha."""
    ranks = {key.removesuffix(".lora_A.weight"): len(value) for key, value in tensors.items() if "lora_A" in key}
    r = _most(ranks.values())
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": r,
        "rank_pattern": {pattern_of(at): rank for at, rank in ranks.items()},
        "alpha_pattern": {pattern_of(at): alphas.get(at, rank) for at, rank in ranks.items()},
    }


def _most(ranks: Iterable[int]) -> int:
    counted = list(ranks)
    return max(sorted(set(counted)), key=counted.count, default=1)
