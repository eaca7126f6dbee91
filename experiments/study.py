"""Run a study of where the rank goes, and write docs/study.md from its stored rows.

    python experiments/study.py run planted
    python experiments/study.py run sst2 --model FOLDER --data FOLDER
    nice -n 19 python experiments/study.py run embedded --workers 1 --arms uniform ALoRA\\ first-order
    python experiments/study.py store runs/study-planted/results.jsonl
    python experiments/study.py page

Each finished trial is a line of `runs/study-NAME/results.jsonl`; the same command goes on with what is missing. A study
that has no such file yet begins with the rows that are stored.
"""

from __future__ import annotations

import waiting  # noqa: F401 - before torch

# isort: split
import contextlib
import gzip
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from cells import sweep
from cells.sweep import Line, Where
from lorafamily.training.folder_lock import FolderLock
from studies import protocol
from studies.arms import ARMS, Arm
from studies.entry import write_entry
from studies.page import write
from studies.problem import Problem
from studies.problems import PROBLEMS
from studies.results import read
from studies.trials import Trial, Trials
from tasks import TaskError

STORED = Path(__file__).parents[1] / "docs" / "study"
PAGE = STORED.with_suffix(".md")


@dataclass(frozen=True)
class Run:
    """Run the trials of a study that are missing."""

    problem: tyro.conf.Positional[str]
    """planted, misleading, embedded, sst2, mrpc, llm-gsm8k or llm-text"""
    model: str | None = None
    """folder or hub id, of sst2 and mrpc: all-MiniLM-L6-v2; of llm-gsm8k and llm-text: a causal language model"""
    data: Path | None = None
    """folder of sst2/ and mrpc/{train,validation,test}.jsonl.gz, gsm8k/{train,validation}.jsonl.gz; llm-text: a file"""
    steps: int | None = None
    """of a run, to see it work: the rows are then in a folder of their own, and no others' equals"""
    arms: tuple[str, ...] = ()
    """names of arms, none: all; arms whose rate or pattern others take are run with them"""
    seeds: int | None = None
    """judged seeds, the first so many; none: all"""
    workers: int | None = None
    """trials side by side, one thread each; none: as many as cores"""
    cluster: str | None = None
    """address of a Ray cluster instead"""
    out: Path = Path("runs")
    """folder of all runs"""


@dataclass(frozen=True)
class Store:
    """Take rows over into docs/study/."""

    results: tyro.conf.Positional[tuple[Path, ...]]
    """runs/study-NAME/results.jsonl"""
    folder: Path = STORED
    """where they are kept"""


@dataclass(frozen=True)
class Page:
    """Write the page and its pictures from the stored rows."""

    folder: Path = STORED
    """of the rows; pictures are written there"""
    out: Path = PAGE
    """the page"""


@dataclass(frozen=True)
class Entry:
    """Write AdaLoRA at its tuned rate as an entry of peft's benchmark."""

    problem: tyro.conf.Positional[str]
    """whose stored rows choose the rate: llm-gsm8k"""
    out: Path
    """folder of the entry, such as experiments/adalora/llama-3.2-3B-rank32-tuned of the benchmark"""
    rank: int = 32
    """slices a layer at the end"""
    folder: Path = STORED
    """of the rows"""


Command = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Store, tyro.conf.subcommand("store")]
    | Annotated[Page, tyro.conf.subcommand("page")]
    | Annotated[Entry, tyro.conf.subcommand("entry")]
)


def run(given: Run) -> list[dict[str, Any]]:
    """All trials of the study; returns the rows.

    Raises:
        TaskError: no such problem or arm.
    """
    if given.problem not in PROBLEMS:
        raise TaskError(f"{given.problem}: no such problem; there are {', '.join(PROBLEMS)}")
    arms = chosen(given)
    short = "" if given.steps is None else f"-{given.steps}-steps"
    folder = (given.out / f"study-{given.problem}{short}").absolute()
    data = given.data and given.data.absolute()
    trials = Trials(given.problem, folder / "trials", given.model, data, given.steps)
    problem = trials.opened()
    torch.set_num_threads(1)  # as in workers, so that one worker gives the rows of many
    where = Where(given.workers or (1 if given.cluster else sweep.cores()), given.cluster)
    with FolderLock(folder):
        path = folder / "results.jsonl"
        text = path.read_text() if path.exists() else "" if short else stored(given.problem)
        rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        partial = path.with_suffix(".partial")  # a run killed while it writes keeps the rows that it had
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))  # without a line that was cut
        partial.replace(path)
        _work(problem, arms, problem.seeds[: given.seeds], where, trials, path, rows)
    return rows


def _work(
    problem: Problem,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    where: Where,
    trials: Trials,
    path: Path,
    rows: list[dict[str, Any]],
) -> None:
    """Run what is missing: rates first, and what follows from a row as soon as it does."""
    given: set[str] = set()

    def more() -> list[Trial]:
        found = protocol.tuning_trials(problem, arms, rows)
        found += [trial for trial in protocol.judging_trials(problem, arms, rows) if trial.seed in seeds]
        found = [trial for trial in found if trial.key not in given]
        given.update(trial.key for trial in found)
        line.total += len(found)
        return found

    line = Line(0)
    with contextlib.closing(sweep.rows(more(), trials, where, more)) as found:
        for trial, row in found:
            rows.append(row)
            with open(path, "a") as file:
                file.write(json.dumps(row) + "\n")
            line.show(f"{trial.key}: {'failed' if row['failed'] else format(row['metric'], '.4f')}")


def chosen(given: Run) -> list[Arm]:
    """The arms that were asked for, with those that they depend on, in their order.

    Raises:
        TaskError: no such arm.
    """
    arms = {arm.name: arm for arm in ARMS[given.problem]}
    wanted = list(given.arms) or list(arms)
    for name in wanted:
        if name not in arms:
            raise TaskError(f"{name}: no such arm; there are {', '.join(arms)}")
        wanted += [other for other in (arms[name].rates_of, arms[name].pattern) if other and other not in wanted]
    return [arm for arm in arms.values() if arm.name in wanted]


def stored(problem: str) -> str:
    """The rows in docs/study/, as lines."""
    path = STORED / f"{problem}.jsonl.gz"
    return gzip.decompress(path.read_bytes()).decode() if path.exists() else ""


def store(given: Store) -> None:
    given.folder.mkdir(parents=True, exist_ok=True)
    for path in given.results:
        name = path.parent.name.removeprefix("study-")
        if name not in PROBLEMS:
            raise TaskError(f"{path}: its folder must be study-NAME, NAME one of {', '.join(PROBLEMS)}")
        rows = sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["key"])
        with gzip.GzipFile(given.folder / f"{name}.jsonl.gz", "wb", mtime=0) as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def entry(given: Entry) -> None:
    """As the command says.

    Raises:
        TaskError: no rows are stored, or they choose no rate for AdaLoRA.
    """
    studies = {study.problem.name: study for study in read(given.folder)}
    if given.problem not in studies:
        raise TaskError(f"{given.folder}: no stored rows of {given.problem}; study.py run, then study.py store")
    print(write_entry(studies[given.problem], given.rank, given.out))


def main(given: Run | Store | Page | Entry) -> None:
    match given:
        case Run():
            run(given)
        case Store():
            store(given)
        case Page():
            write(given.folder, given.out)
        case Entry():
            entry(given)


if __name__ == "__main__":
    try:
        main(tyro.cli(Command))
    except TaskError as refused:
        print(f"study.py: {refused}", file=sys.stderr)
        sys.exit(2)
