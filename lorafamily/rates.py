"""A learning rate for a method, from how sharply the loss curves in its adapters' parameters.

Studies that tune every variant find best rates inversely proportional to the largest eigenvalue of the loss's Hessian
in the adapter's parameters at the start (arXiv:2602.04998). That is a claim about AdamW in runs of theirs;
whether it holds here has not been measured yet (docs/results.md).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lorafamily.activation import remove, switch
from lorafamily.batch import LossFn, loss_of, refuse_one_batch, to_device, weigher
from lorafamily.budget import check_budget
from lorafamily.errors import BudgetError, DataError, MethodError
from lorafamily.functional import fast_path
from lorafamily.injection import apply
from lorafamily.layers.placement import placement_of
from lorafamily.training.execution import evaluating
from lorafamily.training.optimisation import LR

REFERENCE = "suggest_lr-reference"
ENOUGH = 0.02
"""Relative residual below which iterating further would not change a rate that is good to a factor of two anyway."""


@dataclass(frozen=True)
class Curvature:
    """The largest eigenvalue of a Hessian. `residual`: ‖Hv − λv‖ of its unit vector v, within which an eigenvalue is;
    `products`: Hessian-vector products that it took; `differences`: whether they were differences of gradients."""

    eigenvalue: float
    residual: float
    products: int
    differences: bool


@dataclass(frozen=True)
class Suggestion:
    """`lr`: `ratio` times the rate that is good for plain LoRA; `low`, `high`: of the ratio, as far as the eigenvalues'
    residuals leave it open, which says nothing of how well the rule holds. `seconds`: what it took; `steps`: about so
    many training steps take as long."""

    lr: float
    ratio: float
    low: float
    high: float
    method: Curvature
    reference: Curvature
    seconds: float
    steps: int

    def __str__(self) -> str:
        kind = "differences of gradients" if self.method.differences else "Hessian-vector products"
        return (
            f"lr {self.lr:.2g}: {self.ratio:.3g} times plain LoRA's (between {self.low:.3g} and {self.high:.3g}); "
            f"largest eigenvalue {self.method.eigenvalue:.3g}, of LoRA {self.reference.eigenvalue:.3g}; {kind}, "
            f"{self.seconds:.1f} s, about {self.steps} training steps"
        )


def suggest_lr(
    model: nn.Module,
    batches: Any,
    *,
    reference_lr: float = LR,
    count: int = 2,
    iterations: int = 12,
    loss_fn: LossFn | None = None,
    seed: int = 0,
) -> Suggestion:
    """A learning rate for the active adapters: that of plain LoRA with as many parameters on the same layers, divided
    by how many times sharper the loss curves. Ask it right after `apply`; `print` it.

    Args:
        model: with adapters as `apply` left them; it is afterwards what it was, bit for bit.
        batches: as `train` takes them; the first `count` are looked at.
        reference_lr: a peak rate that is good for plain LoRA on this model and data.
        iterations: of the power iteration, at most; it ends earlier where the eigenvector does not change any more.
        loss_fn: as `train` takes it.
        seed: of the first vector, and of the plain LoRA's start.

    Raises:
        StateError: no adapter is active, or one is merged.
        DataError: no batch, or none with a label that counts.
        MethodError: an argument that is no such number, or a loss that does not curve in the adapters' parameters.
    """
    for name, value in (("count", count), ("iterations", iterations)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise MethodError(f"{name}={value!r}: must be a whole number of at least 1")
    if not isinstance(reference_lr, int | float) or not 0 < reference_lr < math.inf:
        raise MethodError(f"reference_lr={reference_lr!r}: must be a positive number")
    begun = time.perf_counter()
    own = placement_of(model)
    pieces = _weighed(model, batches, count, loss_fn)
    method = curvature(model, pieces, iterations=iterations, loss_fn=loss_fn, seed=seed)
    with _reference(model, seed):
        reference = curvature(model, pieces, iterations=iterations, loss_fn=loss_fn, seed=seed)
    assert placement_of(model) is own
    for name, found in (("these adapters", method), ("plain LoRA", reference)):
        if found.eigenvalue <= 0:
            raise MethodError(
                f"the loss does not curve upwards in the parameters of {name} (largest eigenvalue "
                f"{found.eigenvalue:.3g}), and no rate follows from it; give lr yourself"
            )
    ratio = reference.eigenvalue / method.eigenvalue
    low = max(reference.eigenvalue - reference.residual, 0.0) / (method.eigenvalue + method.residual)
    least = method.eigenvalue - method.residual
    high = (reference.eigenvalue + reference.residual) / least if least > 0 else math.inf
    passes = 2 * (method.products + reference.products)  # a product is two forwards and backwards, either way
    return Suggestion(
        reference_lr * ratio, ratio, low, high, method, reference, time.perf_counter() - begun, passes * len(pieces)
    )


def curvature(
    model: nn.Module,
    pieces: Sequence[tuple[Any, float]],
    *,
    iterations: int,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    differences: bool = False,
) -> Curvature:
    """The largest eigenvalue of the Hessian of the loss in the active adapters' parameters, by power iteration.

    `pieces`: batches, and by how much the loss of each counts. `differences`: take differences of gradients, as where
    an operation has no second derivative.
    """
    parameters = [
        p for a in placement_of(model).adapters.values() for p in a.update.parameters() if p.requires_grad and p.numel()
    ]
    device = parameters[0].device
    loss = _Loss(model, pieces, parameters, loss_fn)
    generator = torch.Generator().manual_seed(seed)
    v = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
    with evaluating(model, device), fast_path(False), sdpa_kernel(SDPBackend.MATH):
        try:
            product: Callable[[list[Tensor]], list[Tensor]] = loss.differences if differences else loss.product
            product(v)
        except (RuntimeError, NotImplementedError) as error:
            if differences or isinstance(error, torch.OutOfMemoryError):
                raise
            warnings.warn(
                f"{type(model).__name__} has no second derivative ({str(error).splitlines()[0]}); differences of "
                "gradients are taken instead",
                stacklevel=2,
            )
            product, differences = loss.differences, True
        value, residual, v, products = _power(product, v, 0.0, iterations)
        if value < 0:  # the largest of all sizes is a negative one: look for the largest from there
            value, residual, _, more = _power(product, v, -value, iterations, again=generator)
            products += more
    return Curvature(value, residual, products + 1, differences)


def _power(
    product: Callable[[list[Tensor]], list[Tensor]],
    v: list[Tensor],
    shift: float,
    iterations: int,
    again: torch.Generator | None = None,
) -> tuple[float, float, list[Tensor], int]:
    """The eigenvalue of H that is largest after `shift` is added, its residual, its vector, and how many products."""
    if again is not None:
        v = [torch.randn(x.shape, generator=again).to(x) for x in v]
    value = residual = 0.0
    for number in range(1, iterations + 1):
        v = _unit(v)
        Hv = product(v)
        value = _dot(v, Hv)
        residual = math.sqrt(max(_dot(Hv, Hv) - value**2, 0.0))
        if residual <= ENOUGH * abs(value + shift) or number == iterations:
            return value, residual, v, number
        v = [h + shift * x for h, x in zip(Hv, v, strict=True)] if shift else Hv
        if not _dot(v, v):
            return 0.0, 0.0, v, number
    raise AssertionError


class _Loss:
    """The loss in some parameters, and its derivatives along a vector."""

    def __init__(
        self, model: nn.Module, pieces: Sequence[tuple[Any, float]], parameters: list[nn.Parameter], fn: LossFn | None
    ):
        self.model, self.pieces, self.parameters, self.fn = model, pieces, parameters, fn

    def _gradients(self, *, create_graph: bool) -> Iterator[list[Tensor]]:
        with torch.enable_grad():
            for batch, share in self.pieces:
                loss = share * loss_of(self.model, batch, self.fn)
                found = torch.autograd.grad(loss, self.parameters, create_graph=create_graph, allow_unused=True)
                yield [torch.zeros_like(p) if g is None else g for g, p in zip(found, self.parameters, strict=True)]

    def product(self, v: list[Tensor]) -> list[Tensor]:
        """H v."""
        leaves = [p for p in self.model.parameters() if p.requires_grad]
        kept = [p.grad for p in leaves]
        try:
            for p in leaves:
                p.grad = None
            for gradient in self._gradients(create_graph=True):
                along = torch.stack([(g * x).sum() for g, x in zip(gradient, v, strict=True)]).sum()
                if along.requires_grad:
                    # Not `grad` with respect to the parameters: it passes over operations that can be differentiated
                    # once only, without a word, where a whole backward raises.
                    along.backward()
            return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        finally:
            for p, value in zip(leaves, kept, strict=True):
                p.grad = value

    @torch.no_grad()
    def differences(self, v: list[Tensor]) -> list[Tensor]:
        """H v, from gradients a little before and behind: exact to second order in the step."""
        length = math.sqrt(sum(_dot([p], [p]) for p in self.parameters)) or 1.0
        eps = torch.finfo(self.parameters[0].dtype).eps ** (1 / 3) * length / math.sqrt(_dot(v, v))
        kept = [p.detach().clone() for p in self.parameters]
        total = [torch.zeros_like(x) for x in v]
        try:
            for sign in (1, -1):
                for p, value, x in zip(self.parameters, kept, v, strict=True):
                    p.copy_(value + sign * eps * x)
                for gradient in self._gradients(create_graph=False):
                    for sum_, g in zip(total, gradient, strict=True):
                        sum_ += sign * g / (2 * eps)
        finally:
            for p, value in zip(self.parameters, kept, strict=True):
                p.copy_(value)
        return total


def _weighed(model: nn.Module, batches: Any, count: int, loss_fn: LossFn | None) -> list[tuple[Any, float]]:
    """Batches on the model's device, and by how much the loss of each counts."""
    refuse_one_batch(batches)
    weigh = weigher("auto", model, loss_fn)
    device = next(p for p in model.parameters() if p.requires_grad).device
    found = [(to_device(batch, device), weigh(batch)) for batch in islice(iter(batches), count)]
    total = sum(weight for _, weight in found)
    if not total:
        raise DataError("no batch to look at, or none with a label that counts")
    return [(batch, weight / total) for batch, weight in found if weight]


@contextmanager
def _reference(model: nn.Module, seed: int) -> Iterator[None]:
    """Inside the block the active adapters are plain LoRA's, on the same layers and with about as many parameters."""
    own = placement_of(model)
    flags = {p: p.requires_grad for p in model.parameters()}
    budget = sum(adapter.trainable() for adapter in own.adapters.values())
    check_budget(budget)
    given: dict[str, Any] = {"targets": lambda name, module: name in own.adapters, "name": REFERENCE, "seed": seed}
    with ExitStack() as around:
        try:
            apply(model, "lora", budget=budget, **given)
        except BudgetError:  # fewer than rank 1 has
            apply(model, "lora", rank=1, **given)
        around.callback(lambda: [p.requires_grad_(flag) for p, flag in flags.items()])
        around.callback(switch, model, own.name)
        around.callback(remove, model, REFERENCE)
        yield


def _unit(v: list[Tensor]) -> list[Tensor]:
    length = math.sqrt(_dot(v, v))
    return [x / length for x in v]


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return math.fsum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
