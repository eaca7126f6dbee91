"""A wrapper around the `forward` of one module, set on the instance, so that the module keeps its class.

It calls the forward that was there before: the class's, or one that somebody else set on the instance.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class ForwardWrapper:
    """Computes `adapted` in place of a module's forward while it is `installed`, with the same signature.

    `inner`: the forward that was on the instance before, None where the class's was in use. `wrapped`: whether somebody
    else has wrapped this wrapper since.
    """

    def __init__(self, module: nn.Module, adapted: Callable[..., Any]):
        self.module, self.adapted = module, adapted
        self.inner, self.installed, self.wrapped = None, False, False
        self.input_name = next(iter(self.__signature__.parameters), "input")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.adapted(*args, **kwargs) if self.installed else self.base_forward(*args, **kwargs)

    __code__ = __call__.__code__  # torch.export reports where a forward is written

    def base_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes without this wrapper."""
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.inner or type(self.module).forward.__get__(self.module))

    def input_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The module's input, among the arguments of a call."""
        return args[0] if args else kwargs[self.input_name]

    def install(self) -> None:
        """Take the place of the module's forward."""
        attributes, place = vars(self.module), place_of_forward(self.module)
        if not self.installed and not (self.wrapped and "forward" in attributes):
            before = attributes.get(place)
            from_class = getattr(before, "__func__", None) is type(self.module).forward  # accelerate keeps it bound
            self.inner, attributes[place] = None if from_class else before, self
        self.installed = True

    def uninstall(self) -> None:
        """Put back what was there before. If somebody has wrapped this wrapper since, it stays and passes calls on."""
        attributes, place, self.installed = vars(self.module), place_of_forward(self.module), False
        self.wrapped = attributes.get(place) is not self and "forward" in attributes
        if attributes.get(place) is self:
            attributes[place] = self.inner or type(self.module).forward.__get__(self.module)
            if self.inner is None and place == "forward":
                del attributes[place]


def place_of_forward(module: nn.Module) -> str:
    """The attribute of the instance to wrap: `forward`, or the one that accelerate's hook calls and later restores."""
    return "_old_forward" if {"_hf_hook", "_old_forward"} <= vars(module).keys() else "forward"


class KeepsPadding(ForwardWrapper):
    """Keeps padded batches padded in an nn.TransformerEncoder. In eval mode the encoder would pack them for fused
    kernels, which know no adapters, and would return zeros where the padding was."""

    def __init__(self, encoder: nn.Module):
        super().__init__(encoder, self.padded)

    def padded(self, *args: Any, **kwargs: Any) -> Any:
        encoder: Any = self.module
        before, encoder.use_nested_tensor = encoder.use_nested_tensor, False
        try:
            return self.base_forward(*args, **kwargs)
        finally:
            encoder.use_nested_tensor = before


@contextmanager
def forwards_replaced(new: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """In the block these modules have other `forward`s, on the instance."""
    before = {module: vars(module).get("forward") for module in new}
    for module, forward in new.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, old in before.items():
            del vars(module)["forward"]
            if old is not None:
                vars(module)["forward"] = old
