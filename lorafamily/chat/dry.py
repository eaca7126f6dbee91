"""What a run would take: the table of `plan` for the longest batch, and whether that fits on this device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

import lorafamily
from lorafamily.chat.batches import ChatBatches
from lorafamily.chat.loss import loss_of
from lorafamily.chat.settings import Train
from lorafamily.chat.templates import Template
from lorafamily.chat.tokens import Tokens
from lorafamily.terminal import in_units


def dry_run(options: Train, model: Any, template: Template, rows: Sequence[Tokens]) -> tuple[dict[str, Any], str]:
    """The plan as data, and as text."""
    given, device = options.batches, model.device
    pack = options.data.length if given.pack else None
    batches_of = partial(ChatBatches, size=given.batch, pad=template.pad, pack=pack, shuffle=False)
    longest = batches_of(rows if given.pack else sorted(rows, key=len)[-given.batch :])
    batch = max(longest, key=lambda batch: batch["input_ids"].numel())
    plan = lorafamily.plan(
        model,
        batch=batch,
        loss_fn=loss_of(given.chunk, model),
        checkpoint_activations=options.execution.checkpoint_activations,
        **options.method.arguments(),
    )
    free, peak = free_memory(device), plan.use.memory.peak
    height, length = batch["input_ids"].shape
    fits = None if free is None else peak <= free
    verdict = "an unknown amount" if free is None else f"{in_units(free)} free: it {'fits' if fits else 'DOES NOT FIT'}"
    record = plan.record() | {"free": free, "fits": fits, "batch": [height, length]}
    return record, (
        f"{plan}\nthe longest batch is {height} × {length} tokens; {device.type} has {verdict}\n"
        f"{len(batches_of(rows))} batches an epoch; nothing was trained or written"
    )


def free_memory(device: torch.device) -> int | None:
    """Free bytes; on a GPU including those that the base's weights take already. None: unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_allocated(device))
    try:
        return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return None
