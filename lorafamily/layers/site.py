"""A `Site` holds the adapters of one layer: the only attribute that the layer gets.

What the package knows of a model follows from its sites.
"""

from __future__ import annotations

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
"""The part of a layer that is its whole weight."""


class Site(nn.Module):
    """Everything lorafamily knows of one layer.

    Args:
        layer: whose forward is wrapped.
        kind: computes the layer's output.
        at: the layer's full name in the model that `apply` was given.
        state: what is noted of that model; the same object for all its sites.

    `adapters` holds them by the part of the layer that they are for and by name, `kinds` the kind of each part. `route`
    gives what each sample's own adapter adds to the output, see `deploy/routing.py`.
    """

    layer: nn.Module

    def __init__(self, layer: nn.Module, kind: LayerKind, at: str, state: ModelState):
        super().__init__()
        vars(self)["layer"] = layer  # not registered: it is the site's parent and no child of it
        self.kind, self.kinds, self.at, self.state = kind, dict[str, LayerKind](), at, state
        self.route: Callable[[Tensor], Tensor] | None = None
        self.wrapper = ForwardWrapper(layer, self.forward)
        self.base_forward = self.wrapper.base_forward
        self.adapters = nn.ModuleDict()
        # In eval mode nn.TransformerEncoderLayer hands its weights to a fused kernel unless some submodule has a hook.
        # The container is never called, so this one costs nothing.
        self.adapters.register_forward_pre_hook(_no_fused_kernel)

    def acting(self) -> Acting:
        """The active adapters, the same for every sample, with the kinds of what they adapt."""
        found, name = [], self.state.active
        if name is not None:
            for part, kind in self.kinds.items():
                adapter = self.adapters[part]._modules.get(name)
                if isinstance(adapter, Adapter) and not adapter.off and adapter.rank:
                    found.append((kind, adapter))
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output with its adapters."""
        if self.route is not None:
            return self.base_forward(*args, **kwargs) + self.route(self.wrapper.input_of(args, kwargs))
        acting = self.acting()
        return self.kind.output(self.wrapper, acting, args, kwargs) if acting else self.base_forward(*args, **kwargs)

    def updated(self, y: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer's output with its adapters, from its output without them, y."""
        acting = self.acting()
        return self.kind.updated(self.wrapper, acting, y, args, kwargs) if acting else y

    def put(self, part: str, kind: LayerKind, name: str, adapter: Adapter) -> None:
        """Add an adapter of that name for a part of the layer, or replace the one that has the name."""
        if part not in self.adapters:
            self.adapters[part], self.kinds[part] = nn.ModuleDict(), kind
        self.adapters[part][name] = adapter.train(self.layer.training)  # type: ignore[operator]

    def drop(self, part: str, name: str) -> None:
        """Remove an adapter; with the last of all, the site leaves the layer as it was."""
        del self.adapters[part][name]  # type: ignore[operator]
        if not self.adapters[part]:
            del self.adapters[part], self.kinds[part]
        if not self.adapters:
            self.detach()
            del vars(self.layer)[NAME]

    def attach(self) -> None:
        """Join the model's tree of modules, and take effect."""
        vars(self.layer).pop(NAME, None)
        self.layer._modules[NAME] = self
        self.train(self.layer.training)
        self.wrapper.install()

    def detach(self) -> None:
        """Leave the model's tree: the layer's forward and state dict are those without adapters, and the layer still
        knows its site."""
        if self.layer._modules.pop(NAME, None) is not None:
            vars(self.layer)[NAME] = self
            self.wrapper.uninstall()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Site:
        """Factors follow the model to another device and to a higher precision, never to a lower one: `model.half()`
        leaves them in float32, where small updates are not lost."""

        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype.itemsize < tensor.dtype.itemsize else moved

        return super()._apply(kept, recurse)

    def _replicate_for_data_parallel(self) -> Site:
        raise StateError(
            "nn.DataParallel copies layers without what wraps their forward, so adapters would have no effect; "
            "use DistributedDataParallel, or lorafamily.train under torchrun"
        )


def _no_fused_kernel(module: nn.Module, inputs: Any) -> None:
    return None


def site_on(layer: nn.Module) -> Site | None:
    """The site of a layer, detached ones too; None where there is none."""
    site = layer._modules.get(NAME) or vars(layer).get(NAME)
    return site if isinstance(site, Site) else None


def site_for(layer: nn.Module, kind: LayerKind, at: str, state: ModelState) -> Site:
    """The site of a layer, a new one where there is none.

    Raises:
        TargetError: the layer has an attribute of that name, of somebody else.
    """
    site = site_on(layer)
    if site is None and hasattr(layer, NAME):
        raise TargetError(f'{at} ({type(layer).__name__}) has an attribute "{NAME}" of its own')
    return Site(layer, kind, at, state) if site is None else site


def sites_in(model: nn.Module) -> Iterator[tuple[str, Site]]:
    """Every site in a model, detached ones too, by the name of its layer in this model."""
    for at, module in model.named_modules():
        if (site := site_on(module)) is not None:
            yield at, site


def keep_padding(model: nn.Module) -> None:
    """Let every nn.TransformerEncoder keep padded batches padded if, and only if, a layer of it carries an adapter."""
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            wrapper = vars(encoder).get(place_of_forward(encoder))
            carries = any(NAME in module._modules for module in encoder.modules())
            if carries and not isinstance(wrapper, KeepsPadding):
                KeepsPadding(encoder).install()
            elif not carries and isinstance(wrapper, KeepsPadding):
                wrapper.uninstall()


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own parameters by name, without those of adapters."""
    inside = {id(parameter) for _, site in sites_in(model) for parameter in site.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in inside}
