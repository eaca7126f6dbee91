"""Putting adapters into a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from lorafamily import targets as targeting
from lorafamily.adapter import Adapter
from lorafamily.batch import LossFn
from lorafamily.choice import Choice, choose
from lorafamily.data_driven import gather_for, with_evidence
from lorafamily.dropout import DropoutKind
from lorafamily.evidence import Evidence
from lorafamily.layers.extra_trained import base_values
from lorafamily.layers.placement import Model, place, state_of
from lorafamily.layers.rows import Fused
from lorafamily.layers.state import Placement


def apply(
    model: Model,
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
    data: Any = None,
    loss_fn: LossFn | None = None,
    evidence: Evidence | None = None,
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
        budget: trainable adapter parameters (not bytes); the largest rank that fits is chosen.
        rank: that the update of every layer can have, capped by the layer's size; or ranks by layer, see below. At most
            one of `budget`, `rank` and `rank_budget` is given (LoRA²: or `width`, its k); with none it is the method's
            default rank.
        rank_budget: slices of all modules together, whatever they cost.
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
        data: batches as `train` takes them, for a method that looks at data before it starts ("eva", "gora"); no other
            takes them. The first `evidence_batches` of them are run, in eval mode; processes must be given the same.
        loss_fn: as `train` takes it, for these batches.
        evidence: what `gather` found, in the place of `data`.
        also_train: regular expressions for parameters that train too, such as a task head; saved along, counted apart.
        dropout: probability with which an entry of an adapter's input is dropped in training.
        dropout_kind: "entries", each on its own; or "features", for the whole batch: it costs nothing.
        name: of this set of adapters; a model can hold several, the one placed last is active.
        seed: of the random start; None draws one from torch's global generator.
        **method_options: options of the method, such as `alpha`; an unknown one is refused with a list of those known.

    By layer: `rank`, `alpha` and the method's own sizes (LoRA²'s `width`, `slices`) also take a mapping. A key that is
    a target's full name, as in what `ranks_at` gives, stands for that layer alone; others are regular expressions, of
    which the first that is found in a name counts. A last key ".*" is for all other layers; without it their rank is
    0 (nothing is computed there, and an allocation that grows may change that), and alpha and sizes the method's own. A
    key that decides no layer is refused.

    Raises:
        MethodError, TargetError, BudgetError, StateError, DataError: see the message; the model is untouched.
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
    choice = with_evidence(choice, data, loss_fn, evidence, drawn)
    put(choice, choice.build(torch.Generator().manual_seed(drawn)))
    return model


def gather(
    model: nn.Module,
    method: str,
    data: Any,
    *,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    **chosen: Any,
) -> Evidence:
    """What a method looks at before training, to be saved, and used by `apply(evidence=...)` any number of times.

    It fits the same targets, and methods that want no more: the same or fewer directions of inputs, which follow from
    the rank or the budget. The model is left as it is.

    Args:
        model, method, data, loss_fn: as `apply` takes them.
        seed: of the decomposition of wide layers' inputs, which is randomised.
        **chosen: what else `apply` takes to choose layers and sizes, such as `budget` and `targets`.

    Raises:
        MethodError, TargetError, BudgetError, StateError, DataError: as `apply`.
    """
    return gather_for(choose(model, method, **chosen), data, loss_fn, seed)


def put(choice: Choice, adapters: Mapping[str, Adapter]) -> None:
    """Place what was chosen for a model and built."""
    state = state_of(choice.model)
    active = None if state is None or state.active is None else state.placements[state.active]
    inactive = base_values(choice.extra_trained, {} if active is None else active.inactive_values)
    placement = Placement(choice.name, choice.spec, choice.method, choice.sizing, dict(adapters), inactive)
    placement.by_default = choice.by_default
    place(choice.model, placement, choice.targets)
