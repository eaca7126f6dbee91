"""Budgets, targets, and what `apply` refuses; a refusal leaves the model untouched bit for bit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import lorafamily
from conftest import every_method, logits, tiny
from lorafamily.layers.placement import placement_of
from lorafamily.layers.site import sites_in


class DebertaShaped(nn.Module):
    """The six matrices of each of DeBERTaV3-base's layers, and its embedding, pooler and head by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(100, 768)
        self.layer = nn.ModuleList(
            nn.ModuleDict(
                {
                    **{name: nn.Linear(768, 768) for name in ("query_proj", "key_proj", "value_proj", "dense")},
                    "intermediate": nn.Linear(768, 3072),
                    "output": nn.Linear(3072, 768),
                }
            )
            for _ in range(12)
        )
        self.pooler = nn.Linear(768, 768)
        self.classifier = nn.Linear(768, 2)


@pytest.fixture(scope="module")
def deberta():
    with torch.device("meta"):
        return DebertaShaped()


@pytest.mark.parametrize(
    ("method", "budget", "rank", "parameters"),
    [
        ("lora2", 0.17e6, 1, 167_616),
        ("lora2", 0.34e6, 2, 334_656),
        ("lora2", 1.34e6, 8, 1_336_896),
        ("lora", 0.17e6, 1, 165_888),
        ("lora", 1.33e6, 8, 1_327_104),
        ("olora", 1.33e6, 8, 1_327_104),
        ("alora", 0.17e6, 1, 165_888),
        ("adalora", 0.17e6, 1, 165_960),
    ],
)
def test_budget_buys_the_rank_it_should(deberta, method, budget, rank, parameters):
    try:
        lorafamily.apply(deberta, method, budget=budget)
        placement = placement_of(deberta)
        assert placement.sizing.rank == rank
        assert placement.trainable() == parameters <= budget
        assert lorafamily.summary(deberta).unused == math.floor(budget) - parameters
    finally:
        lorafamily.remove(deberta)


# LoRA paper's settings by shape; where the paper prints another number METHODS of this project says so.
@pytest.mark.parametrize(
    ("layers", "width", "matrices", "rank", "parameters"),
    [
        (12, 768, 2, 8, 294_912),
        (24, 1024, 2, 8, 786_432),
        (48, 1536, 2, 16, 4_718_592),
        (24, 1024, 2, 4, 393_216),
        (36, 1280, 2, 4, 737_280),
        (96, 12288, 2, 1, 4_718_592),
        (96, 12288, 2, 8, 37_748_736),
        (96, 12288, 2, 64, 301_989_888),
        (96, 12288, 4, 2, 18_874_368),
        (96, 12288, 2, 4, 18_874_368),
    ],
)
def test_counts_of_the_lora_paper(layers, width, matrices, rank, parameters):
    with torch.device("meta"):
        model = nn.ModuleList(nn.ModuleList(nn.Linear(width, width) for _ in range(matrices)) for _ in range(layers))
    assert placement_of(lorafamily.apply(model, "lora", rank=rank)).trainable() == parameters


def test_a_pruning_method_may_start_larger_if_the_budget_is_for_the_end(deberta):
    try:
        lorafamily.apply(deberta, "adalora", budget=1.0e6, budget_at="end")
        at_end = placement_of(deberta).sizing
        assert at_end.rank == 9
        assert at_end.initial_parameters > 1.0e6
    finally:
        lorafamily.remove(deberta)
    try:
        lorafamily.apply(deberta, "adalora", budget=1.0e6)
        assert placement_of(deberta).sizing.rank == 6
    finally:
        lorafamily.remove(deberta)


def test_ranks_are_capped_by_the_layer():
    model = lorafamily.apply(tiny(), "lora", rank=50)
    assert placement_of(model).adapters["blocks.0.attention.query"].slices == 16
    assert placement_of(lorafamily.apply(tiny(), "lora", budget=1e9)).trainable() == sum(
        16 * (a.update.d_in + a.update.d_out) for a in placement_of(model).adapters.values()
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"budget": 1_0}, lorafamily.BudgetError, r"budget 10 is too small.*12 matched layers.*smallest.* 576"),
        ({"budget": 0}, lorafamily.BudgetError, "budget=0: must be a positive number"),
        ({"budget": -3.0}, lorafamily.BudgetError, "budget=-3.0: must be a positive number"),
        ({"budget": math.nan}, lorafamily.BudgetError, "budget=nan"),
        ({"budget": "many"}, lorafamily.BudgetError, "budget='many'"),
        ({"budget": 1000, "rank": 1}, lorafamily.BudgetError, "both given; give one"),
        ({"budget": 1000, "budget_at": "start"}, lorafamily.BudgetError, "budget_at='start'"),
        ({"rank_budget": 11}, lorafamily.BudgetError, r"rank_budget 11 is too small.*12 matched.*smallest.* 12"),
        ({"rank_budget": 20.5}, lorafamily.BudgetError, "rank_budget=20.5: must be a whole number"),
        ({"rank_budget": 99, "budget": 9}, lorafamily.BudgetError, "budget=9 and rank_budget=99 are both given"),
        ({"rank_budget": 99, "budget": 9, "rank": 1}, lorafamily.BudgetError, "are all given; give one"),
        ({"rank": 0}, lorafamily.BudgetError, "rank=0: must be a whole number of at least 1"),
        ({"rank": 2.5}, lorafamily.BudgetError, "rank=2.5"),
        (
            {"targets": "atention.qury"},
            lorafamily.TargetError,
            r"nearest: .*attention.query.*end in: down, embedding, key",
        ),
        ({"targets": ["query", "nothing"]}, lorafamily.TargetError, '"nothing" matches no layer'),
        ({"targets": "*"}, lorafamily.TargetError, "no regular expression"),
        ({"targets": lambda name, module: False}, lorafamily.TargetError, "match no layer of ByteDecoder"),
        ({"also_train": "classifier"}, lorafamily.TargetError, "matches no parameter; nearest"),
        ({"also_train": "query"}, lorafamily.TargetError, "the weight of a layer that gets an adapter"),
        ({"method": "lora3"}, lorafamily.MethodError, r"did you mean .*lora2.*installed: adalora, alora"),
        ({"method": "lora2+adalora"}, lorafamily.MethodError, "both methods decide the allocation"),
        ({"method": "lora+lora"}, lorafamily.MethodError, "names lora twice"),
        ({"method": 3}, lorafamily.MethodError, "method=3"),
        ({"gama": 0.1}, lorafamily.MethodError, "unknown option gama; this method takes alpha, init, scaling"),
        ({"alpha": -1}, lorafamily.MethodError, "alpha=-1"),
        ({"scaling": "none"}, lorafamily.MethodError, "scaling='none'"),
        ({"init": "zeros"}, lorafamily.MethodError, "init='zeros'"),
        ({"method": "lora2", "slices": 0}, lorafamily.MethodError, "slices=0"),
        ({"method": "adalora", "gamma": -1}, lorafamily.MethodError, "gamma=-1"),
        ({"dropout": 1.0}, lorafamily.MethodError, "dropout=1.0"),
        ({"name": "a.b"}, lorafamily.StateError, "name='a.b'"),
        ({"name": "keys"}, lorafamily.StateError, "name='keys'"),
        ({"name": "training"}, lorafamily.StateError, "name='training'"),
    ],
)
def test_a_refusal_says_why_and_leaves_the_model_alone(arguments, error, message):
    model = tiny()
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        lorafamily.apply(model, **arguments)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(sites_in(model))


def test_a_name_is_taken_once():
    model = lorafamily.apply(tiny(), "lora", rank=2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(lorafamily.StateError, match=r'"default" is already there; give another name'):
        lorafamily.apply(model, "olora", rank=2)
    lorafamily.merge(model)
    with pytest.raises(lorafamily.StateError, match="merged into the weights"):
        lorafamily.apply(model, "olora", rank=2, name="second")
    lorafamily.unmerge(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_smallest_budget_named_in_the_refusal_works(deberta):
    with pytest.raises(
        lorafamily.BudgetError, match=r"budget 1,000 is too small.*smallest budget that works is 165,888"
    ):
        lorafamily.apply(deberta, "lora", budget=1_000)
    try:
        assert placement_of(lorafamily.apply(deberta, "lora", budget=165_888)).sizing.rank == 1
    finally:
        lorafamily.remove(deberta)


def test_default_targets_leave_head_and_pooler(deberta):
    try:
        lorafamily.apply(deberta, "lora", rank=1)
        assert len(placement_of(deberta).adapters) == 72
        assert not [name for name in placement_of(deberta).adapters if "pooler" in name or "classifier" in name]
    finally:
        lorafamily.remove(deberta)


def test_targets_by_kind_expression_and_predicate():
    def placed(targets):
        return set(placement_of(lorafamily.apply(tiny(), "lora", rank=1, targets=targets)).adapters)

    every = placed(None)
    assert len(every) == 12
    assert placed("attention") == {name for name in every if "attention" in name}
    assert placed(["query", "value"]) == placed(r"attention\.(query|value)$")
    assert placed(lambda name, module: getattr(module, "out_features", 0) == 64) == {n for n in every if "up" in n}


def test_patterns_of_a_convolutional_net_mean_more_than_its_head():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            stages = [nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3), "fc": nn.Linear(4, 4)}) for _ in range(2)]
            self.stages, self.head = nn.ModuleList(stages), nn.Linear(4, 2)

    def adapted(**given):
        return set(placement_of(lorafamily.apply(Net(), "lora", rank=1, **given)).adapters)

    convolutions, linear = {"stages.0.conv", "stages.1.conv"}, {"stages.0.fc", "stages.1.fc"}
    assert adapted(targets=".*") == linear | {"head"}
    assert adapted(targets="conv|head") == convolutions | {"head"}
    assert adapted(targets="head") == {"head"}
    assert adapted(targets="conv", exclude=r"stages\.0") == {"stages.1.conv"}, "excluded is all that is named"
    assert adapted(targets=["fc", "conv"], exclude=r"stages\.0") == {"stages.1.conv", "stages.1.fc"}


def test_modules_that_would_bypass_an_adapter_are_no_targets():
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    lorafamily.apply(model, "lora", rank=2)
    parts = {"0.self_attn.q", "0.self_attn.k", "0.self_attn.v", "0.self_attn.out"}
    assert set(placement_of(model).adapters) == {"0.linear1", "0.linear2"} | parts
    with pytest.raises(lorafamily.TargetError, match="out_proj"):
        lorafamily.apply(model, "lora", rank=2, targets="out_proj", name="second")


@every_method
def test_the_same_seed_places_the_same_adapters_and_another_does_not(method):
    first, second, other = (
        placement_of(lorafamily.apply(tiny(), method, rank=3, seed=seed)).adapters["blocks.1.mlp.down"].state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    from_weight_alone = "olora" in method and "lora2" not in method  # QR leaves nothing to chance
    assert all(torch.equal(first[key], other[key]) for key in first) == from_weight_alone


def test_a_given_seed_leaves_the_global_generator_alone():
    model = tiny()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    lorafamily.apply(model, "lora2", rank=2, seed=4)
    assert torch.equal(torch.rand(3), expected)


def test_nothing_is_allocated_on_the_meta_device(deberta):
    try:
        lorafamily.apply(deberta, "lora2+olora", rank=8)
        assert {p.device.type for p in deberta.parameters()} == {"meta"}
    finally:
        lorafamily.remove(deberta)


def test_summary_reads_as_a_table():
    model = lorafamily.apply(tiny(), "lora", budget=2_000, also_train=r"^norm\.")
    text = str(lorafamily.summary(model))
    assert "blocks.0.attention.query" in text
    assert "adapters: 1,728 trainable" in text
    assert "budget (at the peak): 2,000, of which 272 unused" in text
    assert "also trained, not counted above: 16" in text
    delta = placement_of(model).adapters["blocks.0.mlp.up"]
    delta.update.B.data.normal_()
    row = next(row for row in lorafamily.summary(model).rows if row.module == "blocks.0.mlp.up")
    assert row.norm == pytest.approx(float(delta.delta().norm()), rel=1e-5)  # float32 product against float64 Gram


def test_apply_twice_through_a_submodule_is_refused():
    model = tiny()
    lorafamily.apply(model.blocks[0], "lora", rank=1)
    with pytest.raises(lorafamily.StateError, match=r"blocks\.0\.attention\.query carries an adapter"):
        lorafamily.apply(model, "lora", rank=1)
    assert not torch.isnan(logits(model)).any()


def test_a_lazy_layer_is_named_before_anything_is_changed():
    model = nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(2))
    with pytest.raises(lorafamily.StateError, match=r"1.weight has no shape yet, .* run the model on one batch first"):
        lorafamily.apply(model, "lora", rank=1, targets="^0$")
    model(torch.ones(1, 4))
    assert list(placement_of(lorafamily.apply(model, "lora", rank=1)).adapters) == ["0", "1"]
