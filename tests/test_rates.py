"""A rate for every method: parameters move the weights as far as plain LoRA's, and nothing is left behind."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lorafamily
from conftest import every_method, logits, tiny
from lorafamily.layers.placement import placement_of
from lorafamily.rates import STEPS, _Path, _reference


class Two(nn.Module):
    """Two layers in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.Linear(6, 4, bias=False, dtype=torch.float64) for _ in range(2))

    def forward(self, x):
        return self.a(x) + self.b(x)


@pytest.mark.parametrize("method", ["lora", "olora", "lora2", "adalora"])
@torch.no_grad()
def test_the_distance_is_that_of_dense_updates(method):
    model = lorafamily.apply(Two(), method, rank=2, seed=0)
    adapters = placement_of(model).adapters.values()
    path = _Path(placement_of(model), seed=3)
    before = [a.delta() for a in adapters]
    found = path.distance(0.3)
    for p, sign, _ in path.signs:
        assert set(sign.unique().tolist()) <= {-1, 1}
        p += 0.3 * sign.double()
    moved = [a.delta() for a in adapters]
    expected = math.sqrt(sum((now - then).square().sum().item() for now, then in zip(moved, before, strict=True)))
    assert found == pytest.approx(expected, rel=1e-9)


@every_method
def test_at_the_suggested_rate_weights_go_as_far_as_plain_loras(method):
    model = lorafamily.apply(tiny(), method, rank=4, seed=0)
    found = lorafamily.suggest_lr(model, reference_lr=3e-3, seed=5)
    with _reference(model, 5):
        wanted = _Path(placement_of(model), 5).distance(STEPS * 3e-3)
    assert _Path(placement_of(model), 5).distance(STEPS * found.lr) == pytest.approx(wanted, rel=1e-3)
    assert found.lr == pytest.approx(found.ratio * 3e-3)
    assert found.low <= found.ratio <= found.high
    assert f"lr {found.lr:.2g}: " in str(found)


def test_plain_lora_is_its_own_reference():
    model = lorafamily.apply(tiny(), "lora", rank=4, seed=0)
    found = lorafamily.suggest_lr(model, seed=0)
    assert (found.low, found.ratio, found.high) == pytest.approx((1, 1, 1), rel=1e-3)


def test_methods_whose_parameters_carry_further_get_a_smaller_rate():
    ratios = {m: lorafamily.suggest_lr(lorafamily.apply(tiny(), m, rank=4, seed=0)).ratio for m in ("olora", "lora2")}
    assert ratios["olora"] < 0.6  # orthonormal factors are larger than LoRA's, and both of them count from the start
    assert ratios["lora2"] > 1.5  # products of four small tensors


def test_tensors_that_learn_faster_move_further():
    plain, plus = (lorafamily.apply(tiny(), method, rank=4, seed=0) for method in ("lora", "loraplus"))
    up_ratio = placement_of(plus).method.up_ratio
    assert up_ratio > 10
    found = lorafamily.suggest_lr(plus, seed=0)
    # ΔW is linear in B, which is zero at first, as long as A hardly moves.
    assert found.ratio == pytest.approx(1 / up_ratio, rel=0.1)
    assert lorafamily.suggest_lr(plain, seed=0).ratio == pytest.approx(1, rel=1e-3)


@every_method
def test_the_model_is_left_as_it_was(method):
    model = lorafamily.apply(tiny(), method, rank=2, seed=0).train()
    before, output = {name: p.clone() for name, p in model.state_dict().items()}, logits(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    lorafamily.suggest_lr(model, reference_lr=1e-2, seed=0)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(logits(model), output)
    assert placement_of(model).spec == method


@pytest.mark.parametrize("rate", [0, -1.0, math.inf, "1e-3"])
def test_a_rate_that_is_none_is_refused(rate):
    model = lorafamily.apply(Two(), "lora", rank=2, seed=0)
    with pytest.raises(lorafamily.MethodError, match="must be a positive number"):
        lorafamily.suggest_lr(model, reference_lr=rate)
    assert placement_of(model).name == "default"


def test_a_model_without_adapters_is_refused():
    with pytest.raises(lorafamily.StateError):
        lorafamily.suggest_lr(tiny())
