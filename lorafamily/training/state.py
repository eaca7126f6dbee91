"""Parts of a checkpoint: nested plain data with tensors, a history, and the state of every random generator."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorafamily.errors import FileError
from lorafamily.history import Decision, Evaluation, History, Step, Weights

_TENSOR, _TUPLE, _PAIRS = "tensor", "tuple", "pairs"


def pack(tree: Any, at: str, tensors: dict[str, Tensor]) -> Any:
    """Nested data in a form that JSON can hold. Tensors go into `tensors`, named by their position in the tree.

    `unpack` restores dicts, lists, tuples, tensors, strings, numbers, booleans and None.

    Raises:
        FileError: there is something else in it.
    """
    if isinstance(tree, Tensor):
        tensors[at] = tree
        return {_TENSOR: at}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    if isinstance(tree, (list, tuple)):
        packed = [pack(value, f"{at}.{i}", tensors) for i, value in enumerate(tree)]
        return packed if isinstance(tree, list) else {_TUPLE: packed}
    if isinstance(tree, Mapping) and all(isinstance(key, (str, int)) for key in tree):
        return {_PAIRS: [[key, pack(value, f"{at}.{key}", tensors)] for key, value in tree.items()]}
    raise FileError(f"{at} is a {type(tree).__name__}, which a checkpoint cannot hold (it pickles nothing)")


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack`."""
    if isinstance(packed, list):
        return [unpack(value, tensors) for value in packed]
    if isinstance(packed, dict):
        ((tag, inside),) = packed.items()
        if tag == _TENSOR:
            return tensors[inside]
        if tag == _TUPLE:
            return tuple(unpack(value, tensors) for value in inside)
        return {key: unpack(value, tensors) for key, value in inside}
    return packed


def history_to_tree(history: History) -> dict[str, Any]:
    """A history as plain data, with a float64 tensor for every field of its many steps, in which None is nan."""
    columns = {}
    for name in Step.__dataclass_fields__:
        values = [getattr(step, name) for step in history.steps]
        columns[name] = torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64, device="cpu")
    return {**dataclasses.replace(history, steps=[]).to_dict(), "steps": columns}


def history_from_tree(tree: Mapping[str, Any]) -> History:
    """The history that `history_to_tree` took apart."""
    columns = {name: column.tolist() for name, column in tree["steps"].items()}
    for name in ("step", "slices", "trainable"):
        columns[name] = [int(value) for value in columns[name]]
    columns["orthogonality"] = [None if math.isnan(value) else value for value in columns["orthogonality"]]
    rows = zip(*columns.values(), strict=True)
    return History(
        **{
            **tree,
            "steps": [Step(**dict(zip(columns, row, strict=True))) for row in rows],
            "evaluations": [Evaluation(**entry) for entry in tree["evaluations"]],
            "decisions": [Decision(**entry) for entry in tree["decisions"]],
            **{name: tree[name] and Weights(**tree[name]) for name in ("best", "last")},
        }
    )


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, those of devices included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed all generators for the block, and restore them afterwards; None: leave them alone."""
    with nullcontext() if seed is None else random_kept(device):
        if seed is not None:
            seed_all(seed)
        yield


@contextmanager
def random_kept(device: torch.device) -> Iterator[None]:
    """Restore the state of all generators after the block."""
    before = random_state(device)
    try:
        yield
    finally:
        set_random_state(before, device)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's generators, and of all devices of this type: a model may be on
    several, none of which need be the current one."""
    numpy_state: Any = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (numpy_state[0], torch.from_numpy(numpy_state[1].astype(np.int64)), *numpy_state[2:]),
        "torch": torch.get_rng_state(),
    }
    if device.type not in ("cpu", "meta"):
        module = torch.get_device_module(device)
        get_all = getattr(module, "get_rng_state_all", None)  # not on every device type
        state["devices"] = [module.get_rng_state()] if get_all is None else get_all()
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore what `random_state` returned; generators of devices only if the state has some."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "devices" in state and device.type not in ("cpu", "meta"):
        module = torch.get_device_module(device)
        if hasattr(module, "get_rng_state_all"):
            for i, device_state in enumerate(state["devices"][: module.device_count()]):
                module.set_rng_state(device_state, i)
        else:
            module.set_rng_state(state["devices"][0])
