"""The settings of a run as plain data: the table of runs on TensorBoard, and what must be the same to resume."""

from __future__ import annotations

from lorafamily.layers.state import Placement
from lorafamily.training.optimisation import Rates

Setting = str | int | float | bool


def rate_settings(rates: Rates) -> dict[str, Setting]:
    """The settings of the optimizer and its rates, by name."""
    schedule = rates.schedule
    named = schedule if isinstance(schedule, str) else getattr(schedule, "__name__", type(schedule).__name__)
    if callable(schedule):  # two functions may have one name
        named += "".join(f" {rates.share(max(1, rates.total * i // 4)):.4g}" for i in range(1, 5))
    decay = rates.optimizer.param_groups[0].get("weight_decay", 0.0)
    found = {"lr": rates.peaks[0], "steps": rates.total, "schedule": named, "warmup": rates.given_warmup}
    return {**found, "floor": rates.floor, "weight decay": decay}


def method_settings(placement: Placement | None) -> dict[str, Setting]:
    """The settings of `apply`, by name."""
    if placement is None:
        return {"method": "none"}
    sizing, options = placement.sizing, placement.method.options()
    dropout = next(iter(placement.adapters.values())).dropout
    found = {"method": placement.spec, "start rank": sizing.rank, "budget at": sizing.budget_at, **options}
    found |= {"dropout": dropout.p, "dropout kind": dropout.kind}
    found |= {"budget": sizing.budget or 0, "rank budget": sizing.rank_budget or 0}
    found |= dict.fromkeys(placement.method.layered, "by layer")
    return {name: value if isinstance(value, (int, float)) else str(value) for name, value in found.items()}
