"""What a training step keeps in memory, found by running the real step on fake tensors.

Fake tensors have a shape, a dtype and a device, but no storage. Forward, backward and penalty run on them unchanged:
every kernel is chosen and every tensor kept or freed as on the CPU, but nothing is computed or allocated. Of repeated
blocks only two are run, and then three: what the third adds, every further one adds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lorafamily.allocation.replay import PeakActivations
from lorafamily.batch import LossFn, loss_of
from lorafamily.errors import LoraFamilyError
from lorafamily.planner.blocks import Blocks, copy_on_meta, replace_tensors, without_values
from lorafamily.training.execution import recomputing

Penalty = Callable[[], Tensor]
Ready = Callable[[nn.Module], Penalty | None]
"""Prepares a model for training; returns the function that computes the penalty, None if there is none."""
FEW, MORE = 2, 3  # blocks that are run: the first may differ from the others, so one would not be enough


class PeakBytes(NamedTuple):
    """Bytes at their highest. `activations`: what the backward needs and what is computed on the way, which is all that
    a step makes except gradients of parameters and optimizer states; `with_gradients`: activations and gradients."""

    activations: int
    with_gradients: int


class NotTracedError(Exception):
    """The step cannot run on fake tensors, since it depends on their values, or its blocks cannot stand for others; the
    message says where."""


def peak_of_step(
    model: nn.Module,
    batch: Any,
    ready: Ready,
    *,
    dtype: torch.dtype | None = None,
    loss_fn: LossFn | None = None,
    checkpoint_activations: bool = False,
    blocks: Blocks | None = None,
) -> PeakBytes:
    """What a training step keeps in memory besides weights and optimizer states. The model is not changed.

    Args:
        ready: called with copies of the model on the meta device.
        dtype: of the floating-point weights; None: the model's.
        blocks: repeated blocks, of which a few are run to stand for all; None: all are run.

    Raises:
        NotTracedError: forward or backward depend on values of tensors.
    """

    def run(blocks: Blocks | None, count: int) -> list[tuple[str, list[int]]]:
        """One step on fake tensors: each part of the step with its peak, in order."""
        shorter = copy_on_meta(model, dtype, blocks, count)
        penalty = ready(shorter)
        shorter.train()
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad(), _not_packed():
                fake = partial(without_values, device="cpu")
                replace_tensors(shorter, fake)
                fake_batch = tree_map_only(Tensor, fake, batch)
                if not any(parameter.requires_grad for parameter in shorter.parameters()):
                    _let_inputs_learn(shorter, fake_batch)
                timeline = Timeline(shorter, blocks)
                with recomputing(shorter, checkpoint_activations), timeline:
                    loss = loss_of(shorter, fake_batch, loss_fn)
                    timeline.in_backward = True
                    loss.backward()
                    timeline.mark("after")
                    if penalty is not None:
                        penalty().backward()
        except LoraFamilyError:
            raise
        except Exception as error:
            raise NotTracedError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
        return timeline.parts

    if blocks is not None and blocks.count > FEW + MORE:  # otherwise running all of them is no more work
        try:
            few, more = (_by_place(run(blocks, count), count) for count in (FEW, MORE))
        except NotTracedError:
            pass  # run all blocks
        else:
            # In each part the bytes grow by the same with every block, so the highest forward or backward is the first
            # or the last.
            return _highest(more + (more - few) * (blocks.count - MORE))
    return _highest(np.array([peak for _, peak in run(None, 0)]))


class Timeline(PeakActivations):
    """In a `with` block, records the peak of each part of a step: "before" the blocks, in the "forward" of each,
    between them ("head"), in the "backward" of each, and "after"."""

    def __init__(self, model: nn.Module, blocks: Blocks | None):
        super().__init__()
        self.parts: list[tuple[str, list[int]]] = [("before", [0, 0])]  # bytes as in `PeakBytes`
        self.in_backward = False
        self._gradients = 0
        self._of_gradients: set[int] = set()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._is_gradient)
        if blocks is not None:
            for i, block in enumerate(blocks.of(model)):
                block.register_forward_pre_hook(partial(self._enter, i))
                block.register_forward_hook(partial(self._leave, i))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # half of all calls, which allocate nothing
            return func(*args)
        output = super().__torch_dispatch__(func, types, args, kwargs)
        self._note()
        return output

    def mark(self, part: str) -> None:
        """Begin another part of the step."""
        self.parts.append((part, [0, 0]))
        self._note()

    def _note(self) -> None:
        _, peak = self.parts[-1]
        peak[:] = max(peak[0], self._alive - self._gradients), max(peak[1], self._alive)

    def _is_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        if storage._cdata not in self._of_gradients:  # several gradients may lie in one
            self._of_gradients.add(storage._cdata)
            self._gradients += storage.nbytes()

    def _enter(self, i: int, block: nn.Module, inputs: Any) -> None:
        if not self.in_backward:  # in which checkpointed blocks run again
            self.mark(f"forward {i}")

    def _leave(self, i: int, block: nn.Module, inputs: Any, output: Any) -> None:
        if self.in_backward:
            return
        trained = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if trained:
            trained[0].register_hook(lambda gradient: self.mark(f"backward {i}"))
        self.mark("head")


def _by_place(parts: list[tuple[str, list[int]]], count: int) -> NDArray[np.int64]:
    """Of a step with `count` blocks, the peaks of those parts that every step has, however many blocks there are."""
    # What happens between two blocks is negligible, and happens after the last one too.
    forward = [name for i in range(count) for name in (f"forward {i}", "head")]
    backward = [f"backward {i}" for i in reversed(range(count))]
    if [name for name, _ in parts] != ["before", *forward, *backward, "after"]:
        raise NotTracedError("the model does not call its blocks one after the other, each once")
    last = dict(parts)
    return np.array([last[name] for name in ("before", forward[0], *forward[-2:], backward[0], backward[-1], "after")])


def _highest(peaks: NDArray[np.int64]) -> PeakBytes:
    """The highest of each kind; `peaks` has the shape (parts, kinds)."""
    return PeakBytes(*peaks.max(axis=0).tolist())


@contextmanager
def _not_packed() -> Iterator[None]:
    """Keep decoders of transformers from looking for several texts in one row. In a fake tensor they would assume some,
    and every layer would get a mask that it does not get in training."""
    masks, name = sys.modules.get("transformers.masking_utils"), "find_packed_sequence_indices"
    before = getattr(masks, name, None)
    if before is not None:
        setattr(masks, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        if before is not None:
            setattr(masks, name, before)


def _let_inputs_learn(model: nn.Module, batch: Any) -> None:
    """Let gradients flow down to the input of a model that trains nothing."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda module, inputs, output: output.requires_grad_(torch.is_grad_enabled()))
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaf.requires_grad_()
