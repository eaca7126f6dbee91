"""Every method on every kind of layer in every precision: forward = merged, unmerge and remove exact, files stable."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lorafamily
from conftest import METHODS, pairwise, perturb_
from lorafamily.layers import kinds
from lorafamily.layers.placement import placement_of, targets_of


def linear():
    return nn.Linear(7, 5), torch.randn(4, 3, 7)


def conv1d_of_transformers():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is an extra")
    return pytorch_utils.Conv1D(5, 7), torch.randn(4, 3, 7)


def embedding():
    return nn.Embedding(11, 6), torch.randint(11, (4, 3))


def convolution1():
    return nn.Conv1d(3, 6, 3, stride=2, padding=1), torch.randn(4, 3, 9)


def convolution2():
    layer = nn.Conv2d(3, 6, (3, 2), padding=(2, 1), dilation=2, padding_mode="circular", bias=False)
    return layer, torch.randn(4, 3, 8, 7)


def grouped_convolution():
    return nn.Conv2d(6, 9, (3, 2), groups=3, stride=2, padding=1), torch.randn(4, 6, 8, 7)


def convolution3():
    return nn.Conv3d(2, 4, 3, padding="same"), torch.randn(2, 2, 4, 3, 4)


def fused_linear():
    return nn.Linear(7, 6), torch.randn(4, 3, 7)


def fused_by_heads():
    """GPT-NeoX's order in GPT-2's layout: q, k, v of one head after the other, v of another width."""
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is an extra")
    return pytorch_utils.Conv1D(10, 7), torch.randn(4, 3, 7)


class SelfAttention(nn.Module):
    def __init__(self, **others):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, **others)

    def forward(self, x):
        others = x[..., :5] if self.attention.in_proj_weight is None else x
        return self.attention(x, others, others, need_weights=False)[0]


def attention():
    return SelfAttention(), torch.randn(2, 4, 6)


def cross_attention():
    return SelfAttention(kdim=5, vdim=5), torch.randn(2, 4, 6)


KINDS = [linear, conv1d_of_transformers, embedding, convolution1, convolution2, convolution3, grouped_convolution]
KINDS += [fused_linear, fused_by_heads, attention, cross_attention]
FUSED = {
    fused_linear: {"fused": {"layer": ["q", "k", "v"]}, "targets": ["layer.q", "layer.v"]},
    fused_by_heads: {"fused": {"layer": {"q": 2, "k": 2, "v": 1}}, "targets": ["layer.q", "layer.v"]},
}
# Merging rounds each weight once to the dtype; the outputs, sums of up to some tens of such products of size one, may
# move by some units in its last place.
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.08, torch.float16: 0.01}


def model_of(kind, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layer, x = kind()
    with torch.no_grad():
        for weight in layer.parameters():
            if weight.ndim > 1:
                weight.normal_()
    model = nn.ModuleDict({"layer": layer}).to(dtype).eval()
    model.forward = lambda x: model["layer"](x)
    return model, x.to(dtype) if x.is_floating_point() else x


def adapted(kind, model: nn.Module, method: str, rank: int) -> nn.Module:
    return lorafamily.apply(model, method, rank=rank, seed=0, **{"targets": "layer", **FUSED.get(kind, {})})


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


@torch.no_grad()
@pairwise("method,kind,dtype", METHODS, KINDS, list(ROUNDING), ids=lambda value: getattr(value, "__name__", str(value)))
def test_forward_is_merged_and_everything_can_be_undone(method, kind, dtype, tmp_path):
    model, x = model_of(kind, dtype)
    # F.linear may add in another order for a weight that requires no gradient; apply freezes, so compare with frozen.
    model.requires_grad_(False)
    before, own = copy.deepcopy(model["layer"].state_dict()), classes(model)
    base = model["layer"](x)
    adapted(kind, model, method, rank=3)
    assert torch.equal(model["layer"](x), base)
    perturb_(model, size=0.3)
    output = model["layer"](x)
    assert output.dtype == dtype
    assert (output - base).abs().max() > 0.05
    lorafamily.merge(model)
    assert own.items() <= classes(model).items()
    merged = model["layer"](x)
    size = float(output.abs().max())
    # See ROUNDING; relative to the largest output, since small ones are differences of large terms.
    assert_close(merged, output, rtol=0, atol=ROUNDING[dtype] * size)
    lorafamily.unmerge(model)
    assert torch.equal(model["layer"](x), output)

    first = lorafamily.save(model, tmp_path / "first")
    loaded, _ = model_of(kind, dtype)
    lorafamily.load(loaded, first)
    assert torch.equal(loaded["layer"](x), output)
    second = lorafamily.save(loaded, tmp_path / "second")
    for name in ("adapter.safetensors", "adapter.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()

    lorafamily.remove(model)
    assert classes(model) == own
    assert all(torch.equal(value, before[name]) for name, value in model["layer"].state_dict().items())
    assert torch.equal(model["layer"](x), base)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_gradient_is_that_of_the_changed_weight(kind):
    """float64: backward through the layer with its adapters, and through the same layer with weight W + s U V."""
    model, x = model_of(kind, torch.float64)
    perturb_(adapted(kind, model, "lora", rank=3))
    plain, _ = model_of(kind, torch.float64)
    changed, leaves = {name: value.detach() for name, value in plain.named_parameters()}, {}
    for path, adapter in placement_of(model).adapters.items():
        U, V = leaves[path] = tuple(factor.detach().requires_grad_() for factor in adapter.factors())
        own = targets_of(model)[path].kind
        weight = changed[own.stored_as(path)]
        changed[own.stored_as(path)] = own.restore(own.matrix(weight) + adapter.scale * U @ V, weight)
    inside = {name.removeprefix("layer."): value for name, value in changed.items()}
    expected = torch.func.functional_call(plain["layer"], inside, (x,))
    found = model["layer"](x)
    assert_close(found, expected)
    towards = torch.randn_like(found)
    found.backward(towards)
    expected.backward(towards)
    for path, adapter in placement_of(model).adapters.items():
        assert_close(adapter.update.B.grad, leaves[path][0].grad)
        assert_close(adapter.update.A.grad, leaves[path][1].grad)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_adapted_layers_can_be_pickled_and_copied(kind):
    model, x = model_of(kind, torch.float32)
    perturb_(adapted(kind, model, "lora", rank=2))
    layer = model["layer"]
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.tokens = nn.Embedding(5, 8)
        self.rescaled = nn.Embedding(5, 8, max_norm=1.0)
        self.mix = nn.Linear(8, 8)


def test_linear_layers_go_first():
    assert list(placement_of(lorafamily.apply(Vision(), "lora", rank=1)).adapters) == ["mix"]
    assert list(placement_of(lorafamily.apply(Vision(), "lora", rank=1, targets="m")).adapters) == ["mix"]
    chosen = placement_of(lorafamily.apply(Vision(), "lora", rank=1, targets=["mix", "patches", "^tokens"])).adapters
    assert list(chosen) == ["patches", "tokens", "mix"]
    every = placement_of(lorafamily.apply(Vision(), "lora", rank=1, targets=lambda name, module: True)).adapters
    assert list(every) == ["patches", "depthwise", "tokens", "mix"]
    with pytest.raises(lorafamily.TargetError, match='"rescaled": rescaled cannot carry an adapter: max_norm rescales'):
        lorafamily.apply(Vision(), "lora", targets="rescaled")


class Product(nn.Module):
    """As torch_geometric's Linear, which is no nn.Linear."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.register_parameter("bias", nn.Parameter(torch.randn(6)) if bias else None)
        self.scale = 1.0

    def forward(self, x):
        return nn.functional.linear(x * self.scale, self.weight, self.bias)


class Router(Product):
    def forward(self, x):
        y = super().forward(x)
        return y.softmax(-1), y


@pytest.mark.parametrize("bias", [True, False])
def test_what_computes_as_a_linear_layer_is_one(bias, tmp_path):
    model = nn.Sequential(Product(bias)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    base = model(x)
    perturb_(lorafamily.apply(model, "lora", rank=2))
    adapted = model(x)
    assert (adapted - base).abs().max() > 0.1
    again = copy.deepcopy(model)
    lorafamily.remove(again)
    assert torch.equal(lorafamily.load(again, lorafamily.save(model, tmp_path))(x), adapted)
    assert_close(lorafamily.merge(model)(x), adapted)
    assert torch.equal(lorafamily.remove(model)(x), base)


def test_what_looks_like_a_linear_layer_and_computes_something_else_is_none():
    scaled = Product()
    scaled.scale = 2.0
    lazy = Product()
    lazy.weight = nn.UninitializedParameter()
    whole = Product()
    whole.weight = nn.Parameter(torch.ones(6, 4, dtype=torch.int8), requires_grad=False)
    for layer in (scaled, Router(), whole, lazy):
        assert kinds.kind_of(layer) is None, layer


class Scaled(nn.Module):
    """A linear layer of somebody's own, with the weight in another shape."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, 4))  # (heads, d_out of a head, d_in)

    def forward(self, x):
        return x @ self.weight.flatten(0, 1).T


class ScaledKind(kinds.LayerKind):
    name = "scaled"
    linear = True

    def matches(self, module):
        return isinstance(module, Scaled)

    def matrix(self, weight):
        return weight.flatten(0, 1)

    def restore(self, matrix, weight):
        return matrix.view_as(weight)


def test_a_kind_of_ones_own_takes_a_few_lines(monkeypatch):
    monkeypatch.setattr(kinds, "_KINDS", list(kinds._KINDS))
    with pytest.raises(lorafamily.TargetError):
        lorafamily.apply(nn.Sequential(Scaled()), "lora", rank=2)
    lorafamily.register_layer_kind(ScaledKind())
    model = nn.Sequential(Scaled()).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    base = model(x)
    perturb_(lorafamily.apply(model, "lora", rank=2))
    adapted = model(x)
    assert (adapted - base).abs().max() > 0.1
    assert_close(lorafamily.merge(model)(x), adapted)
    assert torch.equal(lorafamily.remove(model)(x), base)
