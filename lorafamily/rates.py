"""A learning rate for a method, from how far steps of its parameters move the weights.

AdamW moves every parameter by about the learning rate, whatever its gradient. How far that moves the weights depends on
the parametrisation and its initial values. The suggested rate is the one at which the weights move as far as those of
plain LoRA at a rate that is good for it; finding it needs no data and no gradient. docs/results.md measures what it is
worth, and a rule that fails: a rate inversely proportional to the largest eigenvalue of the loss's Hessian
(arXiv:2602.04998).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorafamily.activation import remove, switch
from lorafamily.adapter import Adapter
from lorafamily.errors import BudgetError, MethodError, StateError
from lorafamily.injection import apply
from lorafamily.layers.placement import placement_of
from lorafamily.layers.state import Placement
from lorafamily.parametrisation import Factors
from lorafamily.training.optimisation import LR

REFERENCE = "suggest_lr-reference"
STEPS = 6.0
"""Steps in one direction that a run amounts to, because most steps cancel: chosen on the embedded model, checked on
another."""
FEWER, MORE = 2.0, 18.0
"""A third and three times as many, for the range of a suggestion."""


@dataclass(frozen=True)
class Suggestion:
    """`lr`: the suggested peak rate, `ratio` times the rate for plain LoRA; `low`, `high`: the range of the ratio, from
    a third as many steps in one direction to three times as many. `seconds`: what the computation took."""

    lr: float
    ratio: float
    low: float
    high: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"lr {self.lr:.2g}: {self.ratio:.3g} times plain LoRA's (between {self.low:.3g} and {self.high:.3g}); "
            f"{self.seconds:.1f} s"
        )


def suggest_lr(model: nn.Module, *, reference_lr: float = LR, seed: int = 0) -> Suggestion:
    """A peak learning rate of AdamW for the active adapters: the one at which they move the weights as far as plain
    LoRA, with as many parameters on the same layers, does at `reference_lr`. Call it right after `apply`.

    Args:
        model: with adapters as `apply` left them; it is unchanged afterwards, bit for bit.
        reference_lr: a peak rate that is good for plain LoRA on this model and data.
        seed: of the directions in which parameters are moved, and of plain LoRA's initialisation.

    Raises:
        StateError: no adapter is active, one is merged, or moving the parameters does not move the weights.
        MethodError: `reference_lr` is no positive number.
    """
    if not isinstance(reference_lr, int | float) or not 0 < reference_lr < math.inf:
        raise MethodError(f"reference_lr={reference_lr!r}: must be a positive number")
    begun = time.perf_counter()
    placement = placement_of(model)
    method = _Path(placement, seed)
    with _reference(model, seed):
        reference = _Path(placement_of(model), seed)
        wanted = {steps: reference.distance(steps * reference_lr) for steps in (FEWER, STEPS, MORE)}
    assert placement_of(model) is placement
    ratios = {steps: method.reaches(far) / steps / reference_lr for steps, far in wanted.items()}
    low, high = min(ratios.values()), max(ratios.values())
    ratio = ratios[STEPS]
    return Suggestion(reference_lr * ratio, ratio, low, high, time.perf_counter() - begun)


class _Path:
    """A straight line through the parameters of adapters: each moves up or down, by a random sign, all equally far, but
    those that make U `up_ratio` times as far, as their rate is."""

    @torch.no_grad()
    def __init__(self, placement: Placement, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.adapters = list(placement.adapters.values())
        self.start = [_scaled(adapter) for adapter in self.adapters]
        self.signs = [
            (p, torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8).to(p.device) * 2 - 1, ratio)
            for adapter in self.adapters
            for name, p in adapter.update.named_parameters()
            for ratio in [placement.method.up_ratio if adapter.update.role(name) == "up" else 1.0]
            if p.requires_grad
        ]

    @torch.no_grad()
    def distance(self, moved: float) -> float:
        """‖ΔW − ΔW at the start‖ over all layers, if every parameter is moved by `moved`."""
        kept = [p.clone() for p, _, _ in self.signs]
        try:
            for p, sign, ratio in self.signs:
                p.add_(sign, alpha=moved * ratio)
            squares = [_difference(_scaled(a), start) for a, start in zip(self.adapters, self.start, strict=True)]
        finally:
            for (p, _, _), value in zip(self.signs, kept, strict=True):
                p.copy_(value)
        return math.sqrt(max(math.fsum(squares), 0.0))

    def reaches(self, distance: float) -> float:
        """How far every parameter must be moved to move the weights by `distance`.

        Raises:
            StateError: no distance is enough.
        """
        from scipy.optimize import brentq  # importing it takes a third of a second

        low, high = -20.0, 5.0  # natural logarithms
        if self.distance(math.exp(high)) < distance:
            raise StateError("moving the adapters' parameters does not move the weights; no rate follows from that")
        return math.exp(brentq(lambda at: self.distance(math.exp(at)) - distance, low, high, xtol=1e-4))


def _scaled(adapter: Adapter) -> Factors:
    """Factors of ΔW, its scale included, in float64."""
    U, V = adapter.factors()
    return adapter.scale * U.double(), V.double().clone()


def _difference(now: Factors, start: Factors) -> float:
    """‖U V − U₀ V₀‖², without forming a d_out × d_in matrix."""
    U, V = torch.cat([now[0], start[0]], 1), torch.cat([now[1], -start[1]])
    return float(((U.T @ U) * (V @ V.T)).sum())


@contextmanager
def _reference(model: nn.Module, seed: int) -> Iterator[None]:
    """Inside the block the active adapters are plain LoRA's, on the same layers and with about as many parameters."""
    placement = placement_of(model)
    flags = {p: p.requires_grad for p in model.parameters()}
    same: dict[str, Any] = {"targets": lambda name, module: name in placement.adapters, "name": REFERENCE, "seed": seed}
    with ExitStack() as around:
        try:
            apply(model, "lora", budget=placement.trainable(), **same)
        except BudgetError:  # fewer parameters than LoRA of rank 1 has
            apply(model, "lora", rank=1, **same)
        around.callback(lambda: [p.requires_grad_(flag) for p, flag in flags.items()])
        around.callback(switch, model, placement.name)
        around.callback(remove, model, REFERENCE)
        yield
