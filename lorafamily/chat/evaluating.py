"""The command `lorafamily evaluate`: loss, perplexity and exact match, a column for the base and for each adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import lorafamily
from lorafamily.batch import weigher
from lorafamily.chat.batches import ChatBatches
from lorafamily.chat.checking import at_least
from lorafamily.chat.forms import Conversation, conversations
from lorafamily.chat.generating import answers_to, model_name, question_of
from lorafamily.chat.loss import SAME, ChunkedLoss, difference, own_loss
from lorafamily.chat.model import Base, device_of, pad_of, read_base, read_template
from lorafamily.chat.reporting import perplexity
from lorafamily.chat.rows import read
from lorafamily.chat.settings import Evaluate
from lorafamily.chat.tokens import tokenised
from lorafamily.errors import DataError
from lorafamily.training.batches import mean_loss
from lorafamily.training.processes import Processes

BASE = "base"


def evaluate_command(options: Evaluate, say: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    """Run the command; returns its result as data and as a table.

    Raises:
        LoraFamilyError: no data, no model, or an adapter that does not fit the model.
    """
    _check(options)
    name = model_name(options.model, options.adapter)
    template = read_template(name, options.template, options.adapter[0] if options.adapter else None)
    rows = [row for source in options.data for row in read(source, options.split)]
    found = tokenised(conversations(rows), template, length=options.length, loss_on=options.loss_on)
    say(found.line())
    base = read_base(name, options.dtype, options.quantise, device_of(options.device), template)
    names = _names(options.adapter)
    for name, folder in names.items():
        lorafamily.load(base.model, folder, name=name)
    batches = ChatBatches(sorted(found.rows, key=len), options.batch, pad_of(base.tokenizer), shuffle=False)
    asked = [talk for talk in found.kept if talk.messages is not None][: options.generate]
    columns = {}
    for column in (BASE, *names):
        with contextlib.ExitStack() as around:
            if column == BASE and names:
                around.enter_context(lorafamily.disabled(base.model))
            elif names:
                lorafamily.switch(base.model, column)
            columns[column] = _column(options, base, batches, asked)
    return {"model": base.name, "rows": len(found.rows), "generated": len(asked), "columns": columns}, _table(columns)


def _check(options: Evaluate) -> None:
    at_least(
        ("--length", options.length, 2),
        ("--batch", options.batch, 1),
        ("--generate", options.generate, 0),
        ("--max-new", options.max_new, 1),
        ("--chunk", options.chunk, 0),
    )
    if not options.data:
        raise DataError("--data needs at least one file, folder or name on the hub")


def _names(folders: Sequence[Path]) -> dict[str, Path]:
    """Columns by name: the folder's name, with that of its parent where two are the same.

    Raises:
        DataError: a folder is given twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise DataError("--adapter names a folder twice")
    short = [folder.resolve().name for folder in folders]
    names = [
        own if short.count(own) == 1 and own != BASE else f"{folder.resolve().parent.name}/{own}"
        for own, folder in zip(short, folders, strict=True)
    ]
    return {name.replace(".", "-"): folder for name, folder in zip(names, folders, strict=True)}


@torch.no_grad()
def _column(options: Evaluate, base: Base, batches: ChatBatches, asked: Sequence[Conversation]) -> dict[str, float]:
    model, device = base.model, next(base.model.parameters()).device
    chunked = options.chunk and difference(model, base.vocabulary) <= SAME
    loss_fn = ChunkedLoss(options.chunk) if chunked else own_loss
    loss = mean_loss(model, batches, loss_fn, weigher("tokens", model, loss_fn), Processes(device))
    found = {"loss": loss, "perplexity": perplexity(loss)}
    if asked:
        questions = [question_of(base, talk.question, talk.tools) for talk in asked]
        written = answers_to(model, base.template, questions, options.max_new, batch=options.batch)
        same = [answer == talk.answer.strip() for answer, talk in zip(written, asked, strict=True)]
        found["exact match"] = sum(same) / len(same)
    return found


def _table(columns: dict[str, dict[str, float]]) -> str:
    measures = list(next(iter(columns.values())))
    widths = {name: max(len(name), 10) for name in columns}
    first = max(map(len, measures))
    head = " " * first + "".join(f"  {name:>{width}}" for name, width in widths.items())
    lines = [head, "─" * len(head)]
    for measure in measures:
        cells = [
            f"{columns[name][measure]:.1%}" if "match" in measure else f"{columns[name][measure]:.4f}"
            for name in columns
        ]
        row = "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths.values(), strict=True))
        lines.append(f"{measure:<{first}}{row}")
    return "\n".join(lines)
