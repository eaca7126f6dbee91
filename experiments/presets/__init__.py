"""Named settings of compare.py, a small file each: `--preset NAME`, anything in it overridden by other options."""

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
    """`settings`: the defaults; `by_task`: what other tasks change in them; `quick`: what the short form changes last;
    `published`: for methods that a paper proposed in this form, its name, where a table marks them."""

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
"""The short form of presets with a large model, where its weights are at hand."""


def names() -> list[str]:
    """Every preset, by the names that --preset takes."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(file.stem.replace("_", "-") for file in files if file.stem != "__init__")


def find(name: str) -> Preset:
    """The preset of that name.

    Raises:
        TaskError: there is none; says which there are.
    """
    if name not in names():
        raise TaskError(f"--preset {name}: no such preset; there are {', '.join(names())}")
    return cast(Preset, importlib.import_module(f"presets.{name.replace('-', '_')}").preset)


def defaults(name: str, quick: bool = False, task: str | None = None) -> Compare:
    """A preset's settings, in its short form or not, for its own task or another it knows.

    Raises:
        TaskError: no such preset.
    """
    preset = find(name)
    task = task or preset.settings.task
    changes: dict[str, Any] = {"preset": name, "task": task, "quick": quick}
    changes |= preset.by_task.get(task, {}) | (preset.quick if quick else {})
    return replace(preset.settings, **changes)


def chosen(arguments: Sequence[str]) -> Compare:
    """What a command line asks for: the preset it names, with all else that it gives."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default=Compare.preset)
    early.add_argument("--quick", action="store_true")
    early.add_argument("--task")
    given, _ = early.parse_known_args(arguments)
    return tyro.cli(Compare, args=arguments, default=defaults(given.preset, given.quick, given.task))
