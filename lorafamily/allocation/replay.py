"""Running a model again from the middle: what comes before a changed layer is replayed, not computed again.

A module whose call ended before the changed layer is called cannot depend on it, so its recorded output replaces the
call. The only assumption about the model is that a module's output is all that its call leaves behind: `replays` tells.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lorafamily.layers.site import NAME, Site, sites_in
from lorafamily.layers.wrapper import forwards_replaced

T = TypeVar("T")


class Tape:
    """Wraps the `forward` of every module of a model, and returns recorded outputs instead of calling it.

    Recorded are the outputs of calls that had ended when an adapted layer was first called, and what that layer
    computes there without its adapter. A call is identified by the calls around it and its number within them, so
    modules may be shared and called repeatedly.
    """

    def __init__(self, model: nn.Module):
        adapters = {id(inner) for _, site in sites_in(model) for inner in site.modules()}
        # Not modules of adapters, inside which an ablation happens.
        self._modules = [(path, module) for path, module in model.named_modules() if id(module) not in adapters]
        self.order: dict[str, None] = {}
        """Modules in the order in which they were first called since the tape was made."""
        self._outputs: dict[str, Any] = {}
        self._layer: tuple[str, Tensor] | None = None  # the call that was wound to, and its output without an adapter
        self._within: list[_Call] = []  # calls in progress, the outermost first
        self._stop_at: str | None = None

    def run(self, compute: Callable[[], T]) -> T:
        """Compute something with the model, replaying recorded calls."""
        self._within = [_Call("")]
        with forwards_replaced({m: partial(self._call, path, m, m.forward) for path, m in self._modules}):
            return compute()

    def wind_to(self, path: str, compute: Callable[[], Any]) -> None:
        """Compute until a layer is first called, and record the calls that have ended by then; layers must be wound to
        in `order`."""
        self._stop_at, self._layer = path, None
        try:
            self.run(compute)
        except _Reached:
            self._outputs = {key: output for call in self._within for key, output in call.ended.items()}
        finally:
            self._stop_at, self._within = None, []

    def replays(self, compute: Callable[[], Tensor], result: Tensor) -> bool:
        """Whether a computation comes to the same as without a replay. Otherwise modules leave more behind than
        outputs: hooks inside them collect the loads of routers, or a list losses, or a later layer reads what an
        earlier one has put into a dictionary."""
        self._layer = None  # computed as it was for the result
        again = self.run(compute).to(result)
        rounding = 64 * torch.finfo(result.dtype).eps  # products depend on addresses on some processors
        return torch.allclose(again, result, rtol=rounding, atol=0, equal_nan=True)

    @property
    def bytes(self) -> int:
        """Bytes of the recorded outputs."""
        return sum(leaf.nbytes for leaf in tree_leaves([self._outputs, self._layer]) if isinstance(leaf, Tensor))

    def _call(self, path: str, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        caller = self._within[-1]
        caller.calls[path] += 1
        key = f"{caller.key}/{path}#{caller.calls[path]}"
        if key in self._outputs:
            recorded = self._outputs[key]
            if self._stop_at is not None:
                caller.ended[key] = recorded
            return _copied(recorded)  # the model may write into it
        site = module._modules.get(NAME)
        if isinstance(site, Site):
            if path == self._stop_at:
                if site.kind.additive:
                    self._layer = key, site.base_forward(*args, **kwargs)
                raise _Reached
            if self._layer is not None and key == self._layer[0]:
                return site.updated(self._layer[1], *args, **kwargs)
        self.order.setdefault(path)
        self._within.append(_Call(key))
        output = forward(*args, **kwargs)
        self._within.pop()  # with what was recorded inside it, which the whole call replaces
        if self._stop_at is not None:
            caller.ended[key] = _copied(output)
        return output


@dataclass
class _Call:
    """A call in progress: how often it has called each module, and the outputs of those calls that have ended."""

    key: str
    calls: Counter[str] = field(default_factory=Counter)
    ended: dict[str, Any] = field(default_factory=dict)


class _Reached(BaseException):
    """Raised to leave the model at the layer wound to; a BaseException, so that no `except Exception` catches it."""


def _copied(output: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)


class PeakActivations(TorchDispatchMode):
    """In a `with` block, measures the most bytes of new tensors alive at once, as `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._alive = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                storage = leaf.untyped_storage()
                self._alive += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self._alive)
        return output

    def _freed(self, size: int) -> None:
        self._alive -= size
