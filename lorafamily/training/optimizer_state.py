"""The optimiser in a checkpoint: its state, and whether the optimiser of today can take it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor


class OptimizerState:
    """Of one run. Made before the first step, since it notes the hyperparameters as they were given: schedules change
    them."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.hyperparameters = [
            {name: _plain(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]

    def tree(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "optimizer class": type(self.optimizer).__name__,
            "hyperparameters": self.hyperparameters,
        }

    def mismatch(self, saved: Mapping[str, Any]) -> str:
        """Why the saved state means nothing to this optimiser; empty if it can be loaded."""
        then, now = saved["optimizer class"], type(self.optimizer).__name__
        if then != now:
            return f"optimizer was {then}, is {now}"
        groups = saved["optimizer"]["param_groups"], self.optimizer.param_groups
        counts = [[len(group["params"]) for group in of] for of in groups]
        return f"optimizer had groups of {counts[0]} parameters, has {counts[1]}" if counts[0] != counts[1] else ""

    def changed(self, saved: Mapping[str, Any], named: Collection[str] = ()) -> list[tuple[int, str, str]]:
        """Hyperparameters that were given another value: group, name and a description. `named`: those that the
        settings of `train` name already."""
        found = []
        for number, (then, now) in enumerate(zip(saved["hyperparameters"], self.hyperparameters, strict=True)):
            for name in then.keys() & now.keys():
                if then[name] != now[name] and name.replace("_", " ") not in named:
                    where = f" of group {number}" if len(self.hyperparameters) > 1 else ""
                    found.append((number, name, f"optimizer's {name}{where} was {then[name]!r}, is {now[name]!r}"))
        return sorted(found)

    def load(self, saved: Mapping[str, Any]) -> None:
        """Load the saved state; hyperparameters that were given another value keep the new one."""
        given = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(dict(saved["optimizer"]))
        for number, name, _ in self.changed(saved):
            self.optimizer.param_groups[number][name] = given[number][name]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return tuple(_plain(entry) for entry in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)
