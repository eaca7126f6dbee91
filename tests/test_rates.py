"""A rate for every method: the largest eigenvalue is the Hessian's, and nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lorafamily
from conftest import data, logits, tiny
from lorafamily.layers.placement import placement_of
from lorafamily.rates import _Loss, curvature


class Regression(nn.Module):
    """One layer in float64, whose Hessian is small enough to be written down."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 4, bias=False, dtype=torch.float64)

    def forward(self, x, y):
        return F.mse_loss(torch.tanh(self.layer(x)), y)


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(20, 6, generator=generator).double(),
        "y": torch.randn(20, 4, generator=generator).double(),
    }


def loss_fn(model, batch):
    return model(**batch)


def dense_hessian(model, pieces) -> torch.Tensor:
    """Column by column, with the products that are tested: they are compared with differences of gradients."""
    parameters = [p for a in placement_of(model).adapters.values() for p in a.update.parameters()]
    loss = _Loss(model, pieces, parameters, loss_fn)
    columns = []
    for i in range(sum(p.numel() for p in parameters)):
        flat = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
        flat[i] = 1
        parts = [x.view_as(p) for x, p in zip(flat.split([p.numel() for p in parameters]), parameters, strict=True)]
        columns.append(torch.cat([h.flatten() for h in loss.differences(parts)]))
    return torch.stack(columns)


@pytest.mark.parametrize("differences", [False, True])
@pytest.mark.parametrize("method", ["lora", "olora", "adalora"])
def test_the_eigenvalue_is_that_of_the_whole_hessian(method, differences):
    model = lorafamily.apply(Regression(), method, rank=2, seed=0)
    pieces = [(batch(1), 0.25), (batch(2), 0.75)]
    expected = torch.linalg.eigvalsh(dense_hessian(model, pieces)).max().item()
    found = curvature(model, pieces, iterations=200, loss_fn=loss_fn, differences=differences)
    assert found.differences == differences
    assert abs(found.eigenvalue - expected) <= found.residual + 1e-3 * expected
    assert found.residual <= 0.05 * expected


def test_the_answer_on_a_quadratic_is_known():
    """Loss c/2 ‖θ‖² in the adapter's parameters, with c three times as large for plain LoRA's: a third of its rate."""
    model = lorafamily.apply(Regression(), "olora", rank=2, seed=0)

    def quadratic(model, batch):
        placement = placement_of(model)
        c = 6.0 if placement.spec == "lora" else 2.0
        return 0.5 * c * sum(p.square().sum() for a in placement.adapters.values() for p in a.update.parameters())

    found = lorafamily.suggest_lr(model, [batch()], reference_lr=0.5, loss_fn=quadratic)
    assert found.method.eigenvalue == pytest.approx(2)
    assert found.reference.eigenvalue == pytest.approx(6)
    assert found.ratio == pytest.approx(3)
    assert found.lr == pytest.approx(1.5)
    assert found.low == pytest.approx(3)
    assert "lr 1.5: 3 times plain LoRA's" in str(found)


def test_the_model_is_left_as_it_was_and_lora_is_its_own_reference():
    model = lorafamily.apply(tiny(), "lora", rank=2, seed=0).train()
    before, output = {name: p.clone() for name, p in model.state_dict().items()}, logits(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    found = lorafamily.suggest_lr(model, data(2), reference_lr=1e-2, seed=0)
    assert 0.8 < found.ratio < 1.25  # the same start, and an iteration that stops early
    assert found.low <= found.ratio <= found.high
    assert found.seconds > 0
    assert found.steps > 0
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(logits(model), output)
    assert placement_of(model).spec == "lora"


def test_an_operation_without_a_second_derivative_is_gone_round():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 2 * ctx.saved_tensors[0] * g

    def once(model, batch):
        return Once.apply(model.layer(batch["x"]) - batch["y"]).square().mean()

    def twice(model, batch):
        return (model.layer(batch["x"]) - batch["y"]).pow(4).mean()

    model = lorafamily.apply(Regression(), "lora", rank=2, seed=0)
    with pytest.warns(UserWarning, match="Regression has no second derivative"):
        found = curvature(model, [(batch(), 1.0)], iterations=100, loss_fn=once)
    assert found.differences
    expected = curvature(model, [(batch(), 1.0)], iterations=100, loss_fn=twice)
    assert found.eigenvalue == pytest.approx(expected.eigenvalue, rel=1e-3)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"count": 0}, lorafamily.MethodError, "count=0: must be a whole number"),
        ({"iterations": 0}, lorafamily.MethodError, "iterations=0: must be a whole number"),
        ({"reference_lr": 0}, lorafamily.MethodError, "reference_lr=0: must be a positive number"),
        ({"batches": []}, lorafamily.DataError, "no batch to look at"),
        ({"batches": batch()}, lorafamily.DataError, "must be batches"),
        (
            {"loss_fn": lambda model, batch: 0 * model(**batch)},
            lorafamily.MethodError,
            "does not curve upwards in the parameters of these adapters",
        ),
    ],
)
def test_what_cannot_be_is_refused(given, error, message):
    model = lorafamily.apply(Regression(), "lora", rank=2, seed=0)
    with pytest.raises(error, match=message):
        lorafamily.suggest_lr(model, **{"batches": [batch()], "loss_fn": loss_fn} | given)
    assert placement_of(model).name == "default"
