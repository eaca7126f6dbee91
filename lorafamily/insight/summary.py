"""The adapters of a model, as data and as a table."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lorafamily.layers.experts import Expert
from lorafamily.layers.placement import adapted, placement_of, targets_of
from lorafamily.layers.quantised import Quantised, counts_of
from lorafamily.layers.site import base_parameters
from lorafamily.layers.state import Placement
from lorafamily.names import expert_of
from lorafamily.targets import what_is
from lorafamily.terminal import aligned


@dataclass(frozen=True)
class Row:
    """One adapted layer. `slices`: those of its adapter now; `width`: LoRA²'s k, None for other methods; `parameters`:
    trainable ones now; `norm`: ‖ΔW‖_F. Of quantised layers, `step`: ‖·‖_F of the error that rounding to the base's
    levels makes in a weight; `lost`: the same of the error that merge(requantise=True) made. A ΔW smaller than the step
    hardly survives that merge."""

    module: str
    d_out: int
    d_in: int
    initial_slices: int
    slices: int
    width: int | None
    parameters: int
    norm: float
    step: float | None = None
    lost: float | None = None

    @property
    def rank(self) -> int:
        """The largest rank that ΔW can have."""
        return min(self.slices, self.d_in, self.d_out, *(() if self.width is None else (self.width,)))


@dataclass(frozen=True)
class Summary:
    """The adapters of one name; prints as a table, with the experts of a layer in one line.

    `extra_trained`: the number of extra trained parameters, such as a head's; `tensor_bytes`: of all tensors in a saved
    file, with frozen initial updates and extra trained parameters; `reached`: the base's parameters in adapted layers;
    `not_reached`: its other parameters, by what they are."""

    name: str
    method: str
    rows: tuple[Row, ...]
    base_parameters: int
    extra_trained: int
    budget: int | None
    rank_budget: int | None
    budget_at: str
    initial_parameters: int
    tensor_bytes: int
    dtype: str
    reached: int
    not_reached: dict[str, int]

    @property
    def parameters(self) -> int:
        """Trainable adapter parameters now."""
        return sum(row.parameters for row in self.rows)

    @property
    def slices(self) -> int:
        """Slices of all modules."""
        return sum(row.slices for row in self.rows)

    @property
    def rank(self) -> int:
        """The sum over layers of the largest rank that ΔW can have."""
        return sum(row.rank for row in self.rows)

    @property
    def unused(self) -> int | None:
        """What is left of the budget, in trainable parameters or in slices; None if a rank was given instead."""
        if self.rank_budget is not None:
            return self.rank_budget - self.slices
        return None if self.budget is None else self.budget - self.parameters

    def __str__(self) -> str:
        has_width = any(row.width is not None for row in self.rows)  # then rank and slices differ
        more = [name for name in ("step", "lost") if any(getattr(row, name) is not None for row in self.rows)]
        sizes = [f"{'width':>7}", f"{'slices':>9}", f"{'rank':>7}"] if has_width else [f"{'rank':>9}"]
        norms = [f"{name:>9}" for name in ("‖ΔW‖", *more)]
        table = [["module", f"{'d_out × d_in':>13}", *sizes, "parameters", *norms]]
        for module, rows in _grouped(self.rows).items():
            began, now = _range([row.initial_slices for row in rows]), _range([row.slices for row in rows])
            sizes = [now if all(row.slices == row.initial_slices for row in rows) else f"{began} → {now}"]
            if has_width:
                sizes = [_range([row.width or 0 for row in rows]), *sizes, _range([row.rank for row in rows])]
            norms = [_joint_norm([getattr(row, name) for row in rows]) for name in ("norm", *more)]
            shape, parameters = f"{rows[0].d_out} × {rows[0].d_in}", sum(row.parameters for row in rows)
            table.append([module, shape, *sizes, f"{parameters:,}", *norms])
        head, *lines = aligned(table)
        rule, share = "─" * len(head), self.parameters / self.base_parameters
        lines = [f'adapter "{self.name}": {self.method}, {self.dtype} factors', head, rule, *lines, rule]
        lines.append(
            f"adapters: {self.parameters:,} trainable ({share:.2%} of the base's {self.base_parameters:,}), "
            f"total rank {self.rank}"
            + (f" from {self.slices} slices" if has_width else "")
            + f"; {self.initial_parameters:,} at the start"
        )
        if self.unused is not None:
            by_rank = self.rank_budget is not None
            what, size = ("rank budget", f"{self.rank_budget:,} slices") if by_rank else ("budget", f"{self.budget:,}")
            lines.append(f"{what} (at the {self.budget_at}): {size}, of which {self.unused:,} unused")
        others = sorted(self.not_reached.items(), key=lambda item: -item[1])
        lines.append(
            f"in adapted layers: {self.reached:,} of the base's parameters ({self.reached / self.base_parameters:.1%})"
            + ("; in none: " + ", ".join(f"{count:,} in {what}" for what, count in others) if others else "")
        )
        lines.append(f"saved: {self.tensor_bytes / 1024:,.0f} KiB of tensors")
        if self.extra_trained:
            lines.append(f"also trained, not counted above: {self.extra_trained:,}")
        return "\n".join(lines)


def _grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by line of the table: one for each module, and one for all experts of a layer, named by their indices."""
    groups: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        together, index = expert_of(row.module) or (row.module, -1)
        groups[together][index] = row
    return {
        name if -1 in members else name.replace(".*.", f".{_range([*members])}."): [*members.values()]
        for name, members in groups.items()
    }


def _joint_norm(norms: Sequence[float | None]) -> str:
    """The joint norm of the rows in one line."""
    known = [norm for norm in norms if norm is not None]
    return f"{math.hypot(*known):.3g}" if known else "–"


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}–{high}"


@torch.no_grad()
def summary(model: nn.Module, name: str | None = None) -> Summary:
    """Shape, rank, parameters and ‖ΔW‖ of every adapted layer, totals and the budget used; `print` it for a table.

    Raises:
        StateError: the model has no adapter of that name, or no active one.
    """
    placement, (owner, state) = placement_of(model, name), adapted(model)
    reached, not_reached = _coverage(owner, placement)
    targets, rows = targets_of(owner), []
    for path, adapter in placement.adapters.items():
        update, target, step = adapter.update, targets[path], None
        if isinstance(kind := target.layer_kind, Quantised) and not target.stored.is_meta:
            step = float(target.kind.matrix(kind.rounding(target.layer)).sum().sqrt())
        sizes = update.d_out, update.d_in, adapter.initial_slices, adapter.slices, update.sizes().get("width")
        rows.append(Row(path, *sizes, adapter.trainable(), adapter.norm(), step, state.quantised.lost.get(path)))
    tensors = [t for adapter in placement.adapters.values() for t in adapter.state_dict().values()]
    tensors += placement.inactive_values.values()
    first, sizing = next(iter(placement.adapters.values())), placement.sizing
    return Summary(
        name=placement.name,
        method=placement.spec,
        rows=tuple(rows),
        base_parameters=sum(counts_of(owner).values()),
        extra_trained=sum(value.numel() for value in placement.inactive_values.values()),
        budget=sizing.budget,
        rank_budget=sizing.rank_budget,
        budget_at=sizing.budget_at,
        initial_parameters=sizing.initial_parameters,
        tensor_bytes=sum(tensor.nbytes for tensor in tensors),
        dtype=str(next(first.update.parameters()).dtype).removeprefix("torch."),
        reached=reached,
        not_reached=not_reached,
    )


def _coverage(model: nn.Module, placement: Placement) -> tuple[int, dict[str, int]]:
    """How many of the base's parameters are in adapted layers, and how many others by what they are."""
    adapted, shares = set[int](), Counter[int]()
    for target in (target for at, target in targets_of(model).items() if at in placement.adapters):
        if isinstance(target.kind, Expert):
            shares[id(target.parameter)] += math.prod(target.shape)
        else:
            inside = target.layer.parameters(recurse=nn.utils.parametrize.is_parametrized(target.layer))
            adapted |= {id(target.stored), *map(id, inside)}
    reached, others = 0, Counter[str]()
    description, counts = what_is(model), counts_of(model)
    for name, parameter in base_parameters(model).items():
        in_adapted = counts[name] if id(parameter) in adapted else shares[id(parameter)]
        reached += in_adapted
        if in_adapted < counts[name]:
            others[description(name)] += counts[name] - in_adapted
    return reached, dict(others)
