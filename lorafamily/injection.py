"""Putting adapters into a model, choosing between them, and taking them out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import nn

from lorafamily import targets as targeting
from lorafamily.adapter import Adapter
from lorafamily.batch import LossFn, call, to_device
from lorafamily.beside import base_values, movable_buffers
from lorafamily.budget import Sizing, ranks_by_module, solve
from lorafamily.deploy.merge import unmerge
from lorafamily.dropout import Dropout, DropoutKind
from lorafamily.elsewhere import offloaded_value, refuse_elsewhere
from lorafamily.errors import BudgetError, MethodError, TargetError
from lorafamily.evidence import Evidence, LayerEvidence
from lorafamily.gathering import Stop, gathered, weights_of
from lorafamily.layers import onloaded, whole_weights
from lorafamily.method import FromEvidence, Method, Room
from lorafamily.parts import Fused, Target
from lorafamily.patterns import by_layer
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
    choice = _informed(choice, data, loss_fn, evidence, drawn)
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
    return _gathered(choose(model, method, **chosen), data, loss_fn, seed)


def _gathered(choice: Choice, data: Any, loss_fn: LossFn | None, seed: int) -> Evidence:
    start = choice.method.initialisation
    if not isinstance(start, FromEvidence):
        raise MethodError(f'method "{choice.spec}" looks at no data before training; leave out data and evidence')
    cosine = start.stop_at()
    with disabled(choice.model):
        return gathered(
            choice.model,
            choice.targets,
            start.wants,
            start.directions(choice.sizing.rank),
            data,
            batches=start.evidence_batches,
            loss_fn=loss_fn,
            seed=seed,
            memory=start.evidence_memory,
            stop=None if cosine is None else Stop(cosine, lambda known: _start_ranks(choice, start, known)),
        )


def _start_ranks(choice: Choice, start: FromEvidence, evidence: Mapping[str, LayerEvidence]) -> Mapping[str, int]:
    """The rank that every layer starts with: as given by layer, or as evidence says."""
    if choice.sizing.ranks is not None:
        return choice.sizing.ranks
    shapes = _shapes(choice.targets)
    sizing, method = choice.sizing, choice.method

    def parameters(layer: str, rank: int) -> int:
        return method.at(layer).count(*shapes[layer], rank)

    def slices(layer: str, rank: int) -> int:
        return rank

    if sizing.budget is not None:
        # With budget_at="end" the start is larger: what equal ranks begin with.
        limit, cost = max(sizing.budget, sizing.start) if sizing.budget_at == "end" else sizing.budget, parameters
    else:
        limit, cost = sum(min(sizing.rank, *shape) for shape in shapes.values()), slices
        limit = sizing.rank_budget or limit
    exact = sizing.budget is not None or sizing.rank_budget is not None
    return start.ranks(evidence, Room(shapes, sizing.rank, limit, cost, exact, weights_of(choice.targets)))


def _informed(choice: Choice, data: Any, loss_fn: LossFn | None, evidence: Evidence | None, seed: int) -> Choice:
    """The choice with evidence, and with the ranks that follow from it where none were given by layer.

    Raises:
        MethodError: evidence is wanted and there is none, or the other way round, or it does not fit.
    """
    start = choice.method.initialisation
    if not isinstance(start, FromEvidence):
        if unused := [name for name, value in (("data", data), ("evidence", evidence)) if value is not None]:
            raise MethodError(f'method "{choice.spec}" looks at no data before training; leave out {unused[0]}')
        if loss_fn is not None:
            raise MethodError(f'method "{choice.spec}" looks at no data before training; leave out loss_fn')
        return choice
    if data is not None and evidence is not None:
        raise MethodError("data and evidence are both given; evidence is what data gave, so give one")
    if data is None and loss_fn is not None:
        raise MethodError("loss_fn is for data, and there is none")
    if all(target.held.is_meta for target in choice.targets.values()):
        return choice  # of nothing nothing can be computed, ranks neither
    if data is None and evidence is None:
        raise MethodError(
            f'method "{choice.spec}" looks at {" and ".join(start.wants)} before training: pass data=batches, as train '
            "takes them, or evidence=lorafamily.gather(...)"
        )
    if evidence is None:
        evidence = _gathered(choice, data, loss_fn, seed)
    _check_evidence(choice, start, evidence)
    layers = {path: evidence.layers[path] for path in choice.targets}
    choice = replace(choice, evidence=layers, alike=choice.sizing.rank if start.one_scale else None)
    if choice.sizing.ranks is not None:
        return choice
    ranks, shapes = _start_ranks(choice, start, layers), _shapes(choice.targets)
    begins = sum(choice.method.at(layer).count(*shapes[layer], rank) for layer, rank in ranks.items())
    return replace(choice, sizing=replace(choice.sizing, ranks=ranks, rank=max(ranks.values()), start=begins))


def _check_evidence(choice: Choice, start: FromEvidence, evidence: Evidence) -> None:
    """Refuse evidence of other layers, or of less.

    Raises:
        MethodError: it does not fit.
    """
    if not isinstance(evidence, Evidence):
        raise MethodError(f"evidence is a {type(evidence).__name__}; it must be what lorafamily.gather returned")
    for path, target in choice.targets.items():
        layer, (d_out, d_in) = evidence.layers.get(path), target.shape
        if layer is None:
            raise MethodError(f"evidence has nothing of {path}; gather it with the same targets")
        if "gradients" in start.wants and (layer.gradient is None or tuple(layer.gradient.shape) != (d_out, d_in)):
            raise MethodError(f"evidence has no gradient of {path} in its shape, {d_out} × {d_in}; gather it anew")
        if "inputs" in start.wants:
            k = min(start.directions(choice.sizing.rank), d_in)
            shape = (0, d_in) if layer.directions is None else tuple(layer.directions.shape)
            if shape[0] < k or shape[1] != d_in:
                raise MethodError(
                    f"evidence has {shape[0]} directions of {shape[1]} inputs of {path}, and {k} of {d_in} are needed; "
                    "gather it at the largest rank or budget that it is for"
                )


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
    evidence: Mapping[str, LayerEvidence] | None = None
    alike: int | None = None
    """Slices that give the scale of all layers; None: each layer's own."""

    def build(
        self, generator: torch.Generator, *, meta: bool = False, dtype: torch.dtype | None = None
    ) -> dict[str, Adapter]:
        """An adapter for every layer; with `meta` as if all weights were on the meta device, where nothing is drawn, in
        another `dtype` perhaps."""
        built = {}
        # Of no slices there is no alpha/r: a layer that begins without is scaled like the one with the most.
        slices = {
            path: self.method.at(path).slices(*shape, self.sizing.rank_of(path))
            for path, shape in _shapes(self.targets).items()
        }
        for path, target in self.targets.items():
            with onloaded(target.layer) if meta else whole_weights(target.layer):
                held = target.held.dtype if target.held.is_floating_point() else torch.float32
                planned = torch.empty(target.shape, dtype=dtype or held, device="meta")
                built[path] = self.method.at(path).build(  # a quantised weight's value is gone with the call
                    planned if meta else target.weight,
                    self.sizing.rank_of(path),
                    dropout=self.dropout,
                    generator=generator,
                    scaled_as=self.alike or (None if slices[path] else max(slices.values())),
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
        MethodError, TargetError, BudgetError, StateError: as `apply`.
    """
    model = check_can_place(model, name)
    width, method_options = _width(method, rank, method_options)
    chosen = find(method).with_options(**method_options)
    drops = Dropout(dropout, dropout_kind)
    if dropout_kind != "entries" and not dropout:
        raise MethodError(f"dropout_kind={dropout_kind!r} has no effect without dropout, which is {dropout!r}")
    matched = targeting.match(model, targets, fused, exclude)
    by_default = targeting.by_default(targets)
    if example is not None:
        matched = _with_effect(model, matched, example, by_default)
    beside = match_beside(model, also_train, matched)
    shapes = _shapes(matched)
    own = find(method).options()
    by_name = {option: by_layer(value, shapes, option, own[option]) for option, value in chosen.layered.items()}
    chosen = chosen.with_options(**by_name)
    if width is not None:
        rank = width
    elif rank is not None:
        chosen = _with_slices_for(chosen, rank, shapes, given="slices" in method_options)
    chosen, sizing = solve(chosen, shapes, budget=budget, rank=rank, rank_budget=rank_budget, budget_at=budget_at)
    return Choice(model, name, method, chosen, sizing, matched, beside, drops, by_default)


def _width(method: str, rank: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What somebody says of the size that a budget buys where that is no rank, and the other options.

    Raises:
        BudgetError: a rank was given too.
    """
    by = find(method).parametrisation.sized_by
    if by == "rank" or by not in options:
        return None, options
    if rank is not None:
        raise BudgetError(f"rank={rank!r} and {by}={options[by]!r} are both given; a rank r means {by} r: give one")
    return options[by], {name: value for name, value in options.items() if name != by}


def _with_slices_for(
    method: Method, rank: int | Mapping[str, int], shapes: Mapping[str, tuple[int, int]], given: bool
) -> Method:
    """A method whose slices are counted apart from its width, with as many as updates of that rank need.

    Raises:
        BudgetError: fewer were asked for.
    """
    by, of = method.parametrisation.sliced_by, method.parametrisation.sized_by
    if by == of:
        return method
    needed = ranks_by_module(rank, shapes) if isinstance(rank, Mapping) else dict.fromkeys(shapes, rank)
    if not all(isinstance(r, int) for r in needed.values()):
        return method  # which `solve` refuses
    present = {path: cast(int, method.at(path).parametrisation_options[by]) for path in shapes}
    short = [path for path, r in needed.items() if present[path] < min(r, *shapes[path])]
    if not short:
        return method
    if given:
        raise BudgetError(
            f"rank={rank!r} with {present[short[0]]} {by} on {short[0]}: ΔW has at most as high a rank as it has {by}; "
            f"say {of}=... and {by}=..., or more {by}"
        )
    return method.with_options(**{by: {path: max(present[path], needed[path]) for path in shapes}})


def _shapes(targets: Mapping[str, Target]) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) by name."""
    return {path: (d_in, d_out) for path, target in targets.items() for d_out, d_in in [target.shape]}


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
        StateError: a parameter that is offloaded, or spread over processes.
    """
    beside = targeting.match_parameters(model, patterns)
    weights = {id(target.held): path for path, target in adapted.items()}
    packed = packed_parameters(model)
    planned = {at for at, p in beside.items() if p.is_meta and offloaded_value(model, at) is None}  # nobody's weights
    refuse_elsewhere(beside, beside.keys() - planned, "which also_train names")
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
