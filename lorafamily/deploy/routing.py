"""One batch, many adapters: each sample goes through its own adapter, in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.deploy.plain import padded
from lorafamily.errors import StateError
from lorafamily.layers.kinds import Acting, whole_update
from lorafamily.layers.offloaded import refuse_offloaded_adapters
from lorafamily.layers.placement import Model, activate, noted, placement_of, refuse_merged, targets_of
from lorafamily.layers.site import Site, sites_in
from lorafamily.layers.state import Placement
from lorafamily.layers.weights import onloaded


class Route:
    """The updates of one layer for the samples of a batch. `entry`: for each sample, which of the n factors acts.

    Entry 0 is zero: the base model. Lower ranks are padded with zeros, and scales are multiplied into U.
    """

    def __init__(
        self, path: str, U: Float[Tensor, "n d_out r"], V: Float[Tensor, "n r d_in"], entry: Int[Tensor, " samples"]
    ):
        self.path, self.U, self.V, self.entry = path, U, V, entry

    def __call__(self, x: Float[Tensor, "rows *between d_in"]) -> Float[Tensor, "rows *between d_out"]:
        """The addition to the layer's output. Rows are samples, or the tokens of the first sample, the second, …"""
        samples, rows = len(self.entry), len(x)
        if rows % samples:
            raise StateError(f"{self.path} got {rows} rows for a batch routed as {samples} samples")
        x_of_sample = x.reshape(samples, -1, x.shape[-1])
        h = torch.bmm(x_of_sample, self.V[self.entry].mT.to(x.dtype))
        y = torch.bmm(h, self.U[self.entry].mT.to(h.dtype))
        return y.view(*x.shape[:-1], y.shape[-1])


@contextmanager
def routing(model: Model, names: Sequence[str | None]) -> Iterator[Model]:
    """Inside the block, sample i of every batch goes through the adapter `names[i]`; None is the base model.

    For inference: the factors are read once, at the start of the block, without gradients.

    Raises:
        StateError: an unknown name, a merged model, or an adapter that cannot share a batch with others, because it
            has extra trained parameters or is on layers that are not linear.
    """
    owner, state = noted(model)
    refuse_merged(state)
    if isinstance(names, str) or not names:
        raise StateError(f"names={names!r}: must be a list with the name of an adapter, or None, for every sample")
    placements = {name: placement_of(owner, name) for name in dict.fromkeys(names) if name is not None}
    if state is None:  # all names are None, and there are no adapters
        yield model
        return
    _check(owner, placements)
    order = [None, *placements]
    entry = torch.tensor([order.index(name) for name in names], device="cpu")
    sites = [site for _, site in sites_in(owner)]
    before = state.active
    try:
        activate(owner, None)
        for site in sites:
            site.route = _route(site, list(placements), entry)
        yield model
    finally:
        activate(owner, before)
        for site in sites:
            site.route = None


def _check(model: nn.Module, placements: dict[str, Placement]) -> None:
    targets = targets_of(model)
    for name, placement in placements.items():
        refuse_offloaded_adapters(placement.adapters)
        if placement.inactive_values:
            raise StateError(
                f'adapter "{name}" has its own {", ".join(placement.inactive_values)}, trained along with it; a batch '
                "for several adapters has one for all"
            )
        for path in placement.adapters:
            kind = targets[path].kind
            if not kind.by_sample:
                raise StateError(
                    f'adapter "{name}" is on {path} ({kind.name}); only layers called with samples are routed'
                )


@torch.no_grad()
def _route(site: Site, names: list[str], entry: Int[Tensor, " samples"]) -> Route | None:
    """The route of one layer; None if none of these adapters is on it."""
    updates = [_update(site, name) for name in names]
    if not any(updates):
        return None
    d_out, d_in = site.kind.shape(site.layer)
    with onloaded(site.layer):
        stored = next(iter(site.kind.stored(site.layer).values()))
        like = torch.empty(0, dtype=stored.dtype if stored.is_floating_point() else torch.float32, device=stored.device)
    none = like.new_zeros(d_out, 0), like.new_zeros(0, d_in)
    factors = [none]
    for update in updates:
        U, V, scale = whole_update(update) if update else (*none, 1.0)
        factors.append(((scale * U).to(like), V.to(like)))
    most = max(len(V) for _, V in factors)
    Us, Vs = zip(*(padded(U, V, most) for U, V in factors), strict=True)
    return Route(site.at, torch.stack(Us), torch.stack(Vs), entry.to(like.device))


def _update(site: Site, name: str) -> Acting:
    """The adapters of that name on a layer or its parts."""
    found = ((kind, site.adapters[part]._modules.get(name)) for part, kind in site.kinds.items())
    return [(kind, adapter) for kind, adapter in found if isinstance(adapter, Adapter)]
