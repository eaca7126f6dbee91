"""How a step is computed: precision, compilation, activations kept or recomputed, evaluation in between."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from lorafamily.errors import TrainingError
from lorafamily.layers.bitsandbytes import scales_kept
from lorafamily.layers.wrapper import forwards_replaced
from lorafamily.training.state import random_kept

Precision = Literal["auto", "float32", "bfloat16", "float16"]


def chosen_precision(precision: Precision, device: torch.device) -> Precision:
    """ "auto" is bfloat16 on a GPU that has it and float32 elsewhere.

    Raises:
        TrainingError: an unknown name.
    """
    if precision == "auto":
        return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "float32"
    if precision not in ("float32", "bfloat16", "float16"):
        raise TrainingError(f'precision={precision!r}: must be "auto", "float32", "bfloat16" or "float16"')
    return precision


def autocast(precision: Precision, device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A function that makes the context of a forward."""
    if precision == "float32":
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, getattr(torch, precision))


def recompiling(times: int, compiled: bool) -> contextlib.AbstractContextManager[Any]:
    """Let torch.compile recompile at every change of ranks: by default it silently gives up after eight shapes."""
    if not compiled:
        return contextlib.nullcontext()
    import torch._dynamo.config as dynamo  # slow to import, so only where something is compiled

    return dynamo.patch(recompile_limit=max(dynamo.recompile_limit, times))


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Return every module to the mode it was in, train or eval, after the block."""
    before = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module in model.modules():
            module.training = before.get(module, model.training)


@contextlib.contextmanager
def evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode, with random states restored: how often a run evaluates must not change what it trains."""
    with random_kept(device), modes_kept(model), scales_kept(model):
        model.eval()
        yield


def start_training(model: nn.Module, base_is_frozen: bool) -> None:
    """Put the model into train mode. If it is there already, its modules in eval mode stay so. Frozen normalisation
    layers go into eval mode, since the base that serves the adapter has their old running statistics."""
    if not model.training:
        model.train()
    for module in model.modules() if base_is_frozen else ():
        tracks = isinstance(module, _NormBase) and module.track_running_stats
        if tracks and not any(parameter.requires_grad for parameter in module.parameters()):
            module.eval()


@contextlib.contextmanager
def recomputing(model: nn.Module, active: bool) -> Iterator[None]:
    """Activation checkpointing (non-reentrant), by the switch of `transformers`' models, in others of the blocks, which
    are the entries of the outermost `nn.ModuleList`s.

    Raises:
        TrainingError: the model has neither, or its first forward calls none of its blocks.
    """
    if not active:
        yield
        return
    for name in ("activation_checkpointing", "gradient_checkpointing"):  # from transformers 5 on, and before
        if hasattr(model, f"{name}_enable"):
            if getattr(model, f"is_{name}", False):  # on already, as the user wants it
                yield
                return
            getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
            try:
                yield
            finally:
                getattr(model, f"{name}_disable")()
            return
    blocks = list(_blocks(model))
    if not blocks:
        raise TrainingError(
            f"checkpoint_activations=True works on blocks, the entries of an nn.ModuleList, and {type(model).__name__} "
            "has none"
        )
    ran: set[nn.Module] = set()

    def recomputed(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        ran.add(block)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        hook.remove()
        if not ran:
            raise TrainingError(
                f"checkpoint_activations=True has no effect: {type(model).__name__} calls none of its "
                f"{len(blocks)} blocks, the entries of its nn.ModuleLists, as modules"
            )

    hook = model.register_forward_hook(look)
    try:
        with forwards_replaced({block: functools.partial(recomputed, block, block.forward) for block in blocks}):
            yield
    finally:
        hook.remove()


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The entries of the outermost lists; where these are lists themselves, theirs."""
    for child in module.children():
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _blocks(child)
