"""One cell of a comparison: one method at one budget, learning rate and seed, trained, measured, merged, saved."""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lorafamily
from lorafamily.batch import to_device
from tasks import Task

FIRST = os.environ.get("RANK", "0") == "0"
"""Whether this process writes files and talks; under torchrun there are others."""
NONE, FULL = "none", "full"
"""What is compared beside adapters: nothing adapted (a new task head still trains), everything trained."""


@dataclass(frozen=True)
class Cell:
    """`budget`: trainable adapter numbers; None for `none` and `full`, which have no adapters."""

    method: str
    budget: int | None
    lr: float
    seed: int

    @property
    def key(self) -> str:
        """Names the cell in files and folders."""
        at = "" if self.budget is None else f"@{self.budget}"
        return f"{self.method}{at}-lr{self.lr:g}-seed{self.seed}"


@dataclass(frozen=True)
class Training:
    """What all cells share. `options`: of methods, by method; `targets`: None for all linear layers."""

    steps: int
    evaluate_every: int
    targets: str | None
    dropout: float
    device: str
    options: dict[str, dict[str, Any]]

    def options_of(self, method: str) -> dict[str, Any]:
        """Options set for a method, or for the parts that a combination is made of."""
        merged: dict[str, Any] = {}
        for part in method.split("+"):
            merged |= self.options.get(part, {})
        return merged


def run(cell: Cell, task: Task, training: Training, folder: Path, progress: bool = True) -> dict[str, Any]:
    """Train and measure the cell; a row of results in plain data.

    Log and adapter go into `folder`, and checkpoints, from which a cell that was interrupted goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model, head = task.model(cell.seed)
    model.to(training.device)
    adapts = cell.method not in (NONE, FULL)
    if adapts:
        adapt(model, head, cell, training)
    elif cell.method == NONE:
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(head is not None and re.search(head, name) is not None)

    before = _evaluate(model, task)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = PeakMemory(training.device)
    history = lorafamily.History()
    if trainable:
        history = lorafamily.train(
            model,
            task.training(cell.seed),
            steps=training.steps,
            lr=cell.lr,
            validation=task.validation(),
            evaluate=task.evaluate,
            evaluate_every=training.evaluate_every,
            seed=cell.seed,
            log_dir=folder,
            save_every=training.evaluate_every,
            resume="auto",
            progress=progress,
        )
    peak = memory.read()
    after = history.metrics or before
    row: dict[str, Any] = {
        **{"key": cell.key, "method": cell.method, "budget": cell.budget, "lr": cell.lr, "seed": cell.seed},
        "metric": after[task.metric],
        "validation_loss": after["loss"],
        "train_loss": history.smoothed_loss()[-1] if history.steps else None,
        "curve": [[0, before[task.metric]], *([e.step, e.metrics[task.metric]] for e in history.evaluations)],
        "loss_curve": [[0, before["loss"]], *([e.step, e.metrics["loss"]] for e in history.evaluations)],
        "seconds_per_step": history.seconds / len(history.steps) if history.steps else None,
        "peak_mib": peak if history.steps else None,
        "beside": 0,
        "trainable": trainable,
        "ranks_start": history.ranks_start,
        "ranks_end": history.ranks_end,
        "file_bytes": None,
        "merge_difference": None,
    }
    if adapts:
        summary = lorafamily.summary(model)
        if FIRST:
            row["file_bytes"] = sum(p.stat().st_size for p in lorafamily.save(model, folder / "adapter").iterdir())
        row |= {
            "beside": summary.beside,
            "trainable": summary.start_parameters,
            "merge_difference": lorafamily.merge_difference(model, _first_batch(model, task)),
        }
    elif cell.method == NONE:
        row |= {"beside": trainable, "trainable": 0}
    return row


def forget_checkpoints(folder: Path) -> None:
    """A cell that is done needs them no more."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def adapt(model: nn.Module, head: str | None, cell: Cell, training: Training) -> None:
    """Put the cell's adapters into a model."""
    lorafamily.apply(
        model,
        cell.method,
        budget=cell.budget,
        targets=training.targets,
        also_train=head,
        dropout=training.dropout,
        seed=cell.seed,
        **training.options_of(cell.method),
    )


class PeakMemory:
    """The most memory held since this object was made: of tensors on a GPU, of the whole process elsewhere."""

    def __init__(self, device: str):
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of resident memory

    def read(self) -> float | None:
        """MiB; None where the system does not say."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        if sys.platform == "linux":
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) / 2**10
        if sys.platform == "darwin":  # where the mark cannot be reset: of the process so far, in bytes
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return None


def _evaluate(model: nn.Module, task: Task) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        return task.evaluate(model)


def _first_batch(model: nn.Module, task: Task) -> Any:
    return to_device(next(iter(task.validation())), next(model.parameters()).device)
