"""Smoothed sensitivity, the score of AdaLoRA and its successors."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lorafamily.allocation.run import Run
from lorafamily.allocation.scorer import Scorer, Scores
from lorafamily.errors import AllocationError


class Sensitivity(Scorer):
    """Smoothed sensitivity times its uncertainty (AdaLoRA, sec. 3.2), over every tensor that has slices.

    With I = |w · ∂L/∂w|:   Ī ← β1 Ī + (1−β1) I,   Ū ← β2 Ū + (1−β2) |I − Ī|,   s(w) = Ī Ū.
    A slice's score is the sum over its tensors of the mean s(w) of its entries: P, λ, Q in AdaLoRA; E, aa, B in LoRA².
    `gradient_of`: whether L is the "total" loss, as in the authors' code, where the penalty's gradient counts as
    importance, or the loss of the "task" alone. In a step in which the task has no gradient for an adapter, as when no
    token is routed to an expert, its slices count as having gradient zero, whatever the penalty. So an expert that is
    never used scores 0, a rarely used one little, and ranks follow use.

    Raises:
        AllocationError: an option makes no sense, or the loop does not keep the task's gradient.
    """

    def __init__(
        self,
        run: Run,
        beta1: float = 0.85,
        beta2: float = 0.85,
        gradient_of: Literal["total", "task"] = "total",
    ):
        super().__init__(run)
        if gradient_of not in ("total", "task"):
            raise AllocationError(f'gradient_of={gradient_of!r}: must be "total" (task and penalty) or "task"')
        self.wants_task_gradient = gradient_of == "task"
        if self.wants_task_gradient and run.task_gradient is None:
            raise AllocationError(
                'gradient_of="task": this loop does not keep the gradient of the task apart from that of the penalty; '
                'use a loop that does (Run(task_gradient=...)), or gradient_of="total"'
            )
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= value < 1:
                raise AllocationError(f"{name}={value!r}: must be in [0, 1)")
        self.beta1, self.beta2 = beta1, beta2
        ends = accumulate(len(adapter.update.slice_axes) for adapter in run.adapters.values())
        self.first = dict(zip(run.adapters, [0, *ends], strict=False))  # module -> index of its first tensor
        self.average = [torch.zeros_like(parameter) for _, parameter, _ in self._tensors()]
        self.uncertainty = [torch.zeros_like(parameter) for _, parameter, _ in self._tensors()]

    @torch.no_grad()
    def observe(self) -> None:
        """Average the gradients of the step just made; a tensor without one counts as gradient zero."""
        weights = [parameter.detach() for _, parameter, _ in self._tensors()]
        task = self.run.task_gradient if self.wants_task_gradient else None
        reached = {name: self.run.reached(name) for name in self.run.adapters}
        found = [(p.grad if task is None else task(p)) if reached[name] else None for name, p, _ in self._tensors()]
        gradients = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]
        importance = torch._foreach_abs(torch._foreach_mul(weights, gradients))
        torch._foreach_lerp_(self.average, importance, 1 - self.beta1)
        deviation = torch._foreach_abs(torch._foreach_sub(importance, self.average))
        torch._foreach_lerp_(self.uncertainty, deviation, 1 - self.beta2)

    def state(self) -> Any:
        return {"average": self.average, "uncertainty": self.uncertainty}

    def restore(self, state: Any) -> None:
        for averages, name in ((self.average, "average"), (self.uncertainty, "uncertainty")):
            averages[:] = [value.to(p) for value, (_, p, _) in zip(state[name], self._tensors(), strict=True)]

    @torch.no_grad()
    def scores(self) -> Scores:
        result = {at: torch.zeros(a.slices, dtype=torch.float64, device="cpu") for at, a in self.run.adapters.items()}
        for (name, _, axis), average, uncertainty in zip(self._tensors(), self.average, self.uncertainty, strict=True):
            entries = average * uncertainty
            result[name] += (entries if entries.ndim == 1 else entries.mean(1 - axis)).cpu().double()
        return result

    @torch.no_grad()
    def follow(self, name: str, keep: Int[Tensor, " n"], add: int) -> None:
        # Only this module's tensors: when ranks settle, this is called for each of perhaps thousands of modules.
        for i, (parameter, axis) in enumerate(self.run.adapters[name].update.sliced(), self.first[name]):
            for averages in (self.average, self.uncertainty):
                kept = averages[i].index_select(axis, keep.to(parameter.device))
                averages[i] = torch.zeros_like(parameter)
                averages[i].narrow(axis, 0, len(keep)).copy_(kept)

    def _tensors(self) -> list[tuple[str, nn.Parameter, int]]:
        """Module, parameter and axis of slices, in the order of the averages."""
        return [(name, p, axis) for name, adapter in self.run.adapters.items() for p, axis in adapter.update.sliced()]
