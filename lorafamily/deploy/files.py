"""An adapter as a folder: `adapter.safetensors` with the tensors, `adapter.json` with everything else.

Read with safetensors and json only. Everything is checked before the model is touched.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.budget import Sizing
from lorafamily.deploy.folder import listed, read_json, read_tensors, write_json, write_tensors
from lorafamily.errors import FileError, LoraFamilyError
from lorafamily.layers import base_parameters, kind_of, weight_of
from lorafamily.placement import Model, Placement, check_can_place, place, placement_of, state_of
from lorafamily.registry import find

FORMAT = 1
TENSORS, RECORD = "adapter.safetensors", "adapter.json"
FOLDER = f"a saved adapter is a folder with {RECORD} and {TENSORS}"


def save(model: nn.Module, path: str | os.PathLike[str], name: str | None = None) -> Path:
    """Write the adapters of one name (default: the active ones), with what was trained beside them, into a folder.

    Ranks may differ between modules and may be zero. Saving what was loaded writes the same bytes. Each file is
    written beside its place and renamed into it. Returns the folder.

    Raises:
        StateError: nothing to save.
    """
    placement = placement_of(model, name)
    state = state_of(model)
    assert state is not None
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    parameters = base_parameters(model)
    here = placement.name == state.active
    beside = {n: parameters[n].data if here else parked for n, parked in placement.parked.items()}
    tensors = {f"{at}.{key}": value for at, a in placement.adapters.items() for key, value in a.state_dict().items()}
    tensors |= beside
    record = {
        "format": FORMAT,
        "method": placement.spec,
        "options": placement.method.options(),
        "sizing": dataclasses.asdict(placement.sizing),
        "dropout": placement.dropout,
        "base": type(model).__name__,
        "modules": {
            at: {"shape": list(weight_of(model.get_submodule(at)).shape), **adapter.state()}
            for at, adapter in placement.adapters.items()
        },
        "also_trained": {at: list(value.shape) for at, value in beside.items()},
    }
    write_tensors(folder / TENSORS, tensors)
    write_json(folder / RECORD, record)
    return folder


def load(model: Model, path: str | os.PathLike[str], name: str | None = None) -> Model:
    """Put a saved adapter into a model of the same architecture and make it the active one.

    `name`: under which it goes into the model; default "default". Nothing is changed if anything does not fit.

    Raises:
        FileError: the folder lacks a file, a file is damaged, or the model's layers are not those it was made for.
        MethodError: the method is not installed.
        StateError: the name is taken, or the model is merged.
    """
    name = "default" if name is None else name
    check_can_place(model, name)
    folder = Path(path)
    record = _read_record(folder)
    tensors = read_tensors(folder / TENSORS, FOLDER)
    try:
        method = find(record["method"]).with_options(**record["options"])
        sizing = Sizing(**record["sizing"])
        adapters: dict[str, Adapter] = {}
        expected: dict[str, tuple[int, ...]] = {}
        _check_layers(model, record, folder)
        for at, entry in record["modules"].items():
            weight = weight_of(model.get_submodule(at))
            with torch.device("meta"):
                update = method.parametrisation(weight.shape[1], weight.shape[0], **entry["sizes"])
            adapter = Adapter(update, scale=entry["scale"], dropout=entry["dropout"], start_rank=entry["start_rank"])
            if entry["frozen_start"]:
                adapter.freeze_start()
            adapters[at] = adapter
            expected |= {f"{at}.{key}": tuple(value.shape) for key, value in adapter.state_dict().items()}
        expected |= {at: tuple(shape) for at, shape in record["also_trained"].items()}
    except LoraFamilyError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileError(f"{folder / RECORD}: not a record of an adapter ({type(error).__name__}: {error})") from None
    _check_tensors(tensors, expected, folder)

    for at, adapter in adapters.items():
        adapter.load_state_dict({key: tensors[f"{at}.{key}"] for key in adapter.state_dict()}, assign=True)
        adapter.to(weight_of(model.get_submodule(at)).device)
    parameters = base_parameters(model)
    beside = {at: tensors[at].to(parameters[at].device, parameters[at].dtype) for at in record["also_trained"]}
    place(model, Placement(name, record["method"], method, sizing, record["dropout"], adapters, beside))
    return model


def _read_record(folder: Path) -> dict[str, Any]:
    record = read_json(folder / RECORD, FOLDER)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        raise FileError(f"{folder / RECORD}: format {found!r}; this version of lorafamily reads format {FORMAT}")
    return record


def _check_layers(model: nn.Module, record: Mapping[str, Any], folder: Path) -> None:
    """The model must have every layer and parameter the record names, in that shape."""
    modules, wrong = dict(model.named_modules()), []
    for at, entry in record["modules"].items():
        if at not in modules or kind_of(modules[at]) is None:
            wrong.append(f"{at} is missing")
        elif (shape := list(weight_of(modules[at]).shape)) != entry["shape"]:
            wrong.append(f"{at} is {shape}, not {entry['shape']}")
    parameters = base_parameters(model)
    for at, shape in record["also_trained"].items():
        if at not in parameters:
            wrong.append(f"{at} is missing")
        elif list(parameters[at].shape) != shape:
            wrong.append(f"{at} is {list(parameters[at].shape)}, not {shape}")
    if wrong:
        raise FileError(
            f"{folder}: made for another model ({record['base']}); in this {type(model).__name__} {listed(wrong)}"
        )


def _check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    wrong = [f"{key} is missing" for key in expected if key not in tensors]
    wrong += [f"{key} is not in the record" for key in tensors if key not in expected]
    for key, value in tensors.items():
        if key in expected and tuple(value.shape) != expected[key]:
            wrong.append(f"{key} is {tuple(value.shape)}, not {expected[key]}")
        elif not value.is_floating_point() or not torch.isfinite(value).all():
            wrong.append(f"{key} is not all finite floating-point numbers")
    if wrong:
        raise FileError(f"{folder / TENSORS}: {listed(wrong)}")
