"""GLUE (Wang et al. 2018): classifying or scoring sentences and pairs of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorafamily.batch import to_device
from tasks.task import Batches, Task, TaskError, from_hub, loader, pretrained, read_rows, tokenizer_of


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
    """GLUE's score (Wang et al. 2018). Of a task with two metrics it is their mean, as in GLUE's overall score.

    The Matthews correlation is Pearson's of two binary variables. A constant prediction has no correlation: 0.
    """
    if "correlation" in metric:
        if np.ptp(predicted) == 0:
            return 0.0
        import scipy.stats  # takes a second, which every process of a sweep would wait for

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
        self.train = self.split(data, "train", "train")
        self.rows = len(self.train)
        self.held_out = self.split(data, "validation", self.task.hub_validation)[:held_out]
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
        return loader(self.train, self.batch, self.collate, seed)

    def validation(self) -> Batches:
        return loader(self.held_out, 64, self.collate)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        losses, predicted, true = [], [], []
        for batch in loader(self.by_length, 64, self.collate):
            output = model(**to_device(batch, device))
            losses += [output.loss.item()] * len(batch["labels"])
            logits = output.logits.float().cpu()
            predicted.append(logits.squeeze(-1) if self.task.labels == 1 else logits.argmax(-1))
            true.append(batch["labels"])
        score = glue_score(self.metric, torch.cat(predicted).numpy(), torch.cat(true).numpy())
        return {"loss": sum(losses) / len(losses), self.metric: score}

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A padded batch with its labels."""
        texts = [[row[column] for row in rows] for column in self.task.columns]
        batch = dict(self.tokenizer(*texts, padding=True, truncation=True, max_length=self.length, return_tensors="pt"))
        dtype = torch.float32 if self.task.labels == 1 else torch.long
        return batch | {"labels": torch.tensor([row["label"] for row in rows], dtype=dtype)}

    def split(self, data: Path | None, split: str, hub_split: str) -> list[dict[str, Any]]:
        """The rows of a split.

        Raises:
            TaskError: there are none, or one lacks a column or has no label that the task knows.
        """
        if data is None:
            rows = from_hub(f"--task {self.name}", hub_split, "nyu-mll/glue", self.name)
            where = f"glue/{self.name} on the hub, {hub_split}"
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
