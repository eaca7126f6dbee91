"""ElaLoRA and FlexLoRA: which slices move where, and the cases their formulas leave open. LoRA+: rates by role."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import lorafamily
from conftest import assert_merged, data, logits, perturb_, tiny
from lorafamily.allocation.allocator import Allocator
from lorafamily.allocation.run import Run
from lorafamily.layers.placement import placement_of
from lorafamily.variants.flexlora import entropy

MOVES = {"warmup": 2, "final": 4, "interval": 3}


def allocator_of(model, steps: int = 20) -> Allocator:
    placement = placement_of(model)
    sizing = placement.sizing
    run = Run(model, placement.adapters, steps, sizing.budget, sizing.rank_budget)
    return placement.method.allocation.begin(run)


def test_entropy_and_the_cases_it_leaves_open():
    assert entropy(torch.tensor([2.0, 2.0, 2.0])) == pytest.approx(1)
    assert entropy(torch.tensor([5.0, 0.0])) == 0
    s = torch.tensor([3.0, 4.0]).square() / 25
    assert entropy(torch.tensor([3.0, 4.0])) == pytest.approx(float(-(s * s.log()).sum() / math.log(2)))
    assert entropy(torch.tensor([3.0])) == 1
    assert entropy(torch.zeros(3)) == entropy(torch.zeros(1)) == entropy(torch.zeros(0)) == 0


def planted(model, singular: dict[str, list[float]]) -> None:
    for name, adapter in placement_of(model).adapters.items():
        adapter.update.singular.data = torch.tensor(singular[name])


def test_flexlora_takes_the_smallest_of_the_uneven_and_gives_to_the_even():
    model = lorafamily.apply(tiny(), "flexlora", rank=3, targets="attention", seed=0, moved=2, **MOVES)
    names = list(placement_of(model).adapters)
    uneven = {names[0]: [9.0, -0.1, 1.0], names[1]: [0.2, 9.0, 0.3]}
    even = {names[2]: [1.0, -1.0, 1.0], names[3]: [0.9, 1.0, 1.0]}
    planted(model, {name: [1.0, 2.0, 3.0] for name in names} | uneven | even)
    allocator = allocator_of(model)
    assert allocator.due == [3, 6, 9, 12, 15]
    assert [allocator.slices_at(step) for step in allocator.due] == [2, 1, 1, 1, 1]
    before = logits(model)
    decision = allocator.decide(3)
    moved = {name: rank for name, rank in decision.after.items() if rank != 3}
    assert moved == {names[0]: 2, names[1]: 2, names[2]: 4, names[3]: 4}
    left = {name: placement_of(model).adapters[name].update.singular.tolist() for name in moved}
    assert left[names[0]] == [9.0, 1.0]
    assert left[names[1]] == pytest.approx([9.0, 0.3])
    assert left[names[2]] == [1.0, -1.0, 1.0, 0.0]
    assert not torch.equal(logits(model), before)  # two slices went
    assert decision.scores[names[0]] == pytest.approx([9.0, 0.1, 1.0])


def test_elalora_takes_the_lowest_of_all_and_gives_to_those_whose_lowest_is_highest():
    model = lorafamily.apply(tiny(), "elalora", rank=2, targets="attention", seed=0, moved=3, **MOVES)
    names = list(placement_of(model).adapters)
    allocator = allocator_of(model)
    scores = {name: torch.tensor([5.0 + i, 6.0 + i]).double() for i, name in enumerate(names)}
    scores[names[0]] = torch.tensor([1.0, 2.0]).double()
    scores[names[2]] = torch.tensor([9.0, 0.5]).double()
    allocator.scorer.scores = lambda: scores
    allocator.observed = 1
    after = allocator.decide(3).after  # ⌈3 (13/14)³⌉ = 3
    assert [after[names[i]] for i in (0, 2)] == [0, 1]
    assert {name for name, rank in after.items() if rank == 3} == set(names[-3:])
    assert sum(after.values()) == 2 * len(names)


def test_a_module_gets_at_most_one_slice_an_exchange():
    model = lorafamily.apply(tiny(), "elalora", rank=4, targets=r"blocks\.0.*(query|key)", seed=0, moved=3, **MOVES)
    low, high = placement_of(model).adapters
    allocator = allocator_of(model)
    allocator.scorer.scores = lambda: {low: torch.arange(4.0).double(), high: torch.arange(4.0).double() + 9}
    allocator.observed = 1
    assert allocator.slices_at(3) == 3  # though only one module is left that could get them
    assert allocator.decide(3).after == {low: 3, high: 5}


@pytest.mark.parametrize("method", ["elalora", "flexlora"])
def test_the_total_stays_and_the_run_settles(method, tmp_path):
    model = lorafamily.apply(tiny(), method, rank=2, seed=0, **MOVES)
    start = lorafamily.summary(model).rank
    history = lorafamily.train(model, data(), steps=20, lr=5e-2, seed=0, progress=False)
    assert [decision.step for decision in history.decisions] == [3, 6, 9, 12, 15]
    assert {sum(decision.after.values()) for decision in history.decisions} == {start}
    assert len(set(history.slices_end.values())) > 1
    assert all(adapter.settled for adapter in placement_of(model).adapters.values())
    adapted = logits(model)
    assert torch.equal(logits(lorafamily.load(tiny(), lorafamily.save(model, tmp_path))), adapted)
    assert_merged(logits(lorafamily.merge(model)), adapted)


@pytest.mark.parametrize("method", ["eva+elalora", "gora+flexlora", "rslora+elalora"])
def test_they_combine_where_axes_differ(method):
    given = {} if "rslora" in method else {"data": data(2)}
    model = lorafamily.apply(tiny(), method, budget=4_000, seed=0, **MOVES, **given)
    history = lorafamily.train(model, data(), steps=20, lr=1e-2, seed=0, progress=False)
    assert history.decisions
    assert all(step.trainable <= 4_000 for step in history.steps)


@pytest.mark.parametrize("method", ["elalora", "flexlora"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moved": 0}, "moved=0: must be at least 1"),
        ({"warmup": 10, "final": 10}, "no rank would ever move: of 20 steps the first 10 are warm-up, the last 10 "),
        ({"interval": 19, "final": 5}, "no step is a multiple of 19"),
    ],
)
def test_schedules_that_move_nothing_are_refused(method, options, message):
    model = lorafamily.apply(tiny(), method, rank=2, seed=0, **options)
    with pytest.raises(lorafamily.AllocationError, match=message):
        allocator_of(model)


# LoRA+


def test_lora_plus_trains_u_at_its_multiple_of_the_rate():
    model = lorafamily.apply(tiny(), "loraplus", rank=2, seed=0)
    roles = {p: a.update.role(n) for a in placement_of(model).adapters.values() for n, p in a.update.named_parameters()}
    groups = lorafamily.parameter_groups(model, lr=1e-3)
    assert {(roles[p], group["lr"]) for group in groups for p in group["params"]} == {("down", 1e-3), ("up", 16e-3)}
    twice = lorafamily.apply(tiny(), "loraplus", rank=2, seed=0, up_ratio=2.0)
    one = lorafamily.apply(tiny(), "lora", rank=2, seed=0)
    given = {"steps": 3, "lr": 1e-2, "seed": 0, "progress": False}
    lorafamily.train(twice, data(), **given)
    lorafamily.train(one, data(), up_lr=2e-2, **given)
    for a, b in zip(twice.parameters(), one.parameters(), strict=True):
        assert torch.equal(a, b)


def test_lora_plus_combines_and_survives_a_file(tmp_path):
    model = lorafamily.apply(tiny(), "loraplus+adalora", rank=2, seed=0, up_ratio=4)
    assert placement_of(model).method.up_ratio == 4
    loaded = lorafamily.load(tiny(), lorafamily.save(perturb_(model), tmp_path))
    assert lorafamily.parameter_groups(loaded, lr=1.0)[1]["lr"] == 4
    with pytest.raises(lorafamily.MethodError, match="up_ratio=0: must be a positive"):
        lorafamily.apply(tiny(), "lora", up_ratio=0)


def test_an_optimiser_with_one_rate_is_warned_of():
    model = lorafamily.apply(tiny(), "loraplus", rank=2, seed=0)
    plain = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with pytest.warns(UserWarning, match="U at 16 times the rate of the others, and this optimizer trains all at one"):
        lorafamily.session(model, plain, steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lorafamily.session(model, torch.optim.AdamW(lorafamily.parameter_groups(model)), steps=3)
