"""Changing an optimizer whose parameters change size, so that its state follows.

State of many shapes can follow: moments as large as the parameter, sums over rows or columns (Adafactor, SM3), flat
copies (Prodigy), 8- and 4-bit moments of torchao. State that cannot follow (bitsandbytes' blocks, the matrices of
Shampoo and SOAP) begins anew, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorafamily.parametrisation import Resize

Axes = tuple[int | None, ...]
"""For every axis of a state tensor, the axis of the parameter that it runs along; None if it has a single entry."""
FLAT: Axes = (-1,)
"""All entries of the parameter in one row."""

# State that an optimizer does not initialise with zeros: part of the class's name, key, and a function from the new
# parameter and its group's options to initial entries. All other state of new slices is zero.
_INITIAL: list[tuple[str, str, Callable[[Tensor, dict[str, Any]], Tensor]]] = [
    ("ScheduleFree", "z", lambda new, options: new),
    ("ASGD", "ax", lambda new, options: new),
    ("Prodigy", "p0", lambda new, options: new),
    ("Lookahead", "slow", lambda new, options: new),
    ("Rprop", "step_size", lambda new, options: torch.full_like(new, float(options["lr"]))),
    ("Adagrad", "sum", lambda new, options: torch.full_like(new, options.get("initial_accumulator_value", 0))),
]


class _CannotFollowError(Exception):
    """It is not known which entries of some state belong to which slice."""


def levels(optimizer: Any) -> Iterator[Any]:
    """The optimizer and those that it wraps (accelerate, SAM, schedule-free wrappers), with shared groups or not."""
    seen, waiting = set(), [optimizer]
    while waiting:
        level = waiting.pop()
        if id(level) in seen:
            continue
        seen.add(id(level))
        yield level
        for value in getattr(level, "__dict__", {}).values():
            inside = value if isinstance(value, list | tuple) else (value,)
            waiting += [inner for inner in inside if isinstance(inner, torch.optim.Optimizer)]


def replace_parameter(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter) -> None:
    """Let the optimizer train the new parameter in place of the old one, without its state."""
    for level in levels(optimizer):
        for group in level.param_groups:
            group["params"] = [new if parameter is old else parameter for parameter in group["params"]]


def forget(optimizer: torch.optim.Optimizer, gone: set[int]) -> None:
    """Remove the parameters with these ids (Python's `id`), and their state, from the optimizer."""
    for level in levels(optimizer):
        for group in level.param_groups:
            for parameter in group["params"]:
                if id(parameter) in gone:
                    level.state.pop(parameter, None)
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]


@torch.no_grad()
def follow_resize(optimizer: torch.optim.Optimizer, change: Resize) -> None:
    """Let the optimizer train the new parameter in place of the old one, with its state.

    Entries of kept slices keep their bits (quantised ones are rounded again), those of new slices are what the
    optimizer would begin with. State along the other axis, and scalars such as the step count, stay. If some of a
    parameter's state cannot follow, all of it begins anew, with a warning.
    """
    replace_parameter(optimizer, change.old, change.new)
    for level in levels(optimizer):
        state = level.state.pop(change.old, None)
        if not state:
            continue
        groups = (g for g in level.param_groups if any(p is change.new for p in g["params"]))
        options: dict[str, Any] = next(groups, {})
        try:
            followed = {key: _followed(level, key, value, change, options) for key, value in state.items()}
        except _CannotFollowError as error:
            warnings.warn(
                f'{type(level).__name__} keeps "{error}" in a form that cannot follow a change of rank, so its state '
                "of the tensors that changed begins anew",
                stacklevel=2,
            )
        else:
            level.state[change.new] = followed


def _followed(optimizer: Any, key: Any, value: Any, change: Resize, options: dict[str, Any]) -> Any:
    """One entry of a parameter's state after the change; the message of a _CannotFollowError is the key."""
    if value is None or isinstance(value, bool | int | float | complex | str):
        return value
    if not isinstance(value, Tensor):
        raise _CannotFollowError(key)
    if value.ndim == 0:
        return value
    if getattr(value, "block_size", None) is not None and hasattr(type(value), "zeros"):
        return _in_blocks_as(value, _cut(value.dequantize(), change.axis, change))
    if type(value) not in (Tensor, nn.Parameter) or not value.is_floating_point():  # codes of an unknown quantisation
        raise _CannotFollowError(key)
    axes = _axes(optimizer, key, value, change.old)
    initial = None
    for name, of, initialise in _INITIAL:
        if name in type(optimizer).__name__ and str(key).startswith(of):
            initial = initialise(change.new.detach(), options)
    if axes == FLAT:
        return _cut(value.view(change.old.shape), change.axis, change, initial).flatten()
    return _cut(value, axes.index(change.axis), change, initial) if change.axis in axes else value


def _cut(value: Tensor, axis: int, change: Resize, initial: Tensor | None = None) -> Tensor:
    """The kept entries of `value` along its `axis`; for new slices, then those of `initial`, or zeros."""
    kept = value.index_select(axis, change.keep.to(value.device))
    shape, n = list(kept.shape), len(change.keep)
    shape[axis] = change.new.shape[change.axis] - n
    new = kept.new_zeros(shape) if initial is None else initial.narrow(axis, n, shape[axis]).to(kept)
    return torch.cat([kept, new], axis)


def _in_blocks_as(value: Any, new: Tensor) -> Tensor:
    """Other values, quantised as torchao quantised `value` in blocks. Tensors that are small, or not a whole number of
    blocks, stay floats, as in torchao's optimizers."""
    if new.numel() < 4096 or new.numel() % value.block_size:
        return new
    options = {"signed": value.signed} if hasattr(value, "signed") else {}
    empty: Tensor = type(value).zeros(new.shape, **options, block_size=value.block_size, device=new.device)
    return empty.copy_(new)


def _axes(optimizer: Any, key: Any, value: Tensor, old: Tensor) -> Axes:
    """Along which axes of the parameter a state tensor runs; a _CannotFollowError if that is not known. Where shapes do
    not decide it (square parameters, a single slice), the state's name does, or its shape for other parameters."""
    found = _possible(key, value, old)
    if len(found) > 1:
        for parameter, state in optimizer.state.items():
            other = state.get(key) if isinstance(parameter, Tensor) and isinstance(state, dict) else None
            if isinstance(other, Tensor) and other.ndim and parameter.ndim == old.ndim:
                found &= _possible(key, other, parameter)
                if len(found) <= 1:
                    break
    if len(found) > 1:  # state whose name does not say that it is a mean most often has all axes
        found = found & {tuple(range(old.ndim))} or found & {FLAT}
    if not found:
        raise _CannotFollowError(key)
    return found.pop()


def _possible(key: Any, value: Tensor, parameter: Tensor) -> set[Axes]:
    """All readings of a state tensor's axes that its shape allows."""
    shape, n = tuple(parameter.shape), parameter.ndim
    full = tuple(range(n))
    readings: dict[Axes, tuple[int, ...]] = {full: shape, (None,) * value.ndim: (1,) * value.ndim}
    if n > 1:
        readings[FLAT] = (parameter.numel(),)
    for axis in full if n > 1 else ():
        readings[full[:axis] + full[axis + 1 :]] = shape[:axis] + shape[axis + 1 :]
        readings[(*full[:axis], None, *full[axis + 1 :])] = (*shape[:axis], 1, *shape[axis + 1 :])
    found = {axes for axes, of in readings.items() if of == tuple(value.shape)}
    if n > 1 and ("row" in str(key) or "col" in str(key)):  # in every Adafactor: means over the last axis, or before
        left, summed = (n - 2, n - 1) if "row" in str(key) else (n - 1, n - 2)
        return {axes for axes in found if left in axes and summed not in axes} or found
    return found
