"""DESIGN promises 1, 2, 4, 6, 8: identity at the start, the model stays itself, merge is forward, files, seeds."""

from __future__ import annotations

import copy
import pickle
from itertools import product

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lorafamily
from conftest import METHODS, data, every_method, few_rounds, in_turn, logits, perturb_, tiny, tokens
from lorafamily.layers.placement import placement_of


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_adapted_model_starts_as_the_base(method, dtype):
    model = tiny(dtype=dtype)
    base = logits(model)
    assert torch.equal(logits(lorafamily.apply(model, method, rank=3)), base)


@every_method
def test_names_types_and_values_of_the_base_stay(method):
    model, untouched = tiny(), tiny(seed=5)
    names = [name for name, _ in model.named_parameters()]
    before = copy.deepcopy(model.state_dict())
    lorafamily.apply(model, method, rank=3)
    perturb_(model)
    inside = model.state_dict()
    assert all(torch.equal(inside[key], value) for key, value in before.items())
    untouched.load_state_dict({key: inside[key] for key in before})
    assert isinstance(model.blocks[0].mlp.up, torch.nn.Linear)
    lorafamily.merge(model)
    assert list(model.state_dict()) == list(before)
    lorafamily.remove(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert type(model.blocks[0].mlp.up) is torch.nn.Linear
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_remove_restores_requires_grad_as_it_was():
    model = tiny()
    model.embedding.requires_grad_(False)
    lorafamily.apply(model, "lora", rank=2)
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {"default"}
    lorafamily.remove(model)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["embedding.weight"]


@every_method
def test_merged_model_computes_the_same_function(method):
    model = tiny(dtype=torch.float64)
    base = logits(model)
    lorafamily.apply(model, method, rank=3, alpha=4)
    perturb_(model)
    adapted = logits(model)
    assert (adapted - base).abs().max() > 0.03  # the adapters really do something
    # The same mathematics in another order: float64 rounding, amplified by two blocks.
    assert_close(logits(lorafamily.merge(model)), adapted, rtol=1e-9, atol=1e-9)
    assert not any("lorafamily" in name for name, _ in model.named_modules())
    assert torch.equal(logits(lorafamily.unmerge(model)), adapted)
    assert torch.equal(logits(lorafamily.remove(model)), base)


HALF_AND_WHOLE = [torch.float32, torch.bfloat16, torch.float16]


@in_turn("method,dtype", METHODS, HALF_AND_WHOLE, and_also=product(["lora"], HALF_AND_WHOLE))
def test_a_hundred_merges_leave_every_bit_of_the_base(method, dtype):
    model = tiny(dtype=dtype)
    before = copy.deepcopy(model.state_dict())
    lorafamily.apply(model, method, rank=3)
    perturb_(model)
    lorafamily.merge(model)
    first = [weight.clone() for weight in model.state_dict().values()]
    for _ in range(100):
        lorafamily.merge(lorafamily.unmerge(model))
    assert all(torch.equal(a, b) for a, b in zip(first, model.state_dict().values(), strict=True))
    lorafamily.remove(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_merging_twice_and_unmerging_twice_change_nothing_more():
    model = perturb_(lorafamily.apply(tiny(), "lora", rank=2))
    adapted = logits(model)
    once = logits(lorafamily.merge(model))
    assert torch.equal(logits(lorafamily.merge(model)), once)
    assert torch.equal(logits(lorafamily.unmerge(lorafamily.unmerge(model))), adapted)


def test_neither_eval_nor_train_touches_weights():
    model = perturb_(lorafamily.apply(tiny(), "olora", rank=2))
    before = copy.deepcopy(model.state_dict())
    model.train().eval().train()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_merging_an_adapter_on_a_tied_weight_is_refused():
    model = tiny()
    model.blocks[1].mlp.up.weight = model.blocks[0].mlp.up.weight
    lorafamily.apply(model, "lora", rank=2, targets=r"blocks\.0\.mlp\.up")
    perturb_(model)
    with pytest.raises(lorafamily.StateError, match=r"blocks\.0\.mlp\.up\.weight and blocks\.1\.mlp\.up\.weight"):
        lorafamily.merge(model)


@every_method
def test_a_saved_adapter_gives_the_same_bits_in_a_fresh_model(method, tmp_path):
    model = tiny()
    lorafamily.apply(model, method, rank=3, also_train="norm.weight$", dropout=0.1, **few_rounds(method))
    lorafamily.train(
        model, data(), steps=40, validation=data(1), progress=False
    )  # unequal ranks, where a method makes them
    lorafamily.save(model, tmp_path / "a")
    fresh = lorafamily.load(tiny(), tmp_path / "a")
    assert torch.equal(logits(fresh), logits(model))
    assert {k: v.slices for k, v in placement_of(fresh).adapters.items()} == {
        k: v.slices for k, v in placement_of(model).adapters.items()
    }
    assert str(lorafamily.summary(fresh)) == str(lorafamily.summary(model))
    lorafamily.save(fresh, tmp_path / "b")
    for name in ("adapter.json", "adapter.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert torch.equal(logits(lorafamily.remove(fresh)), logits(tiny()))


@every_method
def test_two_runs_with_one_seed_give_the_same_bytes(method, tmp_path):
    files = []
    for run in ("a", "b"):
        torch.manual_seed(int(run == "a"))  # whatever came before must not matter
        model = lorafamily.apply(tiny(), method, rank=3, targets="blocks.1", seed=7, dropout=0.1, **few_rounds(method))
        lorafamily.train(model, data(), steps=40, validation=data(1), evaluate_every=7, progress=False, seed=3)
        files.append((lorafamily.save(model, tmp_path / run) / "adapter.safetensors").read_bytes())
    assert files[0] == files[1]


def test_how_often_one_evaluates_does_not_change_what_is_trained():
    ends = []
    for every in (None, 3):
        model = lorafamily.apply(tiny(), "lora", rank=3, seed=7, dropout=0.3)
        lorafamily.train(model, data(), steps=10, validation=data(1), evaluate_every=every, progress=False)
        ends.append(logits(model))
    assert torch.equal(*ends)


def test_what_trains_beside_the_adapters_is_saved_and_given_back(tmp_path):
    model = tiny()
    base = copy.deepcopy(model.state_dict())
    lorafamily.apply(model, "lora", rank=2, also_train=r"^norm\.weight$")
    lorafamily.train(model, data(), steps=3, progress=False)
    trained = logits(model)
    assert not torch.equal(model.norm.weight, base["norm.weight"])
    assert lorafamily.summary(model).extra_trained == 16
    with lorafamily.disabled(model):
        assert torch.equal(logits(model), logits(tiny()))
    assert torch.equal(logits(model), trained)
    lorafamily.save(model, tmp_path)
    lorafamily.remove(model)
    assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(lorafamily.load(model, tmp_path)), trained)


def test_several_adapters_switch_and_leave_one_by_one():
    model = tiny()
    base = logits(model)
    outputs = {}
    for name, method in {"fr": "lora", "de": "olora"}.items():
        lorafamily.apply(model, method, rank=2, name=name, also_train=r"^norm\.weight$")
        assert torch.equal(logits(model), base)  # the second one's head starts from the base, not from the first's
        lorafamily.train(model, data(), steps=3, progress=False, lr=1e-2)
        outputs[name] = logits(model)
    assert not torch.equal(outputs["fr"], outputs["de"])
    for name in ("fr", "de", "fr"):
        assert torch.equal(logits(lorafamily.switch(model, name)), outputs[name])
    assert torch.equal(logits(lorafamily.switch(model, None)), base)
    lorafamily.remove(model, "de")
    assert torch.equal(logits(lorafamily.switch(model, "fr")), outputs["fr"])
    with pytest.raises(lorafamily.StateError, match='no adapter named "de"; this model has "fr"'):
        lorafamily.switch(model, "de")
    assert torch.equal(logits(lorafamily.remove(model)), base)


def test_what_becomes_active_inside_disabled_stays_active_and_trains():
    model = tiny()
    for name in ("one", "two"):
        lorafamily.apply(model, "lora", rank=2, targets="blocks.1", name=name)
    with lorafamily.disabled(model):
        lorafamily.switch(model, "one")
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"one"}
    with lorafamily.disabled(model):
        lorafamily.apply(model, "lora", rank=2, targets="blocks.1", name="three")
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"three"}
    with lorafamily.disabled(model):
        lorafamily.remove(model, "three")
    with pytest.raises(lorafamily.StateError, match="no adapter is active"):
        placement_of(model)
    lorafamily.switch(model, "two")
    with lorafamily.disabled(model):
        lorafamily.remove(model)
    assert not any("lorafamily" in name for name, _ in model.named_modules())


class Headed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.first(x))


@pytest.mark.parametrize("head", [nn.Linear(4, 5), nn.Linear(4, 3, bias=False)])
def test_a_trained_layer_that_is_replaced_by_another_size_is_refused_where_values_would_not_fit(head, tmp_path):
    model = lorafamily.apply(Headed(), "lora", rank=2, targets="first", also_train="head")
    model.head = head
    before = {name: value.clone() for name, value in model.state_dict().items()}
    named = r"head.weight is \[5, 4\]" if len(head.weight) == 5 else "head.bias is gone"
    for use in (
        lambda: lorafamily.save(model, tmp_path / "file"),
        lambda: lorafamily.export_peft(model, tmp_path / "peft"),
        lambda: lorafamily.session(model, torch.optim.AdamW(lorafamily.parameter_groups(model)), steps=3),
        lambda: lorafamily.switch(model, None),
        lambda: lorafamily.disabled(model).__enter__(),
        lambda: lorafamily.apply(model, "lora", rank=2, targets="first", name="other"),
    ):
        with pytest.raises(lorafamily.StateError, match=named + ", and was .*resize before you apply adapters"):
            use()
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert not any(tmp_path.iterdir())


def test_an_adapted_layer_that_is_replaced_is_named():
    model = lorafamily.apply(Headed(), "lora", rank=2, targets=["first", "head"])
    model.head = nn.Linear(4, 5)
    with pytest.raises(lorafamily.StateError, match=r"or was head replaced since, as by resize_token_embeddings"):
        lorafamily.merge(model)


def test_adapters_from_the_meta_device_have_no_values_until_they_are_loaded():
    """Whatever the memory held would pass for an adapter."""
    with torch.device("meta"):
        model = lorafamily.apply(tiny(), "olora", rank=2, targets="blocks.1")
    whole = lorafamily.apply(tiny(), "olora", rank=2, targets="blocks.1", seed=0)
    batch = data(1)[0]
    model.to_empty(device="cpu")
    base = {name: value for name, value in whole.state_dict().items() if "lorafamily" not in name}
    model.load_state_dict(base, strict=False)
    assert model.eval()(**batch).logits.isnan().all()
    model.load_state_dict(whole.state_dict())
    assert torch.equal(model(**batch).logits, whole.eval()(**batch).logits)


def test_adapted_models_can_be_copied_and_pickled():
    model = perturb_(lorafamily.apply(tiny(), "lora2+olora", rank=2))
    out = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), out)
        perturb_(other)
        assert not torch.equal(logits(other), out)
        assert torch.equal(logits(lorafamily.remove(other)), logits(tiny()))
    assert torch.equal(logits(model), out)


def test_torch_encoder_layers_do_not_bypass_adapters_in_eval():
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    model = torch.nn.Sequential(layer)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    lorafamily.apply(model, "lora", rank=2)
    with torch.no_grad():
        base = model(x)
        perturb_(model)
        assert (model(x) - base).abs().max() > 1e-3
        merged = lorafamily.merge(model)(x)
        assert_close(merged, lorafamily.unmerge(model)(x), rtol=1e-4, atol=1e-5)  # float32, a fused kernel against not


def test_an_adapter_in_half_precision_keeps_float32_factors():
    model = lorafamily.apply(tiny(dtype=torch.bfloat16), "lora", rank=2)
    assert {p.dtype for p in placement_of(model).adapters["blocks.0.mlp.up"].parameters()} == {torch.float32}
    assert model(tokens()).logits.dtype == torch.bfloat16
    assert "float32 factors" in str(lorafamily.summary(model))
