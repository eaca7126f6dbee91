"""The settings of a comparison, and the cells that follow from them."""

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
"""Exact AB-LoRA takes two forwards for each rank and round, minutes a cell here; its first-order estimate two
backwards."""

TUNED = ("1e-2", "full=2e-3", "olora=1e-3", "lora2=2e-2", "adalora=2e-2", "svd=2e-2", "dual-plane=2e-2")
"""Learning rates for the embedded setting: each method's best of four on another seed (docs/results.md)."""
AUTO = "auto"
"""A value of --lr: plain LoRA's rate is given, and the other methods' rates follow from it."""
CHOSEN = (
    " The learning rates are each method's best of four, tried beforehand with another seed (docs/results.md); EVA has "
    "LoRA's, untried."
)
SUGGESTED = " The learning rates follow from plain LoRA's by lorafamily.suggest_lr, untried (docs/results.md)."


@dataclass(frozen=True)
class Compare:
    """Compare low-rank methods at equal parameter budgets.

    Presets: embedded, which-weights, rank-sweep, budget-sweep, scorers, axes, claims, glue-deberta, glue-roberta,
    e2e-gpt2, allocation-llm. All other options override the preset.
    """

    preset: str = "embedded"
    """the defaults, from experiments/presets/NAME.py"""
    quick: bool = False
    """the preset's short form, a few minutes on two cores: it shows that the run works, and no more"""
    name: str | None = None
    """folder under --out; the same name again runs only the missing cells; none: the preset's name"""
    task: str = "code"
    """code (embedded model, Python source), text (--data FILE), e2e, gsm8k, or a GLUE task: sst2, rte, cola, mrpc, …"""
    model: str | None = None
    """folder or hub id of a transformers model; none for the embedded one"""
    data: Path | None = None
    """folder of <task>/{train,validation}.jsonl.gz; none: from the hub; for --task text: a file"""
    methods: tuple[str, ...] = (NONE, FULL, "lora", "olora", "alora", "lora2", "adalora", "eva", "lora:train_times=2")
    """any of lorafamily.methods(), combined with +, with options as in alora:scorer=exact,rounds=4. lora:train_times=2
    trains with twice the size and then cuts all layers at once to it; adalora:budget_at=end keeps the budget at the end
    only, not at every step. none: no adaptation (a task head still trains); full: full fine-tuning"""
    budgets: tuple[str, ...] = ("80e3", "10e3")
    """largest numbers of trainable adapter parameters, NUMBER for all methods or METHOD=NUMBER; on the embedded model
    80e3 is LoRA at rank 8, 10e3 at rank 1"""
    ranks: tuple[int, ...] = ()
    """further sizes: one rank for every adapted layer"""
    targets: tuple[str, ...] = ("all",)
    """sets of layers to adapt, which are compared: all (linear layers but the head), attention, letters of its matrices
    (qv, qkvo), or a regular expression"""
    fused: tuple[str, ...] = ()
    """projections that are adapted by parts, as in c_attn$=q,k,v"""
    seeds: int = 2
    """number of seeds for every configuration"""
    first_seed: int = 0
    """the first of these seeds"""
    steps: int = 150
    """optimizer steps"""
    epochs: float | None = None
    """passes through the training data, instead of steps"""
    batch: int = 16
    """sequences per step"""
    length: int = 128
    """tokens per sequence at most (the embedded model always takes 128 bytes)"""
    lr: tuple[str, ...] = TUNED
    """peak learning rates, RATE for all methods or METHOD=RATE, equally many for every method; the report shows each
    method at its best. "auto RATE METHOD=RATE": RATE is plain LoRA's; lorafamily.suggest_lr derives the others"""
    tuning_seed: int | None = None
    """choose each row's learning rate with this seed alone, and run --seeds at it"""
    head_lr: float = 1e-2
    """peak learning rate of a new task head, the same for every method: a new head must move far, and at a small rate
    of the method's own it would hardly move, so that the comparison would judge the head"""
    weight_decay: float = 0.0
    """weight decay of AdamW"""
    warmup: float = 0.06
    """share of the run during which the learning rate rises"""
    dropout: float = 0.0
    """dropout probability on the input of the adapters"""
    evaluations: int = 5
    """number of evaluations during a run, evenly spread"""
    held_out: int | None = None
    """validation examples at most; none: all"""
    options: tuple[str, ...] = TRADED_OFF
    """options of methods, as METHOD.OPTION=VALUE"""
    device: str = "auto"
    """auto: a GPU if there is one"""
    workers: int | None = None
    """cells to run side by side in processes of this machine, one thread each; 1: one after another with all threads;
    none: as many as there are cores on a CPU, 1 on a GPU"""
    cluster: str | None = None
    """run the cells on a Ray cluster instead; its address: auto, HOST:PORT, or local for this machine"""
    cpus_per_cell: int = 1
    """threads of a cell when several run side by side"""
    gpus_per_cell: float = 0.0
    """GPUs of a cell on the cluster; 0.5: two cells share one"""
    out: Path = Path("runs")
    """folder for all runs"""
    progress: bool = True
    """show a progress bar for every cell"""
    pictures: bool = True
    """draw the allocation of every cell"""

    @property
    def folder(self) -> Path:
        return self.out / (self.name or self.preset + ("-quick" if self.quick else ""))

    @property
    def run_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)


def cells_of(settings: Compare, seeds: Iterable[int], best: Mapping[Cell, float] | None = None) -> list[Cell]:
    """The grid. `best`: the one learning rate of each configuration, in place of all that were given."""
    rates = _rates(settings)
    cells = []
    for method, targets in itertools.product(settings.methods, settings.targets):
        if method in (NONE, FULL) and targets != settings.targets[0]:
            continue  # without adapters there are no targets
        for size in _sizes(settings, method):
            configuration = Cell(method, size, None if method in (NONE, FULL) else targets, lr=0.0, seed=0)
            tried = rates[method] if best is None else [best[configuration]]
            cells += [configuration.at(lr, seed) for lr in tried for seed in seeds]
    if not cells:
        raise TaskError(
            "nothing to compare: --methods, --budgets or --ranks, --targets, --lr and --seeds must not be empty"
        )
    return cells


def _sizes(settings: Compare, method: str) -> Sequence[Size | None]:
    if method in (NONE, FULL):
        return [None]
    by_method = _by_method(settings.budgets, "--budgets")
    budgets = by_method.get(method, by_method[""])
    return [Size("budget", int(budget)) for budget in budgets] + [Size("rank", r) for r in settings.ranks]


def best_rates(rows: Sequence[Mapping[str, Any]], cells: Sequence[Cell], higher_is_better: bool) -> dict[Cell, float]:
    """For each configuration the learning rate with the best metric among the cells that tried it."""
    found = {row["key"]: row["metric"] for row in rows if row["failed"] is None}
    sign = 1 if higher_is_better else -1
    best: dict[Cell, tuple[float, float]] = {}
    for cell in cells:
        if cell.key not in found:
            continue
        configuration, score = cell.at(0.0, 0), sign * found[cell.key]
        if configuration not in best or score > best[configuration][0]:
            best[configuration] = (score, cell.lr)
    if lost := {cell.at(0.0, 0).key for cell in cells} - {configuration.key for configuration in best}:
        raise TaskError(f"training failed at every learning rate for {', '.join(sorted(lost))}; give smaller --lr")
    return {configuration: lr for configuration, (_, lr) in best.items()}


def departures(settings: Compare) -> str:
    """Where the learning rates come from, and which options differ from the methods' defaults, for the report."""
    used = {part for method in settings.methods for part in parts_of(method)}
    options = [setting for setting in settings.options if setting.partition(".")[0] in used]
    said = CHOSEN if settings.lr == TUNED else SUGGESTED if AUTO in settings.lr else ""
    return said + (f" Options that differ from the methods' defaults: {', '.join(options)}." if options else "")


def parts_of(method: str) -> list[str]:
    """The methods that a name combines: lora2+olora:gamma=0 -> lora2, olora."""
    return method.partition(":")[0].split("+")


def suggested(settings: Compare, cells: Iterable[Cell], rate: Callable[[Cell, float], float]) -> dict[Cell, float]:
    """The learning rate of each configuration: the one that --lr gives its method, else what `rate` derives from
    LoRA's.

    Raises:
        TaskError: --lr auto without exactly one rate, without one for `full`, which has no adapters, or with a tuning
        seed.
    """
    given = _by_method([entry for entry in settings.lr if entry != AUTO], "--lr")
    if any(len(rates) != 1 for rates in given.values()) or settings.tuning_seed is not None:
        raise TaskError("--lr auto takes one rate, plain LoRA's, as in --lr auto 1e-2, and no --tuning-seed")
    if FULL in settings.methods and FULL not in given:
        raise TaskError("--lr auto suggests rates of adapters; give full=RATE, or leave full out of --methods")
    found: dict[Cell, float] = {}
    for cell in cells:
        configuration = cell.at(0.0, 0)
        if configuration not in found:
            (known_rate,) = given.get(cell.method) or given[""]
            asked = cell.size is not None and cell.method not in given
            found[configuration] = rate(cell, known_rate) if asked else known_rate
    return found


def _rates(settings: Compare) -> dict[str, list[float]]:
    """Learning rates by method: those that --lr gives it, else those of the methods it combines, else those for all."""
    given = _by_method([entry for entry in settings.lr if entry != AUTO], "--lr")
    if AUTO in settings.lr:
        return dict.fromkeys(settings.methods, given[""][:1] or [0.0])  # `suggested` replaces them
    rates = {}
    for method in settings.methods:
        # A combination without rates of its own must be gentle enough for the most delicate of its parts.
        parts = [given[part] for part in parts_of(method) if part in given]
        rates[method] = given.get(method) or min(parts, key=min, default=given[""])
    counts = {method: len(given_rates) for method, given_rates in rates.items()}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise TaskError(
            f"--lr gives {', '.join(f'{method} {n}' for method, n in counts.items())} learning rates; "
            "a fair comparison gives every method equally many, and at least one"
        )
    return rates


def _by_method(entries: Sequence[str], option: str) -> dict[str, list[float]]:
    """Numbers by the method that they are given for; those for all other methods are under ""."""
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
    """Refuse a setting for a method that does not exist, which would otherwise be ignored."""
    if method not in (NONE, FULL):
        try:
            find_method(method.partition(":")[0])
        except lorafamily.MethodError as error:
            raise TaskError(f"{setting}: {error}") from None


def training_of(settings: Compare, rows: int) -> Training:
    """The training settings that all cells share. `rows`: sequences of the training data."""
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
        text = method.partition(":")[2]
        for setting in text.split(",") if text else ():
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
        pictures=settings.pictures,
    )


def where_of(settings: Compare, device: str) -> Where:
    """Where the cells run.

    Raises:
        TaskError: settings contradict each other, or would have no effect.
    """
    if settings.cpus_per_cell < 1 or settings.gpus_per_cell < 0 or settings.workers not in (None, *range(1, 100_000)):
        raise TaskError("--workers and --cpus-per-cell must be at least 1, --gpus-per-cell at least 0")
    if settings.cluster is not None:
        if settings.workers is not None:
            raise TaskError("give --cluster or --workers, not both; a cluster has as many workers as its cores allow")
        if (device == "cuda") != (settings.gpus_per_cell > 0):
            raise TaskError(
                f"--gpus-per-cell {settings.gpus_per_cell:g} with --device {device}: cells on GPUs need --device cuda "
                "and a share of a GPU each"
            )
        return Where(cluster=settings.cluster, cpus=settings.cpus_per_cell, gpus=settings.gpus_per_cell)
    if settings.gpus_per_cell:
        raise TaskError("--gpus-per-cell is for --cluster; to share the GPUs of this machine use --cluster local")
    workers = settings.workers
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if workers not in (None, 1):
            raise TaskError(f"--workers {workers}: under torchrun the processes share every cell")
        workers = 1
    if workers is None:
        workers = max(1, cores() // settings.cpus_per_cell) if device == "cpu" else 1
    if workers == 1 and settings.cpus_per_cell > 1:
        raise TaskError("--cpus-per-cell is for several workers; with --workers 1 set OMP_NUM_THREADS instead")
    return Where(workers=workers, cpus=settings.cpus_per_cell)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def what_rows_depend_on(settings: Compare, training: Training) -> dict[str, Any]:
    """The settings in which a finished cell must agree with the others to be compared with them."""
    fields: tuple[str, ...] = ("model", "data", "batch", "length", "held_out", "fused")
    fields += ("head_lr", "weight_decay", "warmup", "dropout")
    same: dict[str, Any] = {"task": settings.task, "steps": training.steps, "evaluations": settings.evaluations}
    same |= {name: getattr(settings, name) for name in fields}
    shared = {method: options for method, options in training.options.items() if ":" not in method}
    same |= {"device": training.device, "options": shared, "torch": torch.__version__}
    return dict(json.loads(json.dumps(same, default=str)))
