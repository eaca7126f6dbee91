"""What a comparison is asked to do, and the cells that come of it."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lorafamily
from cells.cell import FULL, NONE, Cell, Size, Training
from cells.sweep import Where, cores
from lorafamily.registry import find as find_method
from tasks import TaskError

TRADED_OFF = ("alora.scorer=first-order",)
"""Exact AB-LoRA takes two forwards a rank and round, minutes a cell here; its first-order estimate two backwards."""

TUNED = ("1e-2", "full=2e-3", "olora=1e-3", "lora2=2e-2", "adalora=2e-2", "svd=2e-2", "dual-plane=2e-2")
"""For the embedded setting: each method's best of four on another seed, docs/results.md has the numbers."""
AUTO = "auto"
"""Of --lr: plain LoRA's rate is given, and other methods' follow from it."""
CHOSEN = (
    " The learning rates are each method's best of four, tried beforehand with another seed (docs/results.md); EVA has "
    "LoRA's, untried."
)
SUGGESTED = " The learning rates follow from plain LoRA's by lorafamily.suggest_lr, untried (docs/results.md)."


@dataclass(frozen=True)
class Compare:
    """Compare low-rank methods at equal parameter budgets.

    Presets: embedded, which-weights, rank-sweep, budget-sweep, scorers, axes, claims, glue-deberta, glue-roberta,
    e2e-gpt2, allocation-llm. Whatever else is given overrides what the preset says.
    """

    preset: str = "embedded"
    """where the defaults come from: experiments/presets/NAME.py"""
    quick: bool = False
    """the preset's short form, a few minutes on two cores: to see it work, not to learn anything"""
    name: str | None = None
    """folder under --out; the same name again goes on with the cells that are missing; none: the preset's name"""
    task: str = "code"
    """code (embedded model, Python source), text (--data FILE), e2e, gsm8k, or a GLUE task: sst2, rte, cola, mrpc, …"""
    model: str | None = None
    """folder or hub id of a transformers model; none for the embedded one"""
    data: Path | None = None
    """folder of <task>/{train,validation}.jsonl.gz, none to take it from the hub; text: a file"""
    methods: tuple[str, ...] = (NONE, FULL, "lora", "olora", "alora", "lora2", "adalora", "eva", "lora:train_times=2")
    """any of lorafamily.methods(), joined by + to combine, with options of their own as in alora:scorer=exact,rounds=4;
    lora:train_times=2 trains with twice the size and is then cut to it, once through all layers; adalora:budget_at=end
    holds the budget at the end, and not at every step; none: no adaptation (a task head still trains); full: all"""
    budgets: tuple[str, ...] = ("80e3", "10e3")
    """trainable adapter parameters, each exceeded at no step, NUMBER for all or METHOD=NUMBER; on the embedded model
    80e3 is LoRA at rank 8, 10e3 rank 1"""
    ranks: tuple[int, ...] = ()
    """beside budgets: ranks of every adapted layer"""
    targets: tuple[str, ...] = ("all",)
    """sets of layers to adapt: all (linear ones but the head), attention, letters of its matrices (qv, qkvo), or a
    regular expression; several are compared"""
    fused: tuple[str, ...] = ()
    """projections that are adapted by parts, as in c_attn$=q,k,v"""
    seeds: int = 2
    """runs of every cell"""
    first_seed: int = 0
    """the seeds are this one and those after it"""
    steps: int = 150
    """optimizer steps"""
    epochs: float | None = None
    """rounds through the training data, in place of steps"""
    batch: int = 16
    """sequences per step"""
    length: int = 128
    """tokens per sequence at most (the embedded model takes 128 bytes always)"""
    lr: tuple[str, ...] = TUNED
    """peak learning rates, RATE for all or METHOD=RATE; as many for every method, of several each shows its best. auto
    RATE METHOD=RATE: RATE is plain LoRA's, and others get what lorafamily.suggest_lr makes of it"""
    tuning_seed: int | None = None
    """try the learning rates with this seed alone, and run --seeds at the one that was best for each row"""
    head_lr: float = 1e-2
    """peak learning rate of a new task head, the same for every method whatever its own: a new head starts far from
    where it ends, and a method that wants a small rate would be judged by a head that hardly moved"""
    weight_decay: float = 0.0
    """of AdamW"""
    warmup: float = 0.06
    """share of the run in which the learning rate rises"""
    dropout: float = 0.0
    """probability, on the input of the adapters"""
    evaluations: int = 5
    """of the validation metric during a run, evenly spread"""
    held_out: int | None = None
    """validation examples at most; none: all"""
    options: tuple[str, ...] = TRADED_OFF
    """options of methods, as METHOD.OPTION=VALUE"""
    device: str = "auto"
    """auto takes a GPU where there is one"""
    workers: int | None = None
    """cells that run side by side in processes of this machine, one thread each; 1: one after another, with all
    threads; none: as many as cores on a CPU, 1 on a GPU"""
    cluster: str | None = None
    """address of a Ray cluster to run the cells on instead: auto, HOST:PORT, or local for all of this machine"""
    cpus_per_cell: int = 1
    """threads of a cell that runs beside others"""
    gpus_per_cell: float = 0.0
    """on the cluster: of every cell; 0.5 lets two share one"""
    out: Path = Path("runs")
    """folder for all runs"""
    progress: bool = True
    """show a progress bar for every cell"""

    @property
    def folder(self) -> Path:
        return self.out / (self.name or self.preset + ("-quick" if self.quick else ""))

    @property
    def run_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)


def cells_of(settings: Compare, seeds: Iterable[int], best: Mapping[Cell, float] | None = None) -> list[Cell]:
    """The grid. `best`: the one learning rate for each configuration, instead of all that were given."""
    rates = _rates(settings)
    cells = []
    for method, targets in itertools.product(settings.methods, settings.targets):
        if method in (NONE, FULL) and targets != settings.targets[0]:
            continue  # what has no adapters has no targets either
        for size in _sizes(settings, method):
            whole = Cell(method, size, None if method in (NONE, FULL) else targets, lr=0.0, seed=0)
            own = rates[method] if best is None else [best[whole]]
            cells += [whole.at(lr, seed) for lr in own for seed in seeds]
    if not cells:
        raise TaskError(
            "nothing to compare: --methods, --budgets or --ranks, --targets, --lr and --seeds must not be empty"
        )
    return cells


def _sizes(settings: Compare, method: str) -> Sequence[Size | None]:
    if method in (NONE, FULL):
        return [None]
    budgets = _by_method(settings.budgets, "--budgets")
    own = budgets.get(method, budgets[""])
    return [Size("budget", int(budget)) for budget in own] + [Size("rank", r) for r in settings.ranks]


def best_rates(rows: Sequence[Mapping[str, Any]], cells: Sequence[Cell], higher_is_better: bool) -> dict[Cell, float]:
    """For each configuration the learning rate with the best metric among the cells that tried it."""
    found = {row["key"]: row["metric"] for row in rows if row["failed"] is None}
    sign = 1 if higher_is_better else -1
    best: dict[Cell, tuple[float, float]] = {}
    for cell in cells:
        if cell.key not in found:
            continue
        whole, score = cell.at(0.0, 0), sign * found[cell.key]
        if whole not in best or score > best[whole][0]:
            best[whole] = (score, cell.lr)
    if lost := {cell.at(0.0, 0).key for cell in cells} - {whole.key for whole in best}:
        raise TaskError(f"training failed at every learning rate for {', '.join(sorted(lost))}; give smaller --lr")
    return {whole: lr for whole, (_, lr) in best.items()}


def departures(settings: Compare) -> str:
    """What a reader of the table must know besides the task: where rates come from, options unlike a method's own."""
    used = {part for method in settings.methods for part in parts_of(method)}
    options = [setting for setting in settings.options if setting.partition(".")[0] in used]
    said = CHOSEN if settings.lr == TUNED else SUGGESTED if AUTO in settings.lr else ""
    return said + (f" Options that differ from the methods' own: {', '.join(options)}." if options else "")


def parts_of(method: str) -> list[str]:
    """lora2+olora:gamma=0 -> lora2, olora."""
    return method.partition(":")[0].split("+")


def suggested(settings: Compare, cells: Iterable[Cell], rate: Callable[[Cell, float], float]) -> dict[Cell, float]:
    """For each configuration what `rate` makes of plain LoRA's, unless --lr gives its method one.

    Raises:
        TaskError: --lr auto without one rate, or without one for `full`, which has no adapters; rates are tried too.
    """
    given = _by_method([entry for entry in settings.lr if entry != AUTO], "--lr")
    if any(len(own) != 1 for own in given.values()) or settings.tuning_seed is not None:
        raise TaskError("--lr auto takes one rate, plain LoRA's, as in --lr auto 1e-2, and no --tuning-seed")
    if FULL in settings.methods and FULL not in given:
        raise TaskError("--lr auto suggests rates of adapters; give full=RATE, or leave full out of --methods")
    found: dict[Cell, float] = {}
    for cell in cells:
        whole = cell.at(0.0, 0)
        if whole not in found:
            own = given.get(cell.method) or given[""]
            asked = cell.size is not None and cell.method not in given
            found[whole] = rate(cell, own[0]) if asked else own[0]
    return found


def _rates(settings: Compare) -> dict[str, list[float]]:
    """Learning rates by method: its own where --lr gives it some, else those of its parts, else those for all."""
    given = _by_method([entry for entry in settings.lr if entry != AUTO], "--lr")
    if AUTO in settings.lr:
        return dict.fromkeys(settings.methods, given[""][:1] or [0.0])  # to be replaced by what is suggested
    rates = {}
    for method in settings.methods:
        # A combination without rates of its own must be gentle enough for the most delicate of its parts.
        parts = [given[part] for part in parts_of(method) if part in given]
        rates[method] = given.get(method) or min(parts, key=min, default=given[""])
    counts = {method: len(own) for method, own in rates.items()}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise TaskError(
            f"--lr gives {', '.join(f'{method} {n}' for method, n in counts.items())} learning rates; "
            "a comparison is fair where every method gets as many, and at least one"
        )
    return rates


def _by_method(entries: Sequence[str], option: str) -> dict[str, list[float]]:
    """Numbers by the method they are given for; under "" those for all the others."""
    given: dict[str, list[float]] = {"": []}
    for entry in entries:
        method, _, number = entry.rpartition("=")
        try:
            given.setdefault(method, []).append(float(number))
        except ValueError:
            raise TaskError(f"{option} {entry}: must be a number or METHOD=NUMBER, such as lora2=2e-2") from None
        if method:
            known(method, f"{option} {entry}")
    return given


def known(method: str, setting: str) -> None:
    """Refuse a setting for a method that does not exist; it would be ignored."""
    if method not in (NONE, FULL):
        try:
            find_method(method.partition(":")[0])
        except lorafamily.MethodError as error:
            raise TaskError(f"{setting}: {error}") from None


def training_of(settings: Compare, rows: int) -> Training:
    """What all cells share. `rows`: sequences of the training data."""
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    options: dict[str, dict[str, Any]] = {}
    for setting in settings.options:
        method, dot, rest = setting.partition(".")
        option, equals, value = rest.partition("=")
        if not (dot and equals and method and option):
            raise TaskError(f"--options {setting}: must be METHOD.OPTION=VALUE, such as alora.scorer=exact")
        known(method, f"--options {setting}")
        options.setdefault(method, {})[option] = _value(value)
    for method in settings.methods:
        own = method.partition(":")[2]
        for setting in own.split(",") if own else ():
            option, equals, value = setting.partition("=")
            if not (equals and option):
                raise TaskError(f"--methods {method}: must be METHOD:OPTION=VALUE,…, such as alora:scorer=exact")
            options.setdefault(method, {})[option] = _value(value)
    fused = {}
    for setting in settings.fused:
        layer, equals, parts = setting.partition("=")
        if not (layer and equals and parts):
            raise TaskError(f"--fused {setting}: must be LAYER=PART,PART,…, such as c_attn$=q,k,v")
        fused[layer] = parts.split(",")
    steps = settings.steps
    if settings.epochs is not None:
        steps = round(settings.epochs * (rows // settings.batch))
    return Training(
        steps=steps,
        evaluate_every=math.ceil(steps / settings.evaluations),
        fused=fused,
        head_lr=settings.head_lr,
        weight_decay=settings.weight_decay,
        warmup=settings.warmup,
        dropout=settings.dropout,
        device=device,
        options=options,
    )


def where_of(settings: Compare, device: str) -> Where:
    """Where the cells run.

    Raises:
        TaskError: settings that contradict each other, or would have no effect.
    """
    if settings.cpus_per_cell < 1 or settings.gpus_per_cell < 0 or settings.workers not in (None, *range(1, 100_000)):
        raise TaskError("--workers and --cpus-per-cell must be at least 1, --gpus-per-cell at least 0")
    if settings.cluster is not None:
        if settings.workers is not None:
            raise TaskError("--cluster and --workers: give one; the cluster has as many workers as its cores allow")
        if (device == "cuda") != (settings.gpus_per_cell > 0):
            raise TaskError(
                f"--gpus-per-cell {settings.gpus_per_cell:g} with --device {device}: cells on GPUs need --device cuda "
                "and a share of a GPU each"
            )
        return Where(cluster=settings.cluster, cpus=settings.cpus_per_cell, gpus=settings.gpus_per_cell)
    if settings.gpus_per_cell:
        raise TaskError("--gpus-per-cell is for --cluster; one machine's GPUs are shared out by --cluster local")
    workers = settings.workers
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if workers not in (None, 1):
            raise TaskError(f"--workers {workers}: under torchrun the processes share every cell")
        workers = 1
    if workers is None:
        workers = max(1, cores() // settings.cpus_per_cell) if device == "cpu" else 1
    if workers == 1 and settings.cpus_per_cell > 1:
        raise TaskError("--cpus-per-cell is for cells beside others; --workers 1 has the threads of OMP_NUM_THREADS")
    return Where(workers=workers, cpus=settings.cpus_per_cell)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def what_rows_depend_on(settings: Compare, training: Training) -> dict[str, Any]:
    """The settings that a finished cell must have been run with to stand beside the others."""
    fields: tuple[str, ...] = ("model", "data", "batch", "length", "held_out", "fused")
    fields += ("head_lr", "weight_decay", "warmup", "dropout")
    same: dict[str, Any] = {"task": settings.task, "steps": training.steps, "evaluations": settings.evaluations}
    same |= {name: getattr(settings, name) for name in fields}
    shared = {method: own for method, own in training.options.items() if ":" not in method}
    same |= {"device": training.device, "options": shared, "torch": torch.__version__}
    return dict(json.loads(json.dumps(same, default=str)))
