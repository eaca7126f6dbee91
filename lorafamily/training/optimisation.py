"""Parameters by role, their learning rates, and the rate at every step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lorafamily.errors import TrainingError
from lorafamily.layers.placement import noted, placement_of
from lorafamily.training.schedule import Schedule, lr_factor, warmup_steps

LR = 1e-3
WARMUP = 0.06  # of a run
HIGHEST_HEAD_LR = 1e-2


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train now."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Trained(list[nn.Parameter]):
    """All parameters that train, as a list, and by role.

    `up`, `down`: tensors of the adapters that make U and V (V takes the input down to the rank); `gate`: tensors with
    one entry per slice; `head`: extra trained parameters. `names`: the name of every parameter.

        optimizer=lambda p: AdamW([{"params": p.up, "lr": 16e-3}, {"params": p.others(p.up)}], lr=1e-3)   # LoRA+

    `up_ratio`: how many times the learning rate of the others the adapters' method gives `up`, see `Method`.
    """

    def __init__(self, model: nn.Module):
        self.names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(self.names)
        owner, state = noted(model)
        placement = None if state is None or state.active is None else placement_of(owner)
        adapters = {} if placement is None else placement.adapters
        self.up_ratio = 1.0 if placement is None else placement.method.up_ratio
        self.role = {p: a.update.role(name) for a in adapters.values() for name, p in a.update.named_parameters()}
        self.down, self.up, self.gate = ([p for p in self if self.role.get(p) == r] for r in ("down", "up", "gate"))
        self.head = [p for p in self if p not in self.role]

    def others(self, *roles: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """The parameters that are in none of the given lists."""
        taken = {id(p) for role in roles for p in role}
        return [p for p in self if id(p) not in taken]


def parameter_groups(
    model: nn.Module,
    *,
    lr: float = LR,
    head_lr: float | None = None,
    up_lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups, for any optimizer, of a model with adapters.

    Args:
        model: with adapters, or a plain one, all of whose trained parameters get `lr`.
        lr: peak learning rate of the adapters.
        head_lr: peak rate of extra trained parameters. None: ten times `lr`, but no more than 0.01, since the weights
            of a new head have to move by about 1, which at an adapter's rate takes thousands of steps.
        up_lr: peak rate of the tensors that make U; None: `lr` times the method's `up_ratio`, 1 except for LoRA+.
        weight_decay: of all groups.

    Raises:
        TrainingError: nothing trains, or `up_lr` is given and no adapter trains.
    """
    trained = Trained(model)
    if not trained:
        raise TrainingError("no parameter has requires_grad; lorafamily.apply(model, ...) adds some that do")
    if up_lr is None and trained.up_ratio != 1:
        up_lr = lr * trained.up_ratio
    head = trained.head if len(trained.head) < len(trained) else []  # a plain model has no head in this sense
    ups = trained.up if up_lr is not None else []
    if up_lr is not None and not ups:
        raise TrainingError(f"up_lr={up_lr!r}: no adapter trains here, so that nothing makes U; leave it out")
    if head_lr is None:
        head_lr = max(lr, min(10 * lr, HIGHEST_HEAD_LR))
    rates = [(trained.others(head, ups), lr), (ups, up_lr), (head, head_lr)]
    return [{"params": list(group), "lr": rate, "weight_decay": weight_decay} for group, rate in rates if group]


def check_up_rate(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Warn if the optimizer trains U and V at one rate where the method has two (LoRA+)."""
    trained, groups = Trained(model), optimizer.param_groups
    if trained.up_ratio == 1 or not trained.up or not trained.down:
        return
    rates = {p: float(group.get("initial_lr", group["lr"])) for group in groups for p in group["params"]}
    if rates.get(trained.up[0]) == rates.get(trained.down[0]):
        warnings.warn(
            f"the method trains the tensors that make U at {trained.up_ratio:g} times the rate of the others, and this "
            "optimizer trains all at one: make it from lorafamily.parameter_groups(model, lr=...)",
            stacklevel=2,
        )


Optimizer = torch.optim.Optimizer | Callable[[Trained], torch.optim.Optimizer]


def made(
    model: nn.Module,
    optimizer: Optimizer | None,
    lr: float | None,
    head_lr: float | None,
    up_lr: float | None,
    weight_decay: float | None,
) -> torch.optim.Optimizer:
    """AdamW, or the optimizer that was given, or that the given function makes.

    Raises:
        TrainingError: rates next to an optimizer, a negative rate, or something that is no optimizer.
    """
    for name, value in (("lr", lr), ("head_lr", head_lr), ("up_lr", up_lr), ("weight_decay", weight_decay)):
        if value is not None and optimizer is not None:
            raise TrainingError(f"{name}={value!r} and optimizer=...: the optimizer has its own; set it there")
        if value is not None and not float(value) >= 0:
            raise TrainingError(f"{name}={value!r}: must be zero or positive")
    if optimizer is None:
        rates = {"lr": LR if lr is None else float(lr), "weight_decay": float(weight_decay or 0.0)}
        rates |= {name: float(rate) for name, rate in (("head_lr", head_lr), ("up_lr", up_lr)) if rate is not None}
        groups = parameter_groups(model, **rates)
        device = groups[0]["params"][0].device
        return torch.optim.AdamW(groups, fused=device.type in ("cpu", "cuda"))
    found = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer(Trained(model))
    if not isinstance(found, torch.optim.Optimizer):
        raise TrainingError(f"optimizer=... gave a {type(found).__name__}; it must give a torch.optim.Optimizer")
    return found


def largest_norm(max_grad_norm: float | None) -> float:
    """The norm to which gradients are scaled down; 0 and None: infinity.

    Raises:
        TrainingError: a negative norm.
    """
    norm = float(max_grad_norm or torch.inf)
    if not norm > 0:
        raise TrainingError(f"max_grad_norm={max_grad_norm!r}: must be a positive norm; 0 or None for no clipping")
    return norm


class Rates:
    """Sets the learning rate of every step: a share of each group's peak, or what the given LRScheduler says. `total`:
    optimizer steps of the run; the other arguments are those of `train`."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, schedule: Schedule, total: int, warmup: float | None, floor: float
    ):
        self.optimizer, self.schedule, self.total, self.floor = optimizer, schedule, total, floor
        self.given_warmup = WARMUP if warmup is None else warmup
        self.warmup = warmup_steps(self.given_warmup, total)
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.scheduler = schedule if isinstance(schedule, torch.optim.lr_scheduler.LRScheduler) else None
        if not 0 <= floor <= 1:
            raise TrainingError(f"floor={floor!r}: must be a share of the peak rate in [0, 1]")
        if self.scheduler is None:
            self.share(1)  # refuses an unknown schedule
            return
        if self.scheduler.optimizer is not optimizer:
            raise TrainingError("schedule=... is the LRScheduler of another optimizer than optimizer=...")
        for name, value in (("warmup", warmup), ("floor", floor or None)):
            if value is not None:
                raise TrainingError(f"{name}={value!r} has no effect: schedule=... is an LRScheduler, which sets rates")

    def share(self, step: int) -> float:
        """The share of the peak rate at step `step` (from 1)."""
        share = lr_factor(step, self.total, self.warmup, self.schedule)
        return share if step <= self.warmup else max(share, self.floor)

    def set(self, step: int) -> None:
        """Call it before optimizer step `step`."""
        if self.scheduler is None:
            share = self.share(step)
            for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak * share

    def after(self) -> None:
        """Call it after an optimizer step."""
        if self.scheduler is not None:
            self.scheduler.step()

    def put_back(self) -> None:
        """Give the groups their peak rates again: the optimizer may go into another run, or another loop."""
        if self.scheduler is None:
            for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak

    def settings(self) -> dict[str, Any]:
        """The settings of the optimizer and its rates, by name."""
        schedule = self.schedule
        named = schedule if isinstance(schedule, str) else getattr(schedule, "__name__", type(schedule).__name__)
        if callable(schedule):  # two functions may have one name
            named += "".join(f" {self.share(max(1, self.total * i // 4)):.4g}" for i in range(1, 5))
        decay = self.optimizer.param_groups[0].get("weight_decay", 0.0)
        found = {"lr": self.peaks[0], "steps": self.total, "schedule": named, "warmup": self.given_warmup}
        return {**found, "floor": self.floor, "weight decay": decay}

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"scheduler": None if self.scheduler is None else self.scheduler.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
