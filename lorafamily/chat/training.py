"""The command `lorafamily train`: from a file of conversations to a folder with an adapter.

OUT/adapter.safetensors, adapter.json   the adapter, as lorafamily.save writes it
OUT/README.md                           its model card
OUT/run.yaml                            all options
OUT/chat_template.jinja                 the template it was trained with
OUT/log/                                TensorBoard's events, steps, allocation, pictures, checkpoints
OUT/peft, serving, merged, model.gguf   if --export asks for them
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import yaml

import lorafamily
from lorafamily.batch import LossFn
from lorafamily.chat import exporting
from lorafamily.chat.batches import ChatBatches, sees_other_rows
from lorafamily.chat.forms import conversations
from lorafamily.chat.generating import RUN
from lorafamily.chat.loss import loss_of, vocabulary_of
from lorafamily.chat.model import TEMPLATE, beside_text, read_base, read_template
from lorafamily.chat.options import at_least, grouped, write
from lorafamily.chat.reporting import Reporter
from lorafamily.chat.rows import read
from lorafamily.chat.settings import Train
from lorafamily.chat.templates import Template
from lorafamily.chat.tokens import Tokenised, Tokens, preview, tokenised
from lorafamily.deploy.model_card import NATIVE, write_card
from lorafamily.errors import DataError, FileError, StateError, TrainingError
from lorafamily.history import History
from lorafamily.layers.placement import placement_of
from lorafamily.registry import find
from lorafamily.terminal import coloured, in_units
from lorafamily.training.processes import Processes

LOG = "log"
LEAK = 0.1  # rounding in half precision changes logits by 1e-2, seeing another row by about 1


def train_command(options: Train, say: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    """Run the command; returns its result as data and as text. `say` prints a line meanwhile.

    Raises:
        DataError: rows cannot be read or packed; nothing was trained or written.
        LoraFamilyError: options, model and folder do not fit, or what `lorafamily.train` raises.
        Interrupted: a signal stopped the run after it was saved.
    """
    check(options)
    template = read_template(options.model.model, options.model.template)
    train, held_out, line = _read_data(options, template)
    if options.data.preview is not None:
        return _preview(options, train.rows[: options.data.preview], line, template)
    say(line)
    model = read_base(options.model.model, options.model, template)
    loss_fn, arguments = loss_of(options.batches.chunk, model), options.method.arguments()
    if (apart := beside_text(model)) and not isinstance(arguments["exclude"], str):
        say(f"without adapters, since no text passes through: {', '.join(apart)}")
        arguments["exclude"] = [*(arguments["exclude"] or []), *(f"^{re.escape(name)}\\." for name in apart)]
    seed, pack = options.optimisation.seed, options.data.length if options.batches.pack else None
    batches_of = partial(ChatBatches, size=options.batches.batch, pad=template.pad, pack=pack, seed=seed)
    if options.result.dry_run:
        return _dry_run(options, model, loss_fn, arguments, train.rows, batches_of)
    processes = Processes(model.device)
    # Divided among the processes; those to evaluate on are the same in all.
    batches = batches_of(train.rows, rank=processes.rank, num_replicas=processes.world)
    validation = batches_of(sorted(held_out.rows, key=len), pack=None, shuffle=False) if held_out.rows else None
    if pack and (leak := sees_other_rows(model, vocabulary_of(model))) > LEAK:
        raise DataError(
            f"--pack: {type(model).__name__} lets packed rows see each other (a logit changes by {leak:.0%}); "
            "train without --pack"
        )
    method = options.method
    looks = find(method.method).looks_at_data  # at undivided data, so that all processes see the same
    more: dict[str, Any] = {"data": batches_of(train.rows), "loss_fn": loss_fn} if looks else {}
    lorafamily.apply(model, seed=seed, **arguments, **more)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    slices = [adapter.slices for adapter in placement_of(model).adapters.values()]
    say(f"{method.method}: {trained:,} trainable parameters, {sum(slices):,} slices on {len(slices)} layers")
    lr: Any = options.optimisation.lr
    if lr == "auto":
        suggestion = lorafamily.suggest_lr(model, seed=seed)
        say(str(suggestion))
        lr = processes.agreed(suggestion.lr)
    reporter = Reporter(options, model, template, batches, validation, held_out.kept, loss_fn, processes, say)
    with closing(reporter):
        new = processes.first and _begin_folder(options, template.text)
        try:
            history = _run(reporter, lr)
        except BaseException:
            if new and not reporter.at:  # refused before the first step
                shutil.rmtree(options.out, ignore_errors=True)
            raise
    return _finish(reporter, history) if processes.first else ({}, "")


def check(options: Train) -> None:
    """Check the options and the folder.

    Raises:
        DataError: an option makes no sense.
        StateError: the folder holds something else, or an export is not possible.
    """
    data, batches, evaluation, result = options.data, options.batches, options.evaluation, options.result
    epochs = options.optimisation.epochs
    at_least(data, length=2, preview=1)
    at_least(batches, batch=1, accumulate=1, chunk=0)
    at_least(evaluation, samples=0, evaluate_every=1)
    at_least(options.optimisation, steps=1)
    at_least(result, save_every=1)
    if not 0 <= data.eval_share < 1:
        raise DataError(f"--eval-share {data.eval_share:g}: must be a share of the rows in [0, 1)")
    if epochs is not None and not epochs > 0:
        raise DataError(f"--epochs {epochs:g}: must be more than 0")
    if epochs is not None and options.optimisation.steps is not None:
        raise DataError("--steps and --epochs: give one of them")
    if not data.data:
        raise DataError("--data needs at least one file, folder or name on the hub")
    if evaluation.patience is not None and not data.eval_share and not data.validation_data:
        raise DataError("--patience has no effect without rows to evaluate on; give --eval-share or --validation-data")
    if options.execution.compile and batches.chunk:
        raise DataError("--compile needs the model's own loss: add --chunk 0")
    exporting.check(result.export)
    if data.preview is None and not result.dry_run:
        if result.out is None:
            raise DataError("needs --out, a folder for the result (or --preview or --dry-run)")
        _check_folder(options)


def _check_folder(options: Train) -> None:
    """Refuse a folder that is neither new nor of a run with the same options."""
    out = options.out
    if out.is_file():
        raise StateError(f"--out {out}: is a file; give a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / RUN).is_file():
        raise StateError(f"--out {out}: the folder is not empty and not of a run; give another folder")
    try:
        then = yaml.safe_load((out / RUN).read_text(encoding="utf-8"))
        before = {name: dict(then[name]) for name in ("model", "data", "method", "batches", "optimisation")}
    except (yaml.YAMLError, KeyError, TypeError, ValueError, UnicodeDecodeError):
        raise StateError(f"--out {out}: its {RUN} is damaged; remove the folder or give another") from None
    now = grouped(options)
    differing = [
        f"--{key.replace('_', '-')} was {was}, is {now[name].get(key)}"
        for name, group in before.items()
        for key, was in group.items()
        if was != now[name].get(key) and key != "preview"
    ]
    if differing and options.result.resume != "anyway":
        raise StateError(
            f"--out {out}: is of a run with other options: {'; '.join(differing)}. Give another folder, or continue "
            "that run with the new options by --resume anyway"
        )


def _read_data(options: Train, template: Template) -> tuple[Tokenised, Tokenised, str]:
    """Rows to train on, rows to evaluate on, and a line about what was read."""
    given = options.data

    def tokens(*sources: str) -> Tokenised:
        talks = conversations(row for source in sources for row in read(source, given.split))
        return tokenised(talks, template, length=given.length, loss_on=given.loss_on, too_long=given.too_long)

    train = tokens(*given.data)
    line = train.line()
    if given.validation_data is not None:
        validation = tokens(given.validation_data)
    else:
        count = max(1, round(given.eval_share * len(train.rows))) if given.eval_share else 0
        if count and len(train.rows) < 2:
            raise DataError("one row cannot be shared between training and evaluation; add rows, or --eval-share 0")
        generator = torch.Generator().manual_seed(options.optimisation.seed)
        order = torch.randperm(len(train.rows), generator=generator).tolist()
        train, validation = train.subset(order[count:]), train.subset(order[:count])
    return train, validation, f"{line}; {len(validation.rows):,} for evaluation"


def _preview(options: Train, rows: Sequence[Tokens], line: str, template: Template) -> tuple[dict[str, Any], str]:
    colour = coloured(sys.stdout) and not options.json
    texts = [preview(row, template.tokenizer, colour) for row in rows]
    marks = f"learnt tokens are {'in green' if colour else 'between « and »'}"
    parts = [f"── row {at} ──\n{text}" for at, text in enumerate(texts, 1)]
    return {"rows": texts, "data": line}, "\n".join([line, marks, *parts])


def _dry_run(
    options: Train,
    model: Any,
    loss_fn: LossFn,
    arguments: dict[str, Any],
    rows: Sequence[Tokens],
    batches_of: Callable[..., ChatBatches],
) -> tuple[dict[str, Any], str]:
    """The plan for the longest batch, and whether that fits on this device."""
    longest = rows if options.batches.pack else sorted(rows, key=len)[-options.batches.batch :]
    batch = max(batches_of(longest, shuffle=False), key=lambda batch: batch["input_ids"].numel())
    plan = lorafamily.plan(
        model,
        batch=batch,
        loss_fn=loss_fn,
        checkpoint_activations=options.execution.checkpoint_activations,
        **arguments,
    )
    free, peak = free_memory(model.device), plan.use.memory.peak
    height, length = batch["input_ids"].shape
    fits = None if free is None else peak <= free
    verdict = "an unknown amount" if free is None else f"{in_units(free)} free: it {'fits' if fits else 'DOES NOT FIT'}"
    return plan.record() | {"free": free, "fits": fits, "batch": [height, length]}, (
        f"{plan}\nthe longest batch is {height} × {length} tokens; {model.device.type} has {verdict}\n"
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


def _begin_folder(options: Train, template: str) -> bool:
    """Write the options and the template into the folder; returns whether it was new."""
    out = options.out
    if (out / RUN).is_file():
        return False
    try:
        out.mkdir(parents=True, exist_ok=True)
        write(options, out / RUN)
        (out / TEMPLATE).write_text(template, encoding="utf-8")
    except OSError as error:
        raise FileError(f"--out {out}: cannot be written ({error})") from None
    return True


def _mixed(batches: ChatBatches) -> ChatBatches:
    """The same rows in an order that the seed draws. Ranks are scored on the first rows, which by length are the
    shortest."""
    order = np.random.default_rng(batches.seed).permutation(len(batches.rows))
    return replace(batches, rows=[batches.rows[at] for at in order])


def _run(reporter: Reporter, lr: float | None) -> History:
    options, validation = reporter.options, reporter.validation
    settings = vars(options.optimisation) | vars(options.execution)
    settings |= {"epochs": None, "steps": reporter.total, "lr": lr}
    return lorafamily.train(
        reporter.model,
        reporter.batches,
        loss_fn=reporter.loss_fn,
        loss_over="tokens",
        accumulate=options.batches.accumulate,
        validation=validation and _mixed(validation),
        evaluate=reporter.evaluate if validation else None,
        evaluate_every=(options.evaluation.evaluate_every or reporter.tenth) if validation else None,
        patience=options.evaluation.patience,
        restore_best=options.evaluation.restore_best,
        progress=reporter.bar,
        on_step=reporter.step,
        log_dir=options.out / LOG,
        save_every=options.result.save_every or reporter.tenth,
        keep=options.result.keep,
        resume=options.result.resume,
        **settings,
    )


def _finish(reporter: Reporter, history: History) -> tuple[dict[str, Any], str]:
    """Save and export the adapter; returns the result as data and as text."""
    options, model, out = reporter.options, reporter.model, reporter.options.out
    if not history.steps:
        raise TrainingError("no step was made")
    lorafamily.save(model, out)
    write_card(out, model, placement_of(model), NATIVE, options.model.model)
    write(options, out / RUN)  # a resumed run may have got other options
    for picture in (out / LOG).glob("*.png"):
        shutil.copyfile(picture, out / picture.name)
    written = exporting.export(options.result.export, options.model.model, model, reporter.template, out)
    return reporter.result(history, written)
