"""The type checker of the tests: it checks array shapes and dtypes. What users pass is checked by our own errors."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import jaxtyping
import numpy as np
import torch
from beartype import beartype
from torch import Tensor

ARRAYS = ("Float[", "Int[", "UInt8[", "Bool[", "Factors")


def shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype on those annotations that speak of arrays."""
    kept = {name: hint for name, hint in function.__annotations__.items() if _of_arrays(hint)}
    function.__annotations__ = kept
    return beartype(function)


def _of_arrays(hint: Any) -> bool:
    return any(name in (hint if isinstance(hint, str) else repr(hint)) for name in ARRAYS)


def _speaks_of_arrays(thing: Any) -> bool:
    """Whether anything in a function's signature, or among a dataclass's fields, is an array."""
    if inspect.isclass(thing):
        return dataclasses.is_dataclass(thing) and any(_of_arrays(field.type) for field in dataclasses.fields(thing))
    return not inspect.isfunction(thing) or any(map(_of_arrays, thing.__annotations__.values()))


def only_where_arrays_are(jaxtyped: Callable[..., Any]) -> Callable[..., Any]:
    """`jaxtyped`, which the import hook puts on every function, for those that have something to check.

    It binds the arguments of every call; on functions without arrays that was most of the time of the tests. Functions
    inside others are left alone: they are made at every call, and their checks would be, too.
    """

    def chosen(*, typechecker: Any) -> Callable[[Any], Any]:
        checked = functools.partial(jaxtyped, typechecker=typechecker)

        def choose(thing: Any) -> Any:
            if not _speaks_of_arrays(thing) or "<locals>" in getattr(thing, "__qualname__", ""):
                return thing
            return once_a_shape(checked, thing) if inspect.isfunction(thing) else checked(thing)

        return choose

    return chosen


def once_a_shape(jaxtyped: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its shapes checked, once for every combination of types, shapes and dtypes that comes in and goes
    out. The same combination passes again, and checking takes longer than a small model's layer."""
    seen: set[Any] = set()
    returned: list[Any] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        return returned.pop() if returned else function(*args, **kwargs)

    # Annotations are strings, and are looked up where the function is from.
    there = types.FunctionType(run.__code__, function.__globals__, closure=run.__closure__)
    checked = jaxtyped(functools.wraps(function)(there))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        given = described((args, kwargs))
        new = given not in seen
        result = checked(*args, **kwargs) if new else function(*args, **kwargs)
        seen.add(given)
        if (given, described(result)) not in seen:
            if not new:
                returned[:] = [result]
                try:
                    checked(*args, **kwargs)
                finally:
                    returned.clear()
            seen.add((given, described(result)))
        return result

    return call


def described(value: Any) -> Any:
    """What a check of shapes looks at, and can be compared."""
    if isinstance(value, Tensor | np.ndarray):
        return type(value), tuple(value.shape), value.dtype
    if isinstance(value, tuple | list):
        return type(value), *map(described, value)
    if isinstance(value, dict):
        return type(value), *map(described, value.values())
    return type(value)


jaxtyping.jaxtyped = only_where_arrays_are(jaxtyping.jaxtyped)  # before lorafamily is imported, in conftest.py
