"""Adding adapters up is exact; making them smaller is the best there is, and says what it cost."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import lorafamily
from conftest import data, every_method, logits, perturb_, tiny
from lorafamily.layers.placement import placement_of


def two(first: str = "lora", second: str = "olora", **options):
    model = tiny(dtype=torch.float64)
    for seed, (name, method) in enumerate({"a": first, "b": second}.items()):
        perturb_(lorafamily.apply(model, method, rank=3, name=name, seed=seed, **options), seed=seed)
    return model


def deltas(model, name: str) -> dict[str, torch.Tensor]:
    return {at: adapter.delta() for at, adapter in placement_of(model, name).adapters.items()}


@every_method
def test_the_combination_is_the_weighted_sum_of_updates(method):
    model = two("lora", method)
    a, b = deltas(model, "a"), deltas(model, "b")
    base = logits(lorafamily.switch(model, None))
    lorafamily.combine(model, {"a": 0.7, "b": -0.3}, name="ab")
    combined = placement_of(model)
    assert combined.name == "ab"
    for at, delta in deltas(model, "ab").items():
        # float64: the same products, added in another order.
        assert_close(delta, 0.7 * a[at] - 0.3 * b[at], rtol=1e-12, atol=1e-13)
    assert (logits(model) - base).abs().max() > 0.1
    assert all(torch.equal(delta, a[at]) for at, delta in deltas(model, "a").items())
    lorafamily.train(model, data(1), steps=2, progress=False)  # it is an adapter like any other
    lorafamily.remove(model, "ab")
    assert torch.equal(logits(lorafamily.switch(model, None)), base)


def test_layers_that_only_one_part_adapts_and_its_head_come_along():
    model = tiny(dtype=torch.float64)
    lorafamily.apply(model, "lora", rank=2, targets="query", name="a", also_train="norm", seed=0)
    lorafamily.apply(model, "lora", rank=2, targets="mlp", name="b", seed=1)
    for name in "ab":
        perturb_(lorafamily.switch(model, name))
    lorafamily.switch(model, "a")
    norm = next(n for n in placement_of(model, "a").inactive_values)
    with torch.no_grad():
        model.get_parameter(norm).fill_(2.0)
    lorafamily.combine(model, {"a": 1.0, "b": 2.0}, name="ab")
    assert set(deltas(model, "ab")) == set(deltas(model, "a")) | set(deltas(model, "b"))
    assert torch.equal(model.get_parameter(norm), torch.full_like(model.get_parameter(norm), 2.0))
    lorafamily.switch(model, None)
    assert not torch.equal(model.get_parameter(norm), torch.full_like(model.get_parameter(norm), 2.0))


def test_a_combination_that_cannot_be_is_refused():
    model = two(also_train="norm")
    for weights, message in (
        ({}, "nothing to combine"),
        ({"a": 1.0, "c": 1.0}, 'no adapter named "c"; this model has "a", "b"'),
        ({"a": 1.0, "b": 1.0}, "was trained with several of these adapters"),
    ):
        with pytest.raises(lorafamily.StateError, match=message):
            lorafamily.combine(model, weights, name="ab")
    with pytest.raises(lorafamily.StateError, match='"a" is already there'):
        lorafamily.combine(model, {"a": 1.0}, name="a")


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (float("nan"), 'the weight of "b" is nan: it must be a finite number'),
        (-float("inf"), 'the weight of "b" is -inf: it must be a finite number'),
        (1.7e308, r"blocks\.0\.attention\.query \(U\); .* and \d+ more: not all finite numbers; a weight is too large"),
    ],
)
def test_a_sum_that_is_not_finite_is_refused_with_nothing_changed(weight, message):
    model = two()
    before = logits(model)
    with pytest.raises(lorafamily.StateError, match=message):
        lorafamily.combine(model, {"a": 1.0, "b": weight}, name="ab")
    assert lorafamily.summary(model).name == "b"
    assert torch.equal(logits(model), before)


@every_method
def test_compression_is_the_truncated_svd(method):
    model = perturb_(lorafamily.apply(tiny(dtype=torch.float64), method, rank=4, seed=0))
    before = deltas(model, "default")
    report = lorafamily.compress(model, rank=2)
    assert [row.module for row in report] == list(before)
    for row in report:
        U, S, V = torch.linalg.svd(before[row.module])
        best = (U[:, :2] * S[:2]) @ V[:2]
        assert row.rank_after == placement_of(model).adapters[row.module].slices == 2
        # float64: two ways to the same singular vectors, some dozens of roundings each.
        assert_close(deltas(model, "default")[row.module], best, rtol=1e-9, atol=1e-11)
        assert row.error == pytest.approx(float(S[2:].norm() / S.norm()), rel=1e-9)
        assert row.error > 0.01
    assert lorafamily.summary(model).method == "lora"


@pytest.mark.parametrize("what", ["budget", "rank_budget"])
@every_method
def test_a_cut_through_all_layers_is_the_global_cut_of_dense_svds(method, what):
    """Layers of two shapes, one of them pruned to nothing, another pruned, one with ten times the update."""
    model = lorafamily.apply(tiny(dtype=torch.float64), method, rank=4, seed=0)
    none, fewer, large, *_ = placement_of(perturb_(model)).adapters.values()
    none.resize(torch.arange(0))
    fewer.resize(torch.tensor([1, 2]))
    large.scale *= 10
    before = deltas(model, "default")
    costs = {at: sum(delta.shape) if what == "budget" else 1 for at, delta in before.items()}
    assert len({tuple(delta.shape) for delta in before.values()}) > 1
    amount = 1_200 if what == "budget" else 17
    svds = {at: torch.linalg.svd(delta, full_matrices=False) for at, delta in before.items()}
    values = [(float(s), at) for at, (_, S, _) in svds.items() for s in S if s > 1e-12 * S[0]]
    kept, room = dict.fromkeys(before, 0), amount
    worth = (lambda s, at: s**2 / costs[at]) if what == "budget" else (lambda s, at: s)
    for _, at in sorted(values, key=lambda value: -worth(*value)):
        if costs[at] <= room:
            kept[at], room = kept[at] + 1, room - costs[at]
    report = lorafamily.compress(model, **{what: amount})
    after = deltas(model, "default")
    dropped = 0.0
    for row in report:
        U, S, V = svds[row.module]
        n = kept[row.module]
        assert row.rank_after == placement_of(model).adapters[row.module].slices == n
        assert_close(after[row.module], (U[:, :n] * S[:n]) @ V[:n], rtol=1e-8, atol=1e-8 * float(S[0] + 1e-300))
        dropped += float(S[n:].square().sum())
    whole = sum(float(S.square().sum()) for _, S, _ in svds.values())
    assert report.error == pytest.approx((dropped / whole) ** 0.5, rel=1e-8)
    assert 0.01 < report.error < 1
    summary = lorafamily.summary(model)
    spent = summary.parameters if what == "budget" else summary.slices
    assert amount - min(costs.values()) < spent <= amount
    assert summary.unused == amount - spent
    assert len(set(kept.values())) > 2


def test_what_rounding_left_is_no_slice_of_a_global_cut():
    model = lorafamily.apply(tiny(), "lora", rank=8, seed=0)  # ΔW = 0
    report = lorafamily.compress(model, budget=1e4)
    assert {row.rank_after for row in report} == {0}
    assert report.error == 0


def test_compression_to_an_energy_keeps_just_enough():
    model = lorafamily.apply(tiny(dtype=torch.float64), "lora", rank=8, seed=0)
    perturb_(model)
    first, second, *_ = placement_of(model).adapters.values()
    first.resize(torch.arange(0))
    second.update.B.data.zero_()
    before = deltas(model, "default")
    report = lorafamily.compress(model, energy=0.9)
    assert [row.rank_after for row in report][:2] == [0, 0]
    assert [row.error for row in report][:2] == [0.0, 0.0]
    for row in report[2:]:
        S = torch.linalg.svdvals(before[row.module])
        assert row.error**2 <= 0.1 < float(S[row.rank_after - 1 :].square().sum() / S.square().sum())
        assert 1 < row.rank_after < 8
    assert lorafamily.compress(model, energy=1.0)[2].rank_after == report[2].rank_after
    lorafamily.merge(model)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give one of them"),
        ({"rank": 2, "energy": 0.5}, "give one of them"),
        ({"rank": 0}, "rank=0"),
        ({"rank": True}, "rank=True"),
        ({"energy": 0.0}, "energy=0.0"),
        ({"energy": 1.5}, "energy=1.5"),
        ({"rank": 2, "budget": 1e4}, "rank=2, budget=10000.0: give one of them"),
        ({"rank": 2, "name": "b"}, 'no adapter named "b"'),
    ],
)
def test_a_compression_that_cannot_be_is_refused(given, message):
    model = lorafamily.apply(tiny(), "lora", rank=4)
    with pytest.raises(lorafamily.StateError, match=message):
        lorafamily.compress(model, **given)
    assert lorafamily.summary(model).slices == 48


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": 10}, "budget 10 is too small: the cheapest slice costs 32"),
        ({"budget": -1}, "budget=-1: must be a positive number"),
        ({"rank_budget": 0}, "rank_budget=0: must be a whole number"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(given, message):
    model = lorafamily.apply(tiny(), "lora", rank=4)
    with pytest.raises(lorafamily.BudgetError, match=message):
        lorafamily.compress(model, **given)
    assert lorafamily.summary(model).slices == 48


def test_an_inactive_adapter_is_compressed_in_its_place():
    model = two()
    lorafamily.switch(model, "b")
    before = logits(model)
    lorafamily.compress(model, "a", rank=1)
    assert torch.equal(logits(model), before)
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".a." in n} == set()
    assert placement_of(lorafamily.switch(model, "a")).trainable() == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
