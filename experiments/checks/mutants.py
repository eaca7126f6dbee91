"""Change one operator, number or branch of the code at a time, and see whether a test notices.

    pip install cosmic-ray pytest-cov
    python experiments/checks/mutants.py cover --out runs/mutants               # which test runs which line: one suite
    python experiments/checks/mutants.py run --out runs/mutants --sample 300
    python experiments/checks/mutants.py survivors --out runs/mutants

Cosmic Ray makes the changes, one for each place in the code, drawn among those that it knows for the place: eleven ways
to replace a plus would count a line eleven times. Left out are annotations, which nobody evaluates.
Each is tried by the tests that run its line, the fastest first, in a process forked from one that has torch imported.

Files are changed where they are, and put back: run it in a clone of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that rooms find each other

import waiting  # noqa: F401 - before torch

# isort: split
import ast
import difflib
import json
import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

ROOT = Path(__file__).parents[2]
MODULES = (
    *("adapter.py", "parametrisation.py", "budget.py", "layers/site.py", "allocation"),
    *("deploy/merge.py", "deploy/merge_quantised.py"),
)
"""In lorafamily/: where a fault would be silent."""
ANNOTATIONS = ("annotation", "returns")


@dataclass(frozen=True)
class Cover:
    """Run the suite once, and note which test runs which line and how long it takes."""

    out: Path = Path("runs/mutants")
    tests: tuple[str, ...] = ()
    """files or folders; none: all"""


@dataclass(frozen=True)
class Run:
    """Try mutants that have no row yet."""

    out: Path = Path("runs/mutants")
    sample: int = 300
    """places, drawn from all"""
    seed: int = 0
    seconds: float = 60
    """of tests for one mutant, as they took under `cover`"""
    again: bool = False
    """only those that survived, with this many seconds"""


@dataclass(frozen=True)
class Survivors:
    """Print what was found by module, and the changes that no test noticed."""

    out: Path = Path("runs/mutants")


@dataclass(frozen=True)
class Mutant:
    path: str
    line: int
    operator: str
    occurrence: int
    arguments: dict[str, Any]

    @property
    def key(self) -> str:
        return f"{self.path}:{self.line} {self.operator} {self.occurrence}"


def cover(given: Cover) -> None:
    given.out.mkdir(parents=True, exist_ok=True)
    data = (given.out / "coverage").absolute()
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "--cov=lorafamily", "--cov-context=test"]
    command += ["--cov-report=", "--durations=0", "-vv", *given.tests]
    with open(given.out / "durations.txt", "w") as file:
        subprocess.run(command, cwd=ROOT, stdout=file, env=os.environ | {"COVERAGE_FILE": str(data)}, check=False)


def mutants(sample: int, seed: int) -> list[Mutant]:
    """One a place, so many places of all."""
    from cosmic_ray.commands import init
    from cosmic_ray.work_db import use_db

    files = [path for name in MODULES for path in _files(ROOT / "lorafamily" / name)]
    places: dict[tuple[str, Any, str], list[Mutant]] = {}
    with use_db(":memory:") as known:
        init(files, known, {})
        specs = [item.mutations[0] for item in known.work_items]
    annotations = {file: _annotations(file) for file in files}
    for found in specs:
        if any(begin <= found.start_pos < end for begin, end in annotations[found.module_path]):
            continue
        path = found.module_path.relative_to(ROOT).as_posix()
        family = found.operator_name.split("_")[0]
        mutant = Mutant(path, found.start_pos[0], found.operator_name, found.occurrence, dict(found.operator_args))
        places.setdefault((path, found.start_pos, family), []).append(mutant)
    draw = random.Random(seed)
    chosen = [draw.choice(places[place]) for place in sorted(places)]
    print(f"{len(chosen)} places in {len(files)} files; {min(sample, len(chosen))} are tried")
    return draw.sample(chosen, min(sample, len(chosen)))


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.py")) if path.is_dir() else [path]


def _annotations(path: Path) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations begin and end, as (line, column)."""
    nodes = [getattr(node, name, None) for node in ast.walk(ast.parse(path.read_text())) for name in ANNOTATIONS]
    found = [node for node in nodes if isinstance(node, ast.expr)]
    return [((node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0)) for node in found]


class Tests:
    """Which tests run a line, the fastest first."""

    def __init__(self, folder: Path):
        from coverage import CoverageData

        self.data = CoverageData(str(folder / "coverage"))
        self.data.read()
        self.seconds: dict[str, float] = {}
        pattern = re.compile(r"^ *(\d+\.\d+)s (?:call|setup|teardown) +(.*)$", re.MULTILINE)
        for seconds, test in pattern.findall((folder / "durations.txt").read_text()):
            self.seconds[test] = self.seconds.get(test, 0.0) + float(seconds)
        self.lines: dict[str, dict[int, list[str]]] = {}

    def of(self, path: str, line: int, seconds: float) -> list[str]:
        """Those that run the line; for a line that is run at import (a default, a constant), those that run the
        function or class that it is in, or anything in the file."""
        if path not in self.lines:
            measured = next(name for name in self.data.measured_files() if name.endswith("/" + path))
            found = self.data.contexts_by_lineno(measured)
            self.lines[path] = {n: [c.split("|")[0] for c in tests if c] for n, tests in found.items()}
        lines = self.lines[path]
        tests = set(lines.get(line, ()))
        for begin, end in self._around(path, line):
            if not tests:
                tests = {test for n in range(begin, end + 1) for test in lines.get(n, ())}
        chosen: list[str] = []
        spent = 0.0
        for test in sorted(tests, key=lambda test: (self.seconds.get(test, 0.0), test)):
            if (spent := spent + self.seconds.get(test, 0.0)) > seconds and chosen:
                break
            chosen.append(test)
        return chosen

    def _around(self, path: str, line: int) -> list[tuple[int, int]]:
        """First and last lines of statements, functions and classes around a line, the narrowest first, then all."""
        tree = ast.parse((ROOT / path).read_text())
        found = [
            (node.lineno, node.end_lineno or 0)
            for node in ast.walk(tree)
            if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or 0)
        ]
        return [*sorted(found, key=lambda lines: lines[1] - lines[0]), (1, 10**6)]


def attempt(mutant: Mutant, tests: list[str], failures: Path, seconds: float) -> str:
    """Killed, survived, or untested where nothing runs the line. `failures`: gets the names of tests that fail;
    `seconds`: that the tests take."""
    from cosmic_ray.mutating import use_mutation
    from cosmic_ray.plugins import get_operator

    if not tests:
        return "untested"
    operator = get_operator(mutant.operator)(**mutant.arguments)
    with use_mutation(ROOT / mutant.path, operator, mutant.occurrence):
        return "survived" if passed(tests, failures, 60 + 4 * seconds, "-x") else "killed"


def passed(tests: list[str], failures: Path, limit: float, *options: str) -> bool:
    """Run tests in a process of their own, for so many seconds at most: a change can make an endless loop."""
    failures.write_text("")
    child = os.fork()
    if not child:
        _in_child([*options, *tests], failures)
    return _waited(child, limit) == 0


class Noted:
    """A plugin that writes down which tests fail, at import too."""

    def __init__(self, path: Path):
        self.path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            with open(self.path, "a") as file:
                file.write(f"{report.nodeid}\n")


def _in_child(arguments: list[str], failures: Path) -> None:
    import pytest

    os.setsid()
    sys.dont_write_bytecode = True  # of two changes of one length within a second, the second would not be seen
    os.chdir(ROOT)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    code = 1
    try:
        # What the parent has imported cannot be rewritten by pytest, which warns; warnings fail our tests.
        options = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        code = int(pytest.main([*options, *arguments], plugins=[Noted(failures)]))
    finally:
        os._exit(code)


def _waited(child: int, seconds: float) -> int:
    """Exit status; 124 where it takes longer."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 124


def run(given: Run) -> None:
    import peft  # noqa: F401 - what the tests import, once for all children; not lorafamily, which changes
    import transformers  # noqa: F401

    path = given.out / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    outcome = {row["key"]: row["outcome"] for row in rows}
    tests, failures = Tests(given.out), (given.out / "failures.txt").absolute()
    for count, mutant in enumerate(mutants(given.sample, given.seed), 1):
        known = outcome.get(mutant.key)
        if known not in (("survived", "untested") if given.again else (None,)):
            continue
        chosen = tests.of(mutant.path, mutant.line, given.seconds)
        row = {"key": mutant.key, "path": mutant.path, "tests": len(chosen)}
        row |= {"outcome": attempt(mutant, chosen, failures, given.seconds), "mutant": vars(mutant)}
        row["killers"] = failures.read_text().splitlines()
        rows.append(row)
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"[{count}] {mutant.key}: {row['outcome']} ({len(chosen)} tests)", flush=True)
    killers = sorted({test for row in rows for test in row["killers"]})
    if not passed(killers, failures, 3600):
        raise SystemExit(f"fail without any change, so that what they killed does not count:\n{failures.read_text()}")


def survivors(given: Survivors) -> None:
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    rows = {row["key"]: row for row in map(json.loads, (given.out / "rows.jsonl").read_text().splitlines())}
    for row in rows.values():
        if row["outcome"] == "killed":
            continue
        mutant = Mutant(**row["mutant"])
        source = (ROOT / mutant.path).read_text()
        operator = get_operator(mutant.operator)(**mutant.arguments)
        changed = mutate_code(source, operator, mutant.occurrence) or source
        print(f"{row['outcome']}: {mutant.key} ({row['tests']} tests)")
        for line in [*difflib.unified_diff(source.splitlines(), changed.splitlines(), n=0, lineterm="")][2:]:
            if not line.startswith("@@"):
                print(f"    {line[0]} {line[1:].strip()}")
    found: dict[str, Counter[str]] = {}
    for row in rows.values():
        found.setdefault(row["path"], Counter())[row["outcome"]] += 1
    for path, counts in sorted(found.items()):
        print(f"{path}: {counts['killed']} of {counts.total()} killed")
    killed = sum(row["outcome"] == "killed" for row in rows.values())
    print(f"{killed} of {len(rows)} killed: {killed / len(rows):.0%}")


Command = (
    Annotated[Cover, tyro.conf.subcommand("cover")]
    | Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Survivors, tyro.conf.subcommand("survivors")]
)

if __name__ == "__main__":
    match tyro.cli(Command):
        case Cover() as given:
            cover(given)
        case Run() as given:
            run(given)
        case Survivors() as given:
            survivors(given)
