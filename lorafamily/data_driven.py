"""Methods that look at data before training: their evidence, and the ranks that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lorafamily.activation import disabled
from lorafamily.batch import LossFn
from lorafamily.choice import Choice, shapes_of_targets
from lorafamily.errors import MethodError
from lorafamily.evidence import Evidence, LayerEvidence
from lorafamily.gathering import Stop, gathered, weights_of
from lorafamily.method import FromEvidence, Room


def gather_for(choice: Choice, data: Any, loss_fn: LossFn | None, seed: int) -> Evidence:
    """The evidence that the method of a choice looks at.

    Raises:
        MethodError: it looks at none.
    """
    initialisation = choice.method.initialisation
    if not isinstance(initialisation, FromEvidence):
        raise MethodError(f'method "{choice.spec}" looks at no data before training; leave out data and evidence')
    cosine = initialisation.stop_at()
    with disabled(choice.model):
        return gathered(
            choice.model,
            choice.targets,
            initialisation.wants,
            initialisation.directions(choice.sizing.rank),
            data,
            batches=initialisation.evidence_batches,
            loss_fn=loss_fn,
            seed=seed,
            memory=initialisation.evidence_memory,
            stop=None if cosine is None else Stop(cosine, lambda known: _initial_ranks(choice, initialisation, known)),
        )


def _initial_ranks(
    choice: Choice, initialisation: FromEvidence, evidence: Mapping[str, LayerEvidence]
) -> Mapping[str, int]:
    """The initial rank of every layer: as given by layer, or as the evidence says."""
    if choice.sizing.ranks is not None:
        return choice.sizing.ranks
    shapes = shapes_of_targets(choice.targets)
    sizing, method = choice.sizing, choice.method

    def parameters(layer: str, rank: int) -> int:
        return method.at(layer).count(*shapes[layer], rank)

    def slices(layer: str, rank: int) -> int:
        return rank

    if sizing.budget is not None:
        # With budget_at="end" the limit is larger: what equal ranks come to at first.
        limit = max(sizing.budget, sizing.initial_parameters) if sizing.budget_at == "end" else sizing.budget
        cost = parameters
    else:
        limit, cost = sum(min(sizing.rank, *shape) for shape in shapes.values()), slices
        limit = sizing.rank_budget or limit
    exact = sizing.budget is not None or sizing.rank_budget is not None
    return initialisation.ranks(evidence, Room(shapes, sizing.rank, limit, cost, exact, weights_of(choice.targets)))


def with_evidence(choice: Choice, data: Any, loss_fn: LossFn | None, evidence: Evidence | None, seed: int) -> Choice:
    """The choice with evidence, and with the ranks that follow from it where none were given by layer.

    Raises:
        MethodError: evidence is wanted and there is none, or the other way round, or it does not fit.
    """
    initialisation = choice.method.initialisation
    if not isinstance(initialisation, FromEvidence):
        for name, value in (("data", data), ("evidence", evidence), ("loss_fn", loss_fn)):
            if value is not None:
                raise MethodError(f'method "{choice.spec}" looks at no data before training; leave out {name}')
        return choice
    if data is not None and evidence is not None:
        raise MethodError("data and evidence are both given; evidence is what data gave, so give one")
    if data is None and loss_fn is not None:
        raise MethodError("loss_fn is for data, and there is none")
    if all(target.stored.is_meta for target in choice.targets.values()):
        return choice  # without values no ranks can be computed
    if data is None and evidence is None:
        raise MethodError(
            f'method "{choice.spec}" looks at {" and ".join(initialisation.wants)} before training: pass data=batches, '
            "as train takes them, or evidence=lorafamily.gather(...)"
        )
    if evidence is None:
        evidence = gather_for(choice, data, loss_fn, seed)
    _check_evidence(choice, initialisation, evidence)
    layers = {path: evidence.layers[path] for path in choice.targets}
    choice = replace(choice, evidence=layers, scale_slices=choice.sizing.rank if initialisation.one_scale else None)
    if choice.sizing.ranks is not None:
        return choice
    ranks, shapes = _initial_ranks(choice, initialisation, layers), shapes_of_targets(choice.targets)
    parameters = sum(choice.method.at(layer).count(*shapes[layer], rank) for layer, rank in ranks.items())
    sizing = replace(choice.sizing, ranks=ranks, rank=max(ranks.values()), initial_parameters=parameters)
    return replace(choice, sizing=sizing)


def _check_evidence(choice: Choice, initialisation: FromEvidence, evidence: Evidence) -> None:
    """Refuse evidence of other layers, or with less in it than is needed.

    Raises:
        MethodError: it does not fit.
    """
    if not isinstance(evidence, Evidence):
        raise MethodError(f"evidence is a {type(evidence).__name__}; it must be what lorafamily.gather returned")
    wants = initialisation.wants
    for path, target in choice.targets.items():
        layer, (d_out, d_in) = evidence.layers.get(path), target.shape
        if layer is None:
            raise MethodError(f"evidence has nothing of {path}; gather it with the same targets")
        if "gradients" in wants and (layer.gradient is None or tuple(layer.gradient.shape) != (d_out, d_in)):
            raise MethodError(f"evidence has no gradient of {path} in its shape, {d_out} × {d_in}; gather it anew")
        if "inputs" in wants:
            k = min(initialisation.directions(choice.sizing.rank), d_in)
            shape = (0, d_in) if layer.directions is None else tuple(layer.directions.shape)
            if shape[0] < k or shape[1] != d_in:
                raise MethodError(
                    f"evidence has {shape[0]} directions of {shape[1]} inputs of {path}, and {k} of {d_in} are needed; "
                    "gather it at the largest rank or budget that it is for"
                )
