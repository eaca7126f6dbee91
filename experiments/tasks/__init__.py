"""What a comparison trains on: a task gives fresh models, batches and metrics, and checks its input first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import embedded
from tasks.e2e import E2E
from tasks.glue import GLUE, Glue, glue_score
from tasks.maths import GSM8K
from tasks.task import Batches, Task, TaskError, refusals_in_one_line
from tasks.texts import Bytes, CausalText, read_text

__all__ = [
    "E2E",
    "GLUE",
    "GSM8K",
    "Batches",
    "Bytes",
    "CausalText",
    "Glue",
    "Task",
    "TaskError",
    "TaskOptions",
    "find",
    "glue_score",
    "refusals_in_one_line",
]


def find(
    task: str, *, model: str | None, data: Path | None, batch: int, length: int, held_out: int | None = None
) -> Task:
    """The task of that name. `held_out`: validation examples at most.

    Raises:
        TaskError: the task is unknown, or its model or data is missing or unsuitable.
    """
    if task == "code":
        if model is not None:
            raise TaskError("--task code adapts the embedded model; for your own model give --task text or a GLUE task")
        return Bytes("code", embedded.code(validation=False), embedded.code(validation=True), batch, held_out)
    if task == "text":
        text = read_text(data)
        cut = len(text) * 9 // 10
        if model is None:
            return Bytes("text", text[:cut], text[cut:], batch, held_out)
        return CausalText(model, text[:cut], text[cut:], batch, length, held_out)
    if task in GLUE:
        if model is None:
            raise TaskError(f"--task {task} needs --model: a folder or hub id that transformers loads")
        return Glue(task, model, data, batch, length, held_out)
    if task in ("e2e", "gsm8k"):
        if model is None:
            raise TaskError(f"--task {task} needs --model: a folder or hub id of a causal language model")
        if task == "e2e":
            return E2E(model, data, batch, length, held_out)
        return GSM8K(model, data, batch, length, held_out)
    raise TaskError(f"unknown task {task!r}; there are code, text, e2e, gsm8k, {', '.join(GLUE)}")


@dataclass(frozen=True)
class TaskOptions:
    """Options of commands that work on one task."""

    model: str | None = None
    """folder or hub id of a transformers model; none for the embedded one"""
    task: str = "code"
    """as in compare.py"""
    data: Path | None = None
    """as in compare.py"""
    batch: int = 32
    """sequences per step"""
    length: int = 96
    """tokens per sequence at most"""

    def find_task(self, held_out: int | None = None) -> Task:
        """The task of these options."""
        return find(
            self.task, model=self.model, data=self.data, batch=self.batch, length=self.length, held_out=held_out
        )
