"""Methods and scorers by name. Built-in ones and plug-ins are found alike, by entry points."""

from __future__ import annotations

import difflib
import functools
import os
import sys
import warnings
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from lorafamily.allocation.scorer import Scorer
from lorafamily.errors import AllocationError, LoraFamilyError, MethodError
from lorafamily.method import Method

GROUP = "lorafamily.variants"
SCORERS = "lorafamily.scorers"


def methods() -> dict[str, Method]:
    """Every installed method by name, plug-ins included.

    A package adds one by an entry point in its `pyproject.toml`::

        [project.entry-points."lorafamily.variants"]
        mine = "my_package.mine:mine"      # a lorafamily.Method

    Raises:
        MethodError: two packages register one name for different objects, or an entry point is no `Method`.

    A plug-in that cannot be imported is left out, with a warning.
    """
    found = _installed(GROUP, "method", MethodError)
    for name, (target, method) in found.items():
        if not isinstance(method, Method):
            raise MethodError(f'entry point "{name}" = {target} is a {type(method).__name__}, not a lorafamily.Method')
    return {name: method for name, (_, method) in found.items()}


def scorers() -> dict[str, type[Scorer]]:
    """Every installed scorer of slices by name, plug-ins included: the values that an allocation's `scorer=` takes.

    A package adds one by an entry point in its `pyproject.toml`::

        [project.entry-points."lorafamily.scorers"]
        mine = "my_package.mine:Mine"      # a class derived from lorafamily.Scorer

    Raises:
        AllocationError: two packages register one name for different objects, or an entry point is no such class.

    A plug-in that cannot be imported is left out, with a warning.
    """
    found = _installed(SCORERS, "scorer", AllocationError)
    for name, (target, scorer) in found.items():
        if not (isinstance(scorer, type) and issubclass(scorer, Scorer)):
            raise AllocationError(f'entry point "{name}" = {target} is no class derived from lorafamily.Scorer')
    return {name: scorer for name, (_, scorer) in found.items()}


def _installed(group: str, what: str, error: type[LoraFamilyError]) -> dict[str, tuple[str, Any]]:
    """The address ("module:name") and the object of every entry point of a group, by name."""
    found: dict[str, EntryPoint] = {}
    for point in _points(group, _folders()):
        if found.setdefault(point.name, point).value != point.value:
            raise error(
                f'two packages register the {what} "{point.name}": {found[point.name].value} and {point.value}; '
                "uninstall one of them"
            )
    objects = {}
    for name, point in found.items():
        try:
            objects[name] = point.value, _load(point)
        except Exception as reason:  # what is wrong with one package must not stop the use of others
            whose = f" of {point.dist.name}" if point.dist else ""
            warnings.warn(
                f'the {what} "{name}"{whose} is left out: {point.value} cannot be imported '
                f"({type(reason).__name__}: {reason})",
                stacklevel=4,
            )
    return objects


@functools.cache
def _points(group: str, folders: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    """Entry points by name, read once for each state of `folders`; reading takes as long as a small model's step."""
    return tuple(sorted(entry_points(group=group), key=lambda point: point.name))


def _folders() -> tuple[tuple[str, int], ...]:
    """Where packages are, and when each place last changed: what is installed meanwhile is found."""
    return tuple((place, _last_changed(place)) for place in sys.path)


def _last_changed(path: str) -> int:
    try:
        return os.stat(path or ".").st_mtime_ns
    except OSError:  # there is nothing, or it may not be read
        return 0


@functools.cache
def _load(point: EntryPoint) -> Any:
    return point.load()


def find_scorer(name: str) -> type[Scorer]:
    """The scorer of that name.

    Raises:
        AllocationError: no scorer has it; the message lists those that there are.
    """
    installed = scorers()
    if name not in installed:
        raise AllocationError(f"scorer={name!r}: must be one of {', '.join(installed)}")
    return installed[name]


def find(spec: str) -> Method:
    """The method of a name, or of names joined by "+": "lora2+olora" takes each axis from the method that claims it.

    Raises:
        MethodError: a name is unknown (the message suggests the nearest), or the methods cannot be combined.
    """
    if isinstance(spec, Method):
        raise MethodError(
            "a saved adapter must name its method, so apply takes names, not objects: register the method by an entry "
            f'point of the group "{GROUP}", and pass its name'
        )
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
