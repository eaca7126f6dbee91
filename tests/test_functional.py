"""The fast path of "frozen linear + low-rank update" against the plain formulation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import lorafamily
from conftest import every_method, perturb_
from lorafamily.dropout import Mask
from lorafamily.functional import adapted_linear, low_rank_linear
from lorafamily.layers.placement import placement_of


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_(grad)


def inputs(dtype: torch.dtype = torch.float64, rank: int = 3, tokens: tuple = (2, 5)) -> dict:
    return {
        "x": numbers(*tokens, 7, dtype=dtype),
        "W": numbers(6, 7, seed=1, dtype=dtype, grad=False),
        "b": numbers(6, seed=2, dtype=dtype, grad=False),
        "U": numbers(6, rank, seed=5, dtype=dtype),
        "V": numbers(rank, 7, seed=6, dtype=dtype),
        "scale": 0.7,
    }


paths = pytest.mark.parametrize("folded", [False, True], ids=["factored", "folded"])


def plain(x, W, b, U, V, scale):
    return F.linear(x, W, b) + low_rank_linear(x, U, V, scale)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("tokens", [(), (5,), (2, 5), (2, 1, 3), (0,), (2, 0)], ids=str)
@paths
def test_outputs_and_gradients_are_those_of_the_plain_formulation(folded, bias, rank, tokens):
    found, expected = inputs(rank=rank, tokens=tokens), inputs(rank=rank, tokens=tokens)
    if not bias:
        found["b"] = expected["b"] = None
    outputs = adapted_linear(**found, folded=folded), plain(**expected)
    towards = numbers(*outputs[0].shape, seed=9, grad=False)
    for output in outputs:
        output.backward(towards)
    # float64, sums of at most ten products in another order.
    assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-13)
    for name in ("x", "U", "V"):
        assert_close(found[name].grad, expected[name].grad, rtol=1e-12, atol=1e-12)


@paths
def test_gradients_are_those_of_finite_differences_the_second_ones_too(folded):
    given = inputs()

    def of(x, U, V):
        return adapted_linear(x, given["W"], given["b"], U, V, given["scale"], folded=folded)

    assert torch.autograd.gradcheck(of, (given["x"], given["U"], given["V"]))
    assert torch.autograd.gradgradcheck(of, (given["x"], given["U"], given["V"]))
    with torch.no_grad():
        without = of(given["x"], given["U"], given["V"])
    assert torch.equal(without, of(given["x"], given["U"], given["V"]))


def test_second_derivatives_of_a_layer_called_twice_and_with_dropout(monkeypatch):
    """x of the second call is made of the same factors; the mask is that of the forward."""
    drawn = []
    draw = Mask.draw
    monkeypatch.setattr(Mask, "draw", lambda x, p: drawn.append(draw(x, p)) or drawn[-1])

    def of(x, U, V, W, fast):
        for i in range(2):
            if fast:
                x = torch.tanh(adapted_linear(x, W, None, U, V, 0.7, dropout=0.3))
            else:
                x = torch.tanh(F.linear(x, W) + 0.7 * drawn[i].scale * F.linear(F.linear(drawn[i].applied(x), V), U))
        return x

    W = numbers(7, 7, grad=False)
    given = numbers(4, 7, seed=1), numbers(7, 2, seed=2), numbers(2, 7, seed=3)
    found = []
    for fast in (True, False):
        gradients = torch.autograd.grad(of(*given, W, fast).square().sum(), given, create_graph=True)
        found.append([*gradients, *torch.autograd.grad(sum(g.square().sum() for g in gradients), given)])
    for one, other in zip(*found, strict=True):
        assert_close(one, other, rtol=1e-10, atol=1e-11)


@paths
def test_only_what_is_needed_gets_a_gradient(folded):
    given = inputs()
    given["x"] = given["x"].detach()
    adapted_linear(**given, folded=folded).sum().backward()
    assert given["U"].grad is not None
    frozen = {name: value.detach() for name, value in inputs().items() if torch.is_tensor(value)}
    x = frozen["x"].requires_grad_()
    adapted_linear(**frozen, folded=folded).sum().backward()
    assert_close(x.grad, (frozen["W"] + frozen["U"] @ frozen["V"]).sum(0).expand_as(x))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("tokens", [(), (5,), (2, 5), (2, 1, 3)], ids=str)
@paths
def test_the_model_may_write_into_the_output(folded, tokens, bias):
    given = inputs(tokens=tokens) | ({} if bias else {"b": None})
    y = adapted_linear(**given, folded=folded)
    expected = plain(**given)
    y += 1
    y[..., 0] = 0.5  # as a mask over spans does
    torch.relu_(y)
    changed = torch.cat([torch.full_like(expected[..., :1], 0.5), (expected[..., 1:] + 1).relu()], -1)
    assert_close(y, changed)
    of = [given[name] for name in ("x", "U", "V")]
    found, wanted = (torch.autograd.grad(out.square().sum(), of) for out in (y, changed))
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_small_updates(dtype):
    """What W gives cancels here; W + ΔW would round ΔW, 2⁻¹² of W, away."""
    signs = torch.tensor([1.0, -1.0]).repeat(4)
    x = signs.repeat(4096, 1).to(dtype)
    W, U, V = torch.ones(3, 8, dtype=dtype), torch.full((3, 1), 2.0**-12), signs[None]
    assert torch.equal(W, (W.float() + U @ V).to(dtype))
    y = adapted_linear(x, W, None, U.requires_grad_(), V)
    assert torch.equal(y.float(), torch.full((4096, 3), 2.0**-9))


class Saved:
    """What the graph of a computation keeps beside parameters, by dtype, in bytes."""

    def __init__(self, *known: torch.Tensor):
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.bytes: dict[torch.dtype, int] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.bytes[tensor.dtype] = self.bytes.get(tensor.dtype, 0) + storage.nbytes()
        return tensor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_one_copy_of_x_in_its_own_dtype_none_of_the_weight_and_float32_factors(dtype):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False)
    lorafamily.apply(layer, "lora", rank=2, seed=0)
    perturb_(layer)
    x = torch.randn(256, 64, requires_grad=True)
    saved = Saved(x, *layer.parameters())
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor), torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    of_x, of_h, of_factors = 256 * 64 * 2, 256 * 2 * 2, 2 * 2 * 64 * 2
    assert saved.bytes.get(dtype, 0) <= of_x + of_h + of_factors
    # The power of two that V lends U in float16 is one number.
    assert saved.bytes.get(torch.float32, 0) <= (4 if dtype == torch.float16 else 0)
    y.float().square().sum().backward()
    adapter = placement_of(layer).adapters["0"]
    assert adapter.update.A.grad.dtype == torch.float32
    expected = x.detach().clone().requires_grad_()
    U, V = (factor.detach() for factor in adapter.factors())
    out = F.linear(expected, layer[0].weight + adapter.scale * U @ V, layer[0].bias)
    out.square().sum().backward()
    # Sums of 64 products rounded to 8 (bfloat16) or 11 bits, relative to the largest.
    bound = {torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert (x.grad - expected.grad).abs().max() < bound * expected.grad.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_never_folded_and_keeps_small_updates(dtype, monkeypatch):
    W, x = torch.full((4, 4), 1.0, dtype=dtype), torch.eye(4, dtype=dtype).repeat(100, 1)
    U, V = torch.full((4, 1), 1e-3), torch.full((1, 4), 1.0)
    y = adapted_linear(x, torch.zeros_like(W), None, U, V)
    assert_close(y, torch.full_like(y, 1e-3))
    folded = adapted_linear(x.float(), W.float(), None, U, V)
    assert_close(folded, torch.full_like(folded, 1.001))
    before = W.clone()
    monkeypatch.delattr("lorafamily.functional._folded")  # with W of ones the update would be lost in it
    adapted_linear(x, W, None, U, V)
    assert torch.equal(W, before)
    with pytest.raises(NameError, match="_folded"):
        adapted_linear(x.float(), W.float(), None, U, V)


@every_method
@pytest.mark.parametrize("rows", [3, 30, 300])  # the last folds the update into both weights
def test_a_layer_takes_the_fast_path_to_the_same_numbers(method, rows):
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8)).double()
    perturb_(lorafamily.apply(model, method, rank=3, seed=0), size=0.2)
    x = numbers(rows, 16)

    def run() -> list[torch.Tensor]:
        y = model(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad])]

    fast = run()
    with lorafamily.fast_path(False):
        plain = run()
    for one, other in zip(fast, plain, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_what_cannot_take_it_does_not(monkeypatch):
    """Weights and biases that train, and a switch that is off, go the plain way, and right."""
    taken = []
    monkeypatch.setattr(
        "lorafamily.layers.standard.adapted_linear",
        lambda *given, **named: taken.append(1) or adapted_linear(*given, **named),
    )
    model = nn.Sequential(nn.Linear(4, 4))
    perturb_(lorafamily.apply(model, "lora", rank=2, seed=0))
    x = torch.randn(3, 4)
    y = model(x)
    assert len(taken) == 1
    with placement_of(model).adapters["0"].gated(torch.zeros(2)):
        assert_close(model(x), F.linear(x, model[0].weight, model[0].bias))
    assert len(taken) == 2
    with lorafamily.fast_path(False):
        assert_close(model(x), y)
    for name in ("weight", "bias"):
        parameter = model[0].get_parameter(name).requires_grad_(True)
        model(x).sum().backward()
        assert parameter.grad is not None
        parameter.requires_grad_(False)
    assert len(taken) == 2
