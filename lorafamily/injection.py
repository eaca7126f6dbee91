"""Putting adapters into a model, choosing between them, and taking them out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from lorafamily import targets as targeting
from lorafamily.adapter import Adapter
from lorafamily.batch import call, to_device
from lorafamily.beside import base_values, movable_buffers
from lorafamily.budget import Sizing, solve
from lorafamily.deploy.merge import unmerge
from lorafamily.dropout import Dropout, DropoutKind
from lorafamily.errors import TargetError
from lorafamily.layers import onloaded
from lorafamily.method import Method
from lorafamily.parts import Fused, Target
from lorafamily.placement import (
    Model,
    ModelState,
    Placement,
    activate,
    check_can_place,
    let_train,
    noted,
    place,
    placement_of,
    refuse_merged,
    state_of,
    targets_of,
)
from lorafamily.quantised import packed_parameters
from lorafamily.reading import Reads, check_left_out
from lorafamily.registry import find
from lorafamily.site import keep_padding, site_on
from lorafamily.training.execution import evaluating


def apply(
    model: Model,
    method: str = "lora",
    *,
    budget: float | None = None,
    rank: int | None = None,
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
    seed: int | None = None,
    **method_options: Any,
) -> Model:
    """Put adapters into a model, in place, and freeze everything else. Nothing is changed if anything is refused.

    Args:
        model: any `nn.Module`; it comes back as the same object, computing what it computed before. Of a compiled one
            the model inside is adapted.
        method: a name from `lorafamily.methods()`, or names joined by "+" that differ on their axes.
        budget: trainable adapter numbers (not bytes); the largest rank that fits is chosen.
        rank: of every module, capped by the layer's size (LoRA²: the outer width k). At most one of `budget`, `rank`
            and `rank_budget` is given; with none it is the method's default rank.
        rank_budget: rank slices of all modules together (LoRA²: its singular values), whatever they cost.
        budget_at: "peak": the budget is never exceeded; "end": a method that prunes starts larger and ends within it.
        targets: layers to adapt: None or "all-linear" (without output head, pooler, the routers of experts and what
            the kernels of state-space mixers read), "attention", regular expressions searched for in full names (of
            linear layers; of embeddings and convolutions where one matches no linear layer), or a predicate of
            (name, module) that is asked for every layer that can carry an adapter.
        exclude: what of these is left out, named in the same way.
        fused: projections to adapt by parts, such as {"c_attn$": ["q", "k", "v"]}: regular expressions for linear
            layers with the names of their parts, of equal size, or with sizes in rows, which repeat if they add up to
            less than the layer has. A part is a target like a layer ("c_attn.q"); those of nn.MultiheadAttention
            ("q", "k", "v", "out") need no mention.
        example: a batch as `train` takes it, which the model is run on once. Layers whose weights it reads without
            calling them, so that an adapter would have no effect, are then left out with a warning, or refused where
            `targets` name them; without an example `train` finds them in its first batch.
        also_train: regular expressions for parameters that train too, such as a task head; saved along, counted apart.
        dropout: probability with which an entry of an adapter's input is dropped in training.
        dropout_kind: "entries", each on its own; or "features", for the whole batch: it costs nothing.
        name: of this set of adapters; a model can hold several, the one placed last is active.
        seed: of the random start; None draws one from torch's global generator.
        **method_options: options of the method, such as `alpha`; an unknown one is refused with a list of those known.

    Raises:
        MethodError, TargetError, BudgetError, StateError: see the message; the model is untouched.
    """
    choice = choose(
        model,
        method,
        budget=budget,
        rank=rank,
        rank_budget=rank_budget,
        budget_at=budget_at,
        targets=targets,
        exclude=exclude,
        fused=fused,
        example=example,
        also_train=also_train,
        dropout=dropout,
        dropout_kind=dropout_kind,
        name=name,
        **method_options,
    )
    drawn = int(torch.randint(2**31, (), device="cpu")) if seed is None else seed
    put(choice, choice.build(torch.Generator().manual_seed(drawn)))
    return model


@dataclass(frozen=True)
class Choice:
    """What `apply` is going to do, decided and checked: which method of which size on which layers of a model.

    `targets`: what gets an adapter, `beside`: parameters that train too, both by full name.
    """

    model: nn.Module
    name: str
    spec: str
    method: Method
    sizing: Sizing
    targets: dict[str, Target]
    beside: dict[str, nn.Parameter]
    dropout: Dropout
    by_default: bool

    def build(
        self, generator: torch.Generator, device: str | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Adapter]:
        """An adapter for every layer, as if that had its weight on another device (on "meta" nothing is drawn) or in
        another dtype."""
        built = {}
        for path, target in self.targets.items():
            with onloaded(target.layer):
                like = (
                    (target.held.dtype if target.held.is_floating_point() else torch.float32)
                    if dtype is None
                    else dtype
                )
                built[path] = self.method.build(  # a quantised weight's value is gone with the call
                    target.weight if device is None else torch.empty(target.shape, dtype=like, device=device),
                    self.sizing.rank,
                    dropout=self.dropout,
                    generator=generator,
                )
        return built


def choose(
    model: nn.Module,
    method: str = "lora",
    *,
    budget: float | None = None,
    rank: int | None = None,
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
    """What `apply` would do with the same arguments; it refuses what `apply` refuses, and changes nothing."""
    model = check_can_place(model, name)
    chosen = find(method).with_options(**method_options)
    drops = Dropout(dropout, dropout_kind)
    matched = targeting.match(model, targets, fused, exclude)
    by_default = targeting.by_default(targets)
    if example is not None:
        matched = _with_effect(model, matched, example, by_default)
    beside = match_beside(model, also_train, matched)
    shapes = {path: (d_in, d_out) for path, target in matched.items() for d_out, d_in in [target.shape]}
    chosen, sizing = solve(chosen, shapes, budget=budget, rank=rank, rank_budget=rank_budget, budget_at=budget_at)
    return Choice(model, name, method, chosen, sizing, matched, beside, drops, by_default)


def put(choice: Choice, adapters: Mapping[str, Adapter]) -> None:
    """Place what was chosen for a model and built."""
    state = state_of(choice.model)
    active = None if state is None or state.active is None else state.placements[state.active]
    parked = base_values(choice.beside, {} if active is None else active.parked)
    placement = Placement(choice.name, choice.spec, choice.method, choice.sizing, dict(adapters), parked)
    placement.by_default = choice.by_default
    place(choice.model, placement, choice.targets)


def _with_effect(model: nn.Module, matched: dict[str, Target], example: Any, by_default: bool) -> dict[str, Target]:
    """Those of the targets that an adapter has an effect on, found by running the model.

    Raises:
        TargetError: somebody named one that is without effect, or none is left.
    """
    device = next(iter(matched.values())).held.device
    buffers = {at: buffer.clone() for at, buffer in movable_buffers(model).items()}
    with Reads(matched) as reads, evaluating(model, device), torch.no_grad():
        call(model, to_device(example, device))
    for at, value in buffers.items():
        model.get_buffer(at).copy_(value)
    names = reads.without_effect()
    check_left_out(model, names, by_default and len(names) < len(matched))
    return {name: target for name, target in matched.items() if name not in names}


def match_beside(
    model: nn.Module, patterns: str | Sequence[str] | None, adapted: Mapping[str, Target]
) -> dict[str, nn.Parameter]:
    """The parameters that train beside the adapters; never the weight of an adapted layer, which merging replaces.

    Raises:
        TargetError: a pattern that matches no parameter, or one that matches such a weight.
    """
    beside = targeting.match_parameters(model, patterns)
    weights = {id(target.held): path for path, target in adapted.items()}
    packed = packed_parameters(model)
    for name, parameter in beside.items():
        if id(parameter) in packed:
            raise TargetError(f"also_train names {name}, which is quantised and cannot train; an adapter on it can")
        if id(parameter) in weights:
            raise TargetError(
                f"also_train names {name}, the weight of a layer that gets an adapter ({weights[id(parameter)]}); "
                "train one or the other"
            )
    return beside


def switch(model: Model, name: str | None) -> Model:
    """Make another of the model's adapters the active and trainable one; None switches all of them off.

    Raises:
        StateError: no adapter of that name, or one is merged.
    """
    owner, state = noted(model)
    if state is None and name is None:
        return model
    placement = None if name is None else placement_of(owner, name)
    refuse_merged(state)
    assert state is not None
    activate(owner, name)
    if placement is not None:
        for other in state.placements.values():
            if other is not placement:
                let_train(owner, other, False)
        let_train(owner, placement, True)
    return model


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Inside the block the model is the base model, with the head it had before training.

    Raises:
        StateError: an adapter is merged.
    """
    state = state_of(model)
    if state is None:
        yield model
        return
    refuse_merged(state)
    before = state.active
    activate(model, None)
    try:
        yield model
    finally:
        activate(model, before)


def remove(model: Model, name: str | None = None) -> Model:
    """Take adapters out: those of one name, or all. What is left is the base model, to the last bit.

    A merged adapter is unmerged first. With the last adapter go the frozen flags: `requires_grad` is what it was.

    Raises:
        StateError: no adapter of that name.
    """
    owner, state = noted(model)
    if name is None and state is None:
        return model
    leaving = [placement_of(owner, name)] if name is not None else list(cast(ModelState, state).placements.values())
    assert state is not None
    unmerge(owner)
    for placement in leaving:
        if state.active == placement.name:
            activate(owner, None)
        targets = targets_of(owner)
        for path in placement.adapters:
            target = targets[path]
            site = site_on(target.layer)
            assert site is not None
            site.drop(target.part, placement.name)
        del state.placements[placement.name]
    keep_padding(owner)
    if not state.placements:
        for path, parameter in owner.named_parameters():
            parameter.requires_grad_(state.trained_before.get(path, parameter.requires_grad))
    return model
