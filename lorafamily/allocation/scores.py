"""What a rank slice is worth. Every scorer gives {module name: one score a slice}, higher is worth more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor

from lorafamily.adapter import Adapter

Scores = dict[str, Float[Tensor, " r"]]


class Sensitivity:
    """Smoothed sensitivity times its uncertainty (AdaLoRA, sec. 3.2), over every tensor that has slices.

    With I = |w · ∂L/∂w|:   Ī ← β1 Ī + (1−β1) I,   Ū ← β2 Ū + (1−β2) |I − Ī|,   s(w) = Ī Ū.
    A slice scores the sum over its tensors of the mean s(w) of its entries: P, λ, Q in AdaLoRA; E, aa, B in LoRA².
    """

    def __init__(self, adapters: Mapping[str, Adapter], beta1: float, beta2: float):
        self.adapters = adapters
        self.beta1, self.beta2 = beta1, beta2
        self.tensors = [pair for adapter in adapters.values() for pair in adapter.update.sliced()]
        self.average = [torch.zeros_like(parameter) for parameter, _ in self.tensors]
        self.uncertainty = [torch.zeros_like(parameter) for parameter, _ in self.tensors]

    @torch.no_grad()
    def observe(self) -> None:
        """Take in the gradients of the step just made; a tensor without one counts as gradient zero."""
        weights = [parameter.detach() for parameter, _ in self.tensors]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p, _ in self.tensors]
        importance = torch._foreach_abs(torch._foreach_mul(weights, gradients))
        torch._foreach_lerp_(self.average, importance, 1 - self.beta1)
        deviation = torch._foreach_abs(torch._foreach_sub(importance, self.average))
        torch._foreach_lerp_(self.uncertainty, deviation, 1 - self.beta2)

    @torch.no_grad()
    def scores(self) -> Scores:
        each = iter(zip(self.tensors, self.average, self.uncertainty, strict=True))
        result = {}
        for name, adapter in self.adapters.items():
            total = torch.zeros(adapter.rank, dtype=torch.float64)
            for _ in adapter.update.slices:
                (_, axis), average, uncertainty = next(each)
                entries = average * uncertainty
                total += (entries if entries.ndim == 1 else entries.mean(1 - axis)).cpu().double()
            result[name] = total
        return result


Loss = Callable[[], Tensor]


@torch.no_grad()
def ablation(adapters: Mapping[str, Adapter], loss: Loss) -> Scores:
    """AB-LoRA, exact (ALoRA, eq. 5):   IS(i) = S(M) − S(M∖i) + S(M_i),   S = −loss.

    M∖i has slice i off, M_i has only slice i on in the whole network. Two forwards a slice.
    """
    all_on = {name: torch.ones(a.rank, device=a.device) for name, a in adapters.items()}
    all_off = {name: torch.zeros(a.rank, device=a.device) for name, a in adapters.items()}

    def loss_with(gates: Mapping[str, Tensor]) -> Tensor:
        with ExitStack() as stack:
            for name, adapter in adapters.items():
                stack.enter_context(adapter.gated(gates[name]))
            return loss().cpu().double()

    whole = loss_with(all_on)
    result = {}
    for name, adapter in adapters.items():
        scores = []
        for i in range(adapter.rank):
            without, alone = all_on[name].clone(), all_off[name].clone()
            without[i], alone[i] = 0, 1
            scores.append(loss_with({**all_on, name: without}) - whole - loss_with({**all_off, name: alone}))
        result[name] = torch.stack(scores) if scores else torch.zeros(0, dtype=torch.float64)
    return result


def ablation_estimate(adapters: Mapping[str, Adapter], loss: Loss) -> Scores:
    """AB-LoRA to first order in the gates: one backward with all slices on, one with all off.

    S(M) − S(M∖i) ≈ ∂S/∂g_i at g = 1, and S(M_i) ≈ S(M_0) + ∂S/∂g_i at g = 0.
    """
    present = {name: adapter for name, adapter in adapters.items() if adapter.rank}
    result = {name: torch.zeros(adapter.rank, dtype=torch.float64) for name, adapter in adapters.items()}
    for value in (1.0, 0.0):
        gates = {name: torch.full((a.rank,), value, device=a.device, requires_grad=True) for name, a in present.items()}
        with ExitStack() as stack, torch.enable_grad():
            for name, adapter in present.items():
                stack.enter_context(adapter.gated(gates[name]))
            value_of_loss = loss()
            gradients = torch.autograd.grad(value_of_loss, list(gates.values()))
        for name, gradient in zip(gates, gradients, strict=True):
            result[name] -= gradient.cpu().double()
        if value == 0.0:
            for name in result:
                result[name] -= value_of_loss.detach().cpu().double()
    return result
