"""Ranks given by layer: a pattern that a run found trains anew, shuffled or edited."""

from __future__ import annotations

import random

import pytest
import torch
from torch.testing import assert_close

import lorafamily
from conftest import data, every_method, few_rounds, logits, perturb_, tiny
from lorafamily.layers.placement import placement_of

STEPS = 40
SOME = {"blocks.0.attention.query": 5, r"blocks\.1.*mlp": 2, "attention": 3}


def ranks_of(model) -> dict[str, int]:
    return {at: adapter.slices for at, adapter in placement_of(model).adapters.items()}


def by_size(method: str) -> str:
    """The size that counts slices."""
    return "slices" if "lora2" in method.split("+") else "rank"


def shuffled(ranks: dict[str, int], model) -> dict[str, int]:
    """The same ranks, exchanged between layers of one shape."""
    shapes: dict[tuple, list[str]] = {}
    for at in ranks:
        shapes.setdefault(tuple(model.get_submodule(at).weight.shape), []).append(at)
    generator = random.Random(1)
    moved = {}
    for names in shapes.values():
        values = [ranks[name] for name in names]
        generator.shuffle(values)
        moved |= dict(zip(names, values, strict=True))
    return moved


@pytest.mark.parametrize(("method", "anew"), [("alora", "lora"), ("adalora", "svd"), ("lora2", "dual-plane")])
def test_a_pattern_that_a_run_found_trains_anew(method, anew, tmp_path):
    model = lorafamily.apply(tiny(), method, rank=4, seed=0, **few_rounds(method))
    logged = {"log_dir": tmp_path / "run", "pictures": False, "progress": False}
    lorafamily.train(model, data(), steps=STEPS, lr=1e-2, validation=data(1), **logged)
    lorafamily.save(model, tmp_path / "saved")
    found, recorded = ranks_of(model), lorafamily.summary(model).parameters
    assert len(set(found.values())) > 1
    assert lorafamily.slices_at(tmp_path / "run", STEPS) == lorafamily.slices_at(tmp_path / "run") == found
    assert lorafamily.slices_at(tmp_path / "saved") == found
    size = by_size(method)
    width = {"width": 4} if size == "slices" else {}
    again = lorafamily.apply(tiny(), anew, **{size: found}, **width)
    assert ranks_of(again) == found
    assert lorafamily.summary(again).parameters == lorafamily.plan(tiny(), anew, **{size: found}, **width).use.adapters
    assert lorafamily.summary(again).parameters == recorded
    other = shuffled(found, tiny())
    assert other != found
    moved = lorafamily.apply(tiny(), anew, **{size: other}, **width)
    assert ranks_of(moved) == other
    assert lorafamily.summary(moved).parameters == recorded
    history = lorafamily.train(moved, data(), steps=3, progress=False)
    assert history.slices_end == other


def test_names_come_before_patterns_and_of_patterns_the_first_counts():
    model = lorafamily.apply(tiny(), "lora", rank=SOME)
    for at, rank in ranks_of(model).items():
        expected = 5 if at == "blocks.0.attention.query" else 3 if "attention" in at else 2 if "blocks.1" in at else 0
        assert rank == expected, at
    plan = lorafamily.plan(tiny(), "lora", rank=SOME)
    assert plan.use.adapters == lorafamily.summary(model).parameters == placement_of(model).sizing.initial_parameters
    assert " 0–5 " in str(plan)
    everything = ranks_of(lorafamily.apply(tiny(), "lora", rank={**SOME, ".*": 1}))
    assert min(everything.values()) == 1
    assert max(ranks_of(lorafamily.apply(tiny(), "lora", rank={".*": 99})).values()) == 16  # the layer's size


@every_method
def test_ranks_by_layer_live_through_everything(method, tmp_path):
    size = by_size(method)
    model = tiny(dtype=torch.float64)
    base = logits(model)
    lorafamily.apply(model, method, **{size: SOME if size == "rank" else {**SOME, ".*": 0}}, seed=0)
    start = ranks_of(model)
    assert 0 in start.values()
    assert torch.equal(logits(model), base)
    lorafamily.save(perturb_(model), tmp_path / "a")
    adapted = logits(model)
    assert (adapted - base).abs().max() > 0.1
    back = lorafamily.load(tiny(dtype=torch.float64), tmp_path / "a")
    assert torch.equal(logits(back), adapted)
    assert placement_of(back).sizing == placement_of(model).sizing
    lorafamily.save(back, tmp_path / "b")
    for file in ("adapter.json", "adapter.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert_close(logits(lorafamily.merge(model)), adapted)
    lorafamily.unmerge(model)
    lorafamily.remove(model)
    lorafamily.apply(model, method, **{size: SOME if size == "rank" else {**SOME, ".*": 0}}, **few_rounds(method))
    history = lorafamily.train(model, data(), steps=STEPS, validation=data(1), progress=False)
    assert history.slices_start == start
    assert lorafamily.remove(model) is model
    assert torch.equal(logits(model), base)


def test_an_allocation_goes_on_from_the_ranks_given_and_can_grow_a_layer_without():
    model = lorafamily.apply(tiny(), "alora", rank=SOME, seed=0, scorer="random", rounds=2, drop=9)
    history = lorafamily.train(model, data(), steps=STEPS, validation=data(1), seed=0, progress=False)
    assert sum(history.slices_end.values()) == sum(history.slices_start.values())
    grown = [at for at, rank in history.slices_end.items() if rank and not history.slices_start[at]]
    assert grown
    adapter = placement_of(model).adapters[grown[0]]
    assert adapter.scale == 16 / 5  # as the layer with the most slices


def test_alpha_and_the_scale_by_layer():
    options = {"rank": {".*query": 4, ".*": 2}, "alpha": {"blocks.0": 8, ".*query": 4.0}}
    model = lorafamily.apply(tiny(), "lora", **options)
    for at, adapter in placement_of(model).adapters.items():
        alpha = 8 if "blocks.0" in at else 4 if at.endswith("query") else 16
        assert adapter.scale == alpha / (4 if at.endswith("query") else 2)
    one = lorafamily.apply(tiny(), "lora", rank=SOME, alpha=2, scaling="alpha")
    assert {adapter.scale for adapter in placement_of(one).adapters.values()} == {2.0}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses what transformers is about to rename
def test_an_export_has_the_ranks_and_scales_given(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    model = BertModel(config).double().eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    lorafamily.apply(model, "lora", rank={"query": 4, r"layer\.1.*value": 2}, alpha={"query": 8, ".*": 2}, seed=0)
    perturb_(model)
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        adapted = model(ids).last_hidden_state
    folder = lorafamily.export_peft(model, tmp_path / "peft")
    base = BertModel(config).double().eval()
    base.load_state_dict(state)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(base, folder)(ids).last_hidden_state
    assert_close(theirs, adapted, rtol=1e-5, atol=1e-5)  # the file is in float32


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"rank": {"quary": 2}}, lorafamily.TargetError, r'rank\["quary"\] matches none of the 12 adapted layers'),
        ({"rank": {"(": 2}}, lorafamily.TargetError, r'rank\["\("\]: no layer of that name, and no regular'),
        ({"rank": {".*": 2, "query": 4}}, lorafamily.TargetError, r'rank\["query"\] has no effect.*narrow ones first'),
        ({"rank": {3: 2}}, lorafamily.TargetError, "rank has the key 3"),
        ({"rank": {"query": -1}}, lorafamily.BudgetError, r'rank\["query"\]=-1: must be a whole number'),
        ({"rank": {"query": 2.0}}, lorafamily.BudgetError, r'rank\["query"\]=2.0: must be a whole number'),
        ({"rank": {"query": 0}}, lorafamily.BudgetError, "leaves all 12 matched layers at rank 0"),
        ({"rank": {}}, lorafamily.BudgetError, "leaves all 12 matched layers at rank 0"),
        ({"rank": {"query": 2}, "budget": 1e4}, lorafamily.BudgetError, "both given"),
        ({"alpha": {"query": 0}}, lorafamily.MethodError, "alpha=0: must be a positive"),
        ({"alpha": {"quary": 1}}, lorafamily.TargetError, r'alpha\["quary"\] matches none'),
        ({"alpha": {}, "scaling": "r"}, lorafamily.MethodError, 'must be "alpha/r", "alpha/sqrt'),
        ({"method": "lora2", "slices": {"query": -1}}, lorafamily.MethodError, "slices={'query': -1}"),
        ({"method": "lora2", "slices": {"query": 1}, "rank_budget": 50}, lorafamily.BudgetError, "both set the number"),
    ],
)
def test_what_cannot_be_by_layer_is_refused_and_nothing_is_changed(given, error, message):
    model = tiny()
    with pytest.raises(error, match=message):
        lorafamily.apply(model, **given)
    assert not [name for name, _ in model.named_modules() if "lorafamily" in name]


def test_a_saved_adapter_has_no_steps(tmp_path):
    lorafamily.save(lorafamily.apply(tiny(), "lora", rank=2), tmp_path)
    with pytest.raises(lorafamily.FileError, match="slices of its end alone; leave out step=3"):
        lorafamily.slices_at(tmp_path, 3)


# LoRA²'s two sizes


def sizes_of(model) -> set[tuple[int, int]]:
    return {(a.update.width, a.slices) for a in placement_of(model).adapters.values()}


def test_the_rank_of_lora2_is_what_its_update_can_have():
    for rank, sizes in ((3, (3, 8)), (8, (8, 8)), (12, (12, 12))):
        model = lorafamily.apply(tiny(dtype=torch.float64), "lora2", rank=rank, targets="attention", seed=0)
        assert sizes_of(model) == {sizes}
        assert {row.rank for row in lorafamily.summary(model).rows} == {rank}
        for adapter in placement_of(model).adapters.values():
            for parameter in adapter.update.parameters():
                torch.nn.init.normal_(parameter.data)
            assert int(torch.linalg.matrix_rank(adapter.delta(), rtol=1e-9)) == rank
    by_layer = lorafamily.apply(tiny(), "lora2", rank={"query": 12, ".*": 2}, targets="attention", seed=0)
    assert sizes_of(by_layer) == {(12, 12), (2, 8)}


def test_lora2_has_a_width_and_slices_everywhere():
    model = lorafamily.apply(tiny(), "lora2", width=6, slices=4, targets="attention", seed=0)
    assert sizes_of(model) == {(6, 4)}
    row = lorafamily.summary(model).rows[0]
    assert (row.width, row.initial_slices, row.slices, row.rank) == (6, 4, 4, 4)
    head, line = str(lorafamily.summary(model)).splitlines()[1:4:2]
    assert head.split()[4:7] == ["width", "slices", "rank"]
    assert line.split()[4:7] == ["6", "4", "4"]
    assert "width" not in str(lorafamily.summary(lorafamily.apply(tiny(), "lora", rank=2)))
    both = lorafamily.apply(tiny(), "lora2", width={"query": 3, ".*": 2}, slices={"query": 5, ".*": 1}, seed=0)
    assert sizes_of(both) == {(3, 5), (2, 1)}
    with pytest.raises(lorafamily.BudgetError, match="rank=3 and width=2 are both given"):
        lorafamily.apply(tiny(), "lora2", rank=3, width=2)
    with pytest.raises(lorafamily.BudgetError, match=r"rank=6 with 4 slices on .*say width=\.\.\. and slices"):
        lorafamily.apply(tiny(), "lora2", rank=6, slices=4)
    with pytest.raises(lorafamily.MethodError, match="unknown option width"):
        lorafamily.apply(tiny(), "lora", width=2)


def test_slices_never_grow_beyond_the_width():
    model = lorafamily.apply(tiny(), "dual-plane+alora", width=3, slices=2, scorer="random", rounds=3, drop=5, seed=0)
    history = lorafamily.train(model, data(), steps=20, validation=data(1), seed=0, progress=False)
    assert max(max(decision.after.values()) for decision in history.decisions) == 3
