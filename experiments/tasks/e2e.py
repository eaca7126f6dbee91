"""The E2E challenge (Novikova et al. 2017): from a meaning, as a list of slots, to a sentence about a restaurant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafamily.batch import to_device
from tasks.task import Batches, Task, TaskError, loader, pretrained, read_rows, tokenizer_of

BEAMS, LENGTH_PENALTY, NO_REPEAT, WRITTEN = 10, 0.8, 4, 64
"""LoRA's decoding: beams, their length penalty, n-grams that do not come twice, tokens at most."""
IGNORED = -100  # positions without a loss


class E2E(Task):
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
        self.path, self.batch, self.length = model, batch, length
        self.train = [self._pair(data, "train", number, row) for number, row in enumerate(_rows(data, "train"), 1)]
        pairs = [self._pair(data, "validation", number, row) for number, row in enumerate(_rows(data, "validation"), 1)]
        meanings = list(dict.fromkeys(meaning for meaning, _ in pairs))[:held_out]
        self.references = {meaning: [text for own, text in pairs if own == meaning] for meaning in meanings}
        self.held_out = [(meaning, text) for meaning, texts in self.references.items() for text in texts]
        self.rows = len(self.train)
        self.tokenizer = tokenizer_of(model)
        self.about = (
            f"{model} on the E2E challenge: {self.rows:,} pairs to train on, {len(meanings):,} meanings to validate on."
        )

    def model(self, seed: int) -> tuple[nn.Module, str | None]:
        from transformers import AutoModelForCausalLM

        model = pretrained(AutoModelForCausalLM, self.path)[0]
        model.generation_config.pad_token_id = self.tokenizer.pad_token_id
        return model, None

    def training(self, seed: int) -> Batches:
        return loader(self.train, self.batch, self._collate, seed)

    def validation(self) -> Batches:
        return loader(self.held_out, 32, self._collate)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        total = tokens = 0.0
        for batch in self.validation():
            number = (batch["labels"][:, 1:] != IGNORED).sum().item()
            total += model(**to_device(batch, device)).loss.item() * number
            tokens += number
        written = [self._write(model, meaning, device) for meaning in self.references]
        most = max(len(texts) for texts in self.references.values())
        references = [[texts[i] if i < len(texts) else None for texts in self.references.values()] for i in range(most)]
        return {"loss": total / tokens, "BLEU": self.bleu(written, references).score}

    def _write(self, model: Any, meaning: str, device: torch.device) -> str:
        prompt = torch.tensor([self.tokenizer(_prompt(meaning))["input_ids"]], device=device)
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            num_beams=BEAMS,
            length_penalty=LENGTH_PENALTY,
            no_repeat_ngram_size=NO_REPEAT,
            max_new_tokens=WRITTEN,
            do_sample=False,
        )
        text: str = self.tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
        return text.strip()

    def _collate(self, pairs: list[tuple[str, str]]) -> dict[str, Tensor]:
        end = self.tokenizer.eos_token_id
        prompts = [self.tokenizer(_prompt(meaning))["input_ids"] for meaning, _ in pairs]
        wholes = [
            [*prompt, *self.tokenizer(f" {text}")["input_ids"], end][: self.length]
            for prompt, (_, text) in zip(prompts, pairs, strict=True)
        ]
        longest = max(map(len, wholes))
        ids = torch.full((len(wholes), longest), self.tokenizer.pad_token_id)
        labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for row, (prompt, whole) in enumerate(zip(prompts, wholes, strict=True)):
            ids[row, : len(whole)] = torch.tensor(whole)
            mask[row, : len(whole)] = 1
            labels[row, len(prompt) : len(whole)] = ids[row, len(prompt) : len(whole)]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def _pair(self, data: Path, split: str, number: int, row: dict[str, Any]) -> tuple[str, str]:
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
