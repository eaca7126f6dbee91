"""The type checker of the tests: it checks array shapes and dtypes. What users pass is checked by our own errors."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype

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
        return lambda thing: jaxtyped(thing, typechecker=typechecker) if _speaks_of_arrays(thing) else thing

    return chosen


jaxtyping.jaxtyped = only_where_arrays_are(jaxtyping.jaxtyped)  # before lorafamily is imported, in conftest.py
