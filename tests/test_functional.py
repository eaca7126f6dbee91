"""The fast paths of "frozen linear + low-rank update" against the plain formulation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import lorafamily
from conftest import every_method, perturb_
from lorafamily.functional import Reading, adapted_linear, folding_pays, low_rank_linear
from lorafamily.placement import placement_of


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_(grad)


def inputs(dtype: torch.dtype = torch.float64, rank: int = 3, with_start: bool = True, tokens: tuple = (2, 5)) -> dict:
    start = (numbers(6, rank, seed=3, grad=False, dtype=dtype), numbers(rank, 7, seed=4, grad=False, dtype=dtype))
    return {
        "x": numbers(*tokens, 7, dtype=dtype),
        "W": numbers(6, 7, seed=1, dtype=dtype, grad=False),
        "b": numbers(6, seed=2, dtype=dtype, grad=False),
        "U": numbers(6, rank, seed=5, dtype=dtype),
        "V": numbers(rank, 7, seed=6, dtype=dtype),
        "scale": 0.7,
        "start": start if with_start else None,
    }


def plain(x, W, b, U, V, scale, start=None, folded=None):
    y = F.linear(x, W, b) + low_rank_linear(x, U, V, scale)
    return y if start is None else y - low_rank_linear(x, *start, scale)


paths = pytest.mark.parametrize("folded", [False, True], ids=["factored", "folded"])
starts = pytest.mark.parametrize("with_start", [False, True], ids=["from zero", "from a start"])


@paths
@starts
@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("tokens", [(5,), (2, 5), (2, 1, 3)], ids=str)
def test_outputs_and_gradients_are_those_of_the_plain_formulation(folded, with_start, rank, tokens):
    found, expected = (
        inputs(rank=rank, with_start=with_start, tokens=tokens),
        inputs(rank=rank, with_start=with_start, tokens=tokens),
    )
    outputs = adapted_linear(**found, folded=folded), plain(**expected)
    towards = numbers(*outputs[0].shape, seed=9, grad=False)
    for output in outputs:
        output.backward(towards)
    # float64, sums of at most ten products in another order.
    assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-13)
    for name in ("x", "U", "V"):
        assert_close(found[name].grad, expected[name].grad, rtol=1e-12, atol=1e-12)


@paths
@starts
def test_gradients_are_those_of_finite_differences(folded, with_start):
    given = inputs(with_start=with_start)

    def of(x, U, V):
        return adapted_linear(x, given["W"], given["b"], U, V, given["scale"], given["start"], folded=folded)

    assert torch.autograd.gradcheck(of, (given["x"], given["U"], given["V"]))
    with torch.no_grad():
        without = of(given["x"], given["U"], given["V"])
    assert torch.equal(without, of(given["x"], given["U"], given["V"]))


@paths
def test_only_what_is_needed_gets_a_gradient(folded):
    given = inputs()
    given["x"] = given["x"].detach()
    adapted_linear(**given, folded=folded).sum().backward()
    assert given["U"].grad is not None
    frozen = {name: value.detach() for name, value in inputs(with_start=False).items() if torch.is_tensor(value)}
    x = frozen["x"].requires_grad_()
    adapted_linear(**frozen, folded=folded).sum().backward()
    assert_close(x.grad, (frozen["W"] + frozen["U"] @ frozen["V"]).sum(0).expand_as(x))


@paths
def test_a_second_derivative_is_refused(folded):
    given = inputs(with_start=False)
    y = adapted_linear(**given, folded=folded).square().sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(y, given["x"], create_graph=True)


def test_folding_pays_where_half_as_many_numbers_move():
    """Square: from twice as many rows as the layer is wide; else from twice the harmonic mean of its widths."""
    assert not folding_pays(2 * 384, 384, 384)
    assert folding_pays(2 * 384 + 1, 384, 384)
    harmonic = 2 / (1 / 4096 + 1 / 11008)
    for d_in, d_out in ((4096, 11008), (11008, 4096)):
        assert not folding_pays(int(2 * harmonic), d_in, d_out)
        assert folding_pays(int(2 * harmonic) + 1, d_in, d_out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_never_folded_and_keeps_small_updates(dtype):
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
def test_autocast_keeps_one_copy_of_x_in_its_own_dtype_and_float32_factors(dtype):
    layer = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False)
    lorafamily.apply(layer, "lora", rank=2, seed=0)
    perturb_(layer)
    x = torch.randn(256, 64, requires_grad=True)
    saved = Saved(x, *layer.parameters())
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor), torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    of_x, of_W, of_h, of_factors = 256 * 64 * 2, 64 * 64 * 2, 256 * 2 * 2, 2 * 2 * 64 * 2
    assert saved.bytes.get(dtype, 0) <= of_x + of_W + of_h + of_factors
    assert saved.bytes.get(torch.float32, 0) <= 2 * 64 * 4 + 64  # s·U before it is cast
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


@pytest.mark.parametrize("tokens", [3, 300], ids=["factored", "folded"])
@every_method
def test_a_layer_takes_the_fast_path_to_the_same_numbers(method, tokens, monkeypatch):
    """float64, through apply: with many rows and few, against the path that hooks in kinds of layers without one."""
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8)).double()
    perturb_(lorafamily.apply(model, method, rank=3, seed=0), size=0.2)
    x = numbers(tokens, 16)

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        y = model(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad])]

    fast = run()
    monkeypatch.setattr(type(placement_of(model).adapters["0"]), "ungated", False)
    for one, other in zip(fast, run(), strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_what_cannot_take_it_does_not(monkeypatch):
    """A gate and a weight that trains go the plain way, and right."""
    taken = []
    monkeypatch.setattr(
        "lorafamily.layers.Reading", lambda *given, **named: taken.append(1) or Reading(*given, **named)
    )
    model = nn.Sequential(nn.Linear(4, 4))
    perturb_(lorafamily.apply(model, "lora", rank=2, seed=0))
    x = torch.randn(3, 4)
    model(x)
    assert len(taken) == 1
    adapter = placement_of(model).adapters["0"]
    with adapter.gated(torch.zeros(2)):
        assert_close(model(x), F.linear(x, model[0].weight, model[0].bias))
    model[0].weight.requires_grad_(True)
    model(x).sum().backward()
    assert model[0].weight.grad is not None
    assert len(taken) == 1
