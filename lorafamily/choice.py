"""Decide and check what `apply` is going to do, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from lorafamily import targets as targeting
from lorafamily.adapter import Adapter
from lorafamily.allocation.scored_allocation import ScoredAllocation
from lorafamily.batch import call, to_device
from lorafamily.budget import Shapes, Sizing, ranks_by_module, solve
from lorafamily.dropout import Dropout, DropoutKind
from lorafamily.errors import BudgetError, MethodError
from lorafamily.evidence import LayerEvidence
from lorafamily.layers.extra_trained import movable_buffers
from lorafamily.layers.placement import check_can_place
from lorafamily.layers.rows import Fused
from lorafamily.layers.target import Target
from lorafamily.layers.uncalled import WeightReads, check_left_out, warn_read_elsewhere
from lorafamily.layers.weights import onloaded, whole_weights
from lorafamily.method import Method
from lorafamily.patterns import by_layer
from lorafamily.registry import find, find_scorer
from lorafamily.training.execution import evaluating


@dataclass(frozen=True)
class Choice:
    """Which method of which size `apply` puts on which layers of a model.

    `spec`: the method's name; `targets` get adapters, `extra_trained` parameters train too, both by full name.
    `scale_slices`: the number of slices that sets the scale of all layers; None: every layer's own.
    """

    model: nn.Module
    name: str
    spec: str
    method: Method
    sizing: Sizing
    targets: dict[str, Target]
    extra_trained: dict[str, nn.Parameter]
    dropout: Dropout
    by_default: bool
    evidence: Mapping[str, LayerEvidence] | None = None
    scale_slices: int | None = None

    def build(
        self, generator: torch.Generator, *, meta: bool = False, dtype: torch.dtype | None = None
    ) -> dict[str, Adapter]:
        """An adapter for every target. `meta`: on the meta device, where nothing is drawn, perhaps in another `dtype`
        than the weights'."""
        built = {}
        # Without slices alpha/r is undefined: such a layer gets the scale of the layer with the most.
        slices = {
            path: self.method.at(path).slices(*shape, self.sizing.rank_of(path))
            for path, shape in shapes_of_targets(self.targets).items()
        }
        for path, target in self.targets.items():
            with onloaded(target.layer) if meta else whole_weights(target.layer):
                present = target.stored.dtype if target.stored.is_floating_point() else torch.float32
                planned = torch.empty(target.shape, dtype=dtype or present, device="meta")
                built[path] = self.method.at(path).build(  # the dequantised weight is freed after the call
                    planned if meta else target.weight,
                    self.sizing.rank_of(path),
                    dropout=self.dropout,
                    generator=generator,
                    scaled_as=self.scale_slices or (None if slices[path] else max(slices.values())),
                    evidence=None if self.evidence is None else self.evidence[path],
                )
        return built


def choose(
    model: nn.Module,
    method: str = "lora",
    *,
    budget: float | None = None,
    rank: int | Mapping[str, int] | None = None,
    rank_budget: int | None = None,
    budget_at: Literal["peak", "end"] = "peak",
    targets: targeting.Targets = None,
    exclude: targeting.Targets = None,
    fused: Fused | None = None,
    example: Any = None,
    also_train: str | Sequence[str] | None = None,
    dropout: float = 0.0,
    dropout_kind: DropoutKind = "entries",
    name: str = "default",
    **method_options: Any,
) -> Choice:
    """What `apply` would do with the same arguments; it refuses what `apply` refuses, and changes nothing.

    Raises:
        MethodError, AllocationError, TargetError, BudgetError, StateError: as `apply`.
    """
    model = check_can_place(model, name)
    named = find(method)
    sized_by = named.parametrisation.sized_by
    width = None if sized_by == "rank" else method_options.pop(sized_by, None)
    if width is not None and rank is not None:
        raise BudgetError(
            f"rank={rank!r} and {sized_by}={width!r} are both given; a rank r means {sized_by} r: give one"
        )
    chosen = named.with_options(**method_options)
    if isinstance(chosen.allocation, ScoredAllocation):
        find_scorer(chosen.allocation.scorer)
    drops = Dropout(dropout, dropout_kind)
    if dropout_kind != "entries" and not dropout:
        raise MethodError(f"dropout_kind={dropout_kind!r} has no effect without dropout, which is {dropout!r}")
    matched = targeting.match(model, targets, fused, exclude)
    by_default = targeting.by_default(targets)
    if example is not None:
        matched = _with_effect(model, matched, example, by_default)
    extra_trained = targeting.match_extra_trained(model, also_train, matched)
    shapes = shapes_of_targets(matched)
    defaults = named.options()
    layered = {option: by_layer(value, shapes, option, defaults[option]) for option, value in chosen.layered.items()}
    chosen = chosen.with_options(**layered)
    if width is not None:
        rank = width
    elif rank is not None:
        chosen = _with_slices_for(chosen, rank, shapes, method_options)
    chosen, sizing = solve(chosen, shapes, budget=budget, rank=rank, rank_budget=rank_budget, budget_at=budget_at)
    return Choice(model, name, method, chosen, sizing, matched, extra_trained, drops, by_default)


def _with_slices_for(
    method: Method, rank: int | Mapping[str, int], shapes: Shapes, options: Mapping[str, Any]
) -> Method:
    """The method with enough slices for updates of that rank, where slices are a size of their own (LoRA²)."""
    by, of = method.parametrisation.sliced_by, method.parametrisation.sized_by
    if by == of:
        return method
    needed = ranks_by_module(rank, shapes) if isinstance(rank, Mapping) else dict.fromkeys(shapes, rank)
    if not all(isinstance(r, int) for r in needed.values()):
        return method  # `solve` refuses these ranks
    present = {path: cast(int, method.at(path).parametrisation_options[by]) for path in shapes}
    short = [path for path, r in needed.items() if present[path] < min(r, *shapes[path])]
    if not short:
        return method
    if by in options:
        raise BudgetError(
            f"rank={rank!r} with {present[short[0]]} {by} on {short[0]}: the rank of ΔW is at most the number of {by}; "
            f"say {of}=... and {by}=..., or more {by}"
        )
    return method.with_options(**{by: {path: max(present[path], needed[path]) for path in shapes}})


def shapes_of_targets(targets: Mapping[str, Target]) -> Shapes:
    """(d_in, d_out) of every target, by name."""
    return {path: (d_in, d_out) for path, target in targets.items() for d_out, d_in in [target.shape]}


def _with_effect(model: nn.Module, matched: dict[str, Target], example: Any, by_default: bool) -> dict[str, Target]:
    """The targets on which an adapter has an effect, found by running the model on the example."""
    device = next(iter(matched.values())).stored.device
    buffers = {at: buffer.clone() for at, buffer in movable_buffers(model).items()}
    with WeightReads(matched) as reads, evaluating(model, device), torch.no_grad():
        call(model, to_device(example, device))
    for at, value in buffers.items():
        model.get_buffer(at).copy_(value)
    names = reads.without_effect()
    check_left_out(model, names, by_default and len(names) < len(matched))
    warn_read_elsewhere(model, reads.read_elsewhere(model))
    return {name: target for name, target in matched.items() if name not in names}
