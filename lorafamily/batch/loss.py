"""Calling a model with a batch, its loss, and what that loss is a mean over."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lorafamily.batch.containers import items_of
from lorafamily.batch.rows import SumOverRows, rows_weight
from lorafamily.errors import DataError

LossFn = Callable[[nn.Module, Any], Tensor]
LossOver = Literal["auto", "tokens", "rows"] | Callable[[Any], float]
IGNORED = -100  # the label that torch's and transformers' cross entropy leave out


def loss_of(model: nn.Module, batch: Any, loss_fn: LossFn | None = None) -> Tensor:
    """The task loss of one batch: `loss_fn(model, batch)`, or the `.loss` of what the model returns.

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
            "put the labels that the model expects into the batch, or pass loss_fn=lambda model, batch: ..."
        )
    return loss


def call(model: nn.Module, batch: Any) -> Any:
    """What the model returns for a batch: a mapping's values are keyword arguments, a list's or tuple's positional."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (list, tuple)) and not isinstance(batch, PackedSequence):
        return model(*batch)
    return model(batch)


def loss_weight(batch: Any, model: nn.Module | None = None) -> float:
    """The number of labels or rows that the loss of a batch is a mean over, so that the mean of two batches' losses
    with these weights is the loss of both as one batch.

    Labels are whole numbers under `labels`, and those that are -100 do not count. Where the model predicts the next
    token (transformers' decoder-only language models), the first label of every row does not count either. Without
    labels, and for CTC, rows are counted; where there are none, 1.
    """
    tokens = _label_tokens(batch, model)
    return rows_weight(batch) if tokens is None else float(tokens)


def weigher(over: LossOver, model: nn.Module, loss_fn: LossFn | None = None) -> Callable[[Any], float]:
    """The function that gives a batch's weight: what its loss is a mean over. `over`: "auto", which is `loss_weight`,
    but the rows if there is a `loss_fn`; "tokens", the labels that count; "rows"; or a function of the batch.

    Raises:
        DataError: `over` is something else. The function raises it where "tokens" finds no labels in a batch, or where
            the user's function returns no number from 0 on.
    """
    if over == "rows" or (over == "auto" and loss_fn is not None):
        return rows_weight
    if over == "auto":
        return SumOverRows() if _sums(_head_of(model)) else lambda batch: loss_weight(batch, model)
    if over == "tokens":
        return lambda batch: _tokens_asked_for(batch, model)
    if callable(over):
        return lambda batch: _checked(over(batch))
    raise DataError(f'loss_over={over!r}: must be "auto", "tokens", "rows" or a function from a batch to a number')


def _tokens_asked_for(batch: Any, model: nn.Module) -> float:
    tokens = _label_tokens(batch, model)
    if tokens is None:
        raise DataError(
            'loss_over="tokens" counts whole numbers under "labels", and a batch has none; pass "rows", or a function '
            "that returns what a batch's loss is a mean over"
        )
    return float(tokens)


def _checked(weight: Any) -> float:
    value = float(weight)
    if not math.isfinite(value) or value < 0:
        raise DataError(f"loss_over gave {value:g} for a batch: it must be a number from 0 on")
    return value


def _label_tokens(batch: Any, model: nn.Module | None) -> int | None:
    """The number of labels that count; None where there are no labels, or where the loss is no mean over them."""
    given = dict(items_of(batch) or ())
    shifted = given.get("shift_labels")
    labels = shifted if isinstance(shifted, Tensor) else given.get("labels")
    if not isinstance(labels, Tensor) or not labels.ndim or labels.is_floating_point() or labels.dtype == torch.bool:
        return None
    head = _head_of(model)
    if getattr(head, "loss_type", None) == "ForCTC":  # a mean over rows, or their sum
        return None
    if labels.ndim > 1 and shifted is None and _predicts_next(head):
        labels = labels[..., 1:]
    ignored = IGNORED
    if getattr(head, "loss_type", None) == "ForSemanticSegmentation":
        ignored = getattr(head.config, "semantic_loss_ignore_index", IGNORED)
    return int((labels != ignored).sum())


def _head_of(model: nn.Module | None) -> Any:
    """The outermost transformers model, whose class determines the loss."""
    inside = () if model is None else model.modules()
    return next((m for m in inside if hasattr(getattr(m, "config", None), "is_encoder_decoder")), None)


def _sums(head: Any) -> bool:
    """Whether a transformers model's loss is a sum over rows, as that of wav2vec2 for CTC is by default."""
    by_rows = getattr(head, "loss_type", None) == "ForCTC"
    return by_rows and getattr(head.config, "ctc_loss_reduction", "mean") == "sum"


def _predicts_next(head: Any) -> bool:
    """Whether a transformers model compares its logits with the labels one position later.

    XLNet, and decoders taken from an encoder-decoder model (BartForCausalLM), compute their cross entropy themselves,
    without a shift.
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
