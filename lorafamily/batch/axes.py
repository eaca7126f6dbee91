"""Which axes of the tensors in a batch count its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from lorafamily.batch.containers import is_array, items_of

ENTRIES = "entries"  # in place of an axis: each entry of a list, or of packed sequences, is one row


def batch_axes(batch: Any) -> tuple[int, Any]:
    """The number of rows in a batch, and which axes of its tensors they lie on.

    Nothing in a batch says which axis counts its rows, so its tensors and lists vote: a tensor for the size of its
    first axis and, with half the weight, of its second; a list or tuple inside the batch for its length and, with less
    weight, for what its entries agree on. Where the batch itself is a list, its entries are the model's positional
    arguments, so only they vote; unless they are texts, or rows that were not collated ([(image, 3), (image, 5)]).
    `position_ids` are (..., rows, length), known by their name. A tie goes to the first axis.

    Returns:
        The number of rows, 0 where nothing votes, and a tree in the batch's shape. A tensor or array has its batch axis
        there, or None (scalars, class weights, an image in a list of images), and is then never cut; a list or packed
        sequences have ENTRIES, or a list of their parts' trees.
    """
    votes, shapes = _votes(batch, top=True), list(_shapes(batch))
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
        found = Counter({node.shape[1]: 5}) if node.ndim > 1 else Counter[int]()
        if node.ndim:
            found[node.shape[0]] = 10
        return Counter({size: votes for size, votes in found.items() if size})
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


def _shapes(node: Any) -> Iterable[tuple[int, ...]]:
    """The shapes of all tensors and arrays with at least one axis."""
    if is_array(node):
        if node.ndim:
            yield tuple(node.shape)
    else:
        for _, value in items_of(node) or ():
            yield from _shapes(value)


def _places(node: Any, rows: int, second: bool, key: Any = None, top: bool = False) -> Any:
    """The tree that `batch_axes` returns; `second`: whether the second axis counts rows throughout."""
    if isinstance(node, PackedSequence):
        return ENTRIES if int(node.batch_sizes[0]) == rows else None
    if is_array(node):
        return _axis(tuple(node.shape), rows, second, key)
    parts = items_of(node)
    if parts is None:
        return None
    if _is_sequence(node) and len(parts) == rows and not _is_setting(node) and (not top or _counts_itself(node)):
        return ENTRIES
    return [_places(value, rows, second, name) for name, value in parts]


def _axis(shape: tuple[int, ...], rows: int, second: bool, key: Any) -> int | None:
    if key == "position_ids" and len(shape) > 1:  # (rows, length), or (3, rows, length) of texts with images
        return len(shape) - 2 if shape[-2] == rows else None
    if second and len(shape) > 1 and shape[1] == rows:
        return 1
    if shape and shape[0] == rows:
        return 0
    # States of recurrent layers are (layers, rows, width). Pairs such as (images, 3) and images (n, 3, h, w) must not
    # match: a batch of three rows would cut their coordinates or colours.
    return 1 if len(shape) == 3 and shape[1] == rows else None
