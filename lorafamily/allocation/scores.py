"""What a rank slice is worth. Scorers are interchangeable: any allocator takes any of `SCORERS` by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorafamily.errors import AllocationError

if TYPE_CHECKING:
    from lorafamily.adapter import Adapter
    from lorafamily.allocation.allocator import Run

Scores = dict[str, Float[Tensor, " r"]]
"""By module name one score a slice, float64 on the CPU; higher is worth more."""


class Scorer(ABC):
    """Scores the slices of one run's adapters."""

    def __init__(self, run: Run):
        self.run = run

    def observe(self) -> None:
        """Called after every optimiser step, while the gradients are still there."""

    @abstractmethod
    def scores(self) -> Scores:
        """What every slice is worth now."""

    def follow(self, name: str, keep: Int[Tensor, " n"], add: int) -> None:
        """A module kept the given slices and got `add` new ones; what was averaged must follow."""


class Sensitivity(Scorer):
    """Smoothed sensitivity times its uncertainty (AdaLoRA, sec. 3.2), over every tensor that has slices.

    With I = |w · ∂L/∂w|:   Ī ← β1 Ī + (1−β1) I,   Ū ← β2 Ū + (1−β2) |I − Ī|,   s(w) = Ī Ū.
    A slice scores the sum over its tensors of the mean s(w) of its entries: P, λ, Q in AdaLoRA; E, aa, B in LoRA².
    """

    def __init__(self, run: Run, beta1: float = 0.85, beta2: float = 0.85):
        super().__init__(run)
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= value < 1:
                raise AllocationError(f"{name}={value!r}: must be in [0, 1)")
        self.beta1, self.beta2 = beta1, beta2
        self.average = [torch.zeros_like(parameter) for _, parameter, _ in self._tensors()]
        self.uncertainty = [torch.zeros_like(parameter) for _, parameter, _ in self._tensors()]

    @torch.no_grad()
    def observe(self) -> None:
        """Take in the gradients of the step just made; a tensor without one counts as gradient zero."""
        weights = [parameter.detach() for _, parameter, _ in self._tensors()]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for _, p, _ in self._tensors()]
        importance = torch._foreach_abs(torch._foreach_mul(weights, gradients))
        torch._foreach_lerp_(self.average, importance, 1 - self.beta1)
        deviation = torch._foreach_abs(torch._foreach_sub(importance, self.average))
        torch._foreach_lerp_(self.uncertainty, deviation, 1 - self.beta2)

    @torch.no_grad()
    def scores(self) -> Scores:
        result = {name: torch.zeros(a.rank, dtype=torch.float64) for name, a in self.run.adapters.items()}
        for (name, _, axis), average, uncertainty in zip(self._tensors(), self.average, self.uncertainty, strict=True):
            entries = average * uncertainty
            result[name] += (entries if entries.ndim == 1 else entries.mean(1 - axis)).cpu().double()
        return result

    @torch.no_grad()
    def follow(self, name: str, keep: Int[Tensor, " n"], add: int) -> None:
        for i, (owner, parameter, axis) in enumerate(self._tensors()):
            if owner == name:
                for averages in (self.average, self.uncertainty):
                    kept = averages[i].index_select(axis, keep.to(parameter.device))
                    averages[i] = torch.zeros_like(parameter)
                    averages[i].narrow(axis, 0, len(keep)).copy_(kept)

    def _tensors(self) -> list[tuple[str, Tensor, int]]:
        """Module, parameter and axis of slices, in the order of the averages."""
        return [(name, p, axis) for name, adapter in self.run.adapters.items() for p, axis in adapter.update.sliced()]


class Ablation(Scorer):
    """AB-LoRA, exact (ALoRA, sec. 3.2):   IS(i) = S(M) − S(M∖i) + S(M_i),   S = −loss on validation data.

    M∖i has slice i off, M_i has only slice i on in the whole network. Two forwards a slice.
    """

    def __init__(self, run: Run):
        super().__init__(run)
        if run.validation_loss is None:
            raise AllocationError(
                "ranks are scored on validation data, and the run has none: pass train(..., validation=batches)"
            )
        self.loss = run.validation_loss

    @torch.no_grad()
    def scores(self) -> Scores:
        adapters = self.run.adapters
        all_on = {name: torch.ones(a.rank, device=a.device) for name, a in adapters.items()}
        all_off = {name: torch.zeros(a.rank, device=a.device) for name, a in adapters.items()}
        whole = self._loss_with(all_on)
        result = {}
        for name, adapter in adapters.items():
            scores = torch.zeros(adapter.rank, dtype=torch.float64)
            for i in range(adapter.rank):
                without, alone = all_on[name].clone(), all_off[name].clone()
                without[i], alone[i] = 0, 1
                loss_without = self._loss_with({**all_on, name: without})
                loss_alone = self._loss_with({**all_off, name: alone})
                scores[i] = loss_without - whole - loss_alone
            result[name] = scores
        return result

    def _loss_with(self, gates: Mapping[str, Tensor]) -> Tensor:
        with gated(self.run.adapters, gates):
            return self.loss().cpu().double()


class AblationEstimate(Ablation):
    """AB-LoRA to first order in the gates: one backward with all slices on, one with all off.

    S(M) − S(M∖i) ≈ ∂S/∂g_i at g = 1, and S(M_i) ≈ S(M_0) + ∂S/∂g_i at g = 0.
    """

    @torch.no_grad()
    def scores(self) -> Scores:
        present = {name: adapter for name, adapter in self.run.adapters.items() if adapter.rank}
        result = {name: torch.zeros(a.rank, dtype=torch.float64) for name, a in self.run.adapters.items()}
        for value in (1.0, 0.0):
            gates = {n: torch.full((a.rank,), value, device=a.device, requires_grad=True) for n, a in present.items()}
            with gated(present, gates), torch.enable_grad():
                loss = self.loss()
                gradients = torch.autograd.grad(loss, list(gates.values()))
            for name, gradient in zip(gates, gradients, strict=True):
                result[name] -= gradient.cpu().double()
                if value == 0.0:
                    result[name] -= loss.detach().cpu().double()
        return result


class Magnitude(Scorer):
    """‖ΔW‖_F of the slice alone."""

    def scores(self) -> Scores:
        result = {}
        for name, adapter in self.run.adapters.items():
            norms = []
            for only in torch.eye(adapter.rank, device=adapter.device):
                with adapter.gated(only):
                    norms.append(adapter.norm())
            result[name] = torch.tensor(norms, dtype=torch.float64)
        return result


class Chance(Scorer):
    """Uniform random numbers of the run's seed: the control that a scorer must beat."""

    def scores(self) -> Scores:
        draw = self.run.generator
        return {
            name: torch.rand(adapter.rank, dtype=torch.float64, generator=draw)
            for name, adapter in self.run.adapters.items()
        }


SCORERS: dict[str, Callable[[Run], Scorer]] = {
    "sensitivity": Sensitivity,
    "exact": Ablation,
    "first-order": AblationEstimate,
    "magnitude": Magnitude,
    "random": Chance,
}


def scorer_named(name: str, run: Run) -> Scorer:
    """The scorer of that name for a run.

    Raises:
        AllocationError: no such scorer, or it needs what the run lacks.
    """
    if name not in SCORERS:
        raise AllocationError(f"scores={name!r}: must be one of {', '.join(SCORERS)}")
    return SCORERS[name](run)


def gated(adapters: Mapping[str, Adapter], gates: Mapping[str, Tensor]) -> ExitStack:
    """Inside the block every adapter's slices are multiplied by its gate."""
    stack = ExitStack()
    for name, adapter in adapters.items():
        stack.enter_context(adapter.gated(gates[name]))
    return stack
