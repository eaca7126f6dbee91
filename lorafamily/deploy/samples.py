"""Where the samples of a routed batch are in the inputs of layers, and what is refused because nobody can tell.

A layer sees a tensor, not samples: its first axis may count samples, positions, patches or the tokens of one expert.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, count
from typing import Any

from torch import Tensor, nn

from lorafamily.errors import StateError
from lorafamily.layers.state import ModelState

TEXT = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
"""Arguments with a row for every sample, in the models of transformers."""
BESIDE_IMAGES = TEXT[:2]
"""A text in which a sample may have any number of images. A decoder's, in a captioner or recogniser, has one."""
IMAGES = ("pixel_values", "image", "video", "input_features", "input_values", "audio")
"""What the names of images and sounds begin with."""
POSITIONS_FIRST = ("fsmt", "led", "longformer", "xlnet")
"""Types of transformers' models that turn their input round; others have samples first."""


class Samples:
    """The samples of the batches inside a `routing` block.

    `same`: whether all have one adapter, so that it does not matter where they are. `first`: whether the model is known
    to have them along the first axis. While the model computes, also what it got; nothing if only a part of it was
    called: `rows`: the lengths of its inputs' first axes; `counted`: the name and shape of the input whose first axis
    counts samples; `lengths`: numbers of positions of a sample; `beside`: name and shape of a text next to images.
    """

    def __init__(self, model: nn.Module, names: Sequence[str | None]):
        self.count, self.same = len(names), len(set(names)) == 1
        of = getattr(getattr(model, "config", None), "model_type", None)
        self.first = of is not None and of not in POSITIONS_FIRST
        self._look({})

    def _look(self, inputs: Mapping[str, Tensor]) -> None:
        """Note what the model was called with, once for all layers."""
        shapes = {name: tuple(x.shape) for name, x in inputs.items()}
        self.rows = {shape[0] for shape in shapes.values()}
        counted = next((name for name in TEXT if name in shapes), next(iter(shapes), None))
        self.counted = None if counted is None else (counted, shapes[counted])
        # The second axis may count positions, but that of a matrix of numbers is its width.
        with_positions = [x for x in inputs.values() if x.ndim > 2 or (x.ndim == 2 and not x.is_floating_point())]
        self.lengths = {x.shape[1] for x in with_positions if len(x) == self.count}
        text = next((name for name in BESIDE_IMAGES if name in shapes), None)
        images = any(name.startswith(IMAGES) for name in shapes)
        self.beside = (text, shapes[text]) if text is not None and images else None

    @contextmanager
    def watching(self, model: nn.Module, state: ModelState) -> Iterator[None]:
        """Inside the block, remember what the model is called with; an inner block does so for its own samples."""
        names = [*inspect.signature(model.forward).parameters]

        # A model that fails must not leave the inputs of that call for the next.
        hooks = (
            model.register_forward_pre_hook(
                lambda _, args, kwargs: self._look(_tensors(names, args, kwargs) if state.routed is self else {}),
                with_kwargs=True,
            ),
            model.register_forward_hook(lambda *_: self._look({}), always_call=True),
        )
        before, state.routed = state.routed, self
        try:
            yield
        finally:
            state.routed = before
            for hook in hooks:
                hook.remove()

    def check(self, path: str, shape: Sequence[int], samples_first: bool) -> None:
        """Check that an input of this shape, without its width, holds the samples one after another.

        `samples_first`: whether this layer had an input that can be read in one way only.

        Raises:
            StateError: the batch has another number of samples, or nobody can tell where they are.
        """
        if problem := self._problem(tuple(shape), samples_first):
            raise StateError(f"{path} got {shape[0]} rows for a batch routed as {self.count} samples{problem}")

    def _problem(self, shape: tuple[int, ...], samples_first: bool) -> str | None:
        """What is wrong with an input of this shape, as the end of a sentence."""
        if self.counted is not None and (rows := self.counted[1][0]) != self.count:
            return (
                f", and the model {rows} ({self.counted[0]}): give a name for every row along the first axis, with "
                "beams or several returned sequences one for each of them"
            )
        if self.same:
            return None
        flat = len(shape) == 1 and shape[0] in {self.count * length for length in self.lengths}
        if self.beside is not None:
            text, of_text = self.beside
            if shape not in ((self.count * of_text[1],), (self.count, of_text[1])):
                return (
                    f", of shape {shape}: next to {text} of shape {of_text} these may be parts of images or sounds, "
                    "and nobody can tell whose; leave this layer without adapters"
                )
        elif not flat and shape[0] != self.count:
            return (
                ": they are neither samples nor, in the model's input, the tokens of one sample after another "
                "(positions before samples? windows? patches?); leave this layer without adapters, or give all samples "
                "the same one"
            )
        if flat and shape[0] != self.count and shape[0] in self.rows:
            return ": another input of the model has as many rows, which may not be in samples' order"
        if len(shape) > 1 and shape[1] == self.count and not samples_first:
            return ", and as many along the second axis: either may be the samples; pad the batch by one token"
        return None


def refuse_other_order(model: nn.Module, paths: Sequence[str]) -> None:
    """Check that no layer is known to get its samples in another order, whatever its input's shape.

    Raises:
        StateError: it is an expert, or in a transformer of torch that has positions before samples.
    """
    modules = dict(model.named_modules())
    for path in paths:
        parts = path.split(".")
        for at in range(len(parts) - 1):
            outer = modules.get(".".join(parts[: at + 1]))
            if isinstance(outer, nn.ModuleList | nn.ModuleDict) and "expert" in (parts[at] + parts[at + 1]).lower():
                raise StateError(
                    f"{path} is in an expert, which gets some tokens of a batch in an order of its own; only layers "
                    "that all tokens go through are routed"
                )
            attention = getattr(outer, "self_attn", None)
            if isinstance(attention, nn.MultiheadAttention) and not attention.batch_first:
                raise StateError(
                    f"{path} is in {'.'.join(parts[: at + 1])}, which has positions before samples; make it with "
                    "batch_first=True"
                )


def _tensors(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors with rows among a call's arguments; those of a mapping by their names in it."""
    named: dict[str, Any] = {}
    positional = zip(chain(names, (f"argument {i}" for i in count(len(names)))), args, strict=False)
    for name, value in [*positional, *kwargs.items()]:
        named.update(value if isinstance(value, Mapping) else {name: value})
    return {str(name): value for name, value in named.items() if isinstance(value, Tensor) and value.ndim}
