"""Rows of results in groups: the seeds of one method at one size on one set of layers."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cells.cell import ALL

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """The seeds of one method at one size on one set of layers, at its best learning rate.

    `size`: as the table shows it; None without adapters.
    """

    method: str
    size: str | None
    targets: str | None
    lr: float
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """A name that no other group of the comparison has."""
        where = "" if self.targets in (None, ALL) else f" on {self.targets}"
        return f"{self.method}{'' if self.size is None else f' @ {self.size}'}{where}"

    @property
    def runs(self) -> list[Row]:
        """The rows of runs that did not fail."""
        return [row for row in self.rows if not row.get("failed")]

    def mean(self, key: str) -> float | None:
        values = [row[key] for row in self.runs if row[key] is not None]
        return statistics.fmean(values) if values else None

    def deviation(self, key: str) -> float | None:
        """Standard deviation over the seeds; None for a single seed."""
        values = [row[key] for row in self.runs if row[key] is not None]
        return statistics.stdev(values) if len(values) > 1 else None


def size_of(row: Row) -> str | None:
    """A row's size: its budget or its rank."""
    if row.get("rank") is not None:
        return f"rank {row['rank']}"
    return None if row["budget"] is None else f"{row['budget']:,}"


def grouped(rows: Iterable[Row], higher_is_better: bool) -> list[Group]:
    """Rows by method, size and targets, in their order. Of several learning rates the one with the fewest failed seeds
    is taken, and among those the one with the best mean metric."""
    cells: dict[tuple[str, str | None, str | None], dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row["method"], size_of(row), row.get("targets")][row["lr"]].append(row)
    sign = 1 if higher_is_better else -1

    def quality(tried: list[Row]) -> tuple[int, float]:
        ended = [row["metric"] for row in tried if not row.get("failed")]
        return len(ended) - len(tried), sign * statistics.fmean(ended) if ended else -math.inf

    best = []
    for (method, size, targets), by_lr in cells.items():
        lr = max(by_lr, key=lambda lr: quality(by_lr[lr]))
        best.append(Group(method, size, targets, lr, tuple(by_lr[lr])))
    return best
