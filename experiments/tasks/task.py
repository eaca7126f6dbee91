"""What a task is: fresh models, batches and metrics; and what tasks share in reading models and data."""

from __future__ import annotations

import functools
import gzip
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lorafamily.batch import to_device

Batches = Iterable[Mapping[str, Tensor]]


class TaskError(ValueError):
    """The task, its data or its model cannot be used; says which and what would be right."""


class Task(ABC):
    """One thing to adapt a model to."""

    name: str
    metric: str
    """Name of the number in the table, with its unit."""
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
        """Shuffled batches; the same seed, the same order, whatever is trained on them."""

    @abstractmethod
    def validation(self) -> Batches: ...

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Metrics of a model in eval mode: `metric`, and "loss" in nats."""

    @functools.cache  # noqa: B019  (a task lives as long as its comparison)
    def untrained(self, seed: int, device: str) -> dict[str, float]:
        """Metrics of the seed's fresh model: of every method before its first step, since updates start at zero."""
        with torch.no_grad():
            return self.evaluate(self.model(seed)[0].to(device).eval())


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Batches) -> float:
    """Of a model's own loss over rows."""
    device = next(model.parameters()).device
    losses = [(model(**to_device(batch, device)).loss.item(), len(next(iter(batch.values())))) for batch in batches]
    return sum(loss * rows for loss, rows in losses) / sum(rows for _, rows in losses)


def loader(rows: list[Any], batch: int, collate: Callable[[Any], Any], seed: int | None = None) -> Batches:
    """Whole batches in a shuffled order of the seed's own, or, without one, all rows as they stand."""
    dataset = cast("Dataset[Any]", rows)  # a list is one, to all but the type checker
    if seed is None:
        return DataLoader(dataset, batch, collate_fn=collate)
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch, shuffle=True, drop_last=True, generator=generator, collate_fn=collate)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Gzipped JSON lines."""
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
    """A data set's rows. `asked`: how the task was asked for, to say so where it cannot be had."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise TaskError(
            f"{asked} without --data takes its rows from the hub and needs the package datasets: "
            "pip install 'lorafamily[tasks]', or give --data DIR"
        ) from None
    try:
        return [dict(row) for row in load_dataset(*name, split=split)]
    except Exception as error:  # whatever the hub client raises, the remedy is the same
        raise TaskError(
            f"{'/'.join(name)} could not be loaded from the hub ({type(error).__name__}: {error}); give --data DIR"
        ) from None


def tokenizer_of(path: str) -> Any:
    """The model's tokenizer, with something to pad with."""
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def pretrained(auto: Any, path: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model in float32, and what `transformers` tells of its loading."""
    import transformers

    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # that the head is new is known, and said in the report
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
