"""The command `lorafamily train`: from a file of conversations to a folder with an adapter.

OUT/adapter.safetensors, adapter.json   the adapter, as lorafamily.save writes it
OUT/run.yaml                            all options
OUT/chat_template.jinja                 the template it was trained with
OUT/log/                                TensorBoard's events, steps, allocation, pictures, checkpoints
OUT/peft, serving, merged, model.gguf   if asked for
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import lorafamily
from lorafamily.batch import LossFn
from lorafamily.chat import exporting
from lorafamily.chat.batches import ChatBatches, Count, sees_other_rows
from lorafamily.chat.checking import check
from lorafamily.chat.dry import dry_run
from lorafamily.chat.forms import Conversation, conversations
from lorafamily.chat.generating import RUN
from lorafamily.chat.loss import loss_of
from lorafamily.chat.model import TEMPLATE, Base, device_of, pad_of, quiet, read_base, read_template
from lorafamily.chat.options import write
from lorafamily.chat.reporting import Reporter
from lorafamily.chat.rows import read
from lorafamily.chat.settings import OptimisationOptions, Train
from lorafamily.chat.tokens import Tokenised, Tokens, preview, tokenised
from lorafamily.deploy.model_card import NATIVE, write_card
from lorafamily.errors import DataError, FileError, TrainingError
from lorafamily.history import History
from lorafamily.layers.placement import placement_of
from lorafamily.registry import find
from lorafamily.terminal import coloured
from lorafamily.training.processes import Processes

LOG = "log"
LEAK = 0.1  # rounding in half precision changes logits by 1e-2, seeing another row by about 1


@dataclass
class Data:
    """Rows to train on and to evaluate on."""

    train: list[Tokens]
    validation: list[Tokens]
    asked: list[Conversation]
    """Conversations of the rows to evaluate on."""
    line: str
    """What was read, in one line."""


def train_command(options: Train, say: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    """Run the command; returns its result as data and as text. `say` prints a line meanwhile.

    Raises:
        DataError: rows cannot be read or packed; nothing was trained or written.
        LoraFamilyError: options, model and folder do not fit, or what `lorafamily.train` raises.
        Interrupted: a signal stopped the run, and it is saved.
    """
    quiet()
    check(options)
    template = read_template(options.model.model, options.model.template)
    data = read_data(options, template)
    if options.data.preview is not None:
        return _preview(options, data, template)
    say(data.line)
    device = _device(options)
    base = read_base(options.model.model, options.model.dtype, options.model.quantise, device, template)
    if options.result.dry_run:
        return dry_run(options, base, data.train)
    assert options.result.out is not None
    processes = Processes(device)
    batches, validation = batches_of(options, base, data, processes)
    loss_fn = loss_of(options.batches.chunk, base.model, base.vocabulary)
    if options.batches.pack and (leak := sees_other_rows(base.model, base.vocabulary)) > LEAK:
        raise DataError(
            f"--pack: {type(base.model).__name__} lets packed rows see each other (a logit changes by {leak:.0%}); "
            "train without it"
        )
    adapted(options, base, batches, loss_fn)
    say(adapters_line(options, base))
    optimisation = options.optimisation
    if optimisation.lr == "auto":
        suggestion = lorafamily.suggest_lr(base.model, seed=optimisation.seed)
        say(str(suggestion))
        optimisation = dataclasses.replace(optimisation, lr=processes.agreed(suggestion.lr))
    with Reporter(options, base, data.asked, batches, validation, loss_fn, processes, say) as reporter:
        new = processes.first and begin_folder(options, template.text)
        try:
            history = _run(options, optimisation, base, batches, validation, loss_fn, reporter)
        except BaseException:
            if new and not reporter.at:  # refused before the first step
                shutil.rmtree(options.result.out, ignore_errors=True)
            raise
    if not processes.first:
        return {}, ""
    return finish(options, base, history, reporter)


def _device(options: Train) -> torch.device:
    """The device of this process; of torchrun's processes each takes a GPU."""
    device = device_of(options.model.device)
    if device.type == "cuda" and device.index is None and (local := os.environ.get("LOCAL_RANK")):
        torch.cuda.set_device(int(local))
        return torch.device("cuda", int(local))
    return device


def read_data(options: Train, template: Any) -> Data:
    """Rows as tokens, to train and to evaluate on.

    Raises:
        DataError: a row is no conversation, or no row is left.
    """
    given = options.data

    def taken(sources: tuple[str, ...]) -> Tokenised:
        rows = [row for source in sources for row in read(source, given.split)]
        return tokenised(
            conversations(rows), template, length=given.length, loss_on=given.loss_on, too_long=given.too_long
        )

    found = taken(given.data)
    if given.validation_data is not None:
        validation = taken((given.validation_data,))
        return Data(
            found.rows, validation.rows, validation.kept, f"{found.line()}; {len(validation.rows):,} for evaluation"
        )
    count = max(1, round(given.eval_share * len(found.rows))) if given.eval_share else 0
    if count and len(found.rows) < 2:
        raise DataError("one row cannot be shared between training and evaluation; add rows, or --eval-share 0")
    order = torch.randperm(len(found.rows), generator=torch.Generator().manual_seed(options.optimisation.seed)).tolist()
    held_out = sorted(order[:count])
    return Data(
        [found.rows[at] for at in sorted(order[count:])],
        [found.rows[at] for at in held_out],
        [found.kept[at] for at in held_out],
        f"{found.line()}; {count:,} for evaluation",
    )


def _preview(options: Train, data: Data, template: Any) -> tuple[dict[str, Any], str]:
    import sys

    colour = coloured(sys.stdout) and not options.result.json
    texts = [preview(row, template.tokenizer, colour) for row in data.train[: options.data.preview]]
    marks = "in green" if colour else "between « and »"
    head = [f"{data.line}", f"learnt tokens are {marks}"]
    parts = [f"── row {at} ──\n{text}" for at, text in enumerate(texts, 1)]
    return {"rows": texts, "data": data.line}, "\n".join([*head, *parts])


def batches_of(options: Train, base: Base, data: Data, processes: Processes) -> tuple[ChatBatches, ChatBatches | None]:
    """Batches to train on, which are divided among the processes, and to evaluate on, which are the same in all."""
    given, pad = options.batches, pad_of(base.tokenizer)
    batches = ChatBatches(
        data.train,
        given.batch,
        pad,
        options.data.length if given.pack else None,
        seed=options.optimisation.seed,
        rank=processes.rank,
        num_replicas=processes.world,
    )
    if not data.validation:
        return batches, None
    ordered = sorted(data.validation, key=len)
    return batches, ChatBatches(ordered, given.batch, pad, shuffle=False)


def adapted(options: Train, base: Base, batches: ChatBatches, loss_fn: LossFn) -> None:
    """Apply the adapters."""
    method = options.method
    more: dict[str, Any] = {}
    if find(method.method).looks_at_data:  # and sees the same in all processes
        more = {"data": _of_all_processes(batches), "loss_fn": loss_fn}
    lorafamily.apply(base.model, seed=options.optimisation.seed, **method.arguments(), **more)


def _of_all_processes(batches: ChatBatches) -> ChatBatches:
    """The same batches, undivided."""
    return dataclasses.replace(batches, rank=0, num_replicas=1, count=Count())


def adapters_line(options: Train, base: Base) -> str:
    """What was adapted, in one line."""
    trained = sum(p.numel() for p in base.model.parameters() if p.requires_grad)
    ranks = [adapter.rank for adapter in placement_of(base.model).adapters.values()]
    return f"{options.method.method}: {trained:,} trainable parameters, {sum(ranks):,} slices on {len(ranks)} layers"


def begin_folder(options: Train, template: str) -> bool:
    """Write the options and the template into the folder; returns whether it was new.

    Raises:
        FileError: they cannot be written.
    """
    out = options.result.out
    assert out is not None
    if (out / RUN).is_file():
        return False
    try:
        out.mkdir(parents=True, exist_ok=True)
        write(options, out / RUN)
        (out / TEMPLATE).write_text(template, encoding="utf-8")
    except OSError as error:
        raise FileError(f"--out {out}: cannot be written ({error})") from None
    return True


def _run(
    options: Train,
    optimisation: OptimisationOptions,
    base: Base,
    batches: ChatBatches,
    validation: ChatBatches | None,
    loss_fn: LossFn,
    reporter: Reporter,
) -> History:
    evaluation, execution = options.evaluation, options.execution
    assert options.result.out is not None
    settings = dataclasses.asdict(optimisation) | {"epochs": None, "steps": reporter.total}
    return lorafamily.train(
        base.model,
        batches,
        loss_fn=loss_fn,
        loss_over="tokens",
        accumulate=options.batches.accumulate,
        validation=validation,
        evaluate=reporter.evaluate if validation else None,
        evaluate_every=reporter.evaluate_every if validation else None,
        patience=evaluation.patience,
        restore_best=evaluation.restore_best,
        progress=reporter.bar,
        on_step=reporter.step,
        log_dir=options.result.out / LOG,
        save_every=options.result.save_every or max(1, math.ceil(reporter.total / 10)),
        keep=options.result.keep,
        resume=options.result.resume,
        **settings,
        **dataclasses.asdict(execution),
    )


def finish(options: Train, base: Base, history: History, reporter: Reporter) -> tuple[dict[str, Any], str]:
    """Save and export the adapter; returns the result as data and as text.

    Raises:
        TrainingError: no step was made.
        StateError, FileError: an export cannot be written.
    """
    out = options.result.out
    assert out is not None
    if not history.steps:
        raise TrainingError("no step was made")
    lorafamily.save(base.model, out)
    write_card(out, base.model, placement_of(base.model), NATIVE, options.model.model)
    write(options, out / RUN)  # a resumed run may have been given others
    for picture in (out / LOG).glob("*.png"):
        shutil.copyfile(picture, out / picture.name)
    written = exporting.export(options.result.export, options.model.model, base, out)
    result = reporter.result(history) | {"out": str(out), "exports": {k: str(v) for k, v in written.items()}}
    return result, reporter.text(history, out, written)
