"""Names → methods. Built-in methods and anybody's own come through one door, the entry-point group."""

from __future__ import annotations

import difflib
import functools
from importlib.metadata import entry_points

from lorafamily.errors import MethodError
from lorafamily.method import Method

GROUP = "lorafamily.variants"


def methods() -> dict[str, Method]:
    """Every installed method by name, plug-ins included.

    A package adds one by an entry point in its `pyproject.toml`::

        [project.entry-points."lorafamily.variants"]
        mine = "my_package.mine:mine"      # a lorafamily.Method

    Raises:
        MethodError: two packages register one name for different objects, or an entry point is no `Method`.
    """
    targets: dict[str, str] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        if targets.setdefault(point.name, point.value) != point.value:
            raise MethodError(
                f'two packages register the method "{point.name}": {targets[point.name]} and {point.value}; '
                "uninstall one of them"
            )
    return {name: _load(name, target) for name, target in targets.items()}


@functools.cache
def _load(name: str, target: str) -> Method:
    point = next(point for point in entry_points(group=GROUP) if (point.name, point.value) == (name, target))
    method = point.load()
    if not isinstance(method, Method):
        raise MethodError(f'entry point "{name}" = {target} is a {type(method).__name__}, not a lorafamily.Method')
    return method


def find(spec: str) -> Method:
    """The method of a name, or of names joined by "+": "lora2+olora" takes each axis from the part that claims it.

    Raises:
        MethodError: an unknown name (the nearest are offered), or a combination without meaning.
    """
    if not isinstance(spec, str):
        raise MethodError(f"method={spec!r}: must be a name or names joined by '+', such as \"lora2+olora\"")
    installed = methods()
    parts = [part.strip() for part in spec.split("+")]
    for part in parts:
        if part not in installed:
            near = difflib.get_close_matches(part, installed, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise MethodError(f'no method named "{part}" is installed; {hint}installed: {", ".join(sorted(installed))}')
    if duplicated := sorted({part for part in parts if parts.count(part) > 1}):
        raise MethodError(f'"{spec}" names {", ".join(duplicated)} twice')
    method = installed[parts[0]]
    for part in parts[1:]:
        method = method.combined(installed[part], spec)
    return method
