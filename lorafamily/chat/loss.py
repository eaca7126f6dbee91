"""Cross-entropy over chunks of tokens, so that the logits of a large vocabulary do not fill the memory.

Only positions with a label get logits. Those of a chunk are freed before the next is computed, and the backward
computes them again. The loss is the same mean over tokens as the model computes itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lorafamily.batch import IGNORED, LossFn
from lorafamily.training.execution import evaluating

SAME = 1e-3  # relative difference allowed between the two ways to compute a loss, in any precision


def loss_of(chunk: int, model: nn.Module) -> LossFn:
    """The chunked loss, or the model's own if `chunk` is 0 or the model does more in its loss, such as capping logits
    or balancing routers (`Reporter` tells the user)."""
    chunked = chunk and not _balances_routers(model) and difference(model, vocabulary_of(model)) <= SAME
    return ChunkedLoss(chunk) if chunked else own_loss


class ChunkedLoss:
    """A `loss_fn` for `lorafamily.train`: the mean of −log p(token) over the labels that are not -100, in nats.
    `chunk`: tokens whose logits are in memory at a time."""

    def __init__(self, chunk: int = 256):
        self.chunk = chunk

    def __call__(self, model: Any, batch: Any) -> Tensor:
        given = {name: value for name, value in batch.items() if name != "labels"}
        model = getattr(model, "_orig_mod", model)
        hidden = model.base_model(**given, use_cache=False)[0][:, :-1]  # the model without its head
        targets = batch["labels"][:, 1:]
        learnt = targets != IGNORED
        hidden, targets = hidden[learnt], targets[learnt]
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for part, labels in zip(hidden.split(self.chunk), targets.split(self.chunk), strict=True):
            total = total + checkpoint(_summed, model.get_output_embeddings(), part, labels, use_reentrant=False)
        return total / len(targets)


def _summed(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    logits = head(hidden)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")


def vocabulary_of(model: Any) -> int:
    """Rows of the embedding."""
    return int(model.get_input_embeddings().weight.shape[0])


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The model's own loss: all logits at once. In eval mode without what balances routers, so that its exponential is
    the perplexity."""
    more = {"output_router_logits": False} if _balances_routers(model) and not model.training else {}
    return model(**batch, use_cache=False, **more).loss


def _balances_routers(model: Any) -> bool:
    """Whether the model's loss has a term for the use of its experts."""
    return bool(getattr(model.config, "output_router_logits", False))


@torch.no_grad()
def difference(model: Any, vocabulary: int) -> float:
    """The relative difference between the chunked loss and the model's own on a few tokens. It is large for models that
    do more between head and loss, such as capping logits, and infinite for those without a separate head."""
    if getattr(model, "base_model", model) is model or model.get_output_embeddings() is None:
        return float("inf")
    ids = torch.randint(vocabulary, (2, 9), generator=torch.Generator().manual_seed(0)).to(model.device)
    with evaluating(model, model.device):
        expected = own_loss(model, {"input_ids": ids, "labels": ids})
        chunked = ChunkedLoss(5)(model, {"input_ids": ids, "labels": ids})
    return float((chunked - expected).abs() / expected.abs())
