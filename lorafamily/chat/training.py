"""The command `lorafamily train`: from a file of conversations to a folder with an adapter.

OUT/adapter.safetensors, adapter.json   the adapter, as lorafamily.save writes it
OUT/README.md                           its model card
OUT/run.yaml                            all options
OUT/chat_template.jinja                 the template it was trained with
OUT/log/                                TensorBoard's events, steps, allocation, pictures, checkpoints
OUT/peft, serving, merged, model.gguf   if --export asks for them
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import sys
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
    """Rows to train on and to evaluate on. `evaluated`: conversations of the latter; `line`: what was read."""

    train: list[Tokens]
    validation: list[Tokens]
    evaluated: list[Conversation]
    line: str


def train_command(options: Train, say: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    """Run the command; returns its result as data and as text. `say` prints a line meanwhile.

    Raises:
        DataError: rows cannot be read or packed; nothing was trained or written.
        LoraFamilyError: options, model and folder do not fit, or what `lorafamily.train` raises.
        Interrupted: a signal stopped the run after it was saved.
    """
    quiet()
    check(options)
    template = read_template(options.model.model, options.model.template)
    data = _read_data(options, template)
    if options.data.preview is not None:
        return _preview(options, data, template)
    say(data.line)
    device = _device(options)
    base = read_base(options.model.model, options.model.dtype, options.model.quantise, device, template)
    if options.result.dry_run:
        return dry_run(options, base, data.train)
    processes = Processes(device)
    batches, validation = _batches(options, base, data, processes)
    loss_fn = loss_of(options.batches.chunk, base.model, base.vocabulary)
    if options.batches.pack and (leak := sees_other_rows(base.model, base.vocabulary)) > LEAK:
        raise DataError(
            f"--pack: {type(base.model).__name__} lets packed rows see each other (a logit changes by {leak:.0%}); "
            "train without --pack"
        )
    _apply(options, base, batches, loss_fn)
    trained = sum(p.numel() for p in base.model.parameters() if p.requires_grad)
    slices = [adapter.slices for adapter in placement_of(base.model).adapters.values()]
    say(f"{options.method.method}: {trained:,} trainable parameters, {sum(slices):,} slices on {len(slices)} layers")
    optimisation = options.optimisation
    if optimisation.lr == "auto":
        suggestion = lorafamily.suggest_lr(base.model, seed=optimisation.seed)
        say(str(suggestion))
        optimisation = dataclasses.replace(optimisation, lr=processes.agreed(suggestion.lr))
    with Reporter(options, base, data.evaluated, batches, validation, loss_fn, processes, say) as reporter:
        new = processes.first and _begin_folder(options, template.text)
        try:
            history = _run(options, optimisation, base, batches, validation, loss_fn, reporter)
        except BaseException:
            if new and not reporter.at:  # refused before the first step
                shutil.rmtree(options.out, ignore_errors=True)
            raise
    if not processes.first:
        return {}, ""
    return _finish(options, base, history, reporter)


def _device(options: Train) -> torch.device:
    """The device of this process; each of torchrun's processes takes another GPU."""
    device = device_of(options.model.device)
    if device.type == "cuda" and device.index is None and (local := os.environ.get("LOCAL_RANK")):
        torch.cuda.set_device(int(local))
        return torch.device("cuda", int(local))
    return device


def _read_data(options: Train, template: Any) -> Data:
    """Rows as tokens, to train and to evaluate on."""
    given = options.data

    def tokens(*sources: str) -> Tokenised:
        talks = conversations(row for source in sources for row in read(source, given.split))
        return tokenised(talks, template, length=given.length, loss_on=given.loss_on, too_long=given.too_long)

    found = tokens(*given.data)
    if given.validation_data is not None:
        validation = tokens(given.validation_data)
        line = f"{found.line()}; {len(validation.rows):,} for evaluation"
        return Data(found.rows, validation.rows, validation.kept, line)
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
    colour = coloured(sys.stdout) and not options.result.json
    texts = [preview(row, template.tokenizer, colour) for row in data.train[: options.data.preview]]
    marks = f"learnt tokens are {'in green' if colour else 'between « and »'}"
    parts = [f"── row {at} ──\n{text}" for at, text in enumerate(texts, 1)]
    return {"rows": texts, "data": data.line}, "\n".join([data.line, marks, *parts])


def _batches(options: Train, base: Base, data: Data, processes: Processes) -> tuple[ChatBatches, ChatBatches | None]:
    """Batches to train on, which are divided among the processes, and to evaluate on, which are the same in all."""
    size, pad, seed = options.batches.batch, pad_of(base.tokenizer), options.optimisation.seed
    pack = options.data.length if options.batches.pack else None
    rank, world = processes.rank, processes.world
    batches = ChatBatches(data.train, size, pad, pack, seed=seed, rank=rank, num_replicas=world)
    ordered = sorted(data.validation, key=len)
    return batches, ChatBatches(ordered, size, pad, shuffle=False) if ordered else None


def _apply(options: Train, base: Base, batches: ChatBatches, loss_fn: LossFn) -> None:
    more: dict[str, Any] = {}
    if find(options.method.method).looks_at_data:  # undivided, so that all processes see the same
        undivided = dataclasses.replace(batches, rank=0, num_replicas=1, count=Count())
        more = {"data": undivided, "loss_fn": loss_fn}
    lorafamily.apply(base.model, seed=options.optimisation.seed, **options.method.arguments(), **more)


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


def _run(
    options: Train,
    optimisation: OptimisationOptions,
    base: Base,
    batches: ChatBatches,
    validation: ChatBatches | None,
    loss_fn: LossFn,
    reporter: Reporter,
) -> History:
    settings = vars(optimisation) | vars(options.execution) | {"epochs": None, "steps": reporter.total}
    return lorafamily.train(
        base.model,
        batches,
        loss_fn=loss_fn,
        loss_over="tokens",
        accumulate=options.batches.accumulate,
        validation=validation,
        evaluate=reporter.evaluate if validation else None,
        evaluate_every=reporter.evaluate_every if validation else None,
        patience=options.evaluation.patience,
        restore_best=options.evaluation.restore_best,
        progress=reporter.bar,
        on_step=reporter.step,
        log_dir=options.out / LOG,
        save_every=options.result.save_every or max(1, math.ceil(reporter.total / 10)),
        keep=options.result.keep,
        resume=options.result.resume,
        **settings,
    )


def _finish(options: Train, base: Base, history: History, reporter: Reporter) -> tuple[dict[str, Any], str]:
    """Save and export the adapter; returns the result as data and as text."""
    out = options.out
    if not history.steps:
        raise TrainingError("no step was made")
    lorafamily.save(base.model, out)
    write_card(out, base.model, placement_of(base.model), NATIVE, options.model.model)
    write(options, out / RUN)  # a resumed run may have got other options
    for picture in (out / LOG).glob("*.png"):
        shutil.copyfile(picture, out / picture.name)
    written = exporting.export(options.result.export, options.model.model, base, out)
    result = reporter.result(history) | {"out": str(out), "exports": {k: str(v) for k, v in written.items()}}
    return result, reporter.text(history, out, written)
