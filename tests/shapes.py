"""The type checker of the tests: it checks array shapes and dtypes. What users pass is checked by our own errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import beartype

ARRAYS = ("Float[", "Int[", "UInt8[", "Factors")


def shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype on those annotations that speak of arrays."""
    kept = {name: hint for name, hint in function.__annotations__.items() if _of_arrays(hint)}
    function.__annotations__ = kept
    return beartype(function)


def _of_arrays(hint: Any) -> bool:
    return any(name in (hint if isinstance(hint, str) else repr(hint)) for name in ARRAYS)
