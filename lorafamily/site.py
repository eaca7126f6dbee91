"""How adapters sit on a layer: a `Site`, the layer's only new attribute, stands before its `forward`.

The layer's class stays what it is, and whatever `forward` was there, the class's or one that somebody put on the
instance, is what the site calls. What the package knows of a model follows from its sites.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.errors import StateError, TargetError
from lorafamily.layers import Acting, LayerKind

if TYPE_CHECKING:
    from lorafamily.placement import ModelState

NAME = "lorafamily"
"""The attribute that a layer has."""
WHOLE = "weight"
"""The part of a layer that is its whole weight."""


class Front:
    """Stands before the `forward` of a module, on the instance, and computes `around` in its place. What was there is
    `base`; the signature stays."""

    def __init__(self, module: nn.Module, around: Callable[..., Any]):
        self.module, self.around = module, around
        self.inner, self.standing, self.wrapped = None, False, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.around(*args, **kwargs) if self.standing else self.base(*args, **kwargs)

    __code__ = __call__.__code__  # torch.export says where a forward is written

    def base(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes without this."""
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.inner or type(self.module).forward.__get__(self.module))

    def stand(self) -> None:
        """Take the place before the module's forward."""
        own, at = vars(self.module), place_of_forward(self.module)
        if not self.standing and not (self.wrapped and "forward" in own):
            before = own.get(at)
            plain = getattr(before, "__func__", None) is type(self.module).forward  # accelerate notes the class's so
            self.inner, own[at] = None if plain else before, self
        self.standing = True

    def step_aside(self) -> None:
        """Give back what was there. Inside of what others put before it since, it stays and hands calls on."""
        own, at, self.standing = vars(self.module), place_of_forward(self.module), False
        self.wrapped = own.get(at) is not self and "forward" in own
        if own.get(at) is self:
            own[at] = self.inner or type(self.module).forward.__get__(self.module)
            if self.inner is None and at == "forward":
                del own[at]


def place_of_forward(module: nn.Module) -> str:
    """The attribute for a forward on the instance: with accelerate's hook the one that it calls, and puts back."""
    return "_old_forward" if {"_hf_hook", "_old_forward"} <= vars(module).keys() else "forward"


class Site(nn.Module):
    """Everything lorafamily knows of one layer.

    `adapters`: by the part of the layer that they are for, and by name; `kinds`: of each part; `at`: the layer's full
    name in the model that `apply` was given; `state`: what is noted of that model, the same object for all its sites;
    `route`: what each sample's own adapter adds to the output, see `deploy/routing.py`.
    """

    layer: nn.Module

    def __init__(self, layer: nn.Module, kind: LayerKind, at: str, state: ModelState):
        super().__init__()
        vars(self)["layer"] = layer  # not registered: it is the site's parent and no child of it
        self.kind, self.kinds, self.at, self.state = kind, dict[str, LayerKind](), at, state
        self.route: Callable[[Tensor], Tensor] | None = None
        self.front = Front(layer, self.forward)
        self.base = self.front.base
        self.input_name = next(iter(self.front.__signature__.parameters), "input")
        self.adapters = nn.ModuleDict()
        # In eval mode nn.TransformerEncoderLayer hands its weights to a fused kernel unless some submodule has a hook.
        # The container is never called, so this one costs nothing.
        self.adapters.register_forward_pre_hook(_no_fused_kernel)

    @property
    def patched(self) -> bool:
        """Whether a forward stood on the instance before the adapters came."""
        return self.front.inner is not None

    def input_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The layer's input, among what it was called with."""
        given: Tensor = args[0] if args else kwargs[self.input_name]
        return given

    def acting(self) -> Acting:
        """The adapters that take effect for all samples alike, with their kinds."""
        found, name = [], self.state.active
        if name is not None:
            for part, kind in self.kinds.items():
                adapter = self.adapters[part]._modules.get(name)
                if isinstance(adapter, Adapter) and not adapter.off and adapter.rank:
                    found.append((kind, adapter))
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, adapters included."""
        if self.route is not None:
            return self.base(*args, **kwargs) + self.route(self.input_of(args, kwargs))
        acting = self.acting()
        return self.kind.output(self, acting, args, kwargs) if acting else self.base(*args, **kwargs)

    def updated(self, y: Any, *args: Any, **kwargs: Any) -> Any:
        """The same, where the layer's output without adapter is there already."""
        acting = self.acting()
        return self.kind.updated(self, acting, y, args, kwargs) if acting else y

    def put(self, part: str, kind: LayerKind, name: str, adapter: Adapter) -> None:
        """Take in an adapter of that name for a part of the layer, or another in its place."""
        if part not in self.adapters:
            self.adapters[part], self.kinds[part] = nn.ModuleDict(), kind
        self.adapters[part][name] = adapter.train(self.layer.training)  # type: ignore[operator]

    def drop(self, part: str, name: str) -> None:
        """Let an adapter go; with the last one of all, the layer has back what it had."""
        del self.adapters[part][name]  # type: ignore[operator]
        if not self.adapters[part]:
            del self.adapters[part], self.kinds[part]
        if not self.adapters:
            self.step_aside()
            del vars(self.layer)[NAME]

    def stand(self) -> None:
        """Be a part of the model's tree, and take effect."""
        vars(self.layer).pop(NAME, None)
        self.layer._modules[NAME] = self
        self.train(self.layer.training)
        self.front.stand()

    def step_aside(self) -> None:
        """Leave the model's tree, known to the layer still: its class, forward and state dict are as without."""
        if self.layer._modules.pop(NAME, None) is not None:
            vars(self.layer)[NAME] = self
            self.front.step_aside()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Site:
        """Factors follow the model to another device and to a higher precision, never to a lower one: `model.half()`
        leaves them in float32, where small updates are not lost."""

        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype.itemsize < tensor.dtype.itemsize else moved

        return super()._apply(kept, recurse)

    def _replicate_for_data_parallel(self) -> Site:
        raise StateError(
            "nn.DataParallel copies layers without what stands before their forward, so adapters would have no effect; "
            "use DistributedDataParallel, or lorafamily.train under torchrun"
        )


def _no_fused_kernel(module: nn.Module, inputs: Any) -> None:
    return None


def site_on(layer: nn.Module) -> Site | None:
    """The site of a layer, also while it stepped aside; None where there is none."""
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
    """Every site in a model, by its layer's name there; those that stepped aside too."""
    for at, module in model.named_modules():
        if (site := site_on(module)) is not None:
            yield at, site


class KeepsPadding(Front):
    """Before an nn.TransformerEncoder: padded batches stay padded. In eval mode it would pack them for fused kernels,
    which know no adapters, and give zeros where the padding was."""

    def __init__(self, encoder: nn.Module):
        super().__init__(encoder, self.padded)

    def padded(self, *args: Any, **kwargs: Any) -> Any:
        encoder: Any = self.module
        before, encoder.use_nested_tensor = encoder.use_nested_tensor, False
        try:
            return self.base(*args, **kwargs)
        finally:
            encoder.use_nested_tensor = before


def keep_padding(model: nn.Module) -> None:
    """Let every nn.TransformerEncoder keep padded batches padded if, and only if, a layer of it carries an adapter."""
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            front = vars(encoder).get(place_of_forward(encoder))
            carries = any(NAME in module._modules for module in encoder.modules())
            if carries and not isinstance(front, KeepsPadding):
                KeepsPadding(encoder).stand()
            elif not carries and isinstance(front, KeepsPadding):
                front.step_aside()


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own parameters by name, without those of adapters."""
    inside = {id(parameter) for _, site in sites_in(model) for parameter in site.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in inside}
