"""The rows of a batch: which axes of its tensors count them, cutting some out, and joining batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from lorafamily.batch.containers import fingerprint, is_array, items_of, rebuilt
from lorafamily.errors import DataError

ENTRIES = "entries"  # in place of an axis: each entry of a list, or of packed sequences, is one row


def batch_axes(batch: Any) -> tuple[int, Any]:
    """The number of rows in a batch, 0 where nothing votes, and a tree in its shape of the axes that they lie on.

    Nothing in a batch says which axis counts its rows, so its tensors and lists vote: a tensor for the size of its
    first axis and, with half the weight, of its second; a list or tuple inside the batch for its length and, with less
    weight, for what its entries agree on. Where the batch itself is a list, its entries are the model's positional
    arguments, so only they vote; unless they are texts, or rows that were not collated ([(image, 3), (image, 5)]).
    `position_ids` are (..., rows, length), known by their name. A tie goes to the first axis.

    In the tree a tensor or array has its batch axis, or None (scalars, class weights, an image in a list of images),
    and is then never cut; a list or packed sequences have ENTRIES, or a list of their parts' trees.
    """
    votes, shapes = _votes(batch, top=True), _shapes(batch)
    if not votes:
        return 0, _places(batch, 0, False, top=True)
    first = Counter(shape[0] for shape in shapes)
    either = Counter(size for shape in shapes for size in set(shape[:2]))
    # Of two sizes with as many votes, the one that first axes agree on, then the one that occurs in more tensors.
    rows = max(votes, key=lambda size: (votes[size], first[size] if first[size] > 1 else 0, either[size]))
    deep = [shape[:2] for shape in shapes if len(shape) > 1 and (shape[0] == rows) != (shape[1] == rows)]
    second = bool(deep) and all(shape[1] == rows for shape in deep)  # (length, rows) throughout
    return rows, _places(batch, rows, second, top=True)


def rows_in(batch: Any) -> int:
    """The number of rows in a batch; see `batch_axes`."""
    return batch_axes(batch)[0]


def rows_weight(batch: Any) -> float:
    """The number of rows in a batch, 1 where nothing in it counts rows."""
    return float(max(1, rows_in(batch)))


def _is_sequence(node: Any) -> bool:
    """A list or tuple, whose length may count rows; the fields of a named tuple do not."""
    return isinstance(node, (list, tuple)) and not hasattr(node, "_fields") and not isinstance(node, torch.Size)


def _is_setting(node: Any) -> bool:
    """A setting such as (224, 224) next to images: numbers in a tuple are no rows; collating makes tensors of rows."""
    return isinstance(node, tuple) and all(isinstance(value, (int, float)) for value in node)


def _has_no_axis(value: Any) -> bool:
    return not value.ndim if is_array(value) else isinstance(value, (str, bytes, int, float))


def _is_uncollated(node: Any) -> bool:
    """A list of rows as a data set gives them: all of one type, and in each of them something without an axis."""
    parts = [dict(items_of(value) or ()) for value in node]
    if not parts or len({type(value) for value in node}) > 1 or len({tuple(part) for part in parts}) > 1:
        return False
    return any(all(_has_no_axis(part[key]) for part in parts) for key in parts[0])


def _counts_itself(node: Any) -> bool:
    """Whether the entries of a list that is the batch are its rows."""
    return _is_uncollated(node) or not any(_votes(value) for value in node)


def _votes(node: Any, key: Any = None, top: bool = False) -> Counter[int]:
    """The votes for each number of rows."""
    if isinstance(node, PackedSequence):
        return Counter({int(node.batch_sizes[0]): 10})
    if is_array(node):
        if key == "position_ids" and node.ndim > 1:
            return Counter({node.shape[-2]: 10})
        return Counter({size: 5 for size in node.shape[1:2] if size} | {size: 10 for size in node.shape[:1] if size})
    inside = Counter[int]()
    parts = items_of(node) or []
    for name, value in parts:
        inside.update(_votes(value, name))
    if not parts or not _is_sequence(node) or (top and not _counts_itself(node)):
        return inside
    if _is_setting(node):
        return Counter()
    # All entries together weigh less than one tensor; otherwise the height of a few images would outvote all else.
    agreed = Counter({size: min(8, 8 * votes // (10 * len(parts))) for size, votes in inside.items()})
    agreed[len(parts)] = 4 if all(isinstance(value, (int, float)) for _, value in parts) else 9
    return agreed


def _shapes(node: Any) -> list[tuple[int, ...]]:
    """The shapes of all tensors and arrays with at least one axis."""
    if is_array(node):
        return [tuple(node.shape)] if node.ndim else []
    return [shape for _, value in items_of(node) or () for shape in _shapes(value)]


def _places(node: Any, rows: int, second: bool, key: Any = None, top: bool = False) -> Any:
    """The tree that `batch_axes` returns; `second`: whether the second axis counts rows throughout."""
    if isinstance(node, PackedSequence):
        return ENTRIES if int(node.batch_sizes[0]) == rows else None
    if is_array(node):
        shape = tuple(node.shape)
        if key == "position_ids" and len(shape) > 1:  # (rows, length), or (3, rows, length) of texts with images
            return len(shape) - 2 if shape[-2] == rows else None
        if second and len(shape) > 1 and shape[1] == rows:
            return 1
        if shape and shape[0] == rows:
            return 0
        # States of recurrent layers are (layers, rows, width). Pairs such as (images, 3) and images (n, 3, h, w) must
        # not match: a batch of three rows would cut their coordinates or colours.
        return 1 if len(shape) == 3 and shape[1] == rows else None
    parts = items_of(node)
    if parts is None:
        return None
    if _is_sequence(node) and len(parts) == rows and not _is_setting(node) and (not top or _counts_itself(node)):
        return ENTRIES
    return [_places(value, rows, second, name) for name, value in parts]


def cut_rows(batch: Any, begin: int, end: int, places: Any = None) -> Any:
    """Rows `begin` to `end` - 1 of a batch, in the batch's type; what has no batch axis stays. `places`: the tree that
    `batch_axes` returned, if the caller has it."""
    return _cut(batch, batch_axes(batch)[1] if places is None else places, begin, end)


class SumOverRows:
    """Weighs batches, by rows, of which the loss is a sum over rows: that of several is the sum of theirs."""

    def __call__(self, batch: Any) -> float:
        return rows_weight(batch)


def share(weigh: Callable[[Any], float], weight: float, total: float) -> float:
    """The share of a batch's loss in the loss of one large batch; `weight` is the batch's, `total` of all of them."""
    return float(weight > 0) if isinstance(weigh, SumOverRows) else weight / total


def first_rows(batch: Any, rows: int) -> Any:
    """The first rows of a batch, in the batch's type; what has no batch axis stays."""
    return cut_rows(batch, 0, rows)


def gather_rows(
    batches: Iterable[Any], count: int, weigh: Callable[[Any], float] = rows_weight
) -> list[tuple[Any, float]]:
    """The first `count` rows of some batches, fewer where there are no more, in pieces: the loss over all rows is the
    sum of share · loss over the pieces.

    Batches that agree in everything but their rows are joined along the batch axis; others, such as texts padded to
    different lengths, stay separate pieces. `weigh` gives what the loss of a batch is a mean over (see `weigher`).

    Raises:
        DataError: there is no batch, or none of the rows has a label that counts.
    """
    groups: dict[Any, list[tuple[Any, Any]]] = {}
    left = count
    for batch in batches:
        rows, places = batch_axes(batch)
        piece = _cut(batch, places, 0, left) if rows > left else batch
        groups.setdefault(_key_for_joining(piece, places), []).append((piece, places))
        left -= max(1, rows)
        if left <= 0:
            break
    pieces = [_joined([piece for piece, _ in group], group[0][1]) for group in groups.values()]
    if not pieces:
        raise DataError("validation gave no batch: it is empty, or an iterator that is used up; pass a list of batches")
    weights = [weigh(piece) for piece in pieces]
    total = sum(weights)
    if not total:
        raise DataError(f"no label counts in the {count - max(0, left)} rows that were taken: all of them are masked")
    return [(piece, share(weigh, weight, total)) for piece, weight in zip(pieces, weights, strict=True) if weight]


def _cut(node: Any, places: Any, begin: int, end: int) -> Any:
    """Rows `begin` to `end` - 1 of a batch or of a part of it; `places`: its tree from `batch_axes`."""
    if places is None:
        return node
    if isinstance(node, PackedSequence):
        return pack_sequence(unpack_sequence(node)[begin:end], enforce_sorted=node.sorted_indices is None)
    if places == ENTRIES:
        return rebuilt(node, list(node[begin:end]))
    if isinstance(places, int):
        return node[(slice(None),) * places + (slice(begin, end),)]
    values = [_cut(value, of, begin, end) for (_, value), of in zip(items_of(node) or (), places, strict=True)]
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
