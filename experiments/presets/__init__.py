"""Named settings of compare.py (`--preset NAME`), one small file each; other options override them."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import tyro

from cells.settings import Compare
from tasks import TaskError


@dataclass(frozen=True)
class Preset:
    """`settings`: the defaults; `by_task`: changes for other tasks; `quick`: changes of the short form, which come
    last; `published`: the paper's name for methods that a paper proposed in this form, if the table is to mark them."""

    settings: Compare
    quick: dict[str, Any]
    by_task: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    published: Mapping[str, str] = field(default_factory=dict)


SHORT: dict[str, Any] = {
    "epochs": None,
    "steps": 20,
    "seeds": 1,
    "batch": 4,
    "evaluations": 1,
    "options": ("alora.scorer=first-order", "alora.rounds=2"),
}
"""The short form of presets with a large model, for those who have its weights."""


def names() -> list[str]:
    """The names of all presets, as --preset takes them."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(file.stem.replace("_", "-") for file in files if file.stem != "__init__")


def find(name: str) -> Preset:
    """The preset of that name.

    Raises:
        TaskError: there is none; the message lists those that there are.
    """
    if name not in names():
        raise TaskError(f"--preset {name}: no such preset; there are {', '.join(names())}")
    return cast(Preset, importlib.import_module(f"presets.{name.replace('-', '_')}").preset)


def defaults(name: str, quick: bool = False, task: str | None = None) -> Compare:
    """The settings of a preset, in its short form if `quick`, for its own task or another.

    Raises:
        TaskError: no such preset.
    """
    preset = find(name)
    task = task or preset.settings.task
    changes: dict[str, Any] = {"preset": name, "task": task, "quick": quick}
    changes |= preset.by_task.get(task, {}) | (preset.quick if quick else {})
    return replace(preset.settings, **changes)


def chosen(arguments: Sequence[str]) -> Compare:
    """The settings of a command line: those of its preset, overridden by its other options."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default=Compare.preset)
    early.add_argument("--quick", action="store_true")
    early.add_argument("--task")
    given, _ = early.parse_known_args(arguments)
    return tyro.cli(Compare, args=arguments, default=defaults(given.preset, given.quick, given.task))
