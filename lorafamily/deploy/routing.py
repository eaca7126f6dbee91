"""One batch, many adapters: each sample goes through its own adapter, in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.deploy.plain import padded
from lorafamily.deploy.samples import Samples, refuse_other_order
from lorafamily.errors import StateError
from lorafamily.layers.extra_trained import moved_buffers
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
        self,
        path: str,
        U: Float[Tensor, "n d_out r"],
        V: Float[Tensor, "n r d_in"],
        entry: Int[Tensor, " samples"],
        samples: Samples,
    ):
        self.path, self.U, self.V, self.samples = path, U, V, samples
        self.entry = entry[:1] if samples.same else entry
        self.samples_first = samples.first

    def __call__(self, x: Float[Tensor, "rows *between d_in"]) -> Float[Tensor, "rows *between d_out"]:
        """The addition to the layer's output. Rows are samples, or the tokens of the first sample, the second, …

        Raises:
            StateError: this is not so, or nobody can tell.
        """
        shape = x.shape[:-1]
        self.samples.check(self.path, shape, self.samples_first)
        # Lengths vary from batch to batch, and may meet the number of samples once the layer is known.
        self.samples_first |= len(shape) > 1 and shape[1] != len(self.entry)
        x_of_sample = x.reshape(len(self.entry), -1, x.shape[-1])
        h = torch.bmm(x_of_sample, self.V[self.entry].mT.to(x.dtype))
        y = torch.bmm(h, self.U[self.entry].mT.to(h.dtype))
        return y.view(*shape, y.shape[-1])


@contextmanager
def routing(model: Model, names: Sequence[str | None]) -> Iterator[Model]:
    """Inside the block, sample i of every batch goes through the adapter `names[i]`; None is the base model.

    For inference: the factors are read once, at the start of the block, without gradients. Inside it `disabled` and a
    further `routing` act until their own blocks end; `switch` is refused.

    Raises:
        StateError: an unknown name, a merged model, or an adapter that cannot share a batch with others: it has extra
            trained parameters, or buffers that moved in training, or is on layers that are not linear or, if the names
            differ, do not get whole samples one after another. In the block, a forward whose batch has another number
            of samples, or which calls a routed layer with an input in which nobody can tell them apart.
    """
    owner, state = noted(model)
    refuse_merged(state)
    if isinstance(names, str) or not names:
        raise StateError(f"names={names!r}: must be a list with the name of an adapter, or None, for every sample")
    placements = {name: placement_of(owner, name) for name in dict.fromkeys(names) if name is not None}
    if state is None:  # all names are None, and there are no adapters
        yield model
        return
    samples = Samples(owner, names)
    _check(owner, placements, samples)
    order = [None, *placements]
    entry = torch.tensor([order.index(name) for name in names], device="cpu")
    sites = [site for _, site in sites_in(owner)]
    active, routes = state.active, [site.route for site in sites]
    try:
        activate(owner, state, None)
        _check_buffers(owner, placements)
        for site in sites:
            site.route = _route(site, list(placements), entry, samples)
        with samples.watching(owner, state):
            yield model
    finally:
        activate(owner, state, active)
        for site, route in zip(sites, routes, strict=True):
            site.route = route


def _check(model: nn.Module, placements: dict[str, Placement], samples: Samples) -> None:
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
        if not samples.same:
            refuse_other_order(model, [*placement.adapters])


def _check_buffers(model: nn.Module, placements: dict[str, Placement]) -> None:
    """Check that the base's buffers are also the adapters', while the base is active."""
    for name, placement in placements.items():
        if moved := [*moved_buffers(model, placement, active=False)]:
            raise StateError(
                f'adapter "{name}" has its own {", ".join(moved[:3])}{" and more" if moved[3:] else ""}, which moved '
                "in training; a batch for several adapters has one for all"
            )


@torch.no_grad()
def _route(site: Site, names: list[str], entry: Int[Tensor, " samples"], samples: Samples) -> Route | None:
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
    return Route(site.at, torch.stack(Us), torch.stack(Vs), entry.to(like.device), samples)


def _update(site: Site, name: str) -> Acting:
    """The adapters of that name on a layer or its parts."""
    found = ((kind, site.adapters[part]._modules.get(name)) for part, kind in site.kinds.items())
    return [(kind, adapter) for kind, adapter in found if isinstance(adapter, Adapter)]
