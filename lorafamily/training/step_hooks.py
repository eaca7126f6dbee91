"""Hooks around every optimizer step, in any loop: they hide empty tensors from it, and let weight decay pull to ΔW = 0.

    p ← p − η λ (p − p0),   then the step without decay

η is the learning rate and λ the decay of p's group; p0 is the frozen copy of p's initialisation, for adapters whose
initial update is not zero. At p0 = 0 this is AdamW's decay (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2,
line 12). Parameters without such a copy are decayed by the optimizer.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorafamily.adapter import Adapter
from lorafamily.allocation.surgery import levels
from lorafamily.errors import TrainingError

_HOOKED: weakref.WeakKeyDictionary[torch.optim.Optimizer, StepHooks] = weakref.WeakKeyDictionary()


def check_optimizer(optimizer: Any) -> None:
    """Check that an optimizer can train adapters.

    Raises:
        TrainingError: it needs a closure (LBFGS) or sparse gradients, or is no `torch.optim.Optimizer` and wraps none.
    """
    name = type(optimizer).__name__
    if not steppers(optimizer):
        raise TrainingError(f"optimizer is a {name}; it must be a torch.optim.Optimizer, or wrap one")
    for inner in levels(optimizer):
        closure = inspect.signature(inner.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TrainingError(
                f"{type(inner).__name__} needs a closure that computes the loss several times a step, and no loop with "
                "rank allocation passes one; use an optimizer that steps from one gradient, such as AdamW"
            )
        if isinstance(inner, torch.optim.SparseAdam):
            raise TrainingError("SparseAdam takes sparse gradients, and adapters have dense ones; use Adam or AdamW")


def steppers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The innermost optimizers, which change the parameters."""
    found = [level for level in levels(optimizer) if isinstance(level, torch.optim.Optimizer)]
    return [level for level in found if len([*levels(level)]) == 1]


class StepHooks:
    """The hooks of an optimizer, until `remove` or until new hooks replace them.

    Empty tensors leave the groups for the step and return afterwards, so that state dicts, learning rate schedules and
    checkpoints find the groups unchanged. The group's `weight_decay` is read at every step and kept.

    `optimizer`: may be wrapped, by accelerate for example. `adapters`: the model's, by layer, a mapping that may
    change. Raises TrainingError if the optimizer cannot train adapters, or a group without a learning rate decays
    parameters that have a frozen copy.
    """

    def __init__(self, optimizer: Any, adapters: Mapping[str, Adapter]):
        check_optimizer(optimizer)
        self.adapters = adapters
        self._depth = 0  # a class's step may call its parent's, and both call the hooks
        self._groups: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._hooks: list[Any] = []
        initial = self._initial_values()
        for stepper in steppers(optimizer):
            for group in stepper.param_groups:
                if group.get("weight_decay") and group.get("lr") is None and _of(group["params"], initial):
                    raise TrainingError(
                        f"{type(stepper).__name__} finds its learning rate itself (lr=None), and decay towards initial "
                        "values other than zero needs one: give lr (Adafactor: relative_step=False) or weight_decay=0"
                    )
            if stepper in _HOOKED:
                _HOOKED[stepper].remove()
            _HOOKED[stepper] = self
            self._hooks.append(stepper.register_step_pre_hook(self._before))
            self._hooks.append(stepper.register_step_post_hook(self._after))

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _initial_values(self) -> dict[int, Tensor]:
        """Frozen initial values, by the id of their parameter."""
        return {
            id(parameter): value
            for adapter in self.adapters.values()
            if adapter.initial is not None
            for parameter, value in zip(adapter.update.parameters(), adapter.initial.parameters(), strict=True)
        }

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        groups = list(optimizer.param_groups)
        initial = self._initial_values() if any(group.get("weight_decay") for group in groups) else {}
        for group in groups:
            self._groups.append((group, {key: group[key] for key in ("params", "weight_decay") if key in group}))
            group["params"] = present = [parameter for parameter in group["params"] if parameter.numel()]
            decayed = _of(present, initial) if group.get("weight_decay") else []
            if not decayed:
                continue
            if _will_step(optimizer):
                _pull(decayed, initial, float(group["lr"]) * float(group["weight_decay"]))
            if len(decayed) == len(present):
                group["weight_decay"] = 0.0
            else:  # decayed parameters get another group for this step
                chosen = {id(parameter) for parameter in decayed}
                group["params"] = [parameter for parameter in present if id(parameter) not in chosen]
                optimizer.param_groups.append({**group, "params": decayed, "weight_decay": 0.0})

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._depth -= 1
        if self._depth:
            return
        del optimizer.param_groups[len(self._groups) :]
        for group, kept in self._groups:
            group.update(kept)
        self._groups = []


def _of(parameters: list[Tensor], initial: Mapping[int, Tensor]) -> list[Tensor]:
    return [parameter for parameter in parameters if id(parameter) in initial]


def _will_step(optimizer: Any) -> bool:
    """False if a GradScaler found a gradient that is not finite: a fused optimizer then does nothing."""
    found = getattr(optimizer, "found_inf", None)
    return found is None or not float(found)


@torch.no_grad()
def _pull(parameters: list[Tensor], initial: Mapping[int, Tensor], share: float) -> None:
    """Move the parameters that have a gradient, as only these step, a share of the way to their initial values."""
    moving = [parameter for parameter in parameters if parameter.grad is not None]
    if moving:
        torch._foreach_lerp_(moving, [initial[id(parameter)] for parameter in moving], share)
