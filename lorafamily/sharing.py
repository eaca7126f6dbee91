"""Layers that read the very same tensor, q, k and v or gate and up, read it once: one product with their stacked V,
one dropout mask, one product for the gradients of V, one addition to the gradient of the input.

Which layers do is not guessed from names: one forward shows it. A layer that later gets another tensor, such as k and v
in cross-attention, computes alone, so that the result is right whatever the model does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorafamily.adapter import Adapter
from lorafamily.functional import Layer, Reading
from lorafamily.layers import Adapted, MultiplyingKind


def share_inputs(model: nn.Module, *args: Any, **kwargs: Any) -> list[tuple[str, ...]]:
    """Let adapted layers that read the same input read it together, which saves time and memory traffic in training.

    Runs the model once on an example, `model(*args, **kwargs)`, in the mode it is in, without gradients; buffers and
    torch's random states are left as they were. `train` needs no such call: it watches its first forward. Calling
    this again finds the layers anew.

    Returns:
        The full names of the layers of each group, in the order in which the model calls them.
    """
    share(model, [])
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    readers = Readers(model)
    try:
        with torch.no_grad(), torch.random.fork_rng(list(devices)), readers:
            model(*args, **kwargs)
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)
    groups = readers.groups()
    share(model, groups)
    return groups


def share(model: nn.Module, groups: Iterable[Sequence[str]]) -> None:
    """Let just these layers read together, by full name; nobody else does any more."""
    for layer in _layers(model):
        vars(layer).pop("together", None)
    for group in groups:
        members = [model.get_submodule(at) for at in group]
        if all(isinstance(member, Adapted) for member in members):
            together = _Together(cast(list[Adapted], members))
            for member in together.members:
                member.together = together


class Readers:
    """Inside a `with` block notes which adapted layers of a model are called with which tensor."""

    def __init__(self, model: nn.Module):
        self.layers = _layers(model)
        self._calls: dict[int, tuple[Tensor, dict[Adapted, None]]] = {}  # a tensor is held, so its id stays its own
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> None:
        self._hooks = [layer.register_forward_pre_hook(self._note) for layer in self.layers]

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            self._calls.setdefault(id(inputs[0]), (inputs[0], {}))[1][cast(Adapted, layer)] = None

    def groups(self) -> list[tuple[str, ...]]:
        """Names of layers that read the same tensor, and at each of their calls together; forgets what was noted."""
        groups = dict.fromkeys(tuple(layers) for _, layers in self._calls.values())
        self._calls.clear()
        often = Counter(layer for group in groups for layer in group)
        alike = [group for group in groups if len(group) > 1 and all(often[layer] == 1 for layer in group)]
        return [tuple(self.layers[layer] for layer in group) for group in alike]


def _layers(model: nn.Module) -> dict[Adapted, str]:
    adapted = ((layer, at) for at, layer in model.named_modules() if isinstance(layer, Adapted))
    return {layer: at for layer, at in adapted if isinstance(layer.kind, MultiplyingKind)}


class _Together:
    """A group. The first of it to be called reads for all of them; each takes what is its own when it is called."""

    def __init__(self, members: Sequence[Adapted]):
        self.members = members
        self.reading: Reading | None = None
        self.read: tuple[Tensor, int] | None = None  # what was read, and in which version
        self.waiting: dict[Adapted, tuple[Adapter, int]] = {}

    def __call__(self, layer: Adapted, x: Tensor) -> Tensor:
        adapter, kind = layer.acting, cast(MultiplyingKind, layer.kind)
        assert adapter is not None
        if x.is_inference():
            return kind.alone(layer, adapter, x)
        if layer is self.members[0]:
            self._read(x)
        reading, (reader, index) = self.reading, self.waiting.pop(layer, (None, 0))
        same = self.read is not None and self.read[0] is x and self.read[1] == x._version
        if not self.waiting:
            self.reading = self.read = None  # nobody is waiting for it; it holds activations
        if reading is None or reader is not adapter or not same:
            return kind.alone(layer, adapter, x)
        return reading.output(index)

    def _read(self, x: Tensor) -> None:
        """Read x for all members that can take the fast path now and drop as much as the first."""
        drops = self.members[0].acting
        layers: list[Layer] = []
        self.waiting = {}
        for member in self.members:
            adapter = member.acting if isinstance(member, Adapted) else None
            if adapter is None or drops is None or adapter.drops_entries != drops.drops_entries:
                continue
            layer = cast(MultiplyingKind, member.kind).fast(member, x)
            if layer is not None:
                self.waiting[member] = adapter, len(layers)
                layers.append(layer)
        self.reading = self.read = None
        if layers and drops is not None:
            self.reading, self.read = Reading(x, layers, dropout=drops.drops_entries), (x, x._version)
