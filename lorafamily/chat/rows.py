"""Rows from files and from the hub. Each keeps its place (file and line), so that an error can name it."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lorafamily.errors import DataError
from lorafamily.terminal import nearest

T = TypeVar("T")

SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".csv", ".csv.gz", ".parquet")
JSON_TYPES: dict[type, str] = {
    **{dict: "an object", list: "a list", str: "a text", bool: "true or false"},
    **{int: "a number", float: "a number", type(None): "null"},
}


class RowError(Exception):
    """What is wrong with a row; `tried` adds the row's place."""


@dataclass(frozen=True)
class Row:
    """A row of a file. `place`: such as "chats.jsonl, line 3"."""

    place: str
    values: dict[str, Any]


def tried(place: str, make: Callable[..., T], *given: Any) -> T | RowError:
    """What `make` returns, or the RowError that it raises, with the place."""
    try:
        return make(*given)
    except RowError as error:
        return RowError(f"{place}: {error}")


def checked(found: Iterable[T | RowError]) -> list[T]:
    """What was found, if nothing is wrong.

    Raises:
        DataError: with the first error and the number of the others.
    """
    results = list(found)
    wrong = [result for result in results if isinstance(result, RowError)]
    if wrong:
        more = f" (and {len(wrong) - 1} more rows are wrong)" if len(wrong) > 1 else ""
        raise DataError(f"{wrong[0]}{more}; nothing was trained")
    return [result for result in results if not isinstance(result, RowError)]


def read(source: str, split: str = "train") -> list[Row]:
    """All rows of a file, of a folder's files, or of a data set on the hub.

    Args:
        source: JSON lines, JSON (a list), CSV or Parquet, the first and third also gzipped; a folder of such files; or
            a name on the hub, which `datasets` reads.
        split: of a data set on the hub.

    Raises:
        DataError: no such file, an unknown type of file, or rows that cannot be read; the message has the place and
            reason of the first.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and _suffix(file))
        if not files:
            raise DataError(f"{path}: the folder has no file that ends in {', '.join(SUFFIXES)}")
    elif path.is_file():
        if not _suffix(path):
            raise DataError(f"{path}: data must end in {', '.join(SUFFIXES)}, or be a folder of such files")
        files = [path]
    elif path.suffix or path.is_absolute() or source.startswith((".", "~")):
        around = [file.name for file in path.parent.glob("*")]
        raise DataError(f"{path}: no such file{nearest(path.name, around)}")
    else:
        return _from_hub(source, split)
    rows = checked(row for file in files for row in _from_file(file))
    if not rows:
        raise DataError(f"{path}: no row in it; nothing was trained")
    return rows


def _suffix(path: Path) -> str:
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")


def _from_file(path: Path) -> Iterable[Row | RowError]:
    suffix = _suffix(path)
    if suffix == ".parquet":
        return _parquet(path)
    try:
        data = path.read_bytes()
        if suffix.endswith(".gz"):
            data = gzip.decompress(data)
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}); nothing was trained") from None
    reading = _csv if suffix.startswith(".csv") else _json if suffix == ".json" else _json_lines
    return reading(path, data.removeprefix(b"\xef\xbb\xbf"))


def _json_lines(path: Path, data: bytes) -> Iterator[Row | RowError]:
    for number, line in enumerate(data.rstrip().split(b"\n") if data.strip() else [], 1):
        place = f"{path}, line {number}"
        yield tried(place, _json_line, place, line)


def _json_line(place: str, line: bytes) -> Row:
    if not line.strip():
        raise RowError("the line is empty")
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 (byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise RowError("JSON nested too deeply") from None
    if not isinstance(value, dict):
        raise RowError(f"must be a JSON object with keys, and is {JSON_TYPES[type(value)]}")
    return Row(place, value)


def _json(path: Path, data: bytes) -> Iterator[Row | RowError]:
    try:
        values = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (at byte {error.start + 1}); nothing was trained") from None
    except json.JSONDecodeError as error:
        lines = "; one object a line belongs in a file that ends in .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}){lines}; nothing was trained") from None
    if not isinstance(values, list):
        raise DataError(f"{path}: must be a list of objects, and is {JSON_TYPES[type(values)]}; nothing was trained")
    for number, value in enumerate(values, 1):
        place = f"{path}, row {number}"
        if isinstance(value, dict):
            yield Row(place, value)
        else:
            yield RowError(f"{place}: must be an object with keys, and is {JSON_TYPES[type(value)]}")


def _csv(path: Path, data: bytes) -> Iterator[Row | RowError]:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        byte = data[error.start]
        raise DataError(f"{path}, line {line}: not UTF-8 (byte 0x{byte:02x}); nothing was trained") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for values in reader:
            place = f"{path}, line {reader.line_num}"
            if None in values or None in values.values():
                columns = len(reader.fieldnames or ())
                given = columns + len(values.get(None, ())) - sum(value is None for value in values.values())
                yield RowError(f"{place}: {given} columns, where the header has {columns}")
            else:
                yield Row(place, {key: value for key, value in values.items() if value != ""})
    except csv.Error as error:
        yield RowError(f"{path}, line {reader.line_num}: not CSV ({error})")


def _parquet(path: Path) -> list[Row]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        values = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.lib.ArrowException) as error:
        raise DataError(f"{path}: not Parquet ({str(error).splitlines()[0]}); nothing was trained") from None
    return [Row(f"{path}, row {number}", _without_nulls(row)) for number, row in enumerate(values, 1)]


def _from_hub(name: str, split: str) -> list[Row]:
    try:
        import datasets
    except ImportError:
        hint = 'reading the hub needs datasets: pip install "lorafamily[chat]"'
        raise DataError(f"{name}: no such file or folder, and {hint}") from None
    datasets.logging.set_verbosity_error()
    try:
        found = datasets.load_dataset(name, split=split)
    except Exception as error:  # whatever the hub, the network or a script in the data set raises
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise DataError(f"{name}: no such file or folder, and no data set on the hub either ({reason})") from None
    return [Row(f"{name}[{split}], row {number}", _without_nulls(dict(row))) for number, row in enumerate(found, 1)]


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Tables have every column in every row; null means that a value was not given."""
    return {key: value for key, value in row.items() if value is not None}
