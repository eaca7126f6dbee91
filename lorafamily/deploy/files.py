"""An adapter as a folder: `adapter.safetensors` with the tensors, `adapter.json` with everything else.

Read with safetensors and json only. Everything is checked before the model is touched.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.beside import movable_buffers, tied_names, trained_beside
from lorafamily.budget import Sizing
from lorafamily.deploy.folder import listed, read_record, read_sealed_tensors, sealed_sizes, write_sealed
from lorafamily.deploy.plain import noted_dropout
from lorafamily.elsewhere import class_of, is_sharded, refuse_elsewhere, refuse_offloaded_adapters
from lorafamily.errors import FileError, LoraFamilyError, StateError
from lorafamily.layers import onloaded, whole_weights
from lorafamily.method import Method
from lorafamily.names import join
from lorafamily.parts import Target, target_of_record
from lorafamily.placement import (
    Model,
    Placement,
    check_can_place,
    noted,
    place,
    placement_of,
    refuse_untold,
    targets_of,
    warn_of_no_session,
)
from lorafamily.quantised import shapes_of
from lorafamily.registry import find
from lorafamily.site import base_parameters

FORMAT = 2  # 1 had no hashes
TENSORS, RECORD = "adapter.safetensors", "adapter.json"
FOLDER = f"a saved adapter is a folder with {RECORD} and {TENSORS}"


def save(model: nn.Module, path: str | os.PathLike[str], name: str | None = None, *, hash_base: bool = False) -> Path:
    """Write the adapters of one name (default: the active ones), with what was trained beside them, into a folder.

    Ranks may differ between modules and may be zero. Saving what was loaded writes the same bytes. Each file is
    written beside its place and renamed into it. Warns of adapters that were trained without what their method does in
    training, since no session was made for them. Returns the folder.

    `hash_base`: note hashes of the adapted weights too, so that loading onto other weights of the same shapes is
    refused; it reads all of them once.

    Raises:
        StateError: nothing to save, or something trains that would not be in the file.
        FileError: a file cannot be written.
    """
    placement = placement_of(model, name)
    refuse_untold(model, placement)
    warn_of_no_session(placement)
    owner, state = noted(model)
    assert state is not None
    targets = targets_of(owner)
    layers = {at: targets[at] for at in placement.adapters}
    refuse_offloaded_adapters(placement.adapters)
    if hash_base and (spread := [at for at, target in layers.items() if is_sharded(target.held)]):
        raise StateError(
            f"hash_base=True reads whole weights, and that of {spread[0]} is spread over processes, of which one "
            "writes the file; leave it out, or save and load once before shard(model)"
        )
    originals = (state.originals or {}) if hash_base else None
    return write(
        described(
            owner,
            placement,
            layers,
            trained_beside(owner, placement.parked, placement.buffers, state.active == placement.name),
            originals,
        ),
        path,
    )


def described(
    model: nn.Module,
    placement: Placement,
    targets: Mapping[str, Target],
    beside: Mapping[str, Tensor],
    originals: Mapping[str, Tensor | None] | None = None,
) -> Saved:
    """Adapters of a model with what a file says of them. `originals`: None notes no hashes of weights; else those
    weights, by layer, that are not in the model now because something is merged into it."""
    modules: dict[str, dict[str, Any]] = {}
    shared = _shared(model)
    for at, target in targets.items():
        modules[at] = {**target.kind.described(), "shape": list(target.shape)}
        if len(names := shared.get(id(target.held), ())) > 1:
            modules[at]["tied"] = names
        if originals is not None:
            original = originals.get(at)
            modules[at]["weight_hash"] = _hash_of(target) if original is None else _hash(original)
    record = {
        "format": FORMAT,
        "written by": {"lorafamily": version("lorafamily"), "torch": torch.__version__},
        "method": placement.spec,
        "base": {"architecture": class_of(model).__name__, "shapes": _shapes(model)},
        "modules": modules,
    }
    tied = tied_names(model)
    if trained_tied := {at: tied[at] for at in beside if at in tied}:
        record["tied"] = trained_tied
    return Saved(Path(), record, placement.method, placement.sizing, placement.adapters, dict(beside))


@dataclass(frozen=True)
class Saved:
    """An adapter folder, read and checked in itself, on the CPU. `beside`: what was trained beside the adapters."""

    folder: Path
    record: dict[str, Any]
    method: Method
    sizing: Sizing
    adapters: dict[str, Adapter]
    beside: dict[str, Tensor]

    @property
    def modules(self) -> dict[str, dict[str, Any]]:
        """What the record says of every adapted layer: kind, shape as (d_out, d_in), rank, scale."""
        modules: dict[str, dict[str, Any]] = self.record["modules"]
        return modules


def write(saved: Saved, path: str | os.PathLike[str]) -> Path:
    """Write an adapter without a model: one that was read, or made from such a one.

    Raises:
        FileError: a file cannot be written.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    record, tensors = _contents(saved)
    write_sealed(folder, RECORD, record, TENSORS, tensors)
    return folder


def sizes(saved: Saved) -> dict[str, int]:
    """Bytes of each file that `write` would write, to the byte; the tensors may be on the meta device."""
    record, tensors = _contents(saved)
    return sealed_sizes(RECORD, record, TENSORS, tensors)


def _contents(saved: Saved) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = {f"{at}.{key}": value for at, a in saved.adapters.items() for key, value in a.state_dict().items()}
    modules = {at: {**saved.modules[at], "rank": a.rank, **a.state()} for at, a in saved.adapters.items()}
    record = saved.record | {
        "options": saved.method.options(),
        # Without `ranks` where there are none, as records were before ranks could be given by layer.
        "sizing": {k: v for k, v in dataclasses.asdict(saved.sizing).items() if k != "ranks" or v is not None},
        "also_trained": {at: list(value.shape) for at, value in saved.beside.items()},
        "modules": modules,
    }
    return record, tensors | saved.beside


def read(path: str | os.PathLike[str]) -> Saved:
    """Read a saved adapter without a model.

    Raises:
        FileError: the folder lacks a file, or a file is damaged.
        MethodError: the method is not installed.
    """
    folder = Path(path)
    record = read_record(folder / RECORD, FOLDER, FORMAT)
    tensors = read_sealed_tensors(folder / TENSORS, FOLDER, record)
    try:
        method = find(record["method"]).with_options(**record["options"])
        sizing = _sizing(**record["sizing"])
        adapters: dict[str, Adapter] = {}
        expected: dict[str, tuple[int, ...]] = {}
        for at, entry in record["modules"].items():
            d_out, d_in = entry["shape"]
            if not (math.isfinite(entry["scale"]) and _is_count(entry["start_rank"])):
                raise ValueError(f"scale {entry['scale']} or start_rank of {at}")
            settled = entry.get("settled", False)  # records were written without it
            if not isinstance(settled, bool):
                raise TypeError(f"settled of {at}")
            with torch.device("meta"):
                update = method.parametrisation(d_in, d_out, **entry["sizes"])
            dropout = noted_dropout(entry["dropout"], entry["dropout_kind"], folder / RECORD)
            adapter = Adapter(
                update, scale=entry["scale"], dropout=dropout, start_rank=entry["start_rank"], settled=settled
            )
            if entry["frozen_start"]:
                adapter.freeze_start()
            adapters[at] = adapter
            expected |= {f"{at}.{key}": tuple(value.shape) for key, value in adapter.state_dict().items()}
        beside = list(record["also_trained"])
        expected |= {at: tuple(shape) for at, shape in record["also_trained"].items()}
        if not isinstance(record["base"]["architecture"], str):
            raise TypeError("base")
    except LoraFamilyError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise FileError(f"{folder / RECORD}: not a record of an adapter ({why})") from None
    _check_tensors(tensors, expected, folder)
    for at, adapter in adapters.items():
        if len({tensors[f"{at}.{key}"].dtype for key in adapter.state_dict()}) > 1:
            raise FileError(f"{folder / TENSORS}: the tensors of {at} are not all of one dtype")
        adapter.load_state_dict({key: tensors[f"{at}.{key}"] for key in adapter.state_dict()}, assign=True)
    return Saved(folder, record, method, sizing, adapters, {at: tensors[at] for at in beside})


def load(model: Model, path: str | os.PathLike[str], name: str | None = None) -> Model:
    """Put a saved adapter into a model of the same architecture and make it the active one.

    `name`: under which it goes into the model; default "default". Nothing is changed if anything does not fit. Where
    the adapted layers fit but the model differs elsewhere from the one it was made for, that is said as a warning.

    Raises:
        FileError: the folder lacks a file, a file is damaged, or the model's layers (or, where `save` noted hashes,
            their weights) are not those it was made for.
        MethodError: the method is not installed.
        StateError: the name is taken, or the model is merged.
        TargetError: a layer cannot carry an adapter, as where it has an attribute "lorafamily" of its own.
    """
    name = "default" if name is None else name
    owner = check_can_place(model, name)
    saved = read(path)
    targets = _targets(owner, saved)
    if saved.record["base"].get("shapes") != _shapes(owner):
        made_for = saved.record["base"]["architecture"]
        warnings.warn(
            f"{saved.folder}: every adapted layer fits, but this {type(model).__name__} has other parameters beside "
            f"them than the {made_for} the adapter was made for",
            stacklevel=2,
        )
    for at, adapter in saved.adapters.items():
        with onloaded(targets[at].layer):
            adapter.to(targets[at].held.device)
    parameters, buffers = base_parameters(owner), movable_buffers(owner)
    both = {**parameters, **buffers}
    refuse_elsewhere(both, saved.beside, "which the file has values for")
    beside = {at: value.to(both[at].device, both[at].dtype) for at, value in saved.beside.items()}
    placement = Placement(name, saved.record["method"], saved.method, saved.sizing, saved.adapters, {})
    placement.as_read = placement.fingerprints()
    placement.parked = {at: value for at, value in beside.items() if at in parameters}
    placement.buffers = {at: value for at, value in beside.items() if at in buffers}
    place(owner, placement, targets)
    return model


def _sizing(
    budget: int | None,
    budget_at: Literal["peak", "end"],
    rank: int,
    start: int,
    rank_budget: int | None,
    ranks: dict[str, int] | None = None,
) -> Sizing:
    counts = [rank, start, *(given for given in (budget, rank_budget) if given is not None), *(ranks or {}).values()]
    if budget_at not in ("peak", "end") or not all(_is_count(count) for count in counts):
        raise ValueError("sizing")
    return Sizing(budget, budget_at, rank, start, rank_budget, ranks)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _shapes(model: nn.Module) -> str:
    """A hash of the names and shapes of the base's parameters, quantised or not."""
    lines = [f"{name} {shape}" for name, shape in sorted(shapes_of(model).items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _hash(*stored: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in stored:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _hash_of(target: Target) -> str:
    """Of a layer's weight, wherever it is."""
    with whole_weights(target.layer):
        return _hash(*target.kind.stored(target.layer).values())


def _shared(model: nn.Module) -> dict[int, list[str]]:
    """The names of every parameter, by its id: several where weights are tied."""
    names: dict[int, list[str]] = defaultdict(list)
    for at, module in model.named_modules():
        for name, parameter in module._parameters.items():
            names[id(parameter)].append(join(at, name))
    return names


def _targets(model: nn.Module, saved: Saved) -> dict[str, Target]:
    """What the record names. The model must have each, in that shape and with the weights that the record notes, and
    all parameters and buffers that go along."""
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
    own, tied = {**base_parameters(model), **movable_buffers(model)}, tied_names(model)
    for at, value in saved.beside.items():
        if at not in own:
            wrong.append(f"{at} is missing")
        elif own[at].shape != value.shape:
            wrong.append(f"{at} is {list(own[at].shape)}, not {list(value.shape)}")
        elif (there := saved.record.get("tied", {}).get(at, [at])) != (here := tied.get(at, [at])):
            which = [name for name in {**dict.fromkeys(there), **dict.fromkeys(here)} if name != at]
            wrong.append(f"{at} is {'no' if len(there) > 1 else 'one'} tied tensor with {' and '.join(which)}")
    if wrong:
        made_for = saved.record["base"]["architecture"]
        raise FileError(
            f"{saved.folder}: made for another model ({made_for}); in this {type(model).__name__} {listed(wrong)}"
        )
    return targets


def _check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    wrong = [f"{key} is missing" for key in expected if key not in tensors]
    wrong += [f"{key} is not in the record" for key in tensors if key not in expected]
    for key, value in tensors.items():
        if key in expected and tuple(value.shape) != expected[key]:
            wrong.append(f"{key} is {tuple(value.shape)}, not {expected[key]}")
        elif not torch.isfinite(value).all() or not (value.is_floating_point() or value.ndim == 0):
            wrong.append(f"{key} is not all finite floating-point numbers")
    if wrong:
        raise FileError(f"{folder / TENSORS}: {listed(wrong)}")
