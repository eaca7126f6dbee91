"""What the package relies on in a method, checked on small layers: for whoever writes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from einops import einsum
from torch import Tensor

from lorafamily.adapter import Adapter
from lorafamily.allocation.allocator import Fixed
from lorafamily.dropout import Dropout
from lorafamily.errors import MethodError
from lorafamily.evidence import LayerEvidence
from lorafamily.method import FromEvidence, Method
from lorafamily.parametrisation import Parametrisation
from lorafamily.registry import find

SHAPES = ((9, 7), (6, 8))
"""(d_in, d_out) of the layers."""
EXACT = 1e-12
"""Differences in float64, relative to the largest entry, that rounding explains."""

Made = Callable[[], Parametrisation]


def check_method(method: str | Method, *, rank: int = 4) -> None:
    """Check what training, merging, files and budgets rely on in a method, in float64 on layers of 9 × 7 and 6 × 8.

    For the tests of a method of your own. What involves a model (layer kinds, files) or a run (allocation, scorer) is
    not checked, nor dropping and adding slices of a parametrisation with buffers in a method whose ranks are fixed.

    Args:
        method: a name, or a `Method`, which need not be registered.
        rank: size of the adapters, from 2; for LoRA² its width.

    Raises:
        MethodError: a promise is broken; the message lists all that are. Or `rank` is below 2.
    """
    if rank < 2:
        raise MethodError(f"rank={rank}: must be at least 2, so that a slice can be dropped and one is left")
    chosen = find(method) if isinstance(method, str) else method
    broken: dict[str, list[str]] = {}
    for d_in, d_out in SHAPES:
        with torch.no_grad():
            for problem in _problems(chosen, d_in, d_out, rank):
                broken.setdefault(problem, []).append(f"{d_in} × {d_out}")
    if broken:
        lines = [f"- {problem} ({', '.join(shapes)})" for problem, shapes in broken.items()]
        raise MethodError("\n".join([f"{chosen.parametrisation.__name__} does not do what is relied on:", *lines]))


def _problems(method: Method, d_in: int, d_out: int, rank: int) -> Iterator[str]:
    def made() -> Parametrisation:
        update = method.parametrisation(d_in, d_out, **method.capped(d_in, d_out, rank)).double()
        update.check()
        return update

    for check in (_sizes, _first_values, _represents, _gates, _switches_off):
        yield from check(made)
    if not (isinstance(method.allocation, Fixed) and list(made().buffers())):
        yield from _changes_size(made)
    yield from _first_update(method, d_in, d_out, rank)


def _sizes(made: Made) -> Iterator[str]:
    update = made()
    there = sum(parameter.numel() for parameter in update.parameters())
    counted = update.count(update.d_in, update.d_out, **update.sizes())
    if counted != there:
        yield f"count gives {counted} for the sizes {update.sizes()}, and {there} entries train"
    again = type(update)(update.d_in, update.d_out, **update.sizes())
    if _shapes(again) != _shapes(update):
        yield f"made anew with sizes() {update.sizes()} its tensors have the shapes {_shapes(again)}"
    found = {name: update.get_parameter(name).shape[axis] for name, axis in update.slice_axes.items()}
    if len(set(found.values())) != 1:
        yield f"slice_axes counts different numbers of slices: {found}"


def _first_values(made: Made) -> Iterator[str]:
    first, again = _reset(made()), _reset(made())
    pairs = zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    if not all(torch.equal(*pair) for pair in pairs):
        yield "reset gives other values for the same generator: draw all from it"
    if _product(first).any():
        yield "U V is not zero after reset"
    if not _learns(first):
        yield "nothing gets a gradient after reset"


def _represents(made: Made) -> Iterator[str]:
    for m in (made().capacity, made().capacity - 1):
        update = _reset(made())
        U, V = _random(update.d_out, m, seed=1), _random(m, update.d_in, seed=2)
        update.represent(U, V)
        if error := _error(_product(update), U @ V):
            yield f"represent of rank {m}, of at most {update.capacity}, is off by {error:.1e} of the largest entry"
    update = _reset(made())
    V = _random(update.capacity, update.d_in, seed=2)
    update.represent(torch.zeros(update.d_out, len(V), dtype=V.dtype), V)
    if _product(update).any():
        yield "represent with U = 0 does not give zero"
    if not _learns(update):
        yield "nothing gets a gradient after represent with U = 0"


def _gates(made: Made) -> Iterator[str]:
    update = _trained(made())
    each = [_product(update, row) for row in torch.eye(update.slices, dtype=torch.float64)]
    gate = _random(1, update.slices, seed=3)[0]
    if _error(_product(update, gate), einsum(gate, torch.stack(each), "r, r d_out d_in -> d_out d_in")):
        yield "factors(gate) does not multiply slice i by gate[i]"
    if _error(_product(update, torch.ones_like(gate)), _product(update)):
        yield "factors(gate) with ones is not factors()"
    with torch.enable_grad():
        gate.requires_grad_()
        total = (_product(update, gate) * _random(update.d_out, update.d_in, seed=4)).sum()
        if not total.requires_grad or torch.autograd.grad(total, gate, allow_unused=True)[0] is None:
            yield "factors(gate) is not differentiable in the gate"


def _switches_off(made: Made) -> Iterator[str]:
    update = _trained(made())
    wanted = _product(update, _without_one(update))
    update.mask(torch.tensor([1]))
    if _error(_product(update), wanted):
        yield f"zeros in {update.zeroed} do not switch a slice off"
    if not _learns(update, update.zeroed, 1):
        yield f"a slice that zeros in {update.zeroed} switch off gets no gradient there, so that it cannot come back"


def _changes_size(made: Made) -> Iterator[str]:
    update = _trained(made())
    adapter, everything = Adapter(update, scale=1.0), torch.arange(update.slices)
    before, wanted = _product(update), _product(update, _without_one(update))
    try:
        adapter.resize(everything, 2, generator=torch.Generator().manual_seed(5))
        if _error(_product(update), before):
            yield "slices from fresh change U V"
        adapter.resize(everything[everything != 1])
        if _error(_product(update), wanted):
            yield "dropping a slice is not switching it off"
    except RuntimeError as error:
        yield f"with another number of slices factors fails ({error}): is a tensor missing from slice_axes?"
    except MethodError as error:
        yield str(error)


def _first_update(method: Method, d_in: int, d_out: int, rank: int) -> Iterator[str]:
    weight = _random(d_out, d_in, seed=6)
    directions = torch.linalg.qr(_random(d_in, d_in, seed=7))[0]
    explained = torch.full((d_in,), 1 / d_in, dtype=torch.float64)
    evidence = LayerEvidence(directions, explained, gradient=_random(d_out, d_in, seed=8))
    generator = torch.Generator().manual_seed(0)
    adapter = method.build(weight, rank, dropout=Dropout(), generator=generator, evidence=evidence)
    if adapter.delta().any() and not isinstance(method.initialisation, FromEvidence):  # GoRA begins with a step
        yield "ΔW is not zero at first; set frozen_initial = True in an initialisation whose U V is not zero"
    if not torch.equal(weight, _random(d_out, d_in, seed=6)):
        yield "the initialisation changes the base weight"


def _product(update: Parametrisation, gate: Tensor | None = None) -> Tensor:
    """U V."""
    U, V = update.factors(gate)
    return U @ V


def _error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, in units of the largest entry; 0 if rounding explains it."""
    error = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(torch.finfo(torch.float64).tiny))
    return 0.0 if error <= EXACT else error


def _learns(update: Parametrisation, name: str | None = None, i: int | None = None) -> bool:
    """Whether some entry, or some in slice `i` of the tensor `name`, gets a gradient."""
    with torch.enable_grad():
        total = (_product(update) * _random(update.d_out, update.d_in, seed=4)).sum()
        looked_at = list(update.parameters()) if name is None else [update.get_parameter(name)]
        gradients = torch.autograd.grad(total, looked_at, allow_unused=True) if total.requires_grad else [None]
    if name is not None and gradients[0] is not None:
        return bool(gradients[0].select(update.slice_axes[name], i or 0).any())
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


def _without_one(update: Parametrisation) -> Tensor:
    gate = torch.ones(update.slices, dtype=torch.float64)
    gate[1] = 0
    return gate


def _reset(update: Parametrisation) -> Parametrisation:
    update.reset(torch.Generator().manual_seed(0))
    return update


def _trained(update: Parametrisation) -> Parametrisation:
    """As after some training: no entry is zero."""
    _reset(update)
    for i, parameter in enumerate(update.parameters()):
        parameter.data += 0.5 * _random(*parameter.shape, seed=10 + i)
    return update


def _shapes(update: Parametrisation) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in update.state_dict().items()}


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
