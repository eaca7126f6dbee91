"""Layers that read the same input together: what they compute, and when they do not."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import lorafamily
from conftest import every_method, perturb_
from lorafamily import functional
from lorafamily.dropout import Mask
from lorafamily.layers import Adapted, MultiplyingKind


class Attention(nn.Module):
    """q, k and v of `x`, or q of `x` and k, v of `memory`; then a projection."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, size) for size in (width, 8, 8, width))
        self.width = width

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        of = x if memory is None else memory
        scores = F.softmax(self.q(x)[..., :8] @ self.k(of).mT, -1)
        return x + self.out(F.pad(scores @ self.v(of), (0, self.width - 8)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.norm = nn.BatchNorm1d(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x.mT).mT


GROUPS = [("blocks.0.q", "blocks.0.k", "blocks.0.v"), ("blocks.1.q", "blocks.1.k", "blocks.1.v")]


def adapted(method: str = "lora", **options) -> Model:
    torch.manual_seed(0)
    model = Model().double()
    perturb_(lorafamily.apply(model, method, rank=2, seed=0, **options), size=0.2)
    return model


def example(rows: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, rows, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def outcome(model: nn.Module, *given: torch.Tensor) -> list[torch.Tensor]:
    """Output, and gradients of the input and of everything trained."""
    x = given[0].detach().requires_grad_()
    y = model(x, *given[1:])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *trained])]


def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For every product with a stack of V, how many layers it is for."""
    sizes: list[int] = []
    read = functional.Reading.__init__

    def counted(self, x, layers, **named):
        sizes.append(len(layers))
        read(self, x, layers, **named)

    monkeypatch.setattr(functional.Reading, "__init__", counted)
    return sizes


def test_they_are_found_by_running_and_nothing_else_changes():
    model = adapted()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert lorafamily.share_inputs(model.train(), example()) == GROUPS
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())  # batch norm's among them
    assert not any(module._forward_pre_hooks for module in model.modules() if isinstance(module, nn.Linear))
    assert lorafamily.share_inputs(model, example()) == GROUPS


@pytest.mark.parametrize("rows", [2, 100], ids=["factored", "folded"])
@every_method
def test_outputs_and_gradients_are_those_of_layers_on_their_own(method, rows, monkeypatch):
    model = adapted(method)
    alone = outcome(model, example(rows))
    lorafamily.share_inputs(model, example())
    sizes = count(monkeypatch)
    together = outcome(model, example(rows))
    assert sizes == [3, 1, 3, 1]
    # float64; not the same bits: a product with a stack of V sums in another order than one with each, and so do
    # gradients that are added up first and get the update's share then.
    for one, other in zip(alone, together, strict=True):
        assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_one_mask_for_all_of_a_group(monkeypatch):
    model = adapted(dropout=0.3)
    lorafamily.share_inputs(model, example())
    drawn = []
    draw = Mask.draw
    monkeypatch.setattr(Mask, "draw", lambda x, p: drawn.append(draw(x, p)) or drawn[-1])
    model(example(50))
    assert len(drawn) == 4  # qkv, out, qkv, out
    block, x = model.blocks[0], example(50)
    drawn.clear()
    q, k = block.q(x), block.k(x)
    (mask,) = drawn
    rows = x.flatten(0, 1)
    masked = torch.cat([mask.kept(rows[piece], bits) for piece, bits in mask.pieces(len(rows))]).view_as(x) * mask.scale
    for layer, y in ((block.q, q), (block.k, k)):
        U, V, scale, _ = layer.adapters["default"].parts()
        assert_close(y, F.linear(x, layer.weight, layer.bias) + scale * masked @ V.T @ U.T)


def test_a_member_that_gets_another_input_computes_alone():
    """Cross-attention after self-attention was seen, an input written to in between, and one that skips a call."""
    attention, other = Attention().double(), Attention().double()
    other.load_state_dict(attention.state_dict())
    for module in (attention, other):
        perturb_(lorafamily.apply(module, "lora", rank=2, seed=0))
    assert lorafamily.share_inputs(attention, example()) == [("q", "k", "v")]
    for one, two in zip(
        outcome(attention, example(), example(5, seed=1)), outcome(other, example(), example(5, seed=1)), strict=True
    ):
        assert_close(one, two)
    written = example()
    attention.q(written)
    written.mul_(2)
    assert_close(attention.k(written), other.k(written))
    x = example()
    attention.q(x)
    assert_close(attention.v(x), other.v(x))
    attention.k(x)
    assert_close(attention.q(example(seed=2)), other.q(example(seed=2)))
    assert_close(attention.v(x), other.v(x))


def test_nothing_is_held_once_all_have_taken_theirs():
    model = adapted()
    lorafamily.share_inputs(model, example())
    model(example())
    groups = {module.together for module in model.modules() if isinstance(module, Adapted) and module.together}
    assert len(groups) == 2
    assert all(group.reading is group.read is None and not group.waiting for group in groups)


def test_with_activations_computed_again(monkeypatch):
    """Under activation checkpointing a group computes in the backward what it computed in the forward."""
    model = adapted(dropout=0.3)
    lorafamily.share_inputs(model, example())
    torch.manual_seed(1)
    expected = outcome(model, example(20))
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
    torch.manual_seed(1)
    assert_close(outcome(model, example(20)), expected, rtol=0, atol=0)


def test_a_gate_another_adapter_or_none_takes_a_member_out():
    model = adapted()
    perturb_(lorafamily.apply(model, "lora", rank=3, targets="k$|q$", name="second", seed=1))
    lorafamily.switch(model, "default")
    assert lorafamily.share_inputs(model, example()) == GROUPS
    reference = copy.deepcopy(model)
    assert not any(module.together for module in reference.modules() if isinstance(module, Adapted))

    def same() -> None:
        for one, other in zip(outcome(model, example()), outcome(reference, example()), strict=True):
            assert_close(one, other)

    same()
    gated = [m.get_submodule("blocks.0.k").adapters["default"] for m in (model, reference)]
    with gated[0].gated(torch.zeros(2)), gated[1].gated(torch.zeros(2)):
        same()
    for m in (model, reference):
        lorafamily.switch(m, "second")
    same()
    for m in (model, reference):
        lorafamily.remove(m, "default")
    same()
    for m in (model, reference):
        m.blocks[0].q.weight.requires_grad_()
    same()


def test_a_copy_of_one_layer_does_not_copy_its_companions():
    model = adapted()
    lorafamily.share_inputs(model, example())
    one = copy.deepcopy(model.blocks[0].q)
    assert one.together is None
    file = io.BytesIO()
    torch.save(model.blocks[0].q, file)
    file.seek(0)
    assert torch.load(file, weights_only=False).together is None
    lorafamily.remove(model)
    assert all("together" not in vars(module) for module in model.modules())


def test_training_finds_them_in_its_first_forward(monkeypatch):
    sizes = count(monkeypatch)
    model = adapted()
    batches = [(example(), example(seed=1))]
    lorafamily.train(model, batches, steps=2, loss_fn=lambda m, b: F.mse_loss(m(b[0]), b[1]), progress=False)
    assert sizes == [1] * 8 + [3, 1] * 2
    assert not any(module._forward_pre_hooks for module in model.modules() if isinstance(module, nn.Linear))


def test_training_finds_them_where_activations_are_computed_again():
    """Forward and backward of the first step are alone, those of the others together, never one of each."""
    for recomputed in (False, True):
        model = adapted(dropout=0.2)
        for block in model.blocks if recomputed else ():
            forward = block.forward
            block.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
        history = lorafamily.train(
            model,
            [(example(), example(seed=1))],
            steps=4,
            loss_fn=lambda m, b: F.mse_loss(m(b[0]), b[1]),
            progress=False,
        )
        losses = [step.loss for step in history.steps]
        if not recomputed:
            expected = losses
    assert losses == expected


def test_gradients_of_a_group_are_those_of_finite_differences():
    model = adapted("olora", dropout=0.3)
    lorafamily.share_inputs(model, example())

    def of(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return model.blocks[0](x)

    assert torch.autograd.gradcheck(of, (example(2).requires_grad_(),))


@every_method
def test_training_gives_the_losses_of_the_plain_path(method, monkeypatch):
    """float32, 30 steps: rounding differs, and nothing else; Adam divides by small numbers, so it grows some digits."""

    def losses() -> list[float]:
        torch.manual_seed(0)
        model = lorafamily.apply(Model(), method, rank=2, seed=0)
        batches = [(example().float(), example(seed=1).float())]
        loss = lambda m, b: F.mse_loss(m(b[0]), b[1])  # noqa: E731
        history = lorafamily.train(model, batches, steps=30, loss_fn=loss, validation=batches, progress=False)
        return [step.loss for step in history.steps]

    fast = losses()
    monkeypatch.setattr(MultiplyingKind, "fast", lambda self, module, x: None)
    assert losses() == pytest.approx(fast, rel=1e-3)
