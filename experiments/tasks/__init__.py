"""What a comparison trains on: a task gives fresh models, batches and metrics, and checks its input before anything."""

from __future__ import annotations

from pathlib import Path

import embedded
from tasks.e2e import E2E
from tasks.glue import GLUE, Glue, glue_score
from tasks.maths import GSM8K
from tasks.task import Batches, Task, TaskError
from tasks.texts import Bytes, CausalText, read_text

__all__ = ["E2E", "GLUE", "GSM8K", "Batches", "Bytes", "CausalText", "Glue", "Task", "TaskError", "find", "glue_score"]


def find(
    task: str, *, model: str | None, data: Path | None, batch: int, length: int, held_out: int | None = None
) -> Task:
    """The task of that name. `held_out`: validation examples at most.

    Raises:
        TaskError: unknown, or its model or data is missing or not what it takes.
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
    if task == "e2e":
        if model is None:
            raise TaskError("--task e2e needs --model: a folder or hub id of a causal language model")
        return E2E(model, data, batch, length, held_out)
    if task == "gsm8k":
        if model is None:
            raise TaskError("--task gsm8k needs --model: a folder or hub id of a causal language model")
        return GSM8K(model, data, batch, length, held_out)
    raise TaskError(f"unknown task {task!r}; there are code, text, e2e, gsm8k, {', '.join(GLUE)}")
