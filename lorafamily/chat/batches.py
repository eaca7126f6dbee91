"""Rows as batches, shuffled every epoch: padded to the longest of rows with similar length, or packed.

A packed row is several rows one after the other, each with position ids from 0. Models of transformers derive
block-diagonal attention from these ids; `sees_other_rows` tests whether a model does.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorafamily.batch import IGNORED
from lorafamily.chat.tokens import Tokens
from lorafamily.errors import DataError

WINDOW = 50  # batches whose rows are sorted by length together: enough for little padding, few enough to stay shuffled

Batch = dict[str, Tensor]


@dataclass
class Count:
    """What was drawn. `tokens`: of rows; `places`: tokens and padding; `learnt`: tokens that count in the loss."""

    tokens: int = 0
    places: int = 0
    learnt: int = 0

    @property
    def padding(self) -> float:
        """Share of places that hold no token."""
        return 1 - self.tokens / self.places if self.places else 0.0


@dataclass
class ChatBatches:
    """Batches for `lorafamily.train`, the same for the same seed and epoch, so that a run can resume inside an epoch.

    Args:
        rows: to train on.
        size: rows of a batch, or packed rows.
        pad: the token to pad with.
        pack: length of packed rows in tokens; None: rows are padded instead.
        shuffle: a new order every epoch; otherwise the order of the rows.
        rank, num_replicas: this process, and how many there are; each draws batches of its own. (`train` knows these
            names from torch's DistributedSampler, and so that the data is divided.)

    Raises:
        DataError: fewer batches than processes.
    """

    rows: Sequence[Tokens]
    size: int
    pad: int
    pack: int | None = None
    shuffle: bool = True
    seed: int = 0
    rank: int = 0
    num_replicas: int = 1
    count: Count = field(default_factory=Count)
    epoch: int = 0

    def __post_init__(self) -> None:
        if len(self) < 1:
            raise DataError(
                f"{len(self.rows)} rows make fewer batches than there are processes ({self.num_replicas}); "
                "lower --batch"
            )

    def set_epoch(self, epoch: int) -> None:
        """Which epoch comes next; called by `train`."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole = len(self._packed(np.arange(len(self.rows)))) if self.pack else len(self.rows)
        every = -(-whole // self.size)
        return every if self.num_replicas == 1 else every // self.num_replicas

    def __iter__(self) -> Iterator[Batch]:
        batches = self._order()
        batches = batches[self.rank :: self.num_replicas][: len(self)] if self.num_replicas > 1 else batches
        for groups in batches:
            batch = self._batch(groups)
            self.count.tokens += sum(len(self.rows[at]) for group in groups for at in group)
            self.count.places += batch["input_ids"].numel()
            self.count.learnt += int((batch["labels"] != IGNORED).sum())
            yield batch

    def _order(self) -> list[list[list[int]]]:
        """The epoch's batches, as lists of packed rows, each a list of row indices; without packing of one."""
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(len(self.rows)) if self.shuffle else np.arange(len(self.rows))
        if self.pack:
            groups = self._packed(order)
            if self.shuffle:
                groups = [groups[at] for at in generator.permutation(len(groups))]
        elif self.shuffle:
            window = WINDOW * self.size
            parts = [order[at : at + window].tolist() for at in range(0, len(order), window)]
            groups = [[at] for part in parts for at in sorted(part, key=lambda at: len(self.rows[at]))]
        else:
            groups = [[at] for at in order.tolist()]
        batches = [groups[at : at + self.size] for at in range(0, len(groups), self.size)]
        if self.shuffle:
            batches = [batches[at] for at in generator.permutation(len(batches))]
        return batches

    def _packed(self, order: Any) -> list[list[int]]:
        """Row indices by packed row: each row, the longest first, goes where it leaves the least room. How many packed
        rows there are depends on the lengths alone, so that it is the same in every epoch."""
        assert self.pack is not None
        groups: list[list[int]] = []
        room: list[tuple[int, int]] = []  # (tokens left, packed row), sorted
        for at in sorted(order.tolist(), key=lambda at: -len(self.rows[at])):
            needed = len(self.rows[at])
            found = bisect_left(room, (needed, -1))
            if found < len(room):
                left, group = room.pop(found)
            else:
                left, group = self.pack, len(groups)
                groups.append([])
            groups[group].append(at)
            insort(room, (left - needed, group))
        return groups

    def _batch(self, groups: Sequence[Sequence[int]]) -> Batch:
        """Tensors of shape (rows, length)."""
        length = max(sum(len(self.rows[at]) for at in group) for group in groups)
        ids = torch.full((len(groups), length), self.pad)
        labels = torch.full_like(ids, IGNORED)
        there = torch.zeros_like(ids)
        positions = torch.zeros_like(ids)
        for row, group in enumerate(groups):
            end = 0
            for at in group:
                tokens = self.rows[at]
                begin, end = end, end + len(tokens)
                ids[row, begin:end] = torch.from_numpy(tokens.ids).long()
                learnt = torch.from_numpy(tokens.learnt)
                labels[row, begin:end] = torch.where(learnt, ids[row, begin:end], IGNORED)
                there[row, begin:end] = 1
                positions[row, begin:end] = torch.arange(len(tokens))
            positions[row, end:] = torch.arange(length - end)  # padding is a row of its own, which no other attends to
        if self.pack:  # with an attention mask transformers would not read the rows off the positions
            return {"input_ids": ids, "position_ids": positions, "labels": labels}
        return {"input_ids": ids, "attention_mask": there, "labels": labels}


@torch.no_grad()
def sees_other_rows(model: nn.Module, vocabulary: int) -> float:
    """How much the outputs for a row change when another row is packed before it: the largest change of a logit over
    the largest logit. Rounding alone makes about 1e-6 in float32 and 1e-2 in bfloat16; a leak makes about 1."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(vocabulary, (1, length), generator=generator) for length in (7, 12)]
    was_training = model.training
    model.eval()
    try:
        positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
        packed = model(input_ids=torch.cat(rows, 1).to(device), position_ids=positions.to(device), use_cache=False)
        alone = model(input_ids=rows[1].to(device), use_cache=False).logits
    finally:
        model.train(was_training)
    return float((packed.logits[:, rows[0].shape[1] :] - alone).abs().max() / alone.abs().max())
