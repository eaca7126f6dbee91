"""What a task is: fresh models, batches and metrics; and how all tasks read models and data."""

from __future__ import annotations

import functools
import gzip
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lorafamily import LoraFamilyError
from lorafamily.batch import to_device

Batches = Iterable[Mapping[str, Tensor]]


class TaskError(ValueError):
    """The task, its data or its model cannot be used; the message says which, and what would be right."""


@contextmanager
def refusals_in_one_line() -> Iterator[None]:
    """Around a command: what is refused ends it with one line and exit code 2, not with a traceback."""
    try:
        yield
    except (TaskError, LoraFamilyError) as refused:
        print(f"{Path(sys.argv[0]).name}: {refused}", file=sys.stderr)
        sys.exit(2)


class Task(ABC):
    """One thing to adapt a model to."""

    name: str
    metric: str
    """Name of the metric in the table, with its unit."""
    higher_is_better: ClassVar[bool]
    about: str
    """One sentence for the report."""
    rows: int
    """Sequences to train on."""

    @abstractmethod
    def model(self, seed: int) -> tuple[nn.Module, str | None]:
        """A fresh model on the CPU, and a regular expression for its new head, if it has one."""

    @abstractmethod
    def training(self, seed: int) -> Batches:
        """Shuffled batches, in an order that only the seed decides."""

    @abstractmethod
    def validation(self) -> Batches: ...

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Metrics of a model in eval mode: `metric`, and "loss" in nats."""

    @functools.cache  # noqa: B019  (a task lives as long as its comparison)
    def untrained(self, seed: int, device: str) -> dict[str, float]:
        """Metrics of the seed's fresh model. Every method has them before its first step, since updates are zero
        then."""
        with torch.no_grad():
            return self.evaluate(self.model(seed)[0].to(device).eval())


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Batches) -> float:
    """The mean over rows of the loss that the model returns."""
    device = next(model.parameters()).device
    losses = [(model(**to_device(batch, device)).loss.item(), len(next(iter(batch.values())))) for batch in batches]
    return sum(loss * rows for loss, rows in losses) / sum(rows for _, rows in losses)


def loader(rows: list[Any], batch: int, collate: Callable[[Any], Any], seed: int | None = None) -> Batches:
    """Full batches in an order that the seed shuffles; without a seed all rows in their order."""
    dataset = cast("Dataset[Any]", rows)  # a list works as a dataset; only the type checker disagrees
    if seed is None:
        return DataLoader(dataset, batch, collate_fn=collate)
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch, shuffle=True, drop_last=True, generator=generator, collate_fn=collate)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of gzipped JSON lines.

    Raises:
        TaskError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise TaskError(f"{path}: no such file; --data DIR holds <task>/train.jsonl.gz and <task>/validation.jsonl.gz")
    rows = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise TaskError(f"{path}, line {number}: not a JSON object")
                rows.append(row)
    except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TaskError(f"{path}: not gzipped JSON lines ({error})") from None
    return rows


def from_hub(asked: str, split: str, *name: str) -> list[dict[str, Any]]:
    """A data set's rows. `asked`: the option that asked for it, for the message if it cannot be loaded."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise TaskError(
            f"{asked} without --data takes its rows from the hub and needs the package datasets: "
            "pip install 'lorafamily[tasks]', or give --data DIR"
        ) from None
    try:
        return [dict(row) for row in load_dataset(*name, split=split)]
    except Exception as error:  # the hub client raises many types; the remedy is always the same
        raise TaskError(
            f"{'/'.join(name)} could not be loaded from the hub ({type(error).__name__}: {error}); give --data DIR"
        ) from None


def tokenizer_of(path: str) -> Any:
    """The model's tokenizer; if it has no padding token, the end-of-text token pads."""
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def pretrained(auto: Any, path: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model in float32, and the loading report of `transformers`."""
    import transformers

    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # it would warn of the new head, which the report mentions anyway
    logging.disable_progress_bar()
    try:
        model, info = _load(auto, path, output_loading_info=True, dtype=torch.float32, **options)
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
    return model, info


def _load(auto: Any, path: str, **options: Any) -> Any:
    try:
        return auto.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise TaskError(f"--model {path}: {auto.__name__} cannot load it ({str(error).splitlines()[0]})") from None
