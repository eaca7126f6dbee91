"""Methods that look at data before training: their evidence, and the ranks that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from lorafamily.activation import disabled
from lorafamily.batch import LossFn
from lorafamily.budget import parameters
from lorafamily.choice import Choice, shapes_of_targets
from lorafamily.errors import MethodError
from lorafamily.evidence import Evidence, LayerEvidence
from lorafamily.gathering import gathered
from lorafamily.layers.weights import whole_weights
from lorafamily.method import FromEvidence, Room


def gather_for(choice: Choice, data: Any, loss_fn: LossFn | None, seed: int) -> Evidence:
    """The evidence that the chosen method looks at.

    Raises:
        MethodError: it looks at no data.
    """
    initialisation = choice.method.initialisation
    if not isinstance(initialisation, FromEvidence):
        raise MethodError(f'method "{choice.spec}" looks at no data before training; leave out data and evidence')
    rank, needed = choice.sizing.rank, partial(_initial_ranks, choice, initialisation)
    with disabled(choice.model):
        return gathered(choice.model, choice.targets, initialisation, rank, data, loss_fn, seed, needed)


def _initial_ranks(
    choice: Choice, initialisation: FromEvidence, evidence: Mapping[str, LayerEvidence]
) -> Mapping[str, int]:
    """The initial rank of every layer: the ranks that were given by layer, else those that follow from evidence."""
    if choice.sizing.ranks is not None:
        return choice.sizing.ranks
    shapes = shapes_of_targets(choice.targets)
    sizing = choice.sizing

    def cost(layer: str, rank: int) -> int:
        return rank if sizing.budget is None else choice.method.at(layer).count(*shapes[layer], rank)

    def weight(layer: str) -> Tensor:
        with whole_weights(choice.targets[layer].layer):  # also where it is offloaded or sharded
            return choice.targets[layer].weight.detach().clone()

    if sizing.budget is None:
        limit = sizing.rank_budget or sum(min(sizing.rank, *shape) for shape in shapes.values())
    else:  # with budget_at="end" the run may begin with as many parameters as equal ranks have
        limit = max(sizing.budget, sizing.initial_parameters) if sizing.budget_at == "end" else sizing.budget
    exact = sizing.budget is not None or sizing.rank_budget is not None
    return initialisation.ranks(evidence, Room(shapes, sizing.rank, limit, cost, exact, weight))


def with_evidence(choice: Choice, data: Any, loss_fn: LossFn | None, evidence: Evidence | None, seed: int) -> Choice:
    """The choice with evidence, and with the ranks that follow from it unless ranks were given by layer.

    Raises:
        MethodError: the method needs evidence and got none, got some that it does not need, or it does not fit.
    """
    initialisation = choice.method.initialisation
    if not isinstance(initialisation, FromEvidence):
        for name, value in (("data", data), ("evidence", evidence), ("loss_fn", loss_fn)):
            if value is not None:
                raise MethodError(f'method "{choice.spec}" looks at no data before training; leave out {name}')
        return choice
    if data is not None and evidence is not None:
        raise MethodError("data and evidence are both given; evidence was gathered from data, so give one")
    if data is None and loss_fn is not None:
        raise MethodError("loss_fn is for data, and no data is given")
    if all(target.stored.is_meta for target in choice.targets.values()):
        return choice  # without values no ranks can be computed
    if data is None and evidence is None:
        raise MethodError(
            f'method "{choice.spec}" looks at {" and ".join(initialisation.wants)} before training: pass data=batches, '
            "of the form that train takes, or evidence=lorafamily.gather(...)"
        )
    if evidence is None:
        evidence = gather_for(choice, data, loss_fn, seed)
    _check_evidence(choice, initialisation, evidence)
    layers = {path: evidence.layers[path] for path in choice.targets}
    choice = replace(choice, evidence=layers, scale_slices=choice.sizing.rank if initialisation.one_scale else None)
    if choice.sizing.ranks is not None:
        return choice
    ranks = _initial_ranks(choice, initialisation, layers)
    count = parameters(choice.method, shapes_of_targets(choice.targets), ranks)
    sizing = replace(choice.sizing, ranks=ranks, rank=max(ranks.values()), initial_parameters=count)
    return replace(choice, sizing=sizing)


def _check_evidence(choice: Choice, initialisation: FromEvidence, evidence: Evidence) -> None:
    """Refuse evidence that lacks a layer, or what the method needs of one."""
    if not isinstance(evidence, Evidence):
        raise MethodError(f"evidence is a {type(evidence).__name__}; it must be what lorafamily.gather returned")
    wants = initialisation.wants
    for path, target in choice.targets.items():
        layer, (d_out, d_in) = evidence.layers.get(path), target.shape
        if layer is None:
            raise MethodError(f"evidence has nothing of {path}; gather it with the same targets as here")
        if "gradients" in wants and (layer.gradient is None or tuple(layer.gradient.shape) != (d_out, d_in)):
            raise MethodError(f"evidence has no gradient of {path} of shape {d_out} × {d_in}; gather it again")
        if "inputs" in wants:
            k = min(initialisation.directions(choice.sizing.rank), d_in)
            shape = (0, d_in) if layer.directions is None else tuple(layer.directions.shape)
            if shape[0] < k or shape[1] != d_in:
                raise MethodError(
                    f"evidence has {shape[0]} directions of {shape[1]} inputs of {path}, and {k} of {d_in} are needed; "
                    "gather it with the largest rank or budget that you will use it with"
                )
