"""A run's history in a checkpoint: steps as columns, since a run has many."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from lorafamily.history import Decision, Evaluation, History, Step, Weights


def to_tree(history: History) -> dict[str, Any]:
    """Plain data, with a float64 tensor for every field of a step, in which None is nan."""
    columns = {}
    for name in (f.name for f in fields(Step)):
        values = [getattr(step, name) for step in history.steps]
        columns[name] = torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64, device="cpu")
    return {**dataclasses.replace(history, steps=[]).to_dict(), "steps": columns}


def from_tree(tree: Mapping[str, Any]) -> History:
    """The history that `to_tree` took apart."""
    columns = {name: column.tolist() for name, column in tree["steps"].items()}
    for name in ("step", "slices", "trainable"):
        columns[name] = [int(value) for value in columns[name]]
    columns["orthogonality"] = [None if math.isnan(value) else value for value in columns["orthogonality"]]
    rows = zip(*columns.values(), strict=True)
    return History(
        **{
            **tree,
            "steps": [Step(**dict(zip(columns, row, strict=True))) for row in rows],
            "evaluations": [Evaluation(**entry) for entry in tree["evaluations"]],
            "decisions": [Decision(**entry) for entry in tree["decisions"]],
            **{name: tree[name] and Weights(**tree[name]) for name in ("best", "last")},
        }
    )
