"""One value for every layer, from values by layer name or regular expression."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from lorafamily.errors import TargetError

Value = TypeVar("Value")


def by_layer(given: Mapping[str, Value], layers: Iterable[str], what: str, default: Value) -> dict[str, Value]:
    """The value of every layer: that of its full name, else of the first pattern found in the name, else `default`.

    A key that is a layer's full name means that layer alone; any other is a regular expression, searched for in full
    names as `targets` are. `what`: the argument's name, for messages.

    Raises:
        TargetError: a key is no regular expression, or no layer takes its value from it.
    """
    names = list(layers)
    known = set(names)
    patterns = {key: _compiled(key, what) for key in given if key not in known}
    found: dict[str, Value] = {}
    used: set[str | None] = set()
    for name in names:
        key = name if name in given else next((key for key, p in patterns.items() if p.search(name)), None)
        found[name] = default if key is None else given[key]
        used.add(key)
    for key, pattern in patterns.items():
        if key in used:
            continue
        if taken := [name for name in names if pattern.search(name)]:
            raise TargetError(
                f'{what}["{key}"] has no effect: full names or earlier keys decide {taken[0]} and all else it matches; '
                "of several patterns the first counts, so put the narrow ones first"
            )
        near = difflib.get_close_matches(key, names, n=3, cutoff=0.3) or names[:3]
        raise TargetError(
            f'{what}["{key}"] matches none of the {len(names)} adapted layers; nearest: {", ".join(near)}'
        )
    return found


def _compiled(key: str, what: str) -> re.Pattern[str]:
    if not isinstance(key, str):
        raise TargetError(f"{what} has the key {key!r}: must be a layer's full name or a regular expression")
    try:
        return re.compile(key)
    except re.error as error:
        raise TargetError(f'{what}["{key}"]: no layer of that name, and no regular expression ({error})') from None
