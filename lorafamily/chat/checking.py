"""What `lorafamily train` refuses before it reads anything: options that make no sense, and a folder in use."""

from __future__ import annotations

from typing import Any

import yaml

from lorafamily.chat import exporting
from lorafamily.chat.generating import RUN
from lorafamily.chat.options import grouped
from lorafamily.chat.settings import Train
from lorafamily.errors import DataError, StateError


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


def at_least(options: Any, **least: int) -> None:
    """Check options by name, each with the least value allowed.

    Raises:
        DataError: a value is less.
    """
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            raise DataError(f"--{name.replace('_', '-')} {value}: must be at least {bound}")
