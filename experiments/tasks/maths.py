"""Word problems: trained on MetaMathQA (Yu et al. 2023), judged on GSM8K (Cobbe et al. 2021), as peft's benchmark does.

Only the answer is learnt; peft's benchmark learns the question too.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from pathlib import Path

import torch
from torch import nn

from tasks.prompted import Prompted, text_pairs
from tasks.task import TaskError, from_hub, read_rows

PROMPT = "Question: {} Think step by step.\nAnswer:"
LONGEST = 1300
"""Characters of question and answer together; longer rows are left out, as in peft's benchmark."""
MARKS = re.compile(r"(?:answer is:?|####)\s*\$?\s*(-?[\d,]*\.?\d+)")
"""How MetaMathQA and GSM8K mark the final answer."""


def final(answer: str) -> Decimal | None:
    """The number that an answer marks as its result; None if it marks none."""
    found = MARKS.findall(answer)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


class GSM8K(Prompted):
    """A causal language model of `transformers` learns to reason in words; its answer must end with the right number.

    `tuning`: the last 500 rows of the training data, kept out of training. Answers are decoded greedily.
    """

    name, metric = "gsm8k", "accuracy"
    higher_is_better = True
    kept_back, together = 500, 32

    def __init__(self, model: str, data: Path | None, batch: int, length: int, held_out: int | None = None):
        super().__init__(model, batch, length)
        rows = _rows(data, "train", ("query", "response"))
        pairs = [(PROMPT.format(q), a) for q, a in rows if len(q) + len(a) < LONGEST]
        back = min(self.kept_back, len(pairs) // 10)
        self.train, self.tuning = pairs[: len(pairs) - back], pairs[len(pairs) - back :]
        self.questions = _rows(data, "validation", ("question", "answer"))[:held_out]
        self.held_out = [(PROMPT.format(q), a) for q, a in self.questions]
        self.rows = len(self.train)
        self.about = (
            f"{model} on {self.rows:,} rows of MetaMathQA, judged on {len(self.questions):,} questions of GSM8K by "
            "whether the answer ends with the right number."
        )

    def accuracy(self, model: nn.Module) -> float:
        """Share of questions that are answered with the right number."""
        right = 0
        for begin in range(0, len(self.questions), self.together):
            group = self.questions[begin : begin + self.together]
            written = self.written(model, [PROMPT.format(q) for q, _ in group], max_length=self.length)
            right += sum(final(text) == final(answer) for text, (_, answer) in zip(written, group, strict=True))
        return right / len(self.questions)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": self.loss(model, self.validation()), self.metric: self.accuracy(model)}


def _rows(data: Path | None, split: str, keys: tuple[str, str]) -> list[tuple[str, str]]:
    if data is None:
        name = ("meta-math/MetaMathQA",) if split == "train" else ("openai/gsm8k", "main")
        rows = from_hub("--task gsm8k", "train" if split == "train" else "test", *name)
        where = f"{'/'.join(name)} on the hub"
    else:
        path = data / "gsm8k" / f"{split}.jsonl.gz"
        rows, where = read_rows(path), str(path)
    pairs = text_pairs(rows, keys, where, split)
    for number, (_, answer) in enumerate(pairs, 1):
        if split == "validation" and final(answer) is None:
            raise TaskError(f"{where}, row {number}: the answer has no number after ####")
    return pairs
