"""LoRA files of diffusers: one safetensors file for a pipeline, whose keys say which of its models they are for.

Written are `PREFIX.LAYER.lora_A.weight` and `lora_B.weight`, with peft's settings in the file's metadata, which
diffusers reads from 0.34 on. Older versions know no settings; they compute the same if all ranks are equal, because the
scale is multiplied into lora_B and every alpha is the rank. Read are these files and those of other trainers:
`lora.down.weight`, `lora.up.weight` of early diffusers, and kohya's `lora_unet_…` with `lora_down`, `lora_up`, `alpha`.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorafamily.deploy.folder import listed, read_tensors, write_tensors
from lorafamily.deploy.peft_names import most_frequent, pattern_of, whole_layers
from lorafamily.errors import FileError

DIFFUSERS = "pytorch_lora_weights.safetensors"
SETTINGS = "lora_adapter_metadata"
"""The entry of the metadata in which diffusers looks for peft's settings."""
KOHYA = re.compile(r"(lora_(?:unet|transformer|te[12]?))_(.+)\.(lora_down\.weight|lora_up\.weight|alpha)")
EARLY = (
    (re.compile(r"(.+)\.processor\.to_out_lora\.(down|up)\.weight"), r"\1.to_out.0"),
    (re.compile(r"(.+)\.processor\.(to_[qkv])_lora\.(down|up)\.weight"), r"\1.\2"),
    (re.compile(r"(.+)\.lora\.(down|up)\.weight"), r"\1"),
)
"""Keys from before diffusers took over peft's, and the layer that each is for."""
IMAGES, TEXTS = ("unet", "transformer", "lora_unet", "lora_transformer"), ("text_encoder", "lora_te")
"""Prefixes of keys for the model that makes images, and for a pipeline's only text encoder."""


def prefix_of(model: nn.Module) -> str | None:
    """What a pipeline calls a model of diffusers, "unet" or "transformer"; None for models of other libraries."""
    if not hasattr(model, "load_lora_adapter"):
        return None
    return "unet" if type(model).__name__.startswith("UNet") else "transformer"


def write_diffusers(folder: Path, model: nn.Module, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Write tensors under peft's names, and peft's settings, as the file of the model's pipeline."""
    prefix = prefix_of(model)
    metadata = json.dumps({f"{prefix}.{key}": value for key, value in settings.items()}, indent=1)
    prefixed = {f"{prefix}.{key}": value for key, value in tensors.items()}
    write_tensors(folder / DIFFUSERS, prefixed, {"format": "pt", SETTINGS: metadata})


def read_diffusers(model: nn.Module, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and the tensors for this model, both under peft's names.

    Raises:
        FileError: the file is missing or damaged, has no tensors for this model, or names layers that it does not have.
    """
    by_prefix: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in read_tensors(path, f"diffusers saves {DIFFUSERS}").items():
        prefix, rest = _split(key)
        by_prefix[prefix][rest] = value
    possible = IMAGES if prefix_of(model) else TEXTS
    ours = [prefix for prefix in by_prefix if prefix in possible or not prefix]
    others = [prefix for prefix in by_prefix if prefix not in ours]
    if len(ours) != 1:
        found = ", ".join(prefix or "no prefix" for prefix in (ours or others))
        raise FileError(
            f"{path}: keys begin with {found}; for a {type(model).__name__} one of {', '.join(possible)} is needed, or "
            "no prefix at all"
        )
    if others:
        warnings.warn(
            f"{path}: {', '.join(others)} ({sum(len(by_prefix[prefix]) for prefix in others)} tensors) are for other "
            "models of the pipeline and are not read here",
            stacklevel=3,
        )
    prefix, found_here = ours[0], by_prefix[ours[0]]
    tensors = _of_kohya(model, found_here, path) if prefix.startswith("lora_") else _of_early(found_here)
    alphas = {key.removesuffix(".alpha"): float(tensors.pop(key)) for key in list(tensors) if key.endswith(".alpha")}
    return _settings(path, prefix) or _from_tensors(tensors, alphas), tensors


def _split(key: str) -> tuple[str, str]:
    """A key's prefix, "" if it has none, and the rest."""
    if match := KOHYA.fullmatch(key):
        return match[1], f"{match[2]}.{match[3]}"
    prefix, _, rest = key.partition(".")
    return (prefix, rest) if prefix in IMAGES or prefix.startswith("text_encoder") else ("", key)


def _of_kohya(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """kohya's keys under peft's names. They have _ for every dot in a layer's name, so only the model tells which
    layer is meant."""
    names: dict[str, list[str]] = defaultdict(list)
    for at in whole_layers(model):
        names[at.replace(".", "_")].append(at)
    found, wrong = {}, []
    for key, value in tensors.items():
        written, _, what = key.partition(".")
        if len(names[written]) != 1:
            wrong.append(f"{written} could be any of {names[written]}" if names[written] else f"{written} is no layer")
            continue
        renamed = what.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
        found[f"{names[written][0]}.{renamed}"] = value
    if wrong:
        raise FileError(f"{path}: in this {type(model).__name__} {listed(list(dict.fromkeys(wrong)))}")
    return found


def _of_early(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The keys of early diffusers under peft's names; other keys stay."""
    found = {}
    for key, value in tensors.items():
        for pattern, layer in EARLY:
            if match := pattern.fullmatch(key):
                key = f"{match.expand(layer)}.lora_{'A' if match[match.lastindex or 0] == 'down' else 'B'}.weight"
                break
        found[key] = value
    return found


def _settings(path: Path, prefix: str) -> dict[str, Any]:
    """peft's settings for this model from the file's metadata; empty if there are none."""
    try:
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {}).get(SETTINGS, "{}"))
        start = f"{prefix}." if prefix else ""
        return {key.removeprefix(start): value for key, value in settings.items() if key.startswith(start)}
    except (ValueError, AttributeError, SafetensorError) as error:
        raise FileError(f"{path}: damaged, its metadata {SETTINGS} is not JSON ({error})") from None


def _from_tensors(tensors: Mapping[str, Tensor], alphas: Mapping[str, float]) -> dict[str, Any]:
    """Settings for a file without any: ranks from the tensors, and the scale alpha / r, or 1 without alpha."""
    ranks = {key.removesuffix(".lora_A.weight"): len(value) for key, value in tensors.items() if "lora_A" in key}
    r = most_frequent(ranks.values())
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": r,
        "rank_pattern": {pattern_of(at): rank for at, rank in ranks.items()},
        "alpha_pattern": {pattern_of(at): alphas.get(at, rank) for at, rank in ranks.items()},
    }
