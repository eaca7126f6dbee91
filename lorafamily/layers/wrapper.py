"""The wrapper around the `forward` of one module, set on the instance: the module's class stays what it is.

Whatever `forward` was there, the class's or one that somebody set on the instance, is what the wrapper calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


class ForwardWrapper:
    """Computes `adapted` in the place of a module's forward while it is `installed`. The signature stays.

    `inner`: the forward that was on the instance before, None where the class's was in use.
    """

    def __init__(self, module: nn.Module, adapted: Callable[..., Any]):
        self.module, self.adapted = module, adapted
        self.inner, self.installed, self.wrapped = None, False, False
        self.input_name = next(iter(self.__signature__.parameters), "input")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.adapted(*args, **kwargs) if self.installed else self.base_forward(*args, **kwargs)

    __code__ = __call__.__code__  # torch.export says where a forward is written

    def base_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes without this wrapper."""
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.inner or type(self.module).forward.__get__(self.module))

    def input_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The module's input, among what it was called with."""
        given: Tensor = args[0] if args else kwargs[self.input_name]
        return given

    def install(self) -> None:
        """Take the place of the module's forward."""
        own, at = vars(self.module), place_of_forward(self.module)
        if not self.installed and not (self.wrapped and "forward" in own):
            before = own.get(at)
            plain = getattr(before, "__func__", None) is type(self.module).forward  # accelerate notes the class's so
            self.inner, own[at] = None if plain else before, self
        self.installed = True

    def uninstall(self) -> None:
        """Give back what was there. If others have wrapped this wrapper since, it stays and only passes calls on."""
        own, at, self.installed = vars(self.module), place_of_forward(self.module), False
        self.wrapped = own.get(at) is not self and "forward" in own
        if own.get(at) is self:
            own[at] = self.inner or type(self.module).forward.__get__(self.module)
            if self.inner is None and at == "forward":
                del own[at]


def place_of_forward(module: nn.Module) -> str:
    """The attribute for a forward on the instance: with accelerate's hook the one that it calls, and puts back."""
    return "_old_forward" if {"_hf_hook", "_old_forward"} <= vars(module).keys() else "forward"


class KeepsPadding(ForwardWrapper):
    """Around an nn.TransformerEncoder: padded batches stay padded. In eval mode the encoder would pack them for fused
    kernels, which do not know adapters, and would return zeros where the padding was."""

    def __init__(self, encoder: nn.Module):
        super().__init__(encoder, self.padded)

    def padded(self, *args: Any, **kwargs: Any) -> Any:
        encoder: Any = self.module
        before, encoder.use_nested_tensor = encoder.use_nested_tensor, False
        try:
            return self.base_forward(*args, **kwargs)
        finally:
            encoder.use_nested_tensor = before
