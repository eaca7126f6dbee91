"""One batch, many adapters: each sample goes through its own, in one forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorafamily.errors import StateError
from lorafamily.functional import padded
from lorafamily.layers import Adapted, weight_of
from lorafamily.placement import Model, Placement, placement_of, refuse_merged, state_of


class Route:
    """What the samples of a batch get from one layer. Entry 0 of the factors is zero: the base model.

    Factors of different rank are padded with zeros, the scale is multiplied into U.
    """

    def __init__(
        self, path: str, U: Float[Tensor, "n d_out r"], V: Float[Tensor, "n r d_in"], entry: Int[Tensor, " samples"]
    ):
        self.path, self.U, self.V, self.entry = path, U, V, entry

    def __call__(self, x: Float[Tensor, "rows *between d_in"]) -> Float[Tensor, "rows *between d_out"]:
        """What is added to the layer's output; rows are samples, or the tokens of one sample after the other."""
        samples, rows = len(self.entry), len(x)
        if rows % samples:
            raise StateError(f"{self.path} got {rows} rows for a batch routed as {samples} samples")
        x_of_sample = x.reshape(samples, -1, x.shape[-1])
        h = torch.bmm(x_of_sample, self.V[self.entry].mT.to(x.dtype))
        y = torch.bmm(h, self.U[self.entry].mT.to(h.dtype))
        return y.view(*x.shape[:-1], y.shape[-1])


@contextmanager
def routing(model: Model, names: Sequence[str | None]) -> Iterator[Model]:
    """Inside the block sample i of every batch goes through the adapter `names[i]`; None is the base model.

    For inference: the factors are read once, at the start of the block, without gradients.

    Raises:
        StateError: an unknown name, a merged model, or an adapter that cannot be one of several in a batch: with a
            task head of its own, or on layers that are not linear.
    """
    state = state_of(model)
    refuse_merged(state)
    if isinstance(names, str) or not names:
        raise StateError(f"names={names!r}: must be a list with the name of an adapter, or None, for every sample")
    parts = {name: placement_of(model, name) for name in dict.fromkeys(names) if name is not None}
    _check(model, parts)
    order = [None, *parts]
    entry = torch.tensor([order.index(name) for name in names])
    layers = {path for part in parts.values() for path in part.adapters}
    routes = {path: _route(model, path, list(parts.values()), entry) for path in layers}
    everywhere = [m for m in model.modules() if isinstance(m, Adapted)]
    before = [module.active for module in everywhere]
    try:
        for module in everywhere:
            module.active = None  # also where only other adapters are
        for path, route in routes.items():
            layer = model.get_submodule(path)
            assert isinstance(layer, Adapted)
            layer.route = route
        yield model
    finally:
        for module, active in zip(everywhere, before, strict=True):
            module.active, module.route = active, None


def _check(model: nn.Module, parts: dict[str, Placement]) -> None:
    for name, part in parts.items():
        if part.parked:
            raise StateError(
                f'adapter "{name}" has its own {", ".join(part.parked)}, trained beside it; a batch for several '
                "adapters has one for all"
            )
        for path in part.adapters:
            module = model.get_submodule(path)
            assert isinstance(module, Adapted)
            if not module.kind.by_sample:
                raise StateError(
                    f'adapter "{name}" is on {path} ({module.kind.name}); only layers called with samples are routed'
                )


@torch.no_grad()
def _route(model: nn.Module, path: str, parts: list[Placement], entry: Int[Tensor, " samples"]) -> Route:
    weight = weight_of(model.get_submodule(path))
    d_out, d_in = weight.shape
    factors = [(weight.new_zeros(d_out, 0), weight.new_zeros(0, d_in))]
    for part in parts:
        if path in part.adapters:
            U, V = part.adapters[path].factors()
            factors.append(((part.adapters[path].scale * U).to(weight), V.to(weight)))
        else:
            factors.append(factors[0])
    most = max(len(V) for _, V in factors)
    Us, Vs = zip(*(padded(U, V, most) for U, V in factors), strict=True)
    return Route(path, torch.stack(Us), torch.stack(Vs), entry.to(weight.device))
