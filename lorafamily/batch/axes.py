"""Where in a batch its rows are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from lorafamily.batch.containers import is_array, items_of

ENTRIES = "entries"  # the place of the rows in a list, or in packed sequences: one entry each


def batch_axes(batch: Any) -> tuple[int, Any]:
    """How many rows a batch has, and where in it they are.

    Nothing in a batch says which axis counts its rows, so its tensors and lists vote: a tensor for its first axis and,
    with half the weight, for its second; a list or tuple inside the batch for its length and, with less weight, for
    what its entries agree on. A list that is itself the batch goes to the model as positions, so only what is in it
    votes, unless that is texts, or rows that nobody collated ([(image, 3), (image, 5)]). `position_ids` are
    (..., rows, length) by their name. Undecided is left to the first axis.

    Returns:
        The rows, 0 where nothing votes, and a tree in the batch's shape. Of a tensor or array: its axis, or None where
        it has none; of a list or of packed sequences ENTRIES, or a list of the trees of its parts. What has no batch
        axis (scalars, class weights, an image in a list of images) is never cut.
    """
    sizes, agreeing, leaves = Counter[int](), Counter[int](), Counter[int]()
    for size, votes in _votes(batch, top=True).items():
        sizes[size] += votes
    shapes = list(_shapes(batch))
    for shape in shapes:
        agreeing[shape[0]] += 1
        leaves.update(set(shape[:2]))
    if not sizes:
        return 0, _places(batch, 0, False, top=True)
    # Of two sizes with as many votes, the one that first axes agree on, then the one that occurs in more tensors.
    rows = max(sizes, key=lambda size: (sizes[size], agreeing[size] if agreeing[size] > 1 else 0, leaves[size]))
    deep = [shape[:2] for shape in shapes if len(shape) > 1 and (shape[0] == rows) != (shape[1] == rows)]
    second = bool(deep) and all(shape[1] == rows for shape in deep)  # (length, rows) throughout
    return rows, _places(batch, rows, second, top=True)


def rows_in(batch: Any) -> int:
    """The rows of a batch; see `batch_axes`."""
    return batch_axes(batch)[0]


def _is_sequence(node: Any) -> bool:
    """A list or tuple, whose length may count rows; the fields of a named tuple do not."""
    return isinstance(node, (list, tuple)) and not hasattr(node, "_fields") and not isinstance(node, torch.Size)


def _is_setting(node: Any) -> bool:
    """(224, 224) next to images: numbers in a tuple are no rows; collating makes tensors of rows."""
    return isinstance(node, tuple) and all(isinstance(value, (int, float)) for value in node)


def _has_no_axis(value: Any) -> bool:
    return not value.ndim if is_array(value) else isinstance(value, (str, bytes, int, float))


def _is_uncollated(node: Any) -> bool:
    """A list of rows as the data set gives them: all of one type, with something in each that has no axis."""
    parts = [dict(items_of(value) or ()) for value in node]
    if not parts or len({type(value) for value in node}) > 1 or len({tuple(part) for part in parts}) > 1:
        return False
    return any(all(_has_no_axis(part[key]) for part in parts) for key in parts[0])


def _counts_itself(node: Any) -> bool:
    """Whether a list that is the batch has its rows as entries."""
    return _is_uncollated(node) or not any(_votes(value) for value in node)


def _votes(node: Any, key: Any = None, top: bool = False) -> Counter[int]:
    """Votes for each number of rows."""
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
    # However many entries there are, they are one place of the batch: without that, the height of some images
    # outvotes everything else.
    agreed = Counter({size: min(8, 8 * votes // (10 * len(parts))) for size, votes in inside.items()})
    agreed[len(parts)] = 4 if all(isinstance(value, (int, float)) for _, value in parts) else 9
    return agreed


def _shapes(node: Any) -> Iterable[tuple[int, ...]]:
    """Of the tensors and arrays that have an axis."""
    if is_array(node):
        if node.ndim:
            yield tuple(node.shape)
    else:
        for _, value in items_of(node) or ():
            yield from _shapes(value)


def _places(node: Any, rows: int, second: bool, key: Any = None, top: bool = False) -> Any:
    """The tree that `batch_axes` returns."""
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
    # States of recurrent layers, (layers, rows, width). Not of pairs such as (images, 3) or images (n, 3, h, w):
    # three rows would cut their coordinates or colours.
    return 1 if len(shape) == 3 and shape[1] == rows else None
