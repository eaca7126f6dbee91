"""Conversations as tokens, each marked as counting in the loss or not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lorafamily.chat.forms import Conversation
from lorafamily.chat.rows import Complaints, RowError
from lorafamily.chat.templates import Span, Template
from lorafamily.errors import DataError

LossOn = Literal["assistant", "everything"]
TooLong = Literal["cut", "drop"]


@dataclass(frozen=True)
class Tokens:
    """One row. `ids`: its token ids; `learnt`: which of them count in the loss. The first never does, since nothing
    predicts it."""

    ids: NDArray[np.int32]
    learnt: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Tokenised:
    """Rows to train on. `kept`: their conversations; `cut`: how many were cut to the allowed length; `dropped`: how
    many rows were left out, because they were too long or no token that counts was left."""

    rows: list[Tokens]
    kept: list[Conversation]
    cut: int = 0
    dropped: int = 0

    def line(self) -> str:
        """A summary in one line."""
        tokens, learnt = sum(map(len, self.rows)), sum(int(row.learnt.sum()) for row in self.rows)
        more = [f"{self.cut} cut"] if self.cut else []
        more += [f"{self.dropped} left out"] if self.dropped else []
        return (
            f"{len(self.rows):,} rows, {tokens:,} tokens, {learnt:,} of them learnt ({learnt / max(1, tokens):.0%}); "
            f"longest {max(map(len, self.rows), default=0):,}" + (f"; {', '.join(more)} (--length)" if more else "")
        )


def tokenised(
    conversations: Iterable[Conversation],
    template: Template,
    *,
    length: int,
    loss_on: LossOn = "assistant",
    too_long: TooLong = "cut",
) -> Tokenised:
    """Every conversation as at most `length` tokens.

    Raises:
        DataError: the template refuses rows (the message has the place and reason of the first), or no row is left.
    """
    rows, kept, complaints = list[Tokens](), list[Conversation](), Complaints()
    cut = dropped = 0
    for conversation in conversations:
        try:
            row = tokens_of(conversation, template, loss_on)
        except RowError as error:
            complaints.add(conversation.place, str(error))
            continue
        if len(row) > length and too_long == "cut":
            row, cut = Tokens(row.ids[:length], row.learnt[:length]), cut + 1
        if len(row) > length or not row.learnt.any():
            dropped += 1
            continue
        rows.append(row)
        kept.append(conversation)
    complaints.raise_if_any()
    if not rows:
        raise DataError(
            f"all {dropped} rows are longer than --length {length} tokens, or none of their first {length} tokens "
            "counts in the loss; raise --length"
        )
    return Tokenised(rows, kept, cut, dropped)


def tokens_of(conversation: Conversation, template: Template, loss_on: LossOn = "assistant") -> Tokens:
    """One conversation as tokens, however many. RowError if the template refuses it."""
    tokenizer = template.tokenizer
    if conversation.messages is None:
        ids = list(tokenizer(conversation.text)["input_ids"])
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        return _row(ids, [True] * len(ids))
    if loss_on == "everything":
        ids = tokenizer(template.render(conversation.messages, tools=conversation.tools), add_special_tokens=False)
        return _row(ids["input_ids"], [True] * len(ids["input_ids"]))
    text, spans = template.spans(conversation.messages, conversation.tools)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return _row(found["input_ids"], _inside(found["offset_mapping"], spans))


def _inside(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens end within a span. One that begins before the span, such as a space with the first word, counts: the
    prompt ends where the span begins, so the model writes the whole token."""
    return [first < last and any(begin < last <= end for begin, end in spans) for first, last in offsets]


def _row(ids: Sequence[int], learnt: Sequence[bool]) -> Tokens:
    marks = np.array(learnt, dtype=np.bool_)
    marks[:1] = False
    return Tokens(np.array(ids, dtype=np.int32), marks)


def preview(row: Tokens, tokenizer: Any, colour: bool) -> str:
    """The text of a row, with what is learnt in green or, without colours, between « and »."""
    before, after = ("\x1b[1;32m", "\x1b[0m") if colour else ("«", "»")
    texts = []
    for learnt, group in groupby(zip(row.ids.tolist(), row.learnt.tolist(), strict=True), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group], skip_special_tokens=False)
        texts.append(f"{before}{text}{after}" if learnt else text)
    return "".join(texts)
