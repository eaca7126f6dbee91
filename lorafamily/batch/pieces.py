"""Cutting rows from a batch, and joining batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from lorafamily.batch.axes import ENTRIES, batch_axes
from lorafamily.batch.containers import fingerprint, is_array, items_of, rebuilt
from lorafamily.batch.loss import rows_weight
from lorafamily.errors import DataError


def cut_rows(batch: Any, begin: int, end: int, places: Any = None) -> Any:
    """Rows `begin` to `end` - 1 of a batch, in the batch's type; what has no batch axis stays. `places`: the tree that
    `batch_axes` returned, if the caller has it."""
    return cut(batch, batch_axes(batch)[1] if places is None else places, begin, end)


def first_rows(batch: Any, rows: int) -> Any:
    """The first rows of a batch, in the batch's type; what has no batch axis stays."""
    return cut_rows(batch, 0, rows)


def gather_rows(
    batches: Iterable[Any], count: int, weigh: Callable[[Any], float] = rows_weight
) -> list[tuple[Any, float]]:
    """The first `count` rows of some batches, fewer where there are no more; mostly as one piece.

    Batches that agree in everything but their rows are joined along the batch axis; others, such as texts padded to
    different lengths, stay separate pieces. `weigh` gives what the loss of a batch is a mean over (see `weigher`).

    Returns:
        Pieces and their shares, which add up to 1. The loss over all rows is the sum of share · loss over the pieces.

    Raises:
        DataError: there is no batch, or none of the rows has a label that counts.
    """
    groups: dict[Any, list[tuple[Any, Any]]] = {}
    left = count
    for batch in batches:
        rows, places = batch_axes(batch)
        piece = cut(batch, places, 0, left) if rows > left else batch
        groups.setdefault(_key_for_joining(piece, places), []).append((piece, places))
        left -= max(1, rows)
        if left <= 0:
            break
    pieces = [_joined([piece for piece, _ in group], group[0][1]) for group in groups.values()]
    if not pieces:
        raise DataError("validation gave no batch: it is empty, or an iterator that is used up; pass a list of batches")
    weights = [weigh(piece) for piece in pieces]
    if not sum(weights):
        raise DataError(f"no label counts in the {count - max(0, left)} rows that were taken: all of them are masked")
    return [(piece, weight / sum(weights)) for piece, weight in zip(pieces, weights, strict=True) if weight]


def cut(node: Any, places: Any, begin: int, end: int) -> Any:
    """Rows `begin` to `end` - 1 of a batch or of a part of it; `places`: its tree from `batch_axes`."""
    if places is None:
        return node
    if isinstance(node, PackedSequence):
        return pack_sequence(unpack_sequence(node)[begin:end], enforce_sorted=node.sorted_indices is None)
    if places == ENTRIES:
        return rebuilt(node, list(node[begin:end]))
    if isinstance(places, int):
        return node[(slice(None),) * places + (slice(begin, end),)]
    values = [cut(value, of, begin, end) for (_, value), of in zip(items_of(node) or (), places, strict=True)]
    return _with_encodings(rebuilt(node, values), [node], slice(begin, end))


def _with_encodings(made: Any, of: list[Any], rows: slice = slice(None)) -> Any:
    """The batch `made` from others, with the rows of what their tokeniser knows besides tensors (words, offsets)."""
    lists: list[Any] = [getattr(node, "_encodings", None) for node in of]
    if isinstance(made, MutableMapping) and all(isinstance(encodings, list) for encodings in lists):
        made._encodings = [encoding for encodings in lists for encoding in encodings][rows]  # type: ignore[attr-defined]
    return made


def _key_for_joining(node: Any, places: Any) -> Any:
    """A key that is equal for batches that can be joined: all that must agree, which is everything but the rows."""
    if places is None:
        return fingerprint(node) if is_array(node) or isinstance(node, (str, bytes, int, float)) else id(node)
    if isinstance(node, PackedSequence):
        return PackedSequence, node.data.dtype, node.data.shape[1:], node.sorted_indices is None
    if places == ENTRIES:
        return type(node)
    if isinstance(places, int):
        return type(node), str(node.dtype), places, tuple(node.shape[:places]), tuple(node.shape[places + 1 :])
    parts = zip(items_of(node) or (), places, strict=True)
    return type(node), tuple((name, _key_for_joining(value, of)) for (name, value), of in parts)


def _joined(nodes: list[Any], places: Any) -> Any:
    """One batch from several that agree in everything but their rows."""
    if places is None or len(nodes) == 1:
        return nodes[0]
    if isinstance(nodes[0], PackedSequence):
        sequences = [sequence for node in nodes for sequence in unpack_sequence(node)]
        return pack_sequence(sequences, enforce_sorted=False)  # sorted ones need not be sorted together
    if places == ENTRIES:
        return rebuilt(nodes[0], [value for node in nodes for value in node])
    if isinstance(places, int):
        return torch.cat(nodes, places) if isinstance(nodes[0], Tensor) else np.concatenate(nodes, places)
    columns = zip(*([value for _, value in items_of(node) or ()] for node in nodes), strict=True)
    values = [_joined(list(column), of) for column, of in zip(columns, places, strict=True)]
    return _with_encodings(rebuilt(nodes[0], values), nodes)
