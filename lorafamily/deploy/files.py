"""Saves the adapters of a model, and loads them. Everything is checked before the model is touched."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafamily.deploy.folder import listed
from lorafamily.deploy.hashes import hash_of_bits, hash_of_shapes
from lorafamily.deploy.saved import FORMAT, Saved, read, write
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
)
from lorafamily.layers.quantised import shapes_of
from lorafamily.layers.sharded import class_of, is_sharded
from lorafamily.layers.site import base_parameters
from lorafamily.layers.state import Placement
from lorafamily.layers.target import Target, target_of_record
from lorafamily.layers.weights import onloaded, whole_weights


def save(model: nn.Module, path: str | os.PathLike[str], name: str | None = None, *, hash_base: bool = False) -> Path:
    """Write the adapters of one name (default: the active ones) and their extra trained parameters into a folder.

    Ranks may differ between modules and may be zero. Saving what was loaded writes the same bytes. Each file is
    written next to its place and renamed into it. A warning names adapters that were trained without a session, and so
    without the rank allocation or the penalty of their method. Returns the folder.

    `hash_base`: also record hashes of the adapted weights, so that `load` refuses other weights of the same shapes;
    this reads all of them once.

    Raises:
        StateError: nothing to save, a parameter trains that would not be in the file, or a number is not finite.
        FileError: a file cannot be written.
    """
    placement = placement_of(model, name)
    refuse_unsaved(model, placement)
    warn_of_no_session(placement)
    owner, state = adapted(model)
    targets = targets_of(owner)
    layers = {at: targets[at] for at in placement.adapters}
    refuse_offloaded_adapters(placement.adapters)
    if hash_base and (spread := [at for at, target in layers.items() if is_sharded(target.stored)]):
        raise StateError(
            f"hash_base=True reads whole weights, and that of {spread[0]} is spread over processes; leave it out, or "
            "save and load once before shard(model)"
        )
    originals = (state.originals or {}) if hash_base else None
    extra_trained = extra_trained_values(owner, state, placement)
    factors = {f"{at}.{key}": p for at, a in placement.adapters.items() for key, p in a.named_parameters()}
    refuse_not_finite(factors | extra_trained, f"load would refuse the file; {AGAIN}")
    return write(described(owner, placement, layers, extra_trained, originals), path)


def described(
    model: nn.Module,
    placement: Placement,
    targets: Mapping[str, Target],
    extra_trained: Mapping[str, Tensor],
    originals: Mapping[str, Tensor | None] | None = None,
) -> Saved:
    """Adapters of a model as they are written, with their record. `originals`: None records no hashes of weights;
    otherwise the original weights, by layer, of a model into which something is merged."""
    modules: dict[str, dict[str, Any]] = {}
    names_by_id = parameter_names(model)
    for at, target in targets.items():
        modules[at] = {**target.kind.described(), "shape": list(target.shape)}
        if len(names := names_by_id.get(id(target.stored), ())) > 1:
            modules[at]["tied"] = names
        if originals is not None:
            original = originals.get(at)
            modules[at]["weight_hash"] = _hash_of(target) if original is None else hash_of_bits(original)
    record = {
        "format": FORMAT,
        "written by": {"lorafamily": version("lorafamily"), "torch": torch.__version__},
        "method": placement.spec,
        "base": {"architecture": class_of(model).__name__, "shapes": _shapes(model)},
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
    if saved.record["base"].get("shapes") != _shapes(owner):
        made_for = saved.record["base"]["architecture"]
        warnings.warn(
            f"{saved.folder}: every adapted layer fits, but this {type(model).__name__} has other parameters besides "
            f"them than the {made_for} the adapter was made for",
            stacklevel=2,
        )
    for at, adapter in saved.adapters.items():
        with onloaded(targets[at].layer):
            adapter.to(targets[at].stored.device)
    placement = Placement(name, saved.record["method"], saved.method, saved.sizing, saved.adapters, {})
    placement.file_fingerprints = placement.fingerprints()
    take_values(owner, placement, saved.extra_trained)
    place(owner, placement, targets)
    return model


def _shapes(model: nn.Module) -> str:
    """A hash of the names and shapes of the base's parameters; quantising the base does not change it."""
    return hash_of_shapes(shapes_of(model))


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
