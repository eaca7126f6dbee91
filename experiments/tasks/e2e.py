"""The E2E challenge (Novikova et al. 2017): from a meaning, as a list of slots, to a sentence about a restaurant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tasks.prompted import Prompted
from tasks.task import TaskError, read_rows

BEAMS, LENGTH_PENALTY, NO_REPEAT, WRITTEN = 10, 0.8, 4, 64
"""LoRA's decoding: beams, their length penalty, n-grams that do not come twice, tokens at most."""


class E2E(Prompted):
    """A causal language model of `transformers` that goes on from "meaning ||" with a reference.

    The loss is of the reference alone. BLEU is sacrebleu's, of one sentence for every meaning against all of its
    references; the challenge's own script tokenises in another way, so its numbers are not the same.
    """

    name, metric = "e2e", "BLEU"
    higher_is_better = True

    def __init__(self, model: str, data: Path | None, batch: int, length: int, held_out: int | None):
        try:
            import sacrebleu
        except ImportError:
            raise TaskError("--task e2e scores with sacrebleu: pip install 'lorafamily[tasks]'") from None
        if data is None:
            raise TaskError("--task e2e needs --data: a folder with e2e/train.jsonl.gz and e2e/validation.jsonl.gz")
        self.bleu: Any = sacrebleu.corpus_bleu
        super().__init__(model, batch, length)
        pairs = [_pair(data, "train", number, row) for number, row in enumerate(_rows(data, "train"), 1)]
        self.train = [(_prompt(meaning), text) for meaning, text in pairs]
        pairs = [_pair(data, "validation", number, row) for number, row in enumerate(_rows(data, "validation"), 1)]
        meanings = list(dict.fromkeys(meaning for meaning, _ in pairs))[:held_out]
        self.references = {meaning: [text for own, text in pairs if own == meaning] for meaning in meanings}
        self.held_out = [(_prompt(meaning), text) for meaning, texts in self.references.items() for text in texts]
        self.rows = len(self.train)
        self.about = (
            f"{model} on the E2E challenge: {self.rows:,} pairs to train on, {len(meanings):,} meanings to validate on."
        )

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        written = [self.write(model, meaning) for meaning in self.references]
        most = max(len(texts) for texts in self.references.values())
        references = [[texts[i] if i < len(texts) else None for texts in self.references.values()] for i in range(most)]
        return {"loss": self.loss(model, self.validation()), "BLEU": self.bleu(written, references).score}

    def write(self, model: nn.Module, meaning: str) -> str:
        """A sentence for a meaning, as LoRA's authors decode."""
        how: dict[str, Any] = {"num_beams": BEAMS, "length_penalty": LENGTH_PENALTY}
        how |= {"no_repeat_ngram_size": NO_REPEAT, "max_new_tokens": WRITTEN}
        return self.written(model, [_prompt(meaning)], **how)[0]


def _pair(data: Path, split: str, number: int, row: dict[str, Any]) -> tuple[str, str]:
    wanted = ("meaning_representation", "human_reference")
    if missing := [key for key in wanted if not isinstance(row.get(key), str)]:
        raise TaskError(f"{data}/e2e/{split}.jsonl.gz, row {number}: no text under {' and '.join(missing)}")
    return row[wanted[0]], " ".join(row[wanted[1]].split())


def _rows(data: Path, split: str) -> list[dict[str, Any]]:
    path = data / "e2e" / f"{split}.jsonl.gz"
    rows = read_rows(path)
    if not rows:
        raise TaskError(f"{path}: the {split} split is empty")
    return rows


def _prompt(meaning: str) -> str:
    return f"{meaning} ||"
