"""Merging is an act: exact, reversible to the last bit, and it says what it does to the outputs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lorafamily
from conftest import data, logits, perturb_, tiny, tokens
from lorafamily.layers.placement import placement_of, state_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FIVE = {"a": ("lora", 2), "b": ("olora", 3), "c": ("lora2", 4), "d": ("adalora", 1), "e": ("rslora+alora", 5)}


def with_five(dtype: torch.dtype) -> nn.Module:
    """Five adapters of different methods and ranks on one model, all moved off their start."""
    model = tiny().to(dtype)
    for seed, (name, (method, rank)) in enumerate(FIVE.items()):
        perturb_(lorafamily.apply(model, method, rank=rank, name=name, seed=seed), seed=seed, size=0.1)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_and_switching_for_long_never_changes_a_bit(dtype):
    """experiments/bench/deploying.py does the same for ten thousand cycles, beside peft."""
    model = with_five(dtype)
    base = {name: value.clone() for name, value in tiny().to(dtype).state_dict().items()}
    first = {}
    for _ in range(20):
        for name in FIVE:
            merged = logits(lorafamily.merge(lorafamily.switch(model, name)))
            assert torch.equal(merged, first.setdefault(name, merged))
            lorafamily.unmerge(model)
    assert len({float(value.float().sum()) for value in first.values()}) == 5
    lorafamily.remove(model)
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("keep", ["device", "cpu"])
def test_originals_wait_where_they_were_told(keep):
    model = perturb_(lorafamily.apply(tiny(), "lora", rank=2, seed=0))
    weight = model.get_submodule("blocks.0.mlp.up").weight
    pointer, adapted = weight.data_ptr(), logits(model)
    lorafamily.merge(model, keep=keep)
    assert all(original.device.type == "cpu" for original in state_of(model).originals.values())
    assert torch.equal(logits(lorafamily.unmerge(model)), adapted)
    assert model.get_submodule("blocks.0.mlp.up").weight.data_ptr() == pointer  # nothing was copied on this device


def test_merging_for_good_says_so_afterwards():
    model = perturb_(lorafamily.apply(tiny(), "lora", rank=2, seed=0))
    expected = logits(lorafamily.merge(model))
    merged = logits(lorafamily.merge(lorafamily.unmerge(model), keep="none"))
    assert torch.equal(merged, expected)
    for undo in (lorafamily.unmerge, lorafamily.remove):
        with pytest.raises(lorafamily.StateError, match='merged with keep="none": the original weights are gone'):
            undo(model)
    assert torch.equal(logits(model), expected)
    with pytest.raises(lorafamily.StateError, match="keep='disk'"):
        lorafamily.merge(tiny_adapted(), keep="disk")


def tiny_adapted() -> nn.Module:
    return lorafamily.apply(tiny(), "lora", rank=2, seed=0)


def test_a_failure_in_the_middle_leaves_the_model_as_it_was(monkeypatch):
    model = perturb_(tiny_adapted())
    before = logits(model)
    adapters = list(placement_of(model).adapters.values())
    monkeypatch.setattr(adapters[7], "factors", lambda: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(MemoryError):
        lorafamily.merge(model)
    monkeypatch.undo()
    assert torch.equal(logits(model), before)
    assert not state_of(model).merged
    lorafamily.merge(model)


def test_a_failure_in_the_middle_is_said_where_nothing_was_kept(monkeypatch):
    model = perturb_(tiny_adapted())
    adapters = list(placement_of(model).adapters.values())
    monkeypatch.setattr(adapters[7], "factors", lambda: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(lorafamily.StateError, match=r"failed in the middle \(full\), .* load the base"):
        lorafamily.merge(model, keep="none")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("merged", [False, True])
def test_the_difference_that_merging_makes(dtype, merged):
    model = perturb_(lorafamily.apply(tiny().to(dtype), "lora", rank=2, seed=0), size=0.1)
    batch = {"bytes": tokens()}
    unmerged = logits(model)
    expected = float((logits(lorafamily.merge(model)).float() - unmerged.float()).abs().max())
    if not merged:
        lorafamily.unmerge(model)
    model.train()
    assert lorafamily.merge_difference(model, batch) == expected
    assert expected < 40 * torch.finfo(dtype).eps  # logits of size one: some roundings of the weights and of sums
    assert expected > 0 or dtype == torch.float32  # with so many tokens the forward itself forms W + ΔW in float32
    assert model.training
    assert state_of(model).merged is merged
    lorafamily.unmerge(model)
    assert torch.equal(logits(model.eval()), unmerged)


@pytest.mark.parametrize("fused", [None, {"up": ["first", "second"]}])
def test_autocast_does_not_reach_what_is_merged(fused):
    """In bfloat16 the sum would keep 8 bits of W, though ΔW may be zero. The same operations, so the same bits."""
    model = perturb_(lorafamily.apply(tiny(), "olora", rank=2, seed=0, fused=fused))
    deltas = {at: adapter.delta() for at, adapter in placement_of(model).adapters.items()}
    expected = copy.deepcopy(lorafamily.merge(model).state_dict())
    difference = lorafamily.merge_difference(model, {"bytes": tokens()})
    lorafamily.unmerge(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(adapter.delta(), deltas[at]) for at, adapter in placement_of(model).adapters.items())
        lorafamily.merge(model)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert lorafamily.merge_difference(model, {"bytes": tokens()}) == difference


def test_the_difference_needs_outputs_to_compare():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return {"y": self.layer(x)}

    model = lorafamily.apply(Odd(), "lora", rank=1)
    with pytest.raises(lorafamily.StateError, match=r"Odd returned a dict, no tensor and without \.logits"):
        lorafamily.merge_difference(model, torch.ones(2, 4))
    assert not state_of(model).merged


@pytest.mark.parametrize("undo", [lorafamily.unmerge, lorafamily.remove])
@pytest.mark.parametrize("how", ["loaded", "trained"])
def test_what_changed_merged_weights_is_said_when_it_is_discarded(how, undo):
    """What changed in other layers stays, so the model is neither base: the user has to know."""
    model = perturb_(lorafamily.apply(tiny(), "lora", rank=2, seed=0, targets="up"))
    before = tiny().blocks[1].mlp.up.weight
    lorafamily.merge(model)
    if how == "loaded":
        model.load_state_dict(tiny(seed=1).state_dict())
    else:
        with torch.no_grad():
            model.blocks[1].mlp.up.weight[0, 0] += 1e-3
    layers = r"blocks\.0\.mlp\.up; blocks\.1\.mlp\.up;" if how == "loaded" else r"others: blocks\.1\.mlp\.up;"
    with pytest.warns(UserWarning, match=f'weights changed since "default" was merged into them, .*{layers}'):
        undo(model)
    assert torch.equal(model.blocks[1].mlp.up.weight, before)


def test_a_merged_model_that_moved_is_not_taken_for_changed():
    model = perturb_(lorafamily.apply(tiny(), "lora", rank=2, seed=0))
    lorafamily.unmerge(lorafamily.merge(model).bfloat16())  # warnings are errors here
    assert torch.equal(model.blocks[1].mlp.up.weight, tiny().bfloat16().blocks[1].mlp.up.weight)


def test_train_and_eval_never_touch_weights():
    model = perturb_(tiny_adapted())
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        model.train()
        model.eval()
    lorafamily.train(model, data(1), steps=1, lr=0.0, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
