"""Cross-entropy a chunk of tokens at a time, so that logits of a large vocabulary do not decide the memory.

Only positions that are learnt get logits, and those of a chunk are let go before the next is computed; the backward
computes them again. What counts is the same mean over tokens that the model's own loss is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lorafamily.batch import IGNORED

Loss = Callable[[nn.Module, Any], Tensor]
SAME = 1e-3  # of losses computed in another order, in any precision


def loss_of(chunk: int, model: nn.Module, vocabulary: int) -> Loss:
    """In chunks of so many tokens, unless the model does more between its head and its loss, or 0 says all at once."""
    if not chunk:
        return own_loss
    if difference(model, vocabulary) > SAME:
        return own_loss  # such as capped logits; `Reporter` says it
    return ChunkedLoss(chunk)


class ChunkedLoss:
    """A `loss_fn` for `lorafamily.train`: the mean of −log p(token) over the labels that are not -100, in nats.

    Args:
        chunk: tokens whose logits are in memory at a time.
    """

    def __init__(self, chunk: int = 256):
        self.chunk = chunk

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        given = {name: value for name, value in batch.items() if name != "labels"}
        body, head = parts(model)
        hidden = body(**given, use_cache=False)[0][:, :-1]
        targets = batch["labels"][:, 1:]
        learnt = targets != IGNORED
        hidden, targets = hidden[learnt], targets[learnt]
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for part, labels in zip(hidden.split(self.chunk), targets.split(self.chunk), strict=True):
            total = total + checkpoint(_summed, head, part, labels, use_reentrant=False)
        return total / len(targets)


def _summed(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    logits = head(hidden)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")


def parts(model: Any) -> tuple[nn.Module, nn.Module]:
    """The model without its head, which gives hidden states first, and the head that makes logits of them."""
    model = getattr(model, "_orig_mod", model)
    return model.base_model, model.get_output_embeddings()


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The model's own loss: all logits at once."""
    loss: Tensor = model(**batch, use_cache=False).loss
    return loss


@torch.no_grad()
def difference(model: Any, vocabulary: int) -> float:
    """How far the chunked loss is from the model's own on a few tokens, relative; infinite where the model has no such
    parts. Not zero for models that do more between head and loss, such as capping the logits."""
    if getattr(model, "base_model", model) is model or model.get_output_embeddings() is None:
        return float("inf")
    ids = torch.randint(vocabulary, (2, 9), generator=torch.Generator().manual_seed(0))
    ids = ids.to(next(model.parameters()).device)
    was_training = model.training
    model.eval()
    try:
        theirs = own_loss(model, {"input_ids": ids, "labels": ids})
        ours = ChunkedLoss(5)(model, {"input_ids": ids, "labels": ids})
    finally:
        model.train(was_training)
    return float((ours - theirs).abs() / theirs.abs())
