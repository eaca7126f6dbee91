"""Printing for the commands: colours, characters that an encoding lacks, the nearest name in errors, tables, bytes."""

from __future__ import annotations

import codecs
import difflib
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

PLAINER = {
    **dict.fromkeys("─━┄╌", "-"),
    **dict.fromkeys("│┃", "|"),
    **dict.fromkeys("╭╮╰╯┌┐└┘├┤┬┴┼", "+"),
    **dict(zip("▁▂▃▄▅▆▇█", "12345678", strict=True)),
    **{"→": "->", "×": "x", "‖": "||", "Δ": "d", "≤": "<=", "≥": ">=", "−": "-", "·": ".", "…": "..."},
    **{"«": "<<", "»": ">>", "²": "2", "–": "-", "′": "'"},
}
BYTES = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3))


def any_text() -> None:
    """Replace characters that the encoding of standard output or error lacks by plainer ones, instead of failing."""
    codecs.register_error("lorafamily", _plainer)
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None and getattr(stream, "errors", None) in ("strict", "backslashreplace"):
            reconfigure(errors="lorafamily")


def _plainer(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    plain = "".join(PLAINER.get(character, "?") for character in text)
    try:
        plain.encode(error.encoding)
    except UnicodeEncodeError:
        plain = "?" * len(text)
    return plain, error.end


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean X?", or "" if no name is close."""
    found = difflib.get_close_matches(str(name), list(known), 1, 0.6)
    return f"; did you mean {found[0]}?" if found else ""


def coloured(stream: TextIO) -> bool:
    """Whether to show colours: on a terminal, unless NO_COLOR is set (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def in_units(size: int) -> str:
    """A size in bytes with three digits and a unit."""
    for unit, of in BYTES:
        if size >= 0.9995 * of:  # rounds to 1.00
            return f"{size / of:#.3g}".rstrip(".") + f" {unit}"
    return f"{size} B"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table as lines: the first column to the left, the others to the right."""
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[f"{cell:>{width}}" for cell, width in zip(row[1:], widths, strict=True)] for row in rows]
    return ["  ".join([f"{row[0]:<{first}}", *others]) for row, others in zip(rows, cells, strict=True)]
