"""Weights that a model reads without calling their layer, where an adapter would be without effect.

Attention that hands its projections' weights to a fused function, Mamba's `dt_proj`: which layers these are is not
guessed from names; one forward shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lorafamily.parts import ReadRows, Target

_GRAD = vars(torch._C.TensorBase)["grad"].__get__
"""Asking for a gradient is no use of a weight."""


class Reads(TorchFunctionMode):
    """Inside a `with` block notes which of some targets a model calls, and whose weights it reads elsewhere.

    A read is a function of torch that gets the weight and returns a tensor; what returns a dtype or a shape is none.
    """

    def __init__(self, targets: Mapping[str, Target]):
        super().__init__()
        self.targets = {name: target for name, target in targets.items() if not isinstance(target.kind, ReadRows)}
        self._weights = {id(target.parameter): name for name, target in self._with_parameter().items()}
        self._called: set[int] = set()
        self._read: set[int] = set()
        self._inside = 0
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Reads:
        for layer in {id(target.layer): target.layer for target in self.targets.values()}.values():
            self._hooks.append(layer.register_forward_pre_hook(self._begin))
            self._hooks.append(layer.register_forward_hook(self._end, always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        computed = isinstance(result, Tensor | tuple) and not isinstance(result, torch.Size)
        if not self._inside and computed and func != _GRAD:
            self._read |= self._weights.keys() & {id(leaf) for leaf in tree_leaves((args, kwargs))}
        return result

    def without_effect(self) -> list[str]:
        """Targets whose weight was read while their layer was never called."""
        return [
            name
            for name, target in self._with_parameter().items()
            if id(target.parameter) in self._read and id(target.layer) not in self._called
        ]

    def _with_parameter(self) -> dict[str, Target]:
        """Those whose weight is a parameter, and not computed from others."""
        return {n: t for n, t in self.targets.items() if isinstance(t.kind.weight(t.layer), nn.Parameter)}

    def _begin(self, layer: nn.Module, inputs: Any) -> None:
        self._inside += 1
        self._called.add(id(layer))

    def _end(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        self._inside -= 1
