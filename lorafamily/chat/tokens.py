"""Conversations as tokens, each marked as counting in the loss or not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lorafamily.chat.forms import Conversation
from lorafamily.chat.rows import checked, tried
from lorafamily.chat.templates import Template
from lorafamily.errors import DataError

LossOn = Literal["assistant", "everything"]


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

    def subset(self, places: Iterable[int]) -> Tokenised:
        """The rows at these places, in their order."""
        at = sorted(places)
        return Tokenised([self.rows[i] for i in at], [self.kept[i] for i in at])

    def line(self) -> str:
        """A summary in one line."""
        tokens, learnt = sum(map(len, self.rows)), sum(int(row.learnt.sum()) for row in self.rows)
        more = [f"{count} {what}" for count, what in ((self.cut, "cut"), (self.dropped, "left out")) if count]
        return (
            f"{len(self.rows):,} rows, {tokens:,} tokens, {learnt:,} of them learnt ({learnt / max(1, tokens):.0%}); "
            f"longest {max(map(len, self.rows), default=0):,}" + (f"; {', '.join(more)} (--length)" if more else "")
        )


def tokenised(
    conversations: Sequence[Conversation],
    template: Template,
    *,
    length: int,
    loss_on: LossOn = "assistant",
    too_long: Literal["cut", "drop"] = "cut",
) -> Tokenised:
    """Every conversation as at most `length` tokens.

    Raises:
        DataError: the template refuses rows (the message has the place and reason of the first), or no row is left.
    """
    rows = checked(tried(talk.place, tokens_of, talk, template, loss_on) for talk in conversations)
    cut = sum(len(row) > length for row in rows) if too_long == "cut" else 0
    if cut:
        rows = [Tokens(row.ids[:length], row.learnt[:length]) for row in rows]
    kept = [at for at, row in enumerate(rows) if len(row) <= length and row.learnt.any()]
    if not kept:
        raise DataError(
            f"all {len(rows)} rows are longer than --length {length} tokens, or none of their first {length} tokens "
            "counts in the loss; raise --length"
        )
    return Tokenised([rows[at] for at in kept], [conversations[at] for at in kept], cut, len(rows) - len(kept))


def tokens_of(conversation: Conversation, template: Template, loss_on: LossOn = "assistant") -> Tokens:
    """One conversation as tokens, however many. RowError if the template refuses it."""
    tokenizer = template.tokenizer
    if conversation.messages is None:
        ids = list(tokenizer(conversation.text)["input_ids"])
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        learnt = np.ones(len(ids), dtype=np.bool_)
    elif loss_on == "everything":
        text = template.render(conversation.messages, tools=conversation.tools)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        learnt = np.ones(len(ids), dtype=np.bool_)
    else:
        text, spans = template.spans(conversation.messages, conversation.tools)
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = found["input_ids"], found["offset_mapping"]
        # Tokens that end within a span count, also one that begins before it, such as a space with the first word: the
        # prompt ends where the span begins, so the model writes the whole token.
        inside = [first < last and any(begin < last <= end for begin, end in spans) for first, last in offsets]
        learnt = np.array(inside, dtype=np.bool_)
    learnt[:1] = False
    return Tokens(np.array(ids, dtype=np.int32), learnt)


def preview(row: Tokens, tokenizer: Any, colour: bool) -> str:
    """The text of a row, with what is learnt in green or, without colours, between « and »."""
    before, after = ("\x1b[1;32m", "\x1b[0m") if colour else ("«", "»")
    texts = []
    for learnt, group in groupby(zip(row.ids.tolist(), row.learnt.tolist(), strict=True), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group], skip_special_tokens=False)
        texts.append(f"{before}{text}{after}" if learnt else text)
    return "".join(texts)
