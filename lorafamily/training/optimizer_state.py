"""The optimizer in a checkpoint: its state, and whether the optimizer of a resumed run can take it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor


class OptimizerState:
    """The state of a run's optimizer. Make it before the first step: it notes hyperparameters as they were given, and
    schedules change them."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        given = [{name: _plain(group[name]) for name in group if name != "params"} for group in optimizer.param_groups]
        self.hyperparameters = given

    def tree(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "optimizer class": type(self.optimizer).__name__,
            "hyperparameters": self.hyperparameters,
        }

    def mismatch(self, saved: Mapping[str, Any]) -> str:
        """Why this optimizer cannot load the saved state; empty if it can."""
        then, now = saved["optimizer class"], type(self.optimizer).__name__
        if then != now:
            return f"optimizer was {then}, is {now}"
        groups = saved["optimizer"]["param_groups"], self.optimizer.param_groups
        counts = [[len(group["params"]) for group in of] for of in groups]
        return f"optimizer had groups of {counts[0]} parameters, has {counts[1]}" if counts[0] != counts[1] else ""

    def changed(self, saved: Mapping[str, Any], named: Collection[str] = ()) -> list[tuple[int, str, str]]:
        """Hyperparameters whose given values differ: the group's number, the name and a description of each. `named`:
        those that the settings of `train` name already."""
        found = []
        for number, (then, now) in enumerate(zip(saved["hyperparameters"], self.hyperparameters, strict=True)):
            for name in then.keys() & now.keys():
                if then[name] != now[name] and name.replace("_", " ") not in named:
                    where = f" of group {number}" if len(self.hyperparameters) > 1 else ""
                    found.append((number, name, f"optimizer's {name}{where} was {then[name]!r}, is {now[name]!r}"))
        return sorted(found)

    def load(self, saved: Mapping[str, Any]) -> None:
        """Load the saved state; hyperparameters whose given values differ keep the new ones."""
        given = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(dict(saved["optimizer"]))
        for number, name, _ in self.changed(saved):
            self.optimizer.param_groups[number][name] = given[number][name]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)
