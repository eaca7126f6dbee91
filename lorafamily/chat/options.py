"""From the command line and a config file to typed options, and back to a file; errors in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from lorafamily.errors import DataError, FileError
from lorafamily.terminal import nearest

T = TypeVar("T")

INSTEAD = (("budget", "rank", "rank_budget"), ("steps", "epochs"))
"""Options that exclude each other: one on the command line replaces the others in a config file."""


def parsed(of: type[T], arguments: Sequence[str], command: str, examples: str) -> T:
    """The options, from the arguments and, for those not given, from the file of `--config`.

    Raises:
        DataError: no such option or value; the message is one line, with the nearest name.
        FileError: the config file cannot be read, or is not a mapping of options.
        SystemExit: help was asked for and printed.
    """
    arguments, config = _config(list(arguments))
    names = dict(_fields(of))
    given = {name.removeprefix("no_") if name not in names else name for name in map(_name, arguments) if name}
    arguments = [*_from_file(config, names, given), *arguments]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                of,
                args=arguments,
                prog=f"lorafamily {command}",
                description=f"{(of.__doc__ or '').splitlines()[0]}\n\n{examples}",
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise DataError(_one_line(printed.getvalue(), names)) from None


def _config(arguments: list[str]) -> tuple[list[str], Path | None]:
    """The arguments without `--config FILE`, and the file."""
    for at, argument in enumerate(arguments):
        if argument == "--config":
            if at + 1 == len(arguments):
                raise DataError("--config needs a file: --config run.yaml")
            return arguments[:at] + arguments[at + 2 :], Path(arguments[at + 1])
        if argument.startswith("--config="):
            return arguments[:at] + arguments[at + 1 :], Path(argument.partition("=")[2])
    return arguments, None


def _name(argument: str) -> str:
    return argument[2:].partition("=")[0].replace("-", "_") if argument.startswith("--") else ""


def _fields(of: Any) -> Iterator[tuple[str, Any]]:
    """Names and types of all options, including those inside groups."""
    for name, hint in typing.get_type_hints(of).items():
        if dataclasses.is_dataclass(hint):
            yield from _fields(hint)
        else:
            yield name, hint


def _from_file(path: Path | None, names: Mapping[str, Any], given: set[str]) -> list[str]:
    """The options of a config file as arguments, except those that the command line gives or replaces."""
    if path is None:
        return []
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"--config {path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise FileError(f"--config {path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(read, dict):
        raise FileError(f"--config {path}: must map options to values, as the run.yaml of a run does")
    flat: dict[str, Any] = {}
    for key, value in read.items():
        flat |= value if isinstance(value, dict) else {key: value}
    replaced = {name for group in INSTEAD if given & set(group) for name in group}
    arguments: list[str] = []
    for key, value in flat.items():
        name = str(key).replace("-", "_")
        if name not in names:
            raise FileError(f"--config {path}: no option {key}{nearest(name, names)}")
        if value is None or name in given | replaced:
            continue
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list):
            arguments += [f"--{option}", *map(str, value)] if value else []
        else:
            arguments += [f"--{option}", str(value)]
    return arguments


def _one_line(text: str, names: Mapping[str, Any]) -> str:
    """The first paragraph of tyro's message, which says what is wrong, in one line and without the box around it."""
    lines = [re.sub(r"[│╭╮╰╯|+]|─{3,}|-{3,}", " ", line).strip() for line in text.splitlines()[1:]]
    # Without a box there is a rule below the title.
    message = " ".join(takewhile(bool, lines[not lines[:1] or not lines[0] :]))
    if found := re.match(r"Unrecognized options: (--[^\s,=]+)", message):
        return f"no option {found[1]}{nearest(found[1], ['--' + name.replace('_', '-') for name in names])}"
    for value in (r" instantiated from \[(.*)\]", r": ('.*')$"):
        if found := re.match(r"Error parsing (\S+): .*" + value, message):
            hint = str(names.get(_name(found[1]), ""))
            number = "must be a number" if "float" in hint else "must be a whole number" if "int" in hint else ""
            return f"{found[1]} {found[2]}: {number or 'is no such value'}"
    if found := re.match(r"invalid choice '(.*)' for argument '(\S+)'. Expected one of \((.*)\)", message):
        choices = [choice.strip(" '") for choice in found[3].split(",") if choice.strip(" '") not in ("", "None")]
        return f"{found[2]} {found[1]}: must be one of {', '.join(choices)}{nearest(found[1], choices)}"
    if message.startswith("Missing from"):
        missing = re.findall(r"(?<!\S)--[a-z-]+", message)
        return f"needs {', '.join(missing)}; --help shows all options"
    return message


def write(options: Any, path: Path) -> None:
    """Write all options into a config file, so that `--config FILE` runs the same again."""
    path.write_text(yaml.safe_dump(grouped(options), sort_keys=False, allow_unicode=True), encoding="utf-8")


def grouped(options: Any) -> dict[str, dict[str, Any]]:
    """The options by group, as a config file holds them: tuples are lists, and paths are texts."""
    return json.loads(json.dumps(dataclasses.asdict(options), default=str))


def at_least(options: Any, **least: int) -> None:
    """Check options by name, each with the least value allowed.

    Raises:
        DataError: a value is less.
    """
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            raise DataError(f"--{name.replace('_', '-')} {value}: must be at least {bound}")
