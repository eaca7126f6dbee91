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

    It binds the arguments of every call; on functions without arrays that was most of the time of the tests.
    """

    def chosen(*, typechecker: Any) -> Callable[[Any], Any]:
        checked = functools.partial(jaxtyped, typechecker=typechecker)

        def choose(thing: Any) -> Any:
            if not _speaks_of_arrays(thing):
                return thing
            return once_a_shape(checked, thing) if inspect.isfunction(thing) else checked(thing)

        return choose

    return chosen


class OnceAShape:
    """Checks the shapes of a function, once for every combination of types, shapes and dtypes that comes in and goes
    out. The same combination passes again, and checking takes longer than a small model's layer."""

    def __init__(self, jaxtyped: Callable[..., Any], function: Callable[..., Any]):
        self.seen: set[Any] = set()
        self.bodies: list[Callable[..., Any]] = []

        def run(*args: Any, **kwargs: Any) -> Any:
            return self.bodies.pop()(*args, **kwargs)

        # Annotations are strings, and are looked up where the function is from.
        there = types.FunctionType(run.__code__, function.__globals__, closure=run.__closure__)
        self.checked = jaxtyped(functools.wraps(function)(there))

    def __call__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = described((args, kwargs))
        new = given not in self.seen
        result = self._checking(function, args, kwargs) if new else function(*args, **kwargs)
        self.seen.add(given)
        if (given, described(result)) not in self.seen:
            if not new:
                self._checking(lambda *args, **kwargs: result, args, kwargs)
            self.seen.add((given, described(result)))
        return result

    def _checking(self, body: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = len(self.bodies)
        self.bodies.append(body)
        try:
            return self.checked(*args, **kwargs)
        finally:
            del self.bodies[before:]  # it is there still if an argument was refused


CHECKS: dict[types.CodeType, OnceAShape] = {}
"""A function inside another is made at every call of that one; its checks are not."""


def once_a_shape(jaxtyped: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its shapes checked."""
    if function.__code__ not in CHECKS:
        CHECKS[function.__code__] = OnceAShape(jaxtyped, function)
    check = CHECKS[function.__code__]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if torch.compiler.is_compiling() else check(function, args, kwargs)

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
