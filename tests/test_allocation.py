"""Scores, schedules and the surgery that allocation needs."""

from __future__ import annotations

import copy
import dataclasses
import gc
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lorafamily
from conftest import METHODS, data, every_method, few_rounds, in_turn, logits, perturb_, tiny
from lorafamily.adapter import Adapter
from lorafamily.allocation.ablation import Ablation, AblationEstimate
from lorafamily.allocation.allocator import Fixed
from lorafamily.allocation.pruning import ImportancePruning
from lorafamily.allocation.run import Run
from lorafamily.allocation.sensitivity import Sensitivity
from lorafamily.allocation.surgery import follow_resize
from lorafamily.batch import loss_of
from lorafamily.layers.placement import placement_of
from lorafamily.variants.alora import PruneAndGrow
from lorafamily.variants.lora import Plain


def adapters_of(method: str, rank: int = 3, **options) -> tuple[nn.Module, dict[str, Adapter]]:
    model = perturb_(lorafamily.apply(tiny(dtype=torch.float64), method, rank=rank, seed=0, **options))
    return model, placement_of(model).adapters


@torch.no_grad()
def plain(d_in: int, d_out: int, rank: int) -> Plain:
    update = Plain(d_in, d_out, rank)
    update.reset(torch.Generator())
    return update


def gated_off(adapter: Adapter, i: int) -> torch.Tensor:
    """ΔW without slice i."""
    gate = torch.ones(adapter.slices, dtype=torch.float64)
    gate[i] = 0
    with adapter.gated(gate):
        return adapter.delta()


@every_method
def test_dropping_a_slice_is_gating_it_off(method):
    _, adapters = adapters_of(method)
    adapter = next(iter(adapters.values()))
    expected = gated_off(adapter, 1)
    assert (expected - adapter.delta()).abs().max() > 1e-6
    trainable = adapter.trainable()
    adapter.resize(torch.tensor([i for i in range(adapter.slices) if i != 1]))
    # The same float64 sum with a zero term left out or kept: rounding in its last bits.
    assert_close(adapter.delta(), expected, rtol=1e-12, atol=1e-15)
    assert adapter.trainable() == trainable - adapter.update.slice_cost


@every_method
def test_masking_a_slice_is_gating_it_off_for_now(method):
    _, adapters = adapters_of(method)
    adapter = next(iter(adapters.values()))
    expected = gated_off(adapter, 0)
    adapter.mask(torch.tensor([0]))
    # The same float64 sum with a zero term left out or kept: rounding in its last bits.
    assert_close(adapter.delta(), expected, rtol=1e-12, atol=1e-15)
    x = torch.randn(2, adapter.update.d_in, dtype=torch.float64)
    adapter(x).square().sum().backward()
    switch, axis = adapter.update.get_parameter(adapter.update.zeroed), adapter.update.slice_axes[adapter.update.zeroed]
    assert switch.grad.select(axis, 0).any()  # it can come back


@every_method
def test_added_slices_leave_the_function_unchanged(method):
    model, adapters = adapters_of(method)
    before = logits(model)
    for adapter in adapters.values():
        rank = adapter.slices
        adapter.resize(torch.arange(rank), add=2, generator=torch.Generator().manual_seed(0))
        assert adapter.slices == rank + 2
    # float64: sums with zero terms added, so rounding in their last bits.
    assert_close(logits(model), before, rtol=1e-12, atol=1e-12)


@every_method
def test_rank_zero_is_a_normal_state(method, tmp_path):
    model, adapters = adapters_of(method)
    base = logits(tiny(dtype=torch.float64))
    for adapter in adapters.values():
        adapter.resize(torch.arange(0))
    assert torch.equal(logits(model), base)
    fresh = lorafamily.load(tiny(dtype=torch.float64), lorafamily.save(model, tmp_path))
    assert torch.equal(logits(fresh), base)
    for adapter in placement_of(fresh).adapters.values():
        adapter.resize(torch.arange(0), add=1, generator=torch.Generator())
    assert_close(logits(fresh), base, rtol=0, atol=0)
    placement = placement_of(fresh)  # two steps are too short for any method's schedule
    placement.method = placement.method.but(allocation=Fixed())
    history = lorafamily.train(fresh, data(1), steps=2, progress=False, check_gradients=False)
    assert len(history.steps) == 2


@pytest.mark.parametrize("method", ["adalora", "lora2", "alora", "olora+alora"])
def test_training_goes_on_where_some_modules_have_no_rank_left(method):
    model = lorafamily.apply(tiny(), method, rank=2, seed=0, **few_rounds(method))
    adapters = placement_of(model).adapters
    for name in list(adapters)[::3]:
        adapters[name].resize(torch.arange(0))
    history = lorafamily.train(model, data(1), steps=40, validation=data(1), progress=False)
    assert history.slices_end == {name: adapter.slices for name, adapter in adapters.items()}
    assert history.steps[-1].loss < history.steps[0].loss


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, momentum=0.9), torch.optim.Adagrad])
def test_surgery_keeps_the_survivors_moments_bit_for_bit(make):
    torch.manual_seed(0)
    update = plain(6, 5, 4)
    optimizer = make(update.parameters())
    for _ in range(3):
        for parameter in update.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    before = {id(p): copy.copy(optimizer.state[p]) for p in update.parameters()}
    keep = torch.tensor([0, 2, 3])
    for change in update.resize(keep, update.fresh(2, torch.Generator())):
        follow_resize(optimizer, change)
        old, new = before[id(change.old)], optimizer.state[change.new]
        assert change.old not in optimizer.state
        moments = [key for key, value in old.items() if value.shape == change.old.shape]
        assert moments
        for key in moments:
            assert torch.equal(new[key].narrow(change.axis, 0, 3), old[key].index_select(change.axis, keep))
            assert not new[key].narrow(change.axis, 3, 2).any()
        assert all(new[key] is value for key, value in old.items() if key not in moments)
    for parameter in update.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def test_a_count_of_steps_stays_one_whatever_its_shape():
    """As a tensor of one entry it could be the mean over a factor of rank 1."""
    update = plain(6, 5, 1)
    optimizer = torch.optim.Adam(update.parameters())
    for parameter in update.parameters():
        optimizer.state[parameter] = {"step": torch.ones(1), "exp_avg": torch.ones_like(parameter)}
    for change in update.resize(torch.tensor([0]), update.fresh(2, torch.Generator())):
        follow_resize(optimizer, change)
        assert optimizer.state[change.new]["step"].tolist() == [1]
        assert optimizer.state[change.new]["exp_avg"].shape == change.new.shape


def test_two_hundred_resizings_leave_nothing_behind():
    model = lorafamily.apply(tiny(), "olora+alora", rank=3, seed=0)
    adapters = placement_of(model).adapters
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    run = Run(model, adapters, steps=1, optimizer=optimizer)

    def decide(number: int) -> None:
        model(**data(1)[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for i, name in enumerate(adapters):
            if (i + number) % 2:
                run.resize(name, torch.tensor([0, 2]))
                run.resize(name, torch.arange(2), add=1)

    def alive() -> tuple[int, int]:
        gc.collect()
        tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
        # Tests that compile with sizes as symbols leave such tensors in torch's caches; they have no bytes to ask for.
        tensors = [found for found in tensors if not found._has_symbolic_sizes_strides]
        return len(tensors), sum(tensor.nbytes for tensor in tensors)

    for number in range(4):
        decide(number)
    before, states = alive(), len(optimizer.state)
    for number in range(200):
        decide(number)
    assert alive() == before
    assert len(optimizer.state) == states == len(optimizer.param_groups[0]["params"])


@pytest.mark.parametrize("method", ["alora", "olora+alora", "lora2"])
def test_exact_ablation_is_the_definition(method):
    """IS(i) = S(M) − S(M∖i) + S(M_i), against adapters whose slices are really taken out."""
    model, adapters = adapters_of(method, rank=2)
    batch = data(1)[0]

    def loss(of=model):
        return of(**batch).loss

    scores = Ablation(Run(model, adapters, steps=1, validation_loss=lambda rows: loss())).scores()
    with torch.no_grad():
        whole = loss()
    for name, adapter in adapters.items():
        for i in range(adapter.slices):
            without, alone = copy.deepcopy(model), copy.deepcopy(model)
            placement_of(without).adapters[name].resize(torch.tensor([j for j in range(adapter.slices) if j != i]))
            for other, left in placement_of(alone).adapters.items():
                left.resize(torch.tensor([i] if other == name else [], dtype=torch.long))
            with torch.no_grad():
                expected = -whole + loss(without) - loss(alone)
            # float64; a score is a small difference of losses near 6, so their rounding counts for more in it.
            assert_close(scores[name][i], expected, rtol=1e-9, atol=1e-12)


def test_first_order_ablation_is_exact_for_small_updates():
    """The estimate's error is of second order in the size of the update: ten times smaller, a hundred times closer."""
    errors = []
    for size in (1e-2, 1e-3):
        model, adapters = adapters_of("alora")
        for adapter in adapters.values():
            adapter.update.B.data.mul_(size)
        run = Run(model, adapters, steps=1, validation_loss=lambda rows, model=model: loss_of(model, data(1)[0]))
        exact, estimate = (scorer(run).scores() for scorer in (Ablation, AblationEstimate))
        errors.append(max(float((exact[name] - estimate[name]).abs().max()) for name in exact))
    assert errors[1] < errors[0] / 50


def test_magnitude_is_the_norm_of_the_slice_alone():
    model, adapters = adapters_of("olora")
    scores = lorafamily.scorers()["magnitude"](Run(model, adapters, steps=1)).scores()
    adapter = adapters["blocks.0.mlp.up"]
    U, V, U0, V0 = adapter.update.B, adapter.update.A, adapter.initial.B, adapter.initial.A
    for i in range(3):
        alone = adapter.scale * (torch.outer(U[:, i], V[i]) - torch.outer(U0[:, i], V0[i]))
        # float64: the norm by way of Gram matrices, which squares and takes the root again.
        assert float(scores["blocks.0.mlp.up"][i]) == pytest.approx(float(alone.norm().detach()), rel=1e-9)


@pytest.mark.parametrize("scores", lorafamily.scorers())
@pytest.mark.parametrize("method", ["adalora", "lora2+olora", "alora"])
def test_any_allocator_takes_any_scorer(method, scores):
    model = lorafamily.apply(tiny(), method, rank=3, targets="blocks.1", seed=0, scorer=scores, **few_rounds(method))
    if "alora" not in method.split("+"):
        placement_of(model).method = placement_of(model).method.with_options(interval=15)
    history = lorafamily.train(model, data(1), steps=40, validation=data(1), progress=False)
    assert history.slices_end != history.slices_start
    assert history.steps[-1].loss < history.steps[0].loss


def test_lora2_keeps_scores_of_under_one_percent_of_adalora_s_numbers():
    """DeBERTaV3-base's six matrices a layer, r = k = 8; entries of the tensors whose sensitivity is averaged."""
    shapes = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
    with torch.device("meta"):
        layer = nn.ModuleList(nn.Linear(d_in, d_out) for d_in, d_out in shapes)
    scored = {}
    for method in ("adalora", "lora2"):
        adapters = placement_of(lorafamily.apply(layer, method, rank=8)).adapters
        scored[method] = sum(average.numel() for average in Sensitivity(Run(layer, adapters, steps=1)).average)
        lorafamily.remove(layer)
    assert scored == {"adalora": 110_640, "lora2": 816}


def test_averaged_sensitivity_follows_a_resize():
    model, adapters = adapters_of("adalora")
    run = Run(model, adapters, steps=1)
    scorer = Sensitivity(run)
    for adapter in adapters.values():
        for parameter in adapter.update.parameters():
            parameter.grad = torch.randn_like(parameter)
    scorer.observe()
    name, before = "blocks.1.mlp.down", scorer.scores()
    keep = torch.tensor([2, 0])
    run.resize(name, keep, add=1)
    scorer.follow(name, keep, 1)
    after = scorer.scores()
    assert_close(after[name], torch.cat([before[name][keep], torch.zeros(1).double()]))
    assert all(torch.equal(after[other], before[other]) for other in before if other != name)


def pruner(scores: list[list[float]], /, **settings):
    """A pruner over Plain adapters of width 4 whose sensitivity is planted."""
    adapters = {}
    for i, own in enumerate(scores):
        adapters[f"l{i}"] = Adapter(plain(4, 4, len(own)), scale=1.0)
    limit = settings.pop("limit", None)
    allocator = ImportancePruning(**settings).begin(Run(nn.Module(), adapters, steps=10, limit=limit))
    planted = {name: torch.tensor(own, dtype=torch.float64) for name, own in zip(adapters, scores, strict=True)}
    allocator.scorer.scores = lambda: planted
    return allocator, adapters


def run_to_end(allocator):
    return [decision for step in range(1, 11) if (decision := allocator.step(step)) is not None]


def test_slices_fall_by_the_cubic_schedule():
    """b(t) = b_T + (b0 − b_T) (1 − (t − t_i) / (T − t_f − t_i))³, truncated: from 20 to 8 between steps 2 and 8."""
    scores = [[float(i) for i in range(10)], [i + 0.5 for i in range(10)]]
    allocator, _ = pruner(scores, target=0.4, warmup=2, final=2, interval=1)
    decisions = run_to_end(allocator)
    assert [(decision.step, decision.total) for decision in decisions] == [
        *((3, 14), (4, 11), (5, 9), (6, 8), (7, 8), (8, 8)),
        (9, 8),  # masked until here, then removed
    ]


def test_ties_prune_no_more_than_asked():
    allocator, adapters = pruner([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], target=2 / 3, warmup=1, final=3, interval=2)
    decisions = run_to_end(allocator)
    assert [sum(adapter.slices for adapter in adapters.values()), decisions[-1].total] == [4, 4]


def test_target_equal_to_the_start_prunes_nothing():
    allocator, _ = pruner([[3.0, 1.0], [2.0, 4.0]], target=1.0, warmup=1, final=3, interval=2)
    decisions = run_to_end(allocator)
    assert all(decision.after == {"l0": 2, "l1": 2} for decision in decisions)
    assert decisions[-1].threshold is None


def test_a_module_may_lose_all_its_slices():
    allocator, adapters = pruner([[0.1, 0.2], [2.0, 4.0]], target=1, warmup=1, final=3, interval=2)
    run_to_end(allocator)
    assert [adapter.slices for adapter in adapters.values()] == [0, 2]


def test_target_zero_leaves_nothing():
    allocator, adapters = pruner([[0.1, 0.2], [2.0, 4.0]], target=0, warmup=1, final=3, interval=2)
    run_to_end(allocator)
    assert [adapter.slices for adapter in adapters.values()] == [0, 0]


def test_final_pattern_is_cut_to_the_parameter_budget():
    allocator, adapters = pruner([[1.0, 2.0], [3.0, 4.0]], target=1.0, warmup=1, final=3, interval=2, limit=24)
    run_to_end(allocator)
    assert sum(adapter.trainable() for adapter in adapters.values()) == 24
    assert [adapter.slices for adapter in adapters.values()] == [1, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 3}, "is 6 slices in all, but training begins with 4"),
        ({"target": 1.5}, "target=1.5"),
        ({"warmup": 8, "final": 4}, "nothing would ever be pruned: of 10 steps the first 8 are warm-up"),
        ({"warmup": 1.5}, "warmup=1.5"),
        ({"beta1": 1.0}, "beta1=1.0"),
        ({"scorer": "magnitude", "beta1": 0.5}, "has no use for beta1; it takes no options"),
        ({"scorer": "worth"}, "scorer='worth': must be one of exact, first-order, magnitude, random, sensitivity"),
    ],
)
def test_a_schedule_that_cannot_run_is_refused(settings, message):
    with pytest.raises(lorafamily.AllocationError, match=message):
        pruner([[1.0, 2.0], [3.0, 4.0]], **settings)


def grower(ranks: dict[str, int], scores: dict[str, list[float]], *, limit: int | None = None, **settings):
    adapters = {}
    for name, rank in ranks.items():
        adapters[name] = Adapter(plain(8, 8, rank), scale=1.0)
    run = Run(nn.Module(), adapters, steps=10, limit=limit, validation_loss=lambda rows: torch.zeros(()))
    allocator = PruneAndGrow(rounds=1, warmup=1, interval=1, **settings).begin(run)
    planted = {name: torch.tensor(own, dtype=torch.float64) for name, own in scores.items()}
    allocator.scorer.scores = lambda: planted
    return allocator, adapters


RANKS = {"h.0.q": 2, "h.0.k": 2, "h.0.v": 2, "h.1.q": 2, "h.1.k": 2, "h.1.v": 2}
SCORES = {"h.0.q": [1, 9], "h.0.k": [2, 9], "h.0.v": [7, 7], "h.1.q": [6, 6], "h.1.k": [3, 9], "h.1.v": [5, 5]}


def test_alora_drops_the_lowest_and_shares_new_ranks_evenly():
    """n_A = 3 modules a block; three modules lost none and get one new rank each."""
    allocator, adapters = grower(RANKS, SCORES)
    decision = allocator.step(1)
    assert decision.after == {"h.0.q": 1, "h.0.k": 1, "h.0.v": 3, "h.1.q": 3, "h.1.k": 1, "h.1.v": 3}
    assert {name: adapter.slices for name, adapter in adapters.items()} == decision.after
    assert decision.threshold == 3.0
    assert allocator.step(2) is None


def test_alora_gives_the_remainder_to_the_highest_mean_score():
    allocator, _ = grower(RANKS, SCORES | {"h.1.v": [0, 5]}, drop=4)
    # q, k of block 0, k, v of block 1 lose one; 4 new ranks for 2 modules: 2 each. With drop=3 one is left over.
    assert allocator.step(1).after == {"h.0.q": 1, "h.0.k": 1, "h.0.v": 4, "h.1.q": 4, "h.1.k": 1, "h.1.v": 1}
    allocator, _ = grower(RANKS, SCORES | {"h.0.q": [0, 0.5], "h.1.q": [8, 8]}, drop=5)
    # drops: q of block 0 twice, k of both blocks, and one of v of block 1: 5 new ranks for two modules, 8 before 7.
    assert allocator.step(1).after == {"h.0.q": 0, "h.0.k": 1, "h.0.v": 4, "h.1.q": 5, "h.1.k": 1, "h.1.v": 1}


@pytest.mark.parametrize(
    ("ranks", "scores", "drop", "after"),
    [
        # Both would lose one: one is dropped, for the other.
        ({"h.0.q": 2, "h.0.k": 2}, {"h.0.q": [1, 9], "h.0.k": [2, 9]}, None, {"h.0.q": 1, "h.0.k": 3}),
        ({"q": 8}, {"q": [*range(8)]}, None, {"q": 8}),
        ({"q": 8, "k": 8}, {"q": [*range(8)], "k": [*range(8)]}, None, {"q": 8, "k": 8}),  # 8 wide: no room
        # k has room for one alone.
        ({"q": 4, "k": 7}, {"q": [1, 2, 3, 9], "k": [5] * 7}, 3, {"q": 3, "k": 8}),
        ({"a": 4, "b": 4, "c": 4}, {n: [i, 4, 5, 6] for i, n in enumerate("abc")}, 9, {"a": 3, "b": 3, "c": 6}),
        ({"q": 0, "k": 0}, {"q": [], "k": []}, None, {"q": 0, "k": 0}),
    ],
)
def test_alora_drops_nothing_that_it_cannot_give_elsewhere(ranks, scores, drop, after):
    allocator, adapters = grower(ranks, scores, drop=drop)
    decision = allocator.step(1)
    assert decision.after == after == {name: adapter.slices for name, adapter in adapters.items()}
    assert allocator.settled


def test_alora_drops_as_many_cheap_slices_as_a_dear_one_takes():
    """With a parameter budget: two slices of 16 numbers make room for one of 32, the third stays."""
    widths = {"q": 8, "up": 24}
    adapters = {name: Adapter(plain(8, width, 4), scale=1.0) for name, width in widths.items()}
    limit = sum(adapter.trainable() for adapter in adapters.values())
    run = Run(nn.Module(), adapters, steps=1, limit=limit, validation_loss=lambda rows: torch.zeros(()))
    allocator = PruneAndGrow(rounds=1, warmup=1, interval=1, drop=3).begin(run)
    allocator.scorer.scores = lambda: {"q": torch.arange(4.0), "up": torch.full((4,), 9.0)}
    assert allocator.step(1).after == {"q": 2, "up": 5}
    assert run.trainable() == limit


def test_alora_never_exceeds_the_parameter_budget():
    allocator, adapters = grower(RANKS, SCORES, limit=sum(RANKS.values()) * 16 - 16)
    allocator.step(1)
    assert sum(adapter.trainable() for adapter in adapters.values()) == sum(RANKS.values()) * 16 - 16


def test_alora_needs_validation_data_and_enough_steps():
    model = lorafamily.apply(tiny(), "alora", rank=2)
    with pytest.raises(lorafamily.AllocationError, match=r"pass train\(\.\.\., validation=batches\)"):
        lorafamily.train(model, data(), steps=100, progress=False)
    with pytest.raises(lorafamily.AllocationError, match="do not fit into 5 steps"):
        lorafamily.train(model, data(), steps=5, validation=data(1), progress=False)
    with pytest.raises(lorafamily.AllocationError, match="scorer='best'"):
        lorafamily.train(
            lorafamily.apply(tiny(), "alora", rank=2, scorer="best"),
            data(),
            steps=99,
            validation=data(1),
            progress=False,
        )


methods_and_seeds = in_turn("method,seed", METHODS, range(3))


@methods_and_seeds
def test_the_budget_holds_at_every_step(method, seed):
    budget = 3_000
    model = lorafamily.apply(tiny(seed=seed), method, budget=budget, seed=seed, **few_rounds(method))
    history = lorafamily.train(model, data(), steps=40, validation=data(1), progress=False, seed=seed)
    assert max(step.trainable for step in history.steps) <= budget
    assert history.slices_end == {n: a.slices for n, a in placement_of(model).adapters.items()}
    if history.decisions:
        assert history.slices_end != history.slices_start


@methods_and_seeds
def test_the_rank_budget_holds_at_every_step(method, seed):
    """100 slices for 12 modules: 8 each, LoRA²'s singular values included, whatever they cost."""
    model = lorafamily.apply(tiny(seed=seed), method, rank_budget=100, seed=seed, **few_rounds(method))
    summary = lorafamily.summary(model)
    assert (summary.slices, summary.unused, summary.budget) == (96, 4, None)
    assert "rank budget (at the peak): 100 slices, of which 4 unused" in str(summary)
    history = lorafamily.train(model, data(), steps=40, validation=data(1), progress=False, seed=seed)
    assert max(step.slices for step in history.steps) <= 100
    assert history.slices_start == dict.fromkeys(history.slices_start, 8)
    assert sum(adapter.slices for adapter in placement_of(model).adapters.values()) <= 100


def test_a_rank_budget_for_the_end_lets_pruning_start_larger():
    model = lorafamily.apply(tiny(), "adalora", rank_budget=24, budget_at="end", seed=0)
    assert lorafamily.summary(model).slices == 36
    lorafamily.train(model, data(), steps=40, progress=False)
    assert lorafamily.summary(model).slices == 24


@pytest.mark.parametrize("method", ["lora", "alora", "elalora"])
def test_where_nothing_is_pruned_a_budget_for_the_end_is_one_for_the_peak(method):
    sizes = [lorafamily.plan(tiny(), method, budget=4_000, budget_at=at).sizing.rank for at in ("peak", "end")]
    assert sizes[0] == sizes[1] > 1


@pytest.mark.parametrize("seed", range(3))
def test_a_budget_for_the_end_holds_at_the_end(seed):
    model = lorafamily.apply(tiny(), "adalora", budget=3_000, budget_at="end", seed=seed)
    history = lorafamily.train(model, data(), steps=40, progress=False, seed=seed)
    assert history.steps[0].trainable > 3_000
    assert placement_of(model).trainable() <= 3_000


@pytest.mark.parametrize(
    ("widths", "slices", "budget", "start"),
    [
        ((64, 64), 8, 2_000, 1_776),
        ((64, 48), 8, 2_000, 1_584),
        ((16, 200), 8, 2_000, 1_440),
        ((64, 64), 64, 2_300, 3_456),
    ],
)
def test_a_budget_for_the_end_counts_what_has_no_slices(widths, slices, budget, start):
    """LoRA²'s outer factors stay whole, whatever is pruned."""
    chosen = {"budget": budget, "budget_at": "end", "slices": slices, "targets": "layers"}
    model = lorafamily.apply(Layers(6, *widths), "lora2", seed=0, **chosen)
    placement = placement_of(model)
    assert (
        placement.trainable()
        == start
        == lorafamily.plan(Layers(6, *widths), "lora2", **chosen).sizing.initial_parameters
    )
    history = lorafamily.train(model, [torch.ones(2, widths[0])], steps=20, loss_fn=fit_zero, progress=False)
    assert placement.trainable() <= budget
    assert sum(history.slices_end.values()) == 3 / 8 * sum(history.slices_start.values())


@pytest.mark.parametrize("at", ["peak", "end"])
def test_a_budget_that_cannot_be_met_at_the_end_is_refused_at_apply(at):
    model = Layers(6, 64, 64)
    least = {"peak": 912, "end": 822}[at]  # the outer factors of width 1 are 768, all slices 144
    with pytest.raises(lorafamily.BudgetError, match=f"the smallest budget that works is {least:,}"):
        lorafamily.apply(model, "lora2", budget=least - 1, budget_at=at, targets="layers")
    lorafamily.apply(model, "lora2", budget=least, budget_at=at, targets="layers")
    with pytest.raises(lorafamily.BudgetError, match=f"the smallest budget that works is {least:,}"):
        lorafamily.plan(Layers(6, 64, 64), "lora2", budget=least - 1, budget_at=at, targets="layers")


@pytest.mark.parametrize(("target", "least"), [(3 / 8, 822), (0.001, 771), (0.0, 768)])
def test_at_the_end_at_least_one_slice_is_left_unless_none_is_wanted(target, least):
    given = {"budget_at": "end", "targets": "layers", "target": target}
    with pytest.raises(lorafamily.BudgetError, match=f"the smallest budget that works is {least}"):
        lorafamily.plan(Layers(6, 64, 64), "lora2", budget=least - 1, **given)
    lorafamily.plan(Layers(6, 64, 64), "lora2", budget=least, **given)


def test_a_limit_that_would_take_every_slice_is_refused():
    model = lorafamily.apply(Layers(2, 8, 8), "lora2", rank=2, targets="layers")
    run = Run(model, placement_of(model).adapters, steps=20, limit=64)  # the outer factors alone
    with pytest.raises(lorafamily.AllocationError, match=r"64 belong to no slice .* one slice makes it 69"):
        ImportancePruning().begin(run)
    ImportancePruning(target=0).begin(run)


def test_a_slice_that_does_not_fit_makes_place_for_one_that_does():
    """The most important slice is dearer than what is left; without it nothing would be dropped in vain."""
    adapters = {"wide": Adapter(plain(8, 24, 1), scale=1.0), "small": Adapter(plain(8, 8, 2), scale=1.0)}
    allocator = ImportancePruning(target=1.0, warmup=1, final=3, interval=2).begin(
        Run(nn.Module(), adapters, steps=10, limit=31)
    )
    allocator.scorer.scores = lambda: {"wide": torch.tensor([9.0]), "small": torch.tensor([1.0, 2.0])}
    run_to_end(allocator)
    assert {name: adapter.slices for name, adapter in adapters.items()} == {"wide": 0, "small": 1}


class Layers(nn.Module):
    """`n` linear layers in a row, alternating between two widths."""

    def __init__(self, n: int, width: int, inner: int):
        super().__init__()
        torch.manual_seed(0)
        sizes = [(width, inner), (inner, width)]
        self.layers = nn.ModuleList(nn.Linear(*sizes[i % 2]) for i in range(n))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def fit_zero(model, x):
    return model(x).square().mean()


@pytest.mark.parametrize("method", ["adalora", "lora2", "pruning"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_no_pattern_is_settled_before_anything_was_observed(method, steps):
    model = lorafamily.apply(Layers(3, 6, 6), method, rank=4, seed=0, targets="layers")
    with pytest.raises(lorafamily.AllocationError, match="before any gradient was observed"):
        lorafamily.train(model, [torch.ones(2, 6)], steps=steps, loss_fn=fit_zero, progress=False)
    history = lorafamily.train(model, [torch.ones(2, 6)], steps=4, loss_fn=fit_zero, progress=False)
    assert all(any(map(any, decision.scores.values())) for decision in history.decisions)


def test_steps_that_were_skipped_are_not_observed():
    allocator, adapters = pruner([[1.0, 2.0], [3.0, 4.0]], target=1, warmup=0, final=4, interval=1)
    own = Sensitivity.scores
    allocator.scorer.scores = lambda: own(allocator.scorer)
    for adapter in adapters.values():
        for parameter in adapter.update.parameters():
            parameter.data.fill_(1)
            parameter.grad = torch.ones_like(parameter)
    assert allocator.step(1, observe=False) is None  # nothing is masked on scores of nothing
    assert allocator.step(2) is not None
    before = allocator.scorer.scores()
    allocator.step(3, observe=False)
    assert allocator.observed == 1
    assert all(torch.equal(allocator.scorer.scores()[name], value) for name, value in before.items())
    allocator, _ = pruner([[1.0, 2.0], [3.0, 4.0]], target=1, warmup=0, final=4, interval=1)
    for step in range(1, 7):
        assert allocator.step(step, observe=False) is None
    with pytest.raises(lorafamily.AllocationError, match="Sensitivity has seen no step yet: each was skipped"):
        allocator.step(7, observe=False)


def test_a_skipped_step_of_train_is_not_observed():
    model = lorafamily.apply(Layers(3, 6, 6), "adalora", rank=4, seed=0, targets="layers")
    seen = []

    def loss(model, x):
        seen.append(x)
        return fit_zero(model, x) * (torch.nan if len(seen) == 3 else 1)

    history = lorafamily.train(model, [torch.ones(2, 6)], steps=12, loss_fn=loss, skip_nonfinite=1, progress=False)
    assert history.skipped == 1
    assert all(math.isfinite(score) for d in history.decisions for of in d.scores.values() for score in of)


@pytest.mark.parametrize("scores", ["exact", "first-order", "magnitude", "sensitivity"])
def test_scores_that_are_not_finite_are_refused(scores):
    """Validation rows whose labels are all masked, or weights that overflowed."""
    model, adapters = adapters_of("alora")
    loss = data(1)[0]
    nan = scores in ("exact", "first-order")
    run = Run(model, adapters, steps=8, validation_loss=lambda rows: loss_of(model, loss) * (torch.nan if nan else 1))
    allocator = PruneAndGrow(scorer=scores, rounds=1, warmup=1, interval=1).begin(run)
    if not nan:
        next(iter(adapters.values())).update.B.data[0, 0] = torch.inf
    loss_of(model, loss).backward()
    before = dict(allocator.slices)
    why = r"loss of the scored rows is nan.*masked \(-100\)" if nan else "gradients that it observed, are not finite"
    with pytest.raises(lorafamily.AllocationError, match=rf"slices of blocks\.0\..* score .* after step 1, .*{why}"):
        allocator.step(1)
    assert before == allocator.slices == {name: adapter.slices for name, adapter in adapters.items()}
    assert not allocator.settled


@pytest.mark.parametrize("method", ["adalora", "lora2", "alora"])
def test_settled_ranks_stay_unless_they_are_to_move_again(method, tmp_path):
    model = lorafamily.apply(tiny(), method, rank=3, seed=0, **few_rounds(method))

    def train(model):
        return lorafamily.train(model, data(1), steps=40, validation=data(1), progress=False)

    settled = train(model).slices_end
    loaded = lorafamily.load(tiny(), lorafamily.save(model, tmp_path))
    for own in (model, loaded):
        second = lorafamily.train(own, data(1), steps=2, progress=False)  # too short for a schedule, no validation
        assert (second.slices_start, second.slices_end, second.decisions) == (settled, settled, [])
    placement = placement_of(loaded)
    run = Run(loaded, placement.adapters, steps=40, validation_loss=lambda rows: loss_of(loaded, data(1)[0]))
    assert placement.method.allocation.begin(run).settled
    again = placement.method.allocation.begin(dataclasses.replace(run, again=True))
    assert not again.settled
    assert [again.step(step) is not None for step in range(1, 41)].count(True) > 0
    assert again.settled
    assert again.slices != settled


def test_a_run_whose_ranks_are_not_settled_does_not_go_on_with_settled_adapters():
    first, adapters = pruner([[1.0, 2.0], [3.0, 4.0]], target=1, warmup=0, final=4, interval=1)
    first.step(1)
    half_way = first.state()
    run_to_end(first)
    assert all(adapter.settled for adapter in adapters.values())
    run = Run(nn.Module(), adapters, steps=10)
    still = ImportancePruning().begin(run)
    still.restore(first.state())
    assert (still.slices, still.settled) == (first.slices, True)
    with pytest.raises(lorafamily.AllocationError, match="had ranks to settle"):
        still.restore(half_way)
    moving = ImportancePruning(target=1.0, scorer="random").begin(dataclasses.replace(run, again=True))
    moving.restore(half_way)
    assert not any(adapter.settled for adapter in adapters.values())


def test_scores_by_the_task_s_gradient_alone():
    """The penalty's gradient is not seen; without a penalty both are the same."""
    found = {}
    for gamma in (0.0, 50.0):
        for on in ("total", "task"):
            model = lorafamily.apply(tiny(), "adalora", rank=3, seed=0, gamma=gamma, gradient_of=on)
            history = lorafamily.train(
                model,
                data(1),
                steps=8,
                optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
                max_grad_norm=1e9,
                progress=False,
            )
            found[gamma, on] = history.decisions[0].scores
    assert found[0.0, "total"] == found[0.0, "task"] == found[50.0, "task"] != found[50.0, "total"]


def test_a_loop_that_does_not_keep_the_task_s_gradient_is_refused():
    model, adapters = adapters_of("adalora")
    with pytest.raises(lorafamily.AllocationError, match="does not keep the gradient of the task"):
        ImportancePruning(gradient_of="task").begin(Run(model, adapters, steps=20))
    run = Run(model, adapters, steps=20, task_gradient=lambda parameter: parameter.grad)
    allocator = ImportancePruning(gradient_of="task").begin(run)
    assert allocator.wants_task_gradient
    assert not ImportancePruning().begin(run).wants_task_gradient


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scorer": "magnitude", "gradient_of": "task"}, "scorer='magnitude' has no use for gradient_of"),
        ({"scorer": "exact", "gradient_of": "task"}, "no use for gradient_of; it takes scoring_rows, scoring_memory"),
        ({"scorer": "first-order", "scoring_memory": 4.0}, "no use for scoring_memory; it takes scoring_rows"),
        ({"scorer": "sensitivity", "scoring_rows": 4}, "no use for scoring_rows"),
        ({"scorer": "sensitivity", "gradient_of": "penalty"}, "gradient_of='penalty': must be"),
        ({"scoring_rows": 0}, "scoring_rows=0"),
        ({"scoring_memory": -1.0}, "scoring_memory=-1.0"),
    ],
)
def test_options_without_a_use_are_refused(settings, message):
    adapters = {"q": Adapter(plain(8, 8, 2), scale=1.0)}
    run = Run(nn.Module(), adapters, steps=99, validation_loss=lambda rows: torch.zeros(()))
    with pytest.raises(lorafamily.AllocationError, match=message):
        PruneAndGrow(**settings).begin(run)


def test_scoring_asks_for_the_rows_that_were_set():
    model, adapters = adapters_of("alora", rank=1)
    asked = set()

    def loss(rows):
        asked.add(rows)
        return loss_of(model, data(1)[0])

    run = Run(model, adapters, steps=9, validation_loss=loss)
    for scores in ("exact", "first-order"):
        PruneAndGrow(scorer=scores, rounds=1, scoring_rows=7).begin(run).scorer.scores()
    assert asked == {7}
