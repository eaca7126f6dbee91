"""How a step is computed: precision, compilation, activations kept or computed again, evaluation in between."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorafamily.errors import TrainingError
from lorafamily.training.state import random_state, set_random_state

Precision = Literal["auto", "float32", "bfloat16", "float16"]


def chosen_precision(precision: Precision, device: torch.device) -> str:
    """ "auto" is bfloat16 on a GPU that has it and float32 elsewhere.

    Raises:
        TrainingError: no such precision.
    """
    if precision == "auto":
        return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if precision not in ("float32", "bfloat16", "float16"):
        raise TrainingError(f'precision={precision!r}: must be "auto", "float32", "bfloat16" or "float16"')
    return precision


def autocast(precision: str, device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """The context of a forward."""
    if precision == "float32":
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, getattr(torch, precision))


def recompiling(times: int | None) -> contextlib.AbstractContextManager[Any]:
    """Let every change of the ranks compile anew; after eight shapes torch.compile would give up without a word."""
    if times is None:
        return contextlib.nullcontext()
    import torch._dynamo.config as dynamo  # slow to import, for those who compile alone

    return dynamo.patch(recompile_limit=max(dynamo.recompile_limit, times))


@contextlib.contextmanager
def evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode, with the random states put back: how often one looks must not change what is trained."""
    was_training = model.training
    before = random_state(device)
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        set_random_state(before, device)


@contextlib.contextmanager
def recomputing(model: nn.Module, active: bool) -> Iterator[None]:
    """Keep no activations inside the model's blocks, but compute them again in the backward (non-reentrant).

    Blocks are the entries of the outermost `nn.ModuleList`s; models of `transformers` have a switch of their own.

    Raises:
        TrainingError: the model has neither.
    """
    if not active:
        yield
        return
    for theirs in ("activation_checkpointing", "gradient_checkpointing"):  # its name from transformers 5 on, and before
        if hasattr(model, f"{theirs}_enable"):
            getattr(model, f"{theirs}_enable")(**{f"{theirs}_kwargs": {"use_reentrant": False}})
            try:
                yield
            finally:
                getattr(model, f"{theirs}_disable")()
            return
    blocks = list(_blocks(model))
    if not blocks:
        raise TrainingError(
            f"checkpoint_activations=True works on blocks, the entries of an nn.ModuleList, and {type(model).__name__} "
            "has none"
        )
    for block in blocks:
        vars(block)["forward"] = functools.partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del vars(block)["forward"]


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, nn.ModuleList):
        yield from module
    else:
        for child in module.children():
            yield from _blocks(child)
