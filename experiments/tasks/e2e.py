"""The E2E challenge (Novikova et al. 2017): from a meaning, as a list of slots, to a sentence about a restaurant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tasks.prompted import Prompted, text_pairs
from tasks.task import TaskError, read_rows

BEAMS, LENGTH_PENALTY, NO_REPEAT, WRITTEN = 10, 0.8, 4, 64
"""LoRA's decoding: beams, their length penalty, the n-grams that must not repeat, tokens at most."""


class E2E(Prompted):
    """A causal language model of `transformers` that continues "meaning ||" with a reference.

    The loss counts the reference alone. BLEU is sacrebleu's, of one sentence for every meaning against all of its
    references. The challenge's own script tokenises differently, so its numbers are not comparable.
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
        self.train = [(_prompt(meaning), text) for meaning, text in _pairs(data, "train")]
        pairs = _pairs(data, "validation")
        meanings = list(dict.fromkeys(meaning for meaning, _ in pairs))[:held_out]
        self.references = {meaning: [text for other, text in pairs if other == meaning] for meaning in meanings}
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
        """A sentence for a meaning, decoded as LoRA's authors do."""
        how: dict[str, Any] = {"num_beams": BEAMS, "length_penalty": LENGTH_PENALTY}
        how |= {"no_repeat_ngram_size": NO_REPEAT, "max_new_tokens": WRITTEN}
        return self.written(model, [_prompt(meaning)], **how)[0]


def _pairs(data: Path, split: str) -> list[tuple[str, str]]:
    """Meanings and references."""
    path = data / "e2e" / f"{split}.jsonl.gz"
    pairs = text_pairs(read_rows(path), ("meaning_representation", "human_reference"), str(path), split)
    return [(meaning, " ".join(text.split())) for meaning, text in pairs]


def _prompt(meaning: str) -> str:
    return f"{meaning} ||"
