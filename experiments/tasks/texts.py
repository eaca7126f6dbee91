"""Language modelling: the embedded model on bytes, a model of `transformers` on a text file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import embedded
from tasks.task import Batches, Task, TaskError, loader, mean_loss, pretrained, tokenizer_of


class Bytes(Task):
    """The embedded byte-level model, pretrained on prose, on a text; by default on Python code."""

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
        loss = mean_loss(model, self.validation())
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
        return loader(self.pieces[0], self.batch, with_labels, seed)

    def validation(self) -> Batches:
        return loader(self.pieces[1], self.batch, with_labels)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        loss = mean_loss(model, self.validation())
        return {"loss": loss, self.metric: loss / math.log(2) / self.bytes_per_token}


def read_text(path: Path | None) -> bytes:
    """The bytes of a text file."""
    if path is None:
        raise TaskError("--task text needs --data: a text file")
    if not path.is_file():
        raise TaskError(f"--data {path}: no such file")
    return path.read_bytes()


def with_labels(pieces: list[Tensor]) -> dict[str, Tensor]:
    """A batch of pieces of equal length; every token is a label."""
    tokens = torch.stack(pieces)
    return {"input_ids": tokens, "labels": tokens}


def _pieces(tokenizer: Any, text: bytes, length: int) -> list[Tensor]:
    tokens = torch.tensor(tokenizer(text.decode("utf-8", "replace"), add_special_tokens=False)["input_ids"])
    return list(tokens[: len(tokens) // length * length].view(-1, length))
