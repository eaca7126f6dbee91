"""The command `lorafamily evaluate`: loss, perplexity and exact match, in one column for the base and each adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lorafamily
from lorafamily.chat.batches import ChatBatches
from lorafamily.chat.forms import conversations
from lorafamily.chat.generating import answers_to, model_name, questions_of, warn_of_other_quantisation
from lorafamily.chat.loss import loss_of
from lorafamily.chat.model import read_base, read_template
from lorafamily.chat.options import at_least
from lorafamily.chat.reporting import quality
from lorafamily.chat.rows import read
from lorafamily.chat.settings import Evaluate
from lorafamily.chat.tokens import tokenised
from lorafamily.errors import DataError
from lorafamily.terminal import aligned
from lorafamily.training.processes import Processes

BASE, MATCH = "base", "exact match"


def evaluate_command(options: Evaluate, say: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    """Run the command; returns its result as data and as a table.

    Raises:
        DataError: no data.
        LoraFamilyError: no model, or an adapter that does not fit it.
    """
    at_least(options, length=2, batch=1, generate=0, max_new=1, chunk=0)
    if not options.data:
        raise DataError("--data needs at least one file, folder or name on the hub")
    names = _names(options.adapter)
    name = model_name(options.model, options.adapter)
    warn_of_other_quantisation(options.quantise, options.adapter)
    template = read_template(name, options.template, options.adapter[0] if options.adapter else None)
    talks = conversations(row for source in options.data for row in read(source, options.split))
    found = tokenised(talks, template, length=options.length, loss_on=options.loss_on)
    say(found.line())
    model = read_base(name, options, template)
    for column, folder in names.items():
        lorafamily.load(model, folder, name=column)
    batches = ChatBatches(sorted(found.rows, key=len), options.batch, template.pad, shuffle=False)
    questions, answers = questions_of(found.kept, template, options.generate)
    loss_fn = loss_of(options.chunk, model)
    columns: dict[str, dict[str, float]] = {}
    for column in (BASE, *names):
        lorafamily.switch(model, None if column == BASE else column)
        columns[column] = quality(model, batches, loss_fn, Processes(model.device))
        if answers:
            written = answers_to(model, template, questions, options.max_new, batch=options.batch)
            same = [said == answer.strip() for said, answer in zip(written, answers, strict=True)]
            columns[column][MATCH] = sum(same) / len(same)
    return {"model": name, "rows": len(found.rows), "generated": len(answers), "columns": columns}, _table(columns)


def _names(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by column name: the folder's name, after that of its parent where two are the same."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise DataError("--adapter names a folder twice")
    short = [path.name for path in paths]
    names = [p.name if short.count(p.name) == 1 and p.name != BASE else f"{p.parent.name}/{p.name}" for p in paths]
    return {name.replace(".", "-"): folder for name, folder in zip(names, folders, strict=True)}


def _table(columns: dict[str, dict[str, float]]) -> str:
    rows = [["", *(f"{name:>10}" for name in columns)]]
    for measure in next(iter(columns.values())):
        style = ".1%" if measure == MATCH else ".4f"
        rows.append([measure, *(f"{found[measure]:{style}}" for found in columns.values())])
    head, *lines = aligned(rows)
    return "\n".join([head, "─" * len(head), *lines])
