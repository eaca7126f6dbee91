"""Layers whose weight the model reads without calling the layer: an adapter on such a layer would have no effect.

Examples are attention that hands its projections' weights to a fused function, and Mamba's `dt_proj`. Names do not show
which layers these are, but one forward does.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lorafamily.allocation.surgery import forget
from lorafamily.errors import TargetError
from lorafamily.layers.placement import targets_of
from lorafamily.layers.rows import ReadRows
from lorafamily.layers.state import Placement
from lorafamily.layers.target import Target
from lorafamily.layers.wrapper import forwards_replaced

_GRAD = vars(torch._C.TensorBase)["grad"].__get__
"""Looking at a weight's gradient does not count as reading the weight."""


class WeightReads(TorchFunctionMode):
    """Inside a `with` block records which targets' layers a model calls, and which weights it reads outside of them: as
    an argument of a function of torch that returns a tensor, not a dtype or a shape."""

    def __init__(self, targets: Mapping[str, Target]):
        super().__init__()
        some = {name: target for name, target in targets.items() if not isinstance(target.kind, ReadRows)}
        self._layers = {name: target.layer for name, target in some.items()}
        # A weight that is computed from other parameters cannot be recognised. The parameters are kept: accelerate
        # replaces offloaded ones in a forward, and another tensor could get the id of one that is gone.
        self._weights = {name: t.parameter for name, t in some.items() if isinstance(t.stored, nn.Parameter)}
        self._ids = set(map(id, self._weights.values()))
        self._called: set[nn.Module] = set()
        self._read: set[int] = set()
        self._inside = 0
        self._hooks: list[RemovableHandle] = []
        self._around = ExitStack()

    def __enter__(self) -> WeightReads:
        layers = set(self._layers.values())
        self._hooks += [layer.register_forward_pre_hook(self._begin) for layer in layers]
        self._hooks += [layer.register_forward_hook(self._end, always_call=True) for layer in layers]
        # Models may call `layer.forward(x)`, which runs no hooks.
        forwards = {layer: partial(self._forward, layer, layer.forward) for layer in layers}
        self._around.enter_context(forwards_replaced(forwards))
        if "torch._dynamo" in sys.modules:  # which takes a second to import; without it nothing is compiled
            self._around.enter_context(torch.compiler.set_stance("force_eager"))  # in compiled code no call is seen
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._around.close()
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        computed = isinstance(result, Tensor | tuple) and not isinstance(result, torch.Size)
        if not self._inside and computed and func != _GRAD:
            self._read |= self._ids & {id(leaf) for leaf in tree_leaves((args, kwargs))}
        return result

    def without_effect(self) -> list[str]:
        """The targets whose weight was read although their layer was never called."""
        read = [name for name, weight in self._weights.items() if id(weight) in self._read]
        return [name for name in read if self._layers[name] not in self._called]

    def read_elsewhere(self, model: nn.Module) -> list[str]:
        """The targets whose layer was called, and whose weight was read besides, by no other module that has it too."""
        owners = Counter(p for module in model.modules() for p in module._parameters.values() if p is not None)
        alone = [name for name, weight in self._weights.items() if owners[weight] == 1]
        return [name for name in alone if id(self._weights[name]) in self._read and self._layers[name] in self._called]

    def begun(self, model: nn.Module) -> None:
        """Call it in a hook of the model, which may itself be a target: hooks that a call adds it does not run."""
        if model in self._layers.values():
            self._begin(model, None)

    def _begin(self, layer: nn.Module, inputs: Any) -> None:
        self._inside += 1
        self._called.add(layer)

    def _end(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        self._inside -= 1

    def _forward(self, layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._begin(layer, args)
        try:
            return forward(*args, **kwargs)
        finally:
            self._end(layer, args, None)


def watch_first_batch(
    model: nn.Module, targets: Mapping[str, Target], placement: Placement, without_effect: Callable[[list[str]], None]
) -> Callable[[], None]:
    """Watch the model's first batch in training. Afterwards call `without_effect` with the names of the targets whose
    weights it read without calling their layers; note, and warn of, adapted layers whose weights it read as well.

    That is when the model's call ends, or, where a loop calls parts of it (the trunk for a loss of its own, two
    encoders), when what is returned here is called. A model that is compiled as a whole, with these hooks in it, is not
    watched."""
    reads = WeightReads(targets)
    layers = {target.layer for target in targets.values()}
    hooks: list[RemovableHandle] = []
    calls: list[nn.Module] = []
    seen: list[nn.Module] = []

    def begin(module: nn.Module, inputs: Any) -> None:
        if module.training and not torch.compiler.is_compiling():  # not in an evaluation that comes first
            if not calls:
                reads.__enter__()
            calls.append(module)
            reads.begun(module)

    def end(module: nn.Module, inputs: Any, output: Any) -> None:
        if calls and calls[-1] is module and not torch.compiler.is_compiling():
            calls.pop()
            if not calls:
                reads.__exit__(None, None, None)
                if output is not None:  # the forward did not raise
                    seen.append(module)
            if module is model:
                decide()

    def decide() -> None:
        if seen and hooks:
            while hooks:
                hooks.pop().remove()
            without_effect(reads.without_effect())
            placement.read_elsewhere = [at for at in reads.read_elsewhere(model) if at in placement.adapters]
            warn_read_elsewhere(model, placement.read_elsewhere)

    for module in model.modules():
        if layers and (module is model or any(part in layers for part in module.modules() if part is not module)):
            hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end, always_call=True)]
    return decide


def warn_read_elsewhere(model: nn.Module, names: Sequence[str]) -> None:
    """Warn of layers on which merging is not what the adapter does."""
    if names:
        warnings.warn(
            f"{type(model).__name__} calls {_few(names)} and reads the weight besides: the adapter acts in the call "
            "alone, and merging it would change both",
            stacklevel=4,
        )


def leave_out(
    model: nn.Module, placement: Placement, names: Sequence[str], optimizer: torch.optim.Optimizer | None = None
) -> bool:
    """Remove the named adapters, also from the optimizer, since the model does not call their layers, and warn. Returns
    whether there were any. Raises TargetError if the user named them, or if no other adapter would be left."""
    names = [name for name in names if name in placement.adapters]
    check_left_out(model, names, placement.by_default and len(names) < len(placement.adapters))
    targets = targets_of(model)
    gone: set[int] = set()
    for name in names:
        targets[name].site.drop(targets[name].part, placement.name)
        gone |= {id(parameter) for parameter in placement.adapters.pop(name).parameters()}
    if optimizer is not None:
        forget(optimizer, gone)
    return bool(names)


def check_left_out(model: nn.Module, names: Sequence[str], may_be: bool) -> None:
    """Warn of targets without effect, which are left out.

    Raises:
        TargetError: they may not be left out.
    """
    if names:
        reads = f"{type(model).__name__} reads the weight of {_few(names)}"
        why = f"{reads} and never calls the layer: an adapter has no effect"
        if not may_be:
            raise TargetError(f"{why}; leave it out of targets (exclude=...)")
        warnings.warn(f"{why}, and is left out", stacklevel=4)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
