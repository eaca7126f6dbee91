"""A `Site` holds the adapters of one layer, and is the only attribute that the layer gets.

Everything the package knows of a model is found through its sites.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.errors import StateError, TargetError
from lorafamily.layers.kinds import Acting, LayerKind
from lorafamily.layers.state import ModelState
from lorafamily.layers.wrapper import ForwardWrapper, KeepsPadding, place_of_forward

NAME = "lorafamily"
"""The attribute of a layer that holds its site."""
WHOLE = "weight"
"""The name of a layer's whole weight, where parts have names of their own."""


class Site(nn.Module):
    """Everything lorafamily knows of one layer.

    `kind`: computes the layer's output. `at`: the layer's full name in the model that `apply` was given. `state`: the
    model's, one object for all its sites. `adapters`: by part of the layer, then by adapter name. `kinds`: of each
    part. `route`: while each sample has its own adapter, the function from inputs to what these add to the output.
    """

    layer: nn.Module

    def __init__(self, layer: nn.Module, kind: LayerKind, at: str, state: ModelState):
        super().__init__()
        if hasattr(layer, NAME):
            raise TargetError(f'{at} ({type(layer).__name__}) has an attribute "{NAME}" of its own; rename it')
        vars(self)["layer"] = layer  # not registered as a child: it is the site's parent
        self.kind, self.kinds, self.at, self.state = kind, dict[str, LayerKind](), at, state
        self.route: Callable[[Tensor], Tensor] | None = None
        self.wrapper = ForwardWrapper(layer, self.forward)
        self.base_forward = self.wrapper.base_forward
        self.adapters = nn.ModuleDict()
        # In eval mode nn.TransformerEncoderLayer hands its weights to a fused kernel unless some submodule has a hook.
        # This submodule is never called, so its hook costs nothing.
        self.adapters.register_forward_pre_hook(_no_fused_kernel)

    def acting(self) -> Acting:
        """The adapters that act on every sample, each with the layer kind of what it adapts."""
        if self.state.active is None:
            return []
        named = [(kind, self.adapters[part]._modules.get(self.state.active)) for part, kind in self.kinds.items()]
        return [(kind, a) for kind, a in named if isinstance(a, Adapter) and not a.off and a.slices]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output with its adapters."""
        if self.route is not None and self.state.routed is not None:
            return self.base_forward(*args, **kwargs) + self.route(self.wrapper.input_of(args, kwargs))
        acting = self.acting()
        return self.kind.output(self.wrapper, acting, args, kwargs) if acting else self.base_forward(*args, **kwargs)

    def updated(self, y: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer's output with its adapters, given its output without them, y."""
        acting = self.acting()
        return self.kind.updated(self.wrapper, acting, y, args, kwargs) if acting else y

    def put(self, part: str, kind: LayerKind, name: str, adapter: Adapter) -> None:
        """Add an adapter for a part of the layer, or replace the one of that name."""
        if part not in self.adapters:
            self.adapters[part], self.kinds[part] = nn.ModuleDict(), kind
        self.adapters[part][name] = adapter.train(self.layer.training)  # type: ignore[operator]

    def drop(self, part: str, name: str) -> None:
        """Remove an adapter. Without the last one, the layer is as it was before it had a site."""
        del self.adapters[part][name]  # type: ignore[operator]
        if not self.adapters[part]:
            del self.adapters[part], self.kinds[part]
        if not self.adapters:
            self.detach()
            del vars(self.layer)[NAME]

    def attach(self) -> None:
        """Join the model's tree of modules and wrap the layer's forward."""
        vars(self.layer).pop(NAME, None)
        self.layer._modules[NAME] = self
        self.train(self.layer.training)
        self.wrapper.install()

    def detach(self) -> None:
        """Leave the model's tree: the layer's forward and state dict are as without adapters, but the layer still knows
        its site."""
        if self.layer._modules.pop(NAME, None) is not None:
            vars(self.layer)[NAME] = self
            self.wrapper.uninstall()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Site:
        """Factors follow the model to another device and to a higher precision, never to a lower one: `model.half()`
        leaves them in float32, where small updates are not lost. From the meta device, `to_empty` brings whatever the
        memory held: nan, until values are loaded."""

        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.is_meta and not moved.is_meta and moved.is_floating_point():
                moved.fill_(math.nan)
            return tensor.to(moved.device) if moved.dtype.itemsize < tensor.dtype.itemsize else moved

        return super()._apply(kept, recurse)

    def _keep_from_replacing(self, given: object) -> None:
        if given is not None:
            raise StateError(
                f"{self.at}: torch.ao.quantization would put a layer without the adapter in its place; merge first, or "
                "quantise the base before apply or load"
            )

    qconfig = property(fset=_keep_from_replacing)
    """Where torch.ao.quantization notes, in all submodules of a layer, how it is about to replace it."""

    def _replicate_for_data_parallel(self) -> Site:
        raise StateError(
            "nn.DataParallel copies layers without the wrapper around their forward, so adapters would have no effect; "
            "use DistributedDataParallel, or lorafamily.train under torchrun"
        )


def _no_fused_kernel(module: nn.Module, inputs: Any) -> None:
    return None


def site_on(layer: nn.Module) -> Site | None:
    """The site of a layer, even if it is detached; None where there is none."""
    site = layer._modules.get(NAME) or vars(layer).get(NAME)
    return site if isinstance(site, Site) else None


def sites_in(model: nn.Module) -> Iterator[tuple[str, Site]]:
    """Every site in a model, even if it is detached, with the name of its layer in this model."""
    for at, module in model.named_modules():
        if (site := site_on(module)) is not None:
            yield at, site


def keep_padding(model: nn.Module) -> None:
    """Let every nn.TransformerEncoder keep padded batches padded exactly while one of its layers carries an adapter."""
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            wrapper = vars(encoder).get(place_of_forward(encoder))
            carries = any(NAME in module._modules for module in encoder.modules())
            if carries and not isinstance(wrapper, KeepsPadding):
                KeepsPadding(encoder).install()
            elif not carries and isinstance(wrapper, KeepsPadding):
                wrapper.uninstall()


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's parameters by name: the model's, without those of adapters."""
    inside = {id(parameter) for _, site in sites_in(model) for parameter in site.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in inside}
