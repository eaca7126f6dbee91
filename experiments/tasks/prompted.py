"""The base of tasks where a causal language model answers a prompt, and only the answer is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorafamily.batch import to_device
from tasks.task import Batches, Task, TaskError, loader, pretrained, tokenizer_of

IGNORED = -100  # positions without a loss


class Prompted(Task):
    """`train`, `held_out`: prompts with their answers; an answer ends with the end-of-text token."""

    train: Sequence[tuple[str, str]]
    held_out: Sequence[tuple[str, str]]

    def __init__(self, model: str, batch: int, length: int):
        self.path, self.batch, self.length = model, batch, length
        self.tokenizer = tokenizer_of(model)

    def model(self, seed: int) -> tuple[nn.Module, str | None]:
        from transformers import AutoModelForCausalLM

        model = pretrained(AutoModelForCausalLM, self.path)[0]
        model.generation_config.pad_token_id = self.tokenizer.pad_token_id
        return model, None

    def training(self, seed: int) -> Batches:
        return loader(list(self.train), self.batch, self.collate, seed)

    def validation(self) -> Batches:
        return loader(list(self.held_out), 32, self.collate)

    @torch.no_grad()
    def loss(self, model: nn.Module, batches: Batches) -> float:
        """Nats per token, mean over the tokens of the answers."""
        device = next(model.parameters()).device
        total = tokens = 0.0
        for batch in batches:
            number = (batch["labels"][:, 1:] != IGNORED).sum().item()
            total += model(**to_device(batch, device)).loss.item() * number
            tokens += number
        return total / tokens

    def written(self, model: Any, prompts: Sequence[str], **how: Any) -> list[str]:
        """The model's answers to a batch of prompts; `how`: arguments of `generate`."""
        rows = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        longest = max(map(len, rows))
        device = next(model.parameters()).device
        ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):  # padded on the left, since the model continues from the last position
            ids[place, longest - len(row) :] = torch.tensor(row)
            mask[place, longest - len(row) :] = 1
        output = model.generate(ids.to(device), attention_mask=mask.to(device), do_sample=False, **how)
        texts = [self.tokenizer.decode(row[longest:], skip_special_tokens=True) for row in output]
        return [text.strip() for text in texts]

    def collate(self, pairs: list[tuple[str, str]]) -> dict[str, Tensor]:
        """A padded batch with labels on the answers only."""
        end = self.tokenizer.eos_token_id
        prompts = [self.tokenizer(prompt)["input_ids"] for prompt, _ in pairs]
        wholes = [
            [*prompt, *self.tokenizer(f" {answer}")["input_ids"], end][: self.length]
            for prompt, (_, answer) in zip(prompts, pairs, strict=True)
        ]
        longest = max(map(len, wholes))
        ids = torch.full((len(wholes), longest), self.tokenizer.pad_token_id)
        labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for row, (prompt, whole) in enumerate(zip(prompts, wholes, strict=True)):
            ids[row, : len(whole)] = torch.tensor(whole)
            mask[row, : len(whole)] = 1
            labels[row, len(prompt) : len(whole)] = ids[row, len(prompt) : len(whole)]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def text_pairs(rows: Sequence[dict[str, Any]], keys: tuple[str, str], where: str, split: str) -> list[tuple[str, str]]:
    """Two texts of every row. `where`, `split`: what the rows are, for messages.

    Raises:
        TaskError: there are no rows, or one has no text under a key.
    """
    if not rows:
        raise TaskError(f"{where}: the {split} split is empty")
    for number, row in enumerate(rows, 1):
        if missing := [key for key in keys if not isinstance(row.get(key), str)]:
            raise TaskError(f"{where}, row {number}: no text under {' and '.join(missing)}")
    return [(row[keys[0]], row[keys[1]]) for row in rows]
