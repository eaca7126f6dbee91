"""A batch: its rows, to the device, into the model, its loss and what that is a mean over."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from lorafamily.errors import DataError

LossFn = Callable[[nn.Module, Any], Tensor]
LossOver = Literal["auto", "tokens", "rows"] | Callable[[Any], float]
ENTRIES = "entries"  # the place of the rows in a list, or in packed sequences: one entry each
IGNORED = -100  # the label that torch's and transformers' cross entropy leave out


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch, of the same type, with every tensor in it on the device; objects that have a `to` are asked for it.

    Copies overlap with computation where memory is pinned.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    parts = _parts(batch)
    if parts is not None:
        return _rebuilt(batch, [to_device(value, device) for _, value in parts])
    move = getattr(batch, "to", None)
    return move(device) if callable(move) and not isinstance(batch, type) else batch


# Rows


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


def cut_rows(batch: Any, begin: int, end: int, places: Any = None) -> Any:
    """Rows `begin` to `end` - 1 of a batch, in the batch's type; what has no batch axis stays.

    Args:
        places: where they are, if somebody has asked `batch_axes` already.
    """
    return _cut(batch, batch_axes(batch)[1] if places is None else places, begin, end)


def first_rows(batch: Any, rows: int) -> Any:
    """The first rows of a batch, in the batch's type; what has no batch axis stays."""
    return cut_rows(batch, 0, rows)


def gather_rows(
    batches: Iterable[Any], count: int, weigh: Callable[[Any], float] | None = None
) -> list[tuple[Any, float]]:
    """`count` rows from as many batches as that takes; fewer where there are no more.

    Batches that agree in everything but their rows are joined along the batch axis; others, such as texts padded to
    different lengths, stay apart. The loss over all rows is then the sum of share · loss over the pieces.

    Args:
        weigh: what the loss of a batch is a mean over (see `weigher`); None: its rows.

    Returns:
        Pieces and their shares, which add up to 1. Mostly one.

    Raises:
        DataError: no batch, or none of the rows has a label that counts.
    """
    weigh = weigh or (lambda batch: max(1, rows_in(batch)))
    alike: dict[Any, list[tuple[Any, Any]]] = {}
    left = count
    for batch in batches:
        rows, places = batch_axes(batch)
        piece = _cut(batch, places, 0, left) if rows > left else batch
        alike.setdefault(_kind(piece, places), []).append((piece, places))
        left -= max(1, rows)
        if left <= 0:
            break
    pieces = [_joined([piece for piece, _ in group], group[0][1]) for group in alike.values()]
    if not pieces:
        raise DataError("validation gave no batch; it is empty, or an iterator that is used up")
    weights = [weigh(piece) for piece in pieces]
    if not sum(weights):
        raise DataError(f"no label counts in the {count - max(0, left)} rows that were taken: all of them are masked")
    return [(piece, weight / sum(weights)) for piece, weight in zip(pieces, weights, strict=True) if weight]


def fingerprint(batch: Any) -> str:
    """A digest of the tensors, arrays, texts and numbers in a batch; of other objects only their type counts."""
    digest = hashlib.sha256()

    def look(node: Any) -> None:
        parts = list(enumerate(node)) if isinstance(node, PackedSequence) else _parts(node)
        digest.update(f"{type(node).__name__}{len(parts or ())};".encode())
        for key, value in parts or ():
            digest.update(f"{key};".encode())
            look(value)
        if isinstance(node, Tensor) and not node.is_meta:
            digest.update(f"{node.dtype}{tuple(node.shape)}".encode())
            digest.update(node.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(node, np.ndarray) and not node.dtype.hasobject:
            digest.update(f"{node.dtype}{node.shape}".encode() + np.ascontiguousarray(node).tobytes())
        elif isinstance(node, (str, bytes, int, float, complex)):
            digest.update(repr(node).encode())

    look(batch)
    return digest.hexdigest()


def refuse_one_batch(data: Any, name: str = "data") -> None:
    """Batches belong there, and not one batch: running over it would give its keys, its texts or its rows.

    Raises:
        DataError: it is a mapping, a tensor, a text, a named tuple, or a tuple of tensors.
    """
    kind = f"a {type(data).__name__}"
    if isinstance(data, Mapping):
        what = f"{kind} with the keys {', '.join(map(str, data))}"
    elif _is_array(data):
        what = f"{kind} of shape {tuple(data.shape)}"
    elif isinstance(data, tuple) and hasattr(data, "_fields"):
        what = f"{kind} with {', '.join(data._fields)}"
    elif isinstance(data, tuple) and data and all(_is_array(part) for part in data):
        what = f"{kind} of {len(data)} tensors"
    elif isinstance(data, (str, bytes)) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        what = kind
    else:
        return
    raise DataError(f"{name} is {what}, and must be batches: a DataLoader, or a list, [batch] where there is one")


def _is_array(node: Any) -> bool:
    return isinstance(node, (Tensor, np.ndarray))


def _parts(node: Any) -> list[tuple[Any, Any]] | None:
    """Keys and values of what holds other things; None of a tensor, a text, an object only its makers know."""
    if isinstance(node, (PackedSequence, torch.Size)):
        return None
    if isinstance(node, Mapping):
        return list(node.items())
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return list(zip(node._fields, node, strict=True))
    if isinstance(node, (list, tuple)):
        return list(enumerate(node))
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return [(f.name, getattr(node, f.name)) for f in dataclasses.fields(node) if hasattr(node, f.name)]
    return None


def _rebuilt(node: Any, values: list[Any]) -> Any:
    """A container like this one, with other values."""
    if type(node) in (list, tuple):
        return type(node)(values)
    if isinstance(node, tuple):
        return node._make(values) if hasattr(node, "_make") else type(node)(values)
    if isinstance(node, list):
        copied: Any = copy.copy(node)  # what else it carries stays
        copied[:] = values
    elif isinstance(node, MutableMapping):
        copied = copy.copy(node)
        for key, value in zip(node, values, strict=True):
            copied[key] = value
    elif isinstance(node, Mapping):
        copied = type(node)(dict(zip(node, values, strict=True)))  # type: ignore[call-arg]
    else:
        copied = copy.copy(node)
        for (name, _), value in zip(_parts(node) or (), values, strict=True):
            object.__setattr__(copied, name, value)  # frozen ones too; __post_init__ has run
    return copied


def _is_sequence(node: Any) -> bool:
    """A list or tuple, whose length may count rows; the fields of a named tuple do not."""
    return isinstance(node, (list, tuple)) and not hasattr(node, "_fields") and not isinstance(node, torch.Size)


def _is_setting(node: Any) -> bool:
    """(224, 224) beside images: numbers in a tuple are no rows; collating makes tensors of those."""
    return isinstance(node, tuple) and all(isinstance(value, (int, float)) for value in node)


def _has_no_axis(value: Any) -> bool:
    return not value.ndim if _is_array(value) else isinstance(value, (str, bytes, int, float))


def _is_uncollated(node: Any) -> bool:
    """A list of rows as the data set gives them: all of one type, with something in each that has no axis."""
    parts = [dict(_parts(value) or ()) for value in node]
    if not parts or len({type(value) for value in node}) > 1 or len({tuple(part) for part in parts}) > 1:
        return False
    return any(all(_has_no_axis(part[key]) for part in parts) for key in parts[0])


def _counts_itself(node: Any) -> bool:
    """Whether a list that is the batch has its rows as entries."""
    return _is_uncollated(node) or not any(_votes(value) for value in node)


def _votes(node: Any, key: Any = None, top: bool = False) -> Counter[int]:
    """What speaks for which number of rows."""
    if isinstance(node, PackedSequence):
        return Counter({int(node.batch_sizes[0]): 10})
    if _is_array(node):
        if key == "position_ids" and node.ndim > 1:
            return Counter({node.shape[-2]: 10})
        found = Counter({node.shape[1]: 5}) if node.ndim > 1 else Counter[int]()
        if node.ndim:
            found[node.shape[0]] = 10
        return Counter({size: votes for size, votes in found.items() if size})
    inside = Counter[int]()
    parts = _parts(node) or []
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
    if _is_array(node):
        if node.ndim:
            yield tuple(node.shape)
    else:
        for _, value in _parts(node) or ():
            yield from _shapes(value)


def _places(node: Any, rows: int, second: bool, key: Any = None, top: bool = False) -> Any:
    """The tree that `batch_axes` returns."""
    if isinstance(node, PackedSequence):
        return ENTRIES if int(node.batch_sizes[0]) == rows else None
    if _is_array(node):
        return _axis(tuple(node.shape), rows, second, key)
    parts = _parts(node)
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


def _cut(node: Any, places: Any, begin: int, end: int) -> Any:
    if places is None:
        return node
    if isinstance(node, PackedSequence):
        return _packed(unpack_sequence(node)[begin:end], node)
    if places == ENTRIES:
        return _rebuilt(node, list(node[begin:end]))
    if isinstance(places, int):
        return node[(slice(None),) * places + (slice(begin, end),)]
    values = [_cut(value, of, begin, end) for (_, value), of in zip(_parts(node) or (), places, strict=True)]
    return _with_encodings(_rebuilt(node, values), [node], slice(begin, end))


def _packed(sequences: list[Tensor], like: PackedSequence) -> PackedSequence:
    return pack_sequence(sequences, enforce_sorted=like.sorted_indices is None)


def _with_encodings(made: Any, of: list[Any], rows: slice = slice(None)) -> Any:
    """What a tokeniser notes beside its tensors (words, offsets), for these rows."""
    noted: list[Any] = [getattr(node, "_encodings", None) for node in of]
    if isinstance(made, MutableMapping) and all(isinstance(encodings, list) for encodings in noted):
        made._encodings = [encoding for encodings in noted for encoding in encodings][rows]  # type: ignore[attr-defined]
    return made


def _kind(node: Any, places: Any) -> Any:
    """What must be the same of two batches that are to be one: everything but the rows."""
    if places is None:
        return fingerprint(node) if _is_array(node) or isinstance(node, (str, bytes, int, float)) else id(node)
    if isinstance(node, PackedSequence):
        return PackedSequence, node.data.dtype, node.data.shape[1:], node.sorted_indices is None
    if places == ENTRIES:
        return type(node)
    if isinstance(places, int):
        return type(node), str(node.dtype), places, tuple(node.shape[:places]), tuple(node.shape[places + 1 :])
    parts = _parts(node) or []
    return type(node), tuple((name, _kind(value, of)) for (name, value), of in zip(parts, places, strict=True))


def _joined(nodes: list[Any], places: Any) -> Any:
    """One batch of several that are of one kind."""
    if places is None or len(nodes) == 1:
        return nodes[0]
    if isinstance(nodes[0], PackedSequence):
        sequences = [sequence for node in nodes for sequence in unpack_sequence(node)]
        # Sorted ones need not be so together.
        return pack_sequence(sequences, enforce_sorted=False)
    if places == ENTRIES:
        return _rebuilt(nodes[0], [value for node in nodes for value in node])
    if isinstance(places, int):
        return torch.cat(nodes, places) if isinstance(nodes[0], Tensor) else np.concatenate(nodes, places)
    columns = zip(*([value for _, value in _parts(node) or ()] for node in nodes), strict=True)
    values = [_joined(list(column), of) for column, of in zip(columns, places, strict=True)]
    return _with_encodings(_rebuilt(nodes[0], values), nodes)


# Losses


def loss_of(model: nn.Module, batch: Any, loss_fn: LossFn | None = None) -> Tensor:
    """The task loss of one batch: `loss_fn(model, batch)`, or the `.loss` of what the model returns for it.

    Raises:
        DataError: the model returned no loss.
    """
    if loss_fn is not None:
        return loss_fn(model, batch)
    output = call(model, batch)
    loss = getattr(output, "loss", None)
    if loss is None:
        given = f"a {type(batch).__name__}"
        if isinstance(batch, Mapping):
            given = f"the keys {', '.join(batch)}"
        elif isinstance(batch, (list, tuple)):
            given = f"{len(batch)} tensors"
        raise DataError(
            f"{type(model).__name__} returned a {type(output).__name__} without a loss for a batch of {given}; "
            "put the labels the model knows into the batch, or pass loss_fn=lambda model, batch: ..."
        )
    return loss


def call(model: nn.Module, batch: Any) -> Any:
    """What the model returns for a batch: a mapping goes to it as keywords, a tuple or list as positions."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (list, tuple)) and not isinstance(batch, PackedSequence):
        return model(*batch)
    return model(batch)


def loss_weight(batch: Any, model: nn.Module | None = None) -> float:
    """What the loss of a batch is a mean over: the labels that count, or else the rows.

    Labels are whole numbers under `labels`; those that are -100 do not count, nor does the first of every row where
    the model predicts the next token (a decoder-only language model of transformers; of an encoder and decoder, and
    for classes and masked tokens, all do). Without such labels, and for CTC, the rows are counted; 1 where there are
    none. Two losses weighed by this are the loss of the two batches as one.
    """
    tokens = _label_tokens(batch, model)
    return float(max(1, rows_in(batch)) if tokens is None else tokens)


def weigher(over: LossOver, model: nn.Module, loss_fn: LossFn | None = None) -> Callable[[Any], float]:
    """The function from a batch to what its loss is a mean over.

    Args:
        over: "auto": `loss_weight`, or with a `loss_fn` of one's own the rows; "tokens": labels that count; "rows"; or
            a function of the batch.

    Raises:
        DataError: `over` is something else. The function raises it where a batch has no labels for "tokens", or where
            a function of one's own returns what is no weight.
    """
    if over == "auto":
        return rows_weight if loss_fn is not None else lambda batch: loss_weight(batch, model)
    if over == "rows":
        return rows_weight
    if over == "tokens":
        return lambda batch: _tokens_asked_for(batch, model)
    if callable(over):
        return lambda batch: _checked(over(batch))
    raise DataError(f'loss_over={over!r}: must be "auto", "tokens", "rows" or a function from a batch to a number')


def rows_weight(batch: Any) -> float:
    """The rows of a batch, 1 where nothing in it counts rows."""
    return float(max(1, rows_in(batch)))


def _tokens_asked_for(batch: Any, model: nn.Module) -> float:
    tokens = _label_tokens(batch, model)
    if tokens is None:
        raise DataError(
            'loss_over="tokens" counts whole numbers under "labels", and a batch has none; pass "rows", or a function '
            "from a batch to the number its loss is a mean over"
        )
    return float(tokens)


def _checked(weight: Any) -> float:
    value = float(weight)
    if not math.isfinite(value) or value < 0:
        raise DataError(f"loss_over gave {value:g} for a batch: it must be a number from 0 on")
    return value


def _label_tokens(batch: Any, model: nn.Module | None) -> int | None:
    """Labels that count; None where there are none, or the loss is no mean over them."""
    given = dict(_parts(batch) or ())
    labels, shifted = given.get("labels"), given.get("shift_labels")
    head = _head(model)
    if isinstance(shifted, Tensor):
        labels = shifted
    if not isinstance(labels, Tensor) or not labels.ndim or labels.is_floating_point() or labels.dtype == torch.bool:
        return None
    if getattr(head, "loss_type", None) == "ForCTC":  # a mean over rows
        return None
    if labels.ndim > 1 and shifted is None and _predicts_next(head):
        labels = labels[..., 1:]
    ignored = IGNORED
    if getattr(head, "loss_type", None) == "ForSemanticSegmentation":
        ignored = getattr(head.config, "semantic_loss_ignore_index", IGNORED)
    return int((labels != ignored).sum())


def _head(model: nn.Module | None) -> Any:
    """The outermost model of transformers in it: its class knows what its loss is."""
    inside = () if model is None else model.modules()
    return next((m for m in inside if hasattr(getattr(m, "config", None), "is_encoder_decoder")), None)


def _predicts_next(head: Any) -> bool:
    """Whether a model of transformers compares logits with the labels one position on.

    Decoders cut out of an encoder and decoder (BartForCausalLM) and XLNet compute their cross entropy themselves, on
    labels as they are.
    """
    if head is None or head.config.is_encoder_decoder:
        return False
    name = type(head).__name__
    by_name = name.endswith(("LMHeadModel", "DoubleHeadsModel")) and "WithLMHead" not in name
    by_loss = getattr(head, "loss_type", None) in ("ForCausalLM", "ForConditionalGeneration")
    if not by_loss and not by_name and "ForCausalLM" not in name:
        return False
    try:
        source = inspect.getsource(type(head).forward)
    except (OSError, TypeError):
        return True
    return "CrossEntropyLoss" not in source or re.search(r"shift\w*_(logits|labels|pred)|:-1[,\]]", source) is not None
