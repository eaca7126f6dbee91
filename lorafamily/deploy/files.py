"""Saves the adapters of a model, and loads them. Everything is checked before the model is touched."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafamily.deploy.folder import hash_of_bits, hash_of_shapes, listed
from lorafamily.deploy.saved import FORMAT, Saved, read, warn_of_other_base, write
from lorafamily.deploy.writable import AGAIN, refuse_not_finite
from lorafamily.errors import FileError, StateError
from lorafamily.layers.extra_trained import (
    extra_trained_values,
    movable_buffers,
    parameter_names,
    take_values,
    tied_names,
)
from lorafamily.layers.offloaded import refuse_offloaded_adapters
from lorafamily.layers.placement import (
    Model,
    adapted,
    check_can_place,
    place,
    placement_of,
    refuse_unsaved,
    targets_of,
    warn_of_no_session,
    warn_of_no_step,
)
from lorafamily.layers.quantised import Quantised, shapes_of
from lorafamily.layers.sharded import class_of, is_sharded
from lorafamily.layers.site import base_parameters
from lorafamily.layers.state import ModelState, Placement
from lorafamily.layers.target import Target, target_of_record
from lorafamily.layers.weights import onloaded, whole_weights


def save(model: nn.Module, path: str | os.PathLike[str], name: str | None = None, *, hash_base: bool = False) -> Path:
    """Write the adapters of one name (default: the active ones) and their extra trained parameters into a folder.

    Ranks may differ between modules and may be zero. Saving what was loaded writes the same bytes. Each file is
    written next to its place and renamed into it. Of adapters that were trained without a session warnings say what was
    missing: the rank allocation or the penalty of their method, or a gradient. Returns the folder.

    `hash_base`: also record hashes of the adapted weights, so that `load` refuses other weights of the same shapes;
    this reads all of them once.

    Raises:
        StateError: nothing to save, a parameter trains that would not be in the file, a number is not finite, or
            `hash_base` needs weights that were merged with keep="none".
        FileError: a file cannot be written.
    """
    placement = placement_of(model, name)
    refuse_unsaved(model, placement)
    warn_of_no_session(placement)
    warn_of_no_step(placement)
    owner, state = adapted(model)
    targets = targets_of(owner)
    layers = {at: targets[at] for at in placement.adapters}
    refuse_offloaded_adapters(placement.adapters)
    if hash_base and (spread := [at for at, target in layers.items() if is_sharded(target.stored)]):
        raise StateError(
            f"hash_base=True reads whole weights, and that of {spread[0]} is spread over processes; leave it out, or "
            "save and load once before shard(model)"
        )
    base_values = _base_values(owner, state, layers) if hash_base else None
    extra_trained = extra_trained_values(owner, state, placement)
    factors = {f"{at}.{key}": p for at, a in placement.adapters.items() for key, p in a.named_parameters()}
    refuse_not_finite(factors | extra_trained, f"load would refuse the file; {AGAIN}")
    return write(described(owner, placement, layers, extra_trained, base_values), path)


def described(
    model: nn.Module,
    placement: Placement,
    targets: Mapping[str, Target],
    extra_trained: Mapping[str, Tensor],
    base_values: Mapping[str, Tensor] | None = None,
) -> Saved:
    """Adapters of a model as they are written, with their record. `base_values`: None records no hashes of weights;
    otherwise the base's values of those weights that have others in the model now."""
    modules: dict[str, dict[str, Any]] = {}
    names_by_id = parameter_names(model)
    for at, target in targets.items():
        modules[at] = {**target.kind.described(), "shape": list(target.shape)}
        if len(names := names_by_id.get(id(target.stored), ())) > 1:
            modules[at]["tied"] = names
        if base_values is not None:
            modules[at]["weight_hash"] = hash_of_bits(base_values[at]) if at in base_values else _hash_of(target)
    record = {
        "format": FORMAT,
        "written by": {"lorafamily": version("lorafamily"), "torch": torch.__version__},
        "method": placement.spec,
        "base": {"architecture": class_of(model).__name__, "shapes": hash_of_shapes(shapes_of(model))},
        "modules": modules,
    }
    tied = tied_names(model)
    if trained_tied := {at: tied[at] for at in extra_trained if at in tied}:
        record["tied"] = trained_tied
    return Saved(Path(), record, placement.method, placement.sizing, placement.adapters, dict(extra_trained))


def load(model: Model, path: str | os.PathLike[str], name: str | None = None) -> Model:
    """Put a saved adapter into a model of the same architecture and make it the active one.

    `name`: its name in the model; None means "default". If anything does not fit, the model stays unchanged. If the
    adapted layers fit and the model differs elsewhere from the one the adapter was made for, a warning says so.

    Raises:
        FileError: the folder lacks a file, a file is damaged, or the model's layers (or, if `save` recorded hashes,
            their weights) are not those it was made for.
        MethodError: the method is not installed.
        StateError: the name is taken, or the model is merged.
        TargetError: a layer cannot carry an adapter, for example because it has an attribute "lorafamily" of its own.
    """
    name = "default" if name is None else name
    owner = check_can_place(model, name)
    saved = read(path)
    targets = _targets(owner, saved)
    warn_of_other_base(saved, hash_of_shapes(shapes_of(owner)), f"this {type(model).__name__}")
    for at, adapter in saved.adapters.items():
        with onloaded(targets[at].layer):
            adapter.to(targets[at].stored.device)
    placement = Placement(name, saved.record["method"], saved.method, saved.sizing, saved.adapters, {})
    placement.file_fingerprints = placement.fingerprints()
    take_values(owner, placement, saved.extra_trained)
    place(owner, placement, targets)
    return model


def _base_values(owner: nn.Module, state: ModelState, targets: Mapping[str, Target]) -> dict[str, Tensor]:
    """The base's values of adapted weights that have others in the model now: those of a layer into which something is
    merged, and those that trained along with the active adapter. Raises StateError if one of them is gone."""
    every = targets_of(owner)
    kept: dict[int, Tensor | None] = {_place(every[at]): value for at, value in (state.originals or {}).items()}
    if state.active is not None:
        inactive = state.placements[state.active].inactive_values
        kept |= {id(owner.get_parameter(path)): value for path, value in inactive.items()}
    found = {}
    for at, target in targets.items():
        if (weight := _place(target)) not in kept:
            continue
        if (value := kept[weight]) is None:
            raise StateError(
                f'hash_base=True reads the base weights, and that of {at} is gone: "{state.active}" was merged with '
                'keep="none"; save before merging, merge with keep="cpu", or leave hash_base out'
            )
        found[at] = value.to(dtype=target.stored.dtype)  # as unmerge and switch give it back
    return found


def _place(target: Target) -> int:
    """What identifies the memory of a target's weight, which targets may share."""
    return id(target.layer if isinstance(target.layer_kind, Quantised) else target.stored)


def _hash_of(target: Target) -> str:
    """The hash of a layer's weight, also of an offloaded one."""
    with whole_weights(target.layer):
        return hash_of_bits(*target.kind.stored(target.layer).values())


def _targets(model: nn.Module, saved: Saved) -> dict[str, Target]:
    """The targets that the record names. The model must have them, and all parameters and buffers that the file has
    values for, in the same shapes, with the recorded hashes, and tied to the same names."""
    targets, wrong = {}, []
    for at, entry in saved.modules.items():
        target = target_of_record(model, at, entry)
        if target is None:
            wrong.append(f"{at} is missing, or cannot carry an adapter")
            continue
        targets[at] = target
        if (shape := list(target.shape)) != entry["shape"]:
            wrong.append(f"{at} is {shape}, not {entry['shape']}")
        elif "weight_hash" in entry and _hash_of(target) != entry["weight_hash"]:
            wrong.append(f"{at} has other weights")
    ours, tied = {**base_parameters(model), **movable_buffers(model)}, tied_names(model)
    for at, value in saved.extra_trained.items():
        if at not in ours:
            wrong.append(f"{at} is missing")
        elif ours[at].shape != value.shape:
            wrong.append(f"{at} is {list(ours[at].shape)}, not {list(value.shape)}")
        elif (there := saved.record.get("tied", {}).get(at, [at])) != (here := tied.get(at, [at])):
            which = [name for name in {**dict.fromkeys(there), **dict.fromkeys(here)} if name != at]
            wrong.append(f"{at} is {'no' if len(there) > 1 else 'one'} tied tensor with {' and '.join(which)}")
    if wrong:
        made_for = saved.record["base"]["architecture"]
        raise FileError(
            f"{saved.folder}: made for another model ({made_for}); in this {type(model).__name__} {listed(wrong)}"
        )
    return targets
