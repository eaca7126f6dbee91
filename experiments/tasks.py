"""What a comparison trains on: a task gives fresh models, batches and metrics, and checks its input before anything."""

from __future__ import annotations

import functools
import gzip
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import scipy.stats
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import embedded
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
        """A fresh model on the CPU, and a regular expression for the head to train beside adapters, if it has one."""

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
        text = _read_text(data)
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
        from e2e import E2E  # which is made of what is here

        return E2E(model, data, batch, length, held_out)
    raise TaskError(f"unknown task {task!r}; there are code, text, e2e, {', '.join(GLUE)}")


class Bytes(Task):
    """The embedded byte-level model on a text; by default Python code, after pretraining on prose."""

    metric = "bits per byte"
    higher_is_better = False
    evaluated = 32 * 1024  # bytes; half a second on two cores

    def __init__(self, name: str, train: bytes, validation: bytes, batch: int, held_out: int | None = None):
        if min(len(train), len(validation)) < 2 * batch * embedded.CONTEXT:
            raise TaskError(
                f"the text is too short: {len(train):,} bytes to train on and {len(validation):,} to validate on; "
                f"both need {2 * batch * embedded.CONTEXT:,}"
            )
        self.name, self.train, self.batch = name, train, batch
        self.rows = len(train) // embedded.CONTEXT
        step = max(1, len(validation) // self.evaluated)  # pieces from all over the held-out text
        pieces = [validation[i : i + embedded.CONTEXT] for i in range(0, len(validation), embedded.CONTEXT * step)]
        self.held_out = b"".join([piece for piece in pieces if len(piece) == embedded.CONTEXT][:held_out])
        what = "standard-library source code" if name == "code" else "the given text"
        self.about = (
            f"A byte-level decoder (0.8M parameters, pretrained on English prose: {embedded.provenance()['data']}, "
            f"{embedded.provenance()['validation bits per byte']} bits per byte there) adapted to {what}: "
            f"{embedded.digest(train)} to train on, {len(self.held_out):,} held-out bytes to validate on."
        )

    def model(self, seed: int) -> tuple[nn.Module, str | None]:
        return embedded.pretrained(), None

    def training(self, seed: int) -> Batches:
        return embedded.batches(self.train, self.batch, seed=seed)

    def validation(self) -> Batches:
        return embedded.batches(self.held_out, 64)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        loss = _mean_loss(model, self.validation())
        return {"loss": loss, self.metric: loss / math.log(2)}


class CausalText(Task):
    """A causal language model of `transformers` on a text file."""

    metric = "bits per byte"
    higher_is_better = False

    def __init__(
        self, model: str, train: bytes, validation: bytes, batch: int, length: int, held_out: int | None = None
    ):
        self.name, self.path, self.batch = "text", model, batch
        tokenizer = tokenizer_of(model)
        self.pieces = [_pieces(tokenizer, text, length) for text in (train, validation)]
        if min(len(pieces) for pieces in self.pieces) < 1 or len(self.pieces[0]) < batch:
            raise TaskError(
                f"the text is too short: {len(self.pieces[0])} pieces of {length} tokens to train on and "
                f"{len(self.pieces[1])} to validate on; it needs {batch} and 1"
            )
        self.pieces[1] = self.pieces[1][:held_out]
        self.rows = len(self.pieces[0])
        whole = torch.cat(self.pieces[1])
        self.bytes_per_token = len(tokenizer.decode(whole).encode()) / len(whole)
        self.about = f"{model} adapted to a text of {len(train) + len(validation):,} bytes; the last tenth validates."

    def model(self, seed: int) -> tuple[nn.Module, str | None]:
        from transformers import AutoModelForCausalLM

        return pretrained(AutoModelForCausalLM, self.path)[0], None

    def training(self, seed: int) -> Batches:
        return loader(self.pieces[0], self.batch, _with_labels, seed)

    def validation(self) -> Batches:
        return loader(self.pieces[1], self.batch, _with_labels)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        loss = _mean_loss(model, self.validation())
        return {"loss": loss, self.metric: loss / math.log(2) / self.bytes_per_token}


@dataclass(frozen=True)
class GlueTask:
    """Columns of a GLUE task, its number of labels (1: a score to regress), and its metric."""

    columns: tuple[str, ...]
    labels: int
    metric: str
    hub_validation: str = "validation"


GLUE = {
    "cola": GlueTask(("sentence",), 2, "Matthews correlation"),
    "sst2": GlueTask(("sentence",), 2, "accuracy"),
    "mrpc": GlueTask(("sentence1", "sentence2"), 2, "mean of accuracy and F1"),
    "qqp": GlueTask(("question1", "question2"), 2, "mean of accuracy and F1"),
    "stsb": GlueTask(("sentence1", "sentence2"), 1, "mean of Pearson and Spearman correlation"),
    "mnli": GlueTask(("premise", "hypothesis"), 3, "accuracy", "validation_matched"),
    "qnli": GlueTask(("question", "sentence"), 2, "accuracy"),
    "rte": GlueTask(("sentence1", "sentence2"), 2, "accuracy"),
}


def glue_score(metric: str, predicted: np.ndarray, true: np.ndarray) -> float:
    """GLUE's number (Wang et al. 2018); where it takes two, their mean, as its overall score does.

    The Matthews correlation is Pearson's of two binary variables. A constant prediction correlates with nothing: 0.
    """
    if "correlation" in metric:
        if np.ptp(predicted) == 0:
            return 0.0
        pearson = float(scipy.stats.pearsonr(predicted, true).statistic)
        if "Spearman" not in metric:
            return pearson
        return (pearson + float(scipy.stats.spearmanr(predicted, true).statistic)) / 2
    accuracy = float((predicted == true).mean())
    if "F1" not in metric:
        return accuracy
    found, wrong = float((predicted * true).sum()), float((predicted != true).sum())
    return (accuracy + 2 * found / max(2 * found + wrong, 1.0)) / 2


class Glue(Task):
    """Sequence classification or regression with `transformers`, on a GLUE task."""

    higher_is_better = True

    def __init__(self, name: str, model: str, data: Path | None, batch: int, length: int, held_out: int | None = None):
        self.name, self.path, self.batch, self.length = name, model, batch, length
        self.task = GLUE[name]
        self.metric = self.task.metric
        self.train = self._rows(data, "train", "train")
        self.rows = len(self.train)
        self.held_out = self._rows(data, "validation", self.task.hub_validation)[:held_out]
        self.by_length = sorted(self.held_out, key=lambda row: sum(len(row[column]) for column in self.task.columns))
        self.tokenizer = tokenizer_of(model)
        self.about = (
            f"{model} on {name.upper()} ({len(self.train):,} rows to train on, {len(self.held_out):,} to validate on, "
            f"{length} tokens at most). The new task head trains with every method and is counted apart; "
            f'"none" trains the head alone.'
        )

    def model(self, seed: int) -> tuple[nn.Module, str | None]:
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(seed)  # of the new head
        model, info = pretrained(AutoModelForSequenceClassification, self.path, num_labels=self.task.labels)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        new = sorted(info["missing_keys"])
        return model, "|".join(f"^{re.escape(name)}$" for name in new) if new else None

    def training(self, seed: int) -> Batches:
        return loader(self.train, self.batch, self._collate, seed)

    def validation(self) -> Batches:
        return loader(self.held_out, 64, self._collate)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        losses, predicted, true = [], [], []
        for batch in loader(self.by_length, 64, self._collate):
            output = model(**to_device(batch, device))
            losses += [output.loss.item()] * len(batch["labels"])
            logits = output.logits.float().cpu()
            predicted.append(logits.squeeze(-1) if self.task.labels == 1 else logits.argmax(-1))
            true.append(batch["labels"])
        score = glue_score(self.metric, torch.cat(predicted).numpy(), torch.cat(true).numpy())
        return {"loss": sum(losses) / len(losses), self.metric: score}

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        texts = [[row[column] for row in rows] for column in self.task.columns]
        batch = dict(self.tokenizer(*texts, padding=True, truncation=True, max_length=self.length, return_tensors="pt"))
        kind = torch.float32 if self.task.labels == 1 else torch.long
        return batch | {"labels": torch.tensor([row["label"] for row in rows], dtype=kind)}

    def _rows(self, data: Path | None, split: str, hub_split: str) -> list[dict[str, Any]]:
        if data is None:
            rows, where = _from_hub(self.name, hub_split), f"glue/{self.name} on the hub, {hub_split}"
        else:
            path = data / self.name / f"{split}.jsonl.gz"
            rows, where = read_rows(path), str(path)
        if not rows:
            raise TaskError(f"{where}: the {split} split is empty")
        wanted = (*self.task.columns, "label")
        for number, row in enumerate(rows, 1):
            if missing := [key for key in wanted if key not in row]:
                raise TaskError(
                    f"{where}, row {number}: no {' and '.join(missing)}; {self.name} rows have {', '.join(wanted)}, "
                    f"this one has {', '.join(row)}"
                )
            if self.task.labels > 1 and row["label"] not in range(self.task.labels):
                raise TaskError(f"{where}, row {number}: label {row['label']!r}, not in 0 … {self.task.labels - 1}")
        return rows


def loader(rows: list[Any], batch: int, collate: Callable[[Any], Any], seed: int | None = None) -> Batches:
    """Whole batches in a shuffled order of the seed's own, or, without one, all rows as they stand."""
    dataset = cast("Dataset[Any]", rows)  # a list is one, to all but the type checker
    if seed is None:
        return DataLoader(dataset, batch, collate_fn=collate)
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch, shuffle=True, drop_last=True, generator=generator, collate_fn=collate)


@torch.no_grad()
def _mean_loss(model: nn.Module, batches: Batches) -> float:
    device = next(model.parameters()).device
    losses = [(model(**to_device(batch, device)).loss.item(), len(next(iter(batch.values())))) for batch in batches]
    return sum(loss * rows for loss, rows in losses) / sum(rows for _, rows in losses)


def _with_labels(pieces: list[Tensor]) -> dict[str, Tensor]:
    tokens = torch.stack(pieces)
    return {"input_ids": tokens, "labels": tokens}


def _pieces(tokenizer: Any, text: bytes, length: int) -> list[Tensor]:
    tokens = torch.tensor(tokenizer(text.decode("utf-8", "replace"), add_special_tokens=False)["input_ids"])
    return list(tokens[: len(tokens) // length * length].view(-1, length))


def _read_text(path: Path | None) -> bytes:
    if path is None:
        raise TaskError("--task text needs --data: a text file")
    if not path.is_file():
        raise TaskError(f"--data {path}: no such file")
    return path.read_bytes()


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


def _from_hub(task: str, split: str) -> list[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise TaskError(
            f"--task {task} without --data takes the task from the hub and needs the package datasets: "
            "pip install 'lorafamily[tasks]', or give --data DIR"
        ) from None
    try:
        return [dict(row) for row in load_dataset("nyu-mll/glue", task, split=split)]
    except Exception as error:  # whatever the hub client raises, the remedy is the same
        raise TaskError(
            f"glue/{task} could not be loaded from the hub ({type(error).__name__}: {error}); give --data DIR"
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

    transformers.utils.logging.set_verbosity_error()  # that the head is new is known, and said in the report
    transformers.utils.logging.disable_progress_bar()
    model, info = _load(auto, path, output_loading_info=True, dtype=torch.float32, **options)
    return model, info


def _load(auto: Any, path: str, **options: Any) -> Any:
    try:
        return auto.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise TaskError(f"--model {path}: {auto.__name__} cannot load it ({str(error).splitlines()[0]})") from None
