"""One cell of a comparison: one method at one budget, learning rate and seed, trained, measured, merged, saved."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import lorafamily
from cells.sweep import wait_until_free
from lorafamily.batch import to_device
from lorafamily.registry import find as find_method
from tasks import Task, TaskError
from tasks import find as find_task

FIRST = os.environ.get("RANK", "0") == "0"
"""Whether this process writes files and prints; under torchrun the others do neither."""
NONE, FULL = "none", "full"
"""What is compared with adapters: nothing is adapted (a new task head still trains), or everything trains."""
TRAIN_TIMES = "train_times"
"""An option of any method: train with so many times the cell's budget or rank, then cut all layers at once to that
size, as in lora:train_times=2."""
BUDGET_AT = "budget_at"
"""An option of any method, passed to `apply`, as in adalora:budget_at=end."""
ALL = "all"
"""The name for targets that are every linear layer but the head."""
MATRICES = {
    "q": r"(^|[._])(q|query|q_proj|query_proj|q_lin)$",
    "k": r"(^|[._])(k|key|k_proj|key_proj|k_lin)$",
    "v": r"(^|[._])(v|value|v_proj|value_proj|v_lin)$",
    "o": r"(attention\.output|attention\.output\.dense|o_proj|out_proj|out_lin|attn\.c_proj)$",
}
"""Projections of the attention by the names that BERT-like models, LLaMA, GPT-2 (parts) and the embedded decoder
use."""


@dataclass(frozen=True)
class Size:
    """How large an adapter may be: a budget of trainable parameters, or the rank of every layer."""

    by: Literal["budget", "rank"]
    value: int

    def __str__(self) -> str:
        return f"{self.value:,}" if self.by == "budget" else f"rank {self.value}"


@dataclass(frozen=True)
class Cell:
    """One training run. `size`, `targets`: None for `none` and `full`, which have no adapters; `layers_named` explains
    `targets`."""

    method: str
    size: Size | None
    targets: str | None
    lr: float
    seed: int

    def at(self, lr: float, seed: int) -> Cell:
        """The same configuration at another learning rate and seed."""
        return replace(self, lr=lr, seed=seed)

    def limit(self, layers: int) -> dict[str, Any]:
        """The size as a limit for all adapted layers together, an argument of `compress`."""
        assert self.size is not None
        return {"budget": self.size.value} if self.size.by == "budget" else {"rank_budget": self.size.value * layers}

    @property
    def key(self) -> str:
        """The cell's name in files and folders."""
        size = "" if self.size is None else f"@{'r' if self.size.by == 'rank' else ''}{self.size.value}"
        where = "" if self.targets in (None, ALL) else f"-on-{self.targets}"
        what = re.sub(r"[^\w.+=@-]", "_", f"{self.method}{size}{where}")
        return f"{what}-lr{self.lr:g}-seed{self.seed}"


@dataclass(frozen=True)
class Training:
    """Training settings that all cells share. `options`: options by method; `fused`: layers that are adapted by
    parts."""

    steps: int
    evaluate_every: int
    fused: dict[str, list[str]]
    head_lr: float
    weight_decay: float
    warmup: float
    dropout: float
    device: str
    options: dict[str, dict[str, Any]]
    pictures: bool

    def options_of(self, method: str) -> dict[str, Any]:
        """Options of a method: those of the methods that it combines, overridden by its own."""
        return {k: value for k, value in self._all_options(method).items() if k not in (TRAIN_TIMES, BUDGET_AT)}

    def budget_at(self, method: str) -> dict[str, Any]:
        """When the budget must hold, as an argument of `apply`; empty if no option says so."""
        return {name: value for name, value in self._all_options(method).items() if name == BUDGET_AT}

    def train_times(self, method: str) -> float:
        """By what factor training exceeds the cell's size, to which it is cut afterwards; 1: no cut.

        Raises:
            TaskError: the option is less than 1, or no number.
        """
        times = self._all_options(method).get(TRAIN_TIMES, 1)
        if isinstance(times, bool) or not isinstance(times, (int, float)) or times < 1:
            raise TaskError(f"{method}: {TRAIN_TIMES}={times!r} must be a number, 1 or more")
        return times

    def _all_options(self, method: str) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for part in method.partition(":")[0].split("+"):
            merged |= self.options.get(part, {})
        return merged | self.options.get(method, {})


def layers_named(targets: str) -> str | list[str] | None:
    """The `targets` of `apply` for an entry of --targets: "all", "attention", letters of the attention's matrices,
    which stand for all names that models have for them, or a regular expression."""
    if targets == ALL:
        return None
    if set(targets) <= MATRICES.keys():
        return [MATRICES[letter] for letter in targets]
    return targets


def run(cell: Cell, task: Task, training: Training, folder: Path, progress: bool = True) -> dict[str, Any]:
    """Train and measure the cell; returns a row of results in plain data.

    Log, adapter and checkpoints go into `folder`; an interrupted cell continues from its last checkpoint. A run that
    diverged, for instance at too high a learning rate, is a row too: `failed` says at which step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model, head = task.model(cell.seed)
    model.to(training.device)
    adapts = cell.method not in (NONE, FULL)
    if adapts:
        adapt(model, head, cell, training, task.training(cell.seed))
    elif cell.method == NONE:
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(head is not None and re.search(head, name) is not None)

    before = task.untrained(cell.seed, training.device)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = PeakMemory(training.device)
    history, failed = lorafamily.History(), None
    if trainable:
        try:
            history = lorafamily.train(
                model,
                task.training(cell.seed),
                steps=training.steps,
                **rates(cell, head, training),
                warmup=training.warmup,
                validation=task.validation(),
                evaluate=task.evaluate,
                evaluate_every=training.evaluate_every,
                seed=cell.seed,
                log_dir=folder,
                pictures=training.pictures,
                save_every=training.evaluate_every,
                resume="auto",
                progress=progress,
            )
        except lorafamily.NonFiniteError as error:
            failed = str(error)
    peak = memory.read()
    after = history.metrics or before
    cut_error, slices_end = None, history.slices_end
    if adapts and not failed and training.train_times(cell.method) > 1:
        report = lorafamily.compress(model, **cell.limit(len(history.slices_start)))
        cut_error, slices_end = report.error, {row.module: row.rank_after for row in report}
        after = task.evaluate(model.eval())
    row: dict[str, Any] = {
        **{"key": cell.key, "method": cell.method, "targets": cell.targets, "lr": cell.lr, "seed": cell.seed},
        **{by: cell.size.value if cell.size and cell.size.by == by else None for by in ("budget", "rank")},
        "failed": failed,
        "metric": None if failed else after[task.metric],
        "validation_loss": None if failed else after["loss"],
        "train_loss": history.smoothed_loss()[-1] if history.steps else None,
        "curve": [[0, before[task.metric]], *([e.step, e.metrics[task.metric]] for e in history.evaluations)],
        "loss_curve": [[0, before["loss"]], *([e.step, e.metrics["loss"]] for e in history.evaluations)],
        "seconds_per_step": history.seconds / len(history.steps) if history.steps else None,
        "peak_mib": peak if history.steps else None,
        "extra_trained": 0,
        "trainable": trainable,
        "ranks_start": history.slices_start,
        "ranks_end": slices_end,
        "cut_error": cut_error,
        "file_bytes": None,
        "merge_difference": None,
    }
    if adapts and not failed:
        summary = lorafamily.summary(model)
        if FIRST:
            row["file_bytes"] = sum(p.stat().st_size for p in lorafamily.save(model, folder / "adapter").iterdir())
        row |= {
            "extra_trained": summary.extra_trained,
            "trainable": summary.initial_parameters,
            "merge_difference": lorafamily.merge_difference(model, _first_batch(model, task)),
        }
    elif cell.method == NONE:
        row |= {"extra_trained": trainable, "trainable": 0}
    return row


def rates(cell: Cell, head: str | None, training: Training) -> dict[str, Any]:
    """Arguments of `train`: the cell's learning rate, and for the head the one that all methods share."""
    if cell.method == NONE:
        return {"lr": training.head_lr, "weight_decay": training.weight_decay}
    if cell.method == FULL and head is not None:

        def optimizer(trained: lorafamily.Trained) -> torch.optim.Optimizer:
            new = [p for p in trained if re.search(head, trained.names[p])]
            groups = [{"params": trained.others(new), "lr": cell.lr}, {"params": new, "lr": training.head_lr}]
            return torch.optim.AdamW(groups, weight_decay=training.weight_decay, fused=True)

        return {"optimizer": optimizer}
    return {"lr": cell.lr, "head_lr": training.head_lr, "weight_decay": training.weight_decay}


@dataclass(frozen=True)
class Work:
    """What a worker needs to turn cells into rows. `task`: arguments of `tasks.find`; `folder`: holds all cells'
    folders."""

    task: dict[str, Any]
    training: Training
    folder: Path

    def __call__(self) -> Callable[[Cell], dict[str, Any]]:
        task = find_task(**self.task)

        def work(cell: Cell) -> dict[str, Any]:
            folder = self.folder / cell.key
            wait_until_free(folder)  # a worker may not have noticed yet that its driver or node is gone
            return run(cell, task, self.training, folder, progress=False)

        return work


def forget_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a finished cell."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def adapt(model: nn.Module, head: str | None, cell: Cell, training: Training, data: Any = None) -> None:
    """Put the cell's adapters into a model. `data`: batches for methods that look at data first; None on the meta
    device."""
    assert cell.size is not None
    assert cell.targets is not None
    sizing: dict[str, Any] = {cell.size.by: int(training.train_times(cell.method) * cell.size.value)}
    looks = find_method(cell.method.partition(":")[0]).looks_at_data
    lorafamily.apply(
        model,
        cell.method.partition(":")[0],
        targets=layers_named(cell.targets),
        fused=training.fused or None,
        also_train=head,
        dropout=training.dropout,
        seed=cell.seed,
        data=data if looks else None,
        **sizing,
        **training.budget_at(cell.method),
        **training.options_of(cell.method),
    )


class PeakMemory:
    """Peak memory since this object was made: of tensors on a GPU, of the whole process elsewhere."""

    def __init__(self, device: str):
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of resident memory

    def read(self) -> float | None:
        """MiB; None if the system does not report it."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        if sys.platform == "linux":
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) / 2**10
        if sys.platform == "darwin":  # the mark cannot be reset there: bytes of the process since its beginning
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return None


def _first_batch(model: nn.Module, task: Task) -> Any:
    return to_device(next(iter(task.validation())), next(model.parameters()).device)
