"""Rows as batches, shuffled every epoch: either rows of similar length, padded to the longest, or packed rows.

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
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lorafamily.batch import IGNORED
from lorafamily.chat.tokens import Tokens
from lorafamily.errors import DataError
from lorafamily.training.execution import evaluating

WINDOW = 50  # batches whose rows are sorted by length together: enough to need little padding, few enough to stay mixed


@dataclass
class Count:
    """What the batches contained so far. `places`: tokens and padding."""

    tokens: int = 0
    places: int = 0

    @property
    def padding(self) -> float:
        """Share of places that hold no token."""
        return 1 - self.tokens / self.places if self.places else 0.0


@dataclass
class ChatBatches:
    """Batches for `lorafamily.train`, the same for the same seed and epoch, so that a run can resume inside an epoch.

    Args:
        size: rows per batch, or packed rows per batch.
        pad: id of the token to pad with.
        pack: length of packed rows in tokens; None: rows are padded instead.
        shuffle: a new order every epoch; otherwise the order of `rows`.
        rank, num_replicas: this process and the number of processes; each draws other batches. The names are those of
            torch's DistributedSampler, from which `train` sees that the data is divided.

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
        """Called by `train` before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        rows = len(self._packed(range(len(self.rows)))) if self.pack else len(self.rows)
        return -(-rows // self.size) // self.num_replicas

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        batches = self._order()
        whole = len(batches) - len(batches) % self.num_replicas
        for groups in batches[self.rank : whole : self.num_replicas]:
            batch = self._batch(groups)
            self.count.tokens += sum(len(self.rows[at]) for group in groups for at in group)
            self.count.places += batch["input_ids"].numel()
            yield batch

    def _order(self) -> list[list[list[int]]]:
        """The epoch's batches: lists of groups of row indices. A group is a packed row, or without packing one row."""
        generator = np.random.default_rng([self.seed, self.epoch])

        def shuffled(items: list[Any]) -> list[Any]:
            return [items[at] for at in generator.permutation(len(items))] if self.shuffle else items

        order = shuffled(list(range(len(self.rows))))
        if self.pack:
            groups = shuffled(self._packed(order))
        else:
            window = WINDOW * self.size if self.shuffle else 1
            parts = [order[at : at + window] for at in range(0, len(order), window)]
            groups = [[at] for part in parts for at in sorted(part, key=lambda at: len(self.rows[at]))]
        return shuffled([groups[at : at + self.size] for at in range(0, len(groups), self.size)])

    def _packed(self, order: Sequence[int]) -> list[list[int]]:
        """Row indices by packed row: each row, the longest first, goes where it leaves the least room. The number of
        packed rows depends on the lengths alone, so it is the same in every epoch."""
        assert self.pack is not None
        groups: list[list[int]] = []
        room: list[tuple[int, int]] = []  # (tokens left, packed row), sorted
        for at in sorted(order, key=lambda at: -len(self.rows[at])):
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

    def _batch(self, groups: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Tensors of shape (rows, length)."""
        packed = [[self.rows[at] for at in group] for group in groups]
        lengths = [[len(row) for row in rows] for rows in packed]

        def padded(groups: list[list[NDArray[Any]]], fill: int) -> Tensor:
            joined = [torch.from_numpy(np.concatenate(arrays)) for arrays in groups]
            return pad_sequence(joined, batch_first=True, padding_value=fill)

        ids = padded([[row.ids for row in rows] for rows in packed], self.pad).long()
        learnt = padded([[row.learnt for row in rows] for rows in packed], False)
        labels = torch.where(learnt, ids, IGNORED)
        if self.pack:  # given an attention mask, transformers would not derive the rows from the positions
            # Padding gets positions like a row of its own, so that no other row attends to it.
            positions = [torch.arange(n) for row in lengths for n in (*row, ids.shape[1] - sum(row))]
            return {"input_ids": ids, "position_ids": torch.cat(positions).view_as(ids), "labels": labels}
        mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)  # one length a row
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


@torch.no_grad()
def sees_other_rows(model: nn.Module, vocabulary: int) -> float:
    """How much the outputs for a row change when another row is packed before it, in a batch of two that are packed
    differently: the largest change of a logit over the largest logit. Rounding causes about 1e-6 in float32 and 1e-2 in
    bfloat16; attention to the other row about 1.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    short, long = (torch.randint(vocabulary, (1, length), generator=generator) for length in (7, 12))
    packed = [[short, long], [long, short]]  # some kernels tell rows apart in a batch of one only
    ids = torch.cat([torch.cat(pair, 1) for pair in packed]).to(device)
    positions = torch.stack([torch.cat([torch.arange(row.shape[1]) for row in pair]) for pair in packed]).to(device)
    with evaluating(model, device):
        found = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        alone = [model(input_ids=last.to(device), use_cache=False).logits[0] for _, last in packed]
    change = max((row[-len(one) :] - one).abs().max() for row, one in zip(found, alone, strict=True))
    return float(change / max(one.abs().max() for one in alone))
