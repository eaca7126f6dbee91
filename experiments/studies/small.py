"""Problems that two CPU cores can run: the embedded model, and sentences for MiniLM."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import embedded
from lorafamily.batch import to_device
from studies.problem import Batch, Problem, looking
from tasks import Glue, TaskError


class Embedded(Problem):
    """The byte decoder, from English prose to the standard library's source code; modules held out are halved by name
    into those to tune on and those to judge on."""

    name = "embedded"
    what = (
        "A byte-level decoder of 0.8M parameters, pretrained on English prose, adapted to Python source code; the "
        "budget is LoRA's at rank 8, with a singular value for each slice. Forgetting: bits per byte on docstrings of "
        "modules that were held out of both."
    )
    metric = "bits per byte"
    budget = 8 * (9_216 + 24)  # with a singular value for each of AdaLoRA's slices
    steps, batch = 600, 16
    evaluations = 15
    margin = 0.02
    goal = 2.05
    pieces = 128
    """Of 128 bytes, in each held-out text."""

    def model(self, seed: int) -> nn.Module:
        return embedded.pretrained()

    def training(self, seed: int) -> Any:
        return embedded.batches(_code(), self.batch, seed=seed)

    def tuning(self, seed: int) -> Sequence[Batch]:
        return _pieces("tuning", self.pieces)

    def judging(self, seed: int) -> Sequence[Batch]:
        return _pieces("judging", self.pieces)

    def source(self) -> Sequence[Batch]:
        return _pieces("source", self.pieces)

    def quality(self, loss: float, seed: int) -> float:
        return loss / math.log(2)


@functools.cache
def _code() -> bytes:
    return embedded.code(validation=False)


@functools.cache
def _pieces(which: str, wanted: int) -> Sequence[Batch]:
    """So many pieces of a held-out text, from all over it, in batches of 64."""
    held_out = [path for path in embedded.library() if embedded.held_out(path)]
    if which == "source":
        text = embedded.docstrings(held_out)
    else:
        text = "\n".join(embedded.library()[path] for path in held_out[which == "judging" :: 2]).encode()
    chunks = embedded.Chunks(text)
    every = max(1, len(chunks) // wanted)
    rows = torch.stack([chunks[i]["bytes"] for i in range(0, len(chunks), every)][:wanted])
    return [{"bytes": part} for part in rows.split(64)]


class Sentences(Problem):
    """A GLUE task for MiniLM, tuned on the validation split and judged on the test split.

    The budget is LoRA's at rank 4 on every linear layer of the encoder, a singular value per slice included.
    """

    metric = "share of sentences classified wrongly"
    budget = 4 * 6 * (4 * (384 + 384 + 1) + 2 * (384 + 1536 + 1))
    steps, batch, length = 600, 8, 64
    evaluations = 15
    margin = 0.01
    seeds = range(5)
    head_lr = 1e-2
    curve, scored = 436, 32
    """Rows of the validation split that curves are drawn on; those of them that ranks are scored on, drawn at random
    since the first by length are the shortest."""

    def __init__(self, name: str, what: str, goal: float, constant: float = math.inf):
        self.name, self.what, self.goal, self.constant = name, what, goal, constant

    def read(self, model: str | None, data: Path | None) -> None:
        if model is None or data is None:
            raise TaskError(f"the problem {self.name} needs --model, a folder of all-MiniLM-L6-v2, and --data")
        self.task = Glue(self.name, model, data, self.batch, self.length)
        self.head = self.task.model(0)[1]
        every = max(1, len(self.task.held_out) // self.curve)
        curve = self.task.held_out[::every][: self.curve]
        order = torch.randperm(len(curve), generator=torch.Generator().manual_seed(0)).tolist()
        drawn, others = [curve[i] for i in order[: self.scored]], [curve[i] for i in order[self.scored :]]
        self.batches = {
            "tuning": [self.task.collate(drawn), *self._batches(others)],
            "judging": self._batches(self.task.split(data, "test", "test")),
        }

    def model(self, seed: int) -> nn.Module:
        return self.task.model(seed)[0]

    def training(self, seed: int) -> Any:
        return self.task.training(seed)

    def tuning(self, seed: int) -> Sequence[Batch]:
        return self.batches["tuning"]

    def judging(self, seed: int) -> Sequence[Batch]:
        return self.batches["judging"]

    def measure(self, model: nn.Module, batches: Sequence[Batch], seed: int) -> float:
        device = next(model.parameters()).device
        wrong = rows = 0
        with looking(model):
            for batch in batches:
                found = model(**to_device(batch, device)).logits.argmax(-1).cpu()
                wrong, rows = wrong + int((found != batch["labels"]).sum()), rows + len(found)
        return wrong / rows

    def _batches(self, rows: Sequence[dict[str, Any]]) -> Sequence[Batch]:
        """All rows in batches of 64, those of like length together."""
        columns = self.task.task.columns
        ordered = sorted(rows, key=lambda row: sum(len(row[column]) for column in columns))
        return [self.task.collate(ordered[i : i + 64]) for i in range(0, len(ordered), 64)]
