"""The settings of a run as plain data: the table of runs on TensorBoard, and what must be the same to resume."""

from __future__ import annotations

from lorafamily.batch import LossOver
from lorafamily.layers.state import Placement
from lorafamily.training.optimisation import WARMUP, Rates

Setting = str | int | float | bool


def run_settings(
    rates: Rates,
    placement: Placement | None,
    warmup: float | None,
    accumulate: int,
    seed: int | None,
    loss_over: LossOver,
    again: bool,
    patience: int | None,
) -> dict[str, Setting]:
    """Settings by name; the arguments have the names of `train`'s."""
    schedule = rates.schedule
    named = schedule if isinstance(schedule, str) else getattr(schedule, "__name__", type(schedule).__name__)
    if callable(schedule):  # two functions may have one name
        named += "".join(f" {rates.share(max(1, rates.total * i // 4)):.4g}" for i in range(1, 5))
    return {
        "lr": rates.peaks[0],
        "steps": rates.total,
        "schedule": named,
        "warmup": WARMUP if warmup is None else warmup,
        "floor": rates.floor,
        "accumulate": accumulate,
        "seed": -1 if seed is None else seed,
        "loss over": loss_over if isinstance(loss_over, str) else "a function",
        "again": int(again),
        "patience": patience or 0,
        "weight decay": rates.optimizer.param_groups[0].get("weight_decay", 0.0),
        **_method_settings(placement),
    }


def _method_settings(placement: Placement | None) -> dict[str, Setting]:
    if placement is None:
        return {"method": "none"}
    sizing, options = placement.sizing, placement.method.options()
    dropout = next(iter(placement.adapters.values())).dropout
    found = {"method": placement.spec, "start rank": sizing.rank, "budget at": sizing.budget_at, **options}
    found |= {"dropout": dropout.p, "dropout kind": dropout.kind}
    found |= {"budget": sizing.budget or 0, "rank budget": sizing.rank_budget or 0}
    found |= dict.fromkeys(placement.method.layered, "by layer")
    return {name: value if isinstance(value, (int, float)) else str(value) for name, value in found.items()}
