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
    """Put adapters into a model, in place, and freeze everything else. If it raises an error, the model is unchanged.

    Args:
        model: any `nn.Module`; the same object is returned. Of a compiled model the module inside is adapted.
        method: a name from `lorafamily.methods()`, or names joined by "+" that differ on their axes.
        budget: trainable adapter parameters (not bytes); the largest rank that fits is chosen. At most one of `budget`,
            `rank` and `rank_budget` is given (LoRA²: or `width`, its k); default: the method's rank.
        rank: of the update of every layer, capped by the layer's size; or ranks by layer, see below.
        rank_budget: slices of all modules together, whatever parameters they have.
        budget_at: "peak": the run never exceeds the budget; "end": a method that prunes starts larger, ends within.
        targets, exclude: layers to adapt, and those of them to leave out: None or "all-linear" (no output head, pooler,
            routers of experts, indexers of tokens, or what the kernels of state-space mixers read), "attention",
            regular expressions searched for in full names (targets: of linear layers; of embeddings and convolutions
            too where one matches no linear layer but output heads), or a predicate of (name, module), asked of every
            layer that can carry an adapter.
        fused: linear layers to adapt by parts, such as {"c_attn$": ["q", "k", "v"]}: by regular expression the names of
            parts of equal size, or names with sizes in rows, repeated if their sum is smaller than the layer. A part is
            a target like a layer ("c_attn.q"). nn.MultiheadAttention always has "q", "k", "v" and "out".
        example: a batch, on which the model is run once to find layers whose weights are read without a call, where an
            adapter has no effect. They are left out with a warning, or refused where `targets` names them.
        data: batches as `train` takes them, the same on every process, for a method that looks at data before training
            ("eva", "gora"); the first `evidence_batches` are run, in eval mode.
        loss_fn: as `train` takes it, for these batches.
        evidence: what `gather` returned, instead of `data`.
        also_train: regular expressions for parameters that train too, such as a task head; saved with the adapters,
            counted apart.
        dropout, dropout_kind: probability with which each of an adapter's input "entries" is dropped in training, or
            each of its "features", for the whole batch, which takes no time or memory.
        name: of these adapters; a model can have several sets, of which the one placed last is active.
        seed: of the random initialisation; None draws one from torch's global generator.
        **method_options: such as `alpha`; an error about an unknown option lists those that the method has.

    `rank`, `alpha` and the method's sizes (LoRA²'s `width`, `slices`) can be mappings, by layer. A target's full name
    means that layer alone; other keys are regular expressions, of which the first found in a name counts. Layers
    without a key have rank 0 and the method's default alpha and sizes; a key without effect is an error.

    Raises:
        MethodError, AllocationError, TargetError, BudgetError, StateError, DataError: see the message; the model is
            untouched.
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
    seed = int(torch.randint(2**31, (), device="cpu")) if seed is None else seed
    choice = with_evidence(choice, data, loss_fn, evidence, seed)
    put(choice, choice.build(torch.Generator().manual_seed(seed)))
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
    """Gather the evidence that a method looks at before training, to be saved and given to `apply(evidence=...)`.

    It fits the same targets, and methods that need at most as many directions of the inputs; how many follows from the
    rank or the budget. The model is unchanged afterwards.

    Args:
        model, method, data, loss_fn: as `apply` takes them.
        seed: of the randomised decomposition of inputs to wide layers.
        **chosen: arguments of `apply` that choose layers and sizes, such as `budget` and `targets`.

    Raises:
        MethodError, AllocationError, TargetError, BudgetError, StateError, DataError: as `apply`.
    """
    return gather_for(choose(model, method, **chosen), data, loss_fn, seed)


def put(choice: Choice, adapters: Mapping[str, Adapter]) -> None:
    """Place the adapters that `choice.build` made."""
    state = state_of(choice.model)
    active = None if state is None or state.active is None else state.placements[state.active]
    inactive = base_values(choice.extra_trained, {} if active is None else active.inactive_values)
    placement = Placement(choice.name, choice.spec, choice.method, choice.sizing, dict(adapters), inactive)
    placement.by_default = choice.by_default
    place(choice.model, placement, choice.targets)
