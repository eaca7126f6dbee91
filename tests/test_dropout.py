"""Dropout of an update's input: what it keeps, what it costs, and that backward drops what forward dropped."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import lorafamily
from conftest import every_method, perturb_
from lorafamily.dropout import Dropout, Mask
from lorafamily.errors import MethodError
from lorafamily.functional import adapted_linear, low_rank_linear
from lorafamily.layers.placement import placement_of
from test_functional import Saved, inputs, numbers


def keep_of(mask: Mask, n: int) -> torch.Tensor:
    """The mask of n rows, written out."""
    d = mask.within.shape[1]
    return torch.cat([mask.kept(torch.ones(len(bits), d, dtype=mask.dtype), bits) for _, bits in mask.pieces(n)]) > 0


@pytest.mark.parametrize("p", [1e-9, 0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_drops_as_often_as_said_and_the_mean_stays(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(1000, 333, dtype=dtype)
    mask = Mask.draw(x, p)
    keep = keep_of(mask, len(x)).double()
    steps = 2 ** (torch.finfo(dtype).bits - 3)
    dropped = max(1, round(p * steps)) / steps
    assert mask.scale == 1 / (1 - dropped)
    assert len(keep) == 1000
    # Entries are independent in pairs, so the mean's standard error is that of independent ones; five of them.
    error = (dropped * (1 - dropped) / keep.numel()) ** 0.5
    assert abs((1 - keep).mean() - dropped) <= 5 * error
    assert abs((keep * mask.scale).mean() - 1) <= 5 * error * mask.scale


def test_any_three_entries_are_independent():
    """All three rows of a feature take all eight patterns as often as independent ones: by chi-squared over many draws,
    for rows that share one table, the other, and both. Bounded at 1e-4 / 20 comparisons: fixed seeds, not flaky."""
    torch.manual_seed(1)
    n, p = 3 * 64, 0.3
    keep = torch.stack([keep_of(Mask.draw(torch.ones(n, 50), p), n) for _ in range(400)])  # (draws, n, d)
    rows = [0, 1, 64, 65, 128, 191]  # 0, 64, 128 share a row of `within`; 0, 1 one of `across`
    for three in itertools.combinations(rows, 3):
        code = sum(keep[:, row].long() * 2**i for i, row in enumerate(three)).flatten()
        expected = [len(code) * (1 - p) ** bin(c).count("1") * p ** (3 - bin(c).count("1")) for c in range(8)]
        assert stats.chisquare(torch.bincount(code, minlength=8), expected).pvalue > 1e-4 / 20
    across_features = keep[:, 0, :-1].double() - (1 - p), keep[:, 0, 1:].double() - (1 - p)
    covariance = (across_features[0] * across_features[1]).mean()
    assert abs(covariance) < 5 * p * (1 - p) / across_features[0].numel() ** 0.5


def test_what_is_linear_in_the_input_has_the_moments_of_independent_entries():
    """h = V (x ∘ keep) · scale: mean V x, covariance p / (1 − p) V diag(x²) Vᵀ within a row, none between rows."""
    torch.manual_seed(2)
    p, n, draws = 0.2, 130, 20000
    x, V = torch.randn(n, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    found = []
    for _ in range(draws):
        mask = Mask.draw(x, p)
        kept = torch.cat([mask.kept(x[piece], bits) for piece, bits in mask.pieces(n)])
        found.append(mask.scale * kept[[0, 64]] @ V.T)  # two rows that share a row of `within`
    h = torch.stack(found).flatten(1)
    expected = torch.block_diag(*(p / (1 - p) * (V * x[row] ** 2) @ V.T for row in (0, 64)))
    spread = expected.diagonal().sqrt()
    # Five standard errors of a mean, and of a covariance, which is at most the product of spreads times √(κ / draws)
    # with κ the kurtosis: 3 would be a normal's, and few entries, dropped rarely, have at most twice that.
    assert ((h.mean(0) - (x[[0, 64]] @ V.T).flatten()).abs() < 5 * spread / draws**0.5).all()
    assert ((torch.cov(h.T) - expected).abs() < 5 * spread[:, None] * spread * (6 / draws) ** 0.5).all()


def test_masks_differ_and_come_again_with_the_seed():
    x = torch.ones(100, 7)
    torch.manual_seed(0)
    first, second = keep_of(Mask.draw(x, 0.5), 100), keep_of(Mask.draw(x, 0.5), 100)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, keep_of(Mask.draw(x, 0.5), 100))


@pytest.mark.parametrize("tokens", [(4,), (500,), (2, 150)], ids=["few", "many", "two sequences"])
def test_backward_drops_what_forward_dropped(tokens, monkeypatch):
    found, expected = (inputs(tokens=tokens) for _ in range(2))
    rows = found["x"].detach().reshape(-1, 7)
    mask = Mask.draw(rows, 0.25)
    monkeypatch.setattr(Mask, "draw", lambda x, p: mask)
    y = adapted_linear(**found, dropout=0.25)
    masked = expected["x"] * keep_of(mask, len(rows)).view(expected["x"].shape) * mask.scale
    reference = F.linear(expected["x"], expected["W"], expected["b"])
    reference = reference + low_rank_linear(masked, expected["U"], expected["V"], expected["scale"])
    towards = numbers(*y.shape, seed=9, grad=False)
    for output in (y, reference):
        output.backward(towards)
    # float64: the same sums in another order.
    assert_close(y, reference, rtol=1e-12, atol=1e-13)
    for name in ("x", "U", "V"):
        assert_close(found[name].grad, expected[name].grad, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("kind", ["entries", "features"])
def test_gradients_are_those_of_finite_differences(kind):
    layer = nn.Sequential(nn.Linear(7, 6)).double()
    perturb_(lorafamily.apply(layer, "olora", rank=2, dropout=0.4, dropout_kind=kind, seed=0))
    layer.train()

    def of(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return layer(x)

    assert torch.autograd.gradcheck(of, (numbers(70, 7),))


@pytest.mark.parametrize("kind", ["entries", "features"])
@every_method
def test_it_acts_in_training_only(kind, method):
    layer = nn.Sequential(nn.Linear(64, 64))
    perturb_(lorafamily.apply(layer, method, rank=2, dropout=0.1, dropout_kind=kind, seed=0))
    x = torch.randn(256, 64)
    assert torch.equal(layer.eval()(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


def test_it_keeps_no_mask_and_no_second_input():
    layer = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False)
    perturb_(lorafamily.apply(layer, "lora", rank=2, dropout=0.1, seed=0))
    x = torch.randn(4096, 64, requires_grad=True)
    saved = Saved(x, *layer.parameters())
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        layer(x)
    assert sum(saved.bytes.values()) <= 4 * (2 * 4096 + 4 * 2 * 64)  # V xᵀ, and s·U, V and theirs; x has 4 · 64 · 4096
    mask = Mask.draw(x.detach(), 0.1)
    assert mask.within.numel() + mask.across.numel() == (64 + 4096 // 64) * 64


def test_dropped_features_are_the_same_for_the_whole_batch():
    """x = columns of one feature each: what is dropped is then zero in all rows or in none."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(40, 8, bias=False)).double()
    nn.init.zeros_(layer[0].weight)
    perturb_(lorafamily.apply(layer, "lora", rank=2, dropout=0.5, dropout_kind="features", seed=0))
    delta = placement_of(layer).adapters["0"].delta()
    x = torch.eye(40, dtype=torch.float64).repeat(20, 1)
    counts = []
    for _ in range(200):
        y = layer(x).view(20, 40, 8)
        assert_close(y, y[:1].expand_as(y))
        kept = y[0].abs().sum(1) > 0
        # float64, products of two numbers each, doubled because half are dropped.
        assert_close(y[0][kept], 2 * delta.T[kept], rtol=1e-12, atol=1e-14)
        counts.append(kept.sum())
    assert stats.binomtest(int(sum(counts)), 200 * 40, 0.5).pvalue > 1e-3  # a fixed seed, not flaky


def test_what_is_no_dropout_is_refused():
    for p in (-0.1, 1.0, "much", True, float("nan")):
        with pytest.raises(MethodError, match="probability"):
            lorafamily.apply(nn.Sequential(nn.Linear(3, 3)), dropout=p)
    with pytest.raises(MethodError, match="entries, features"):
        Dropout(0.1, "rows")


def test_the_kind_is_saved(tmp_path):
    for kind in ("entries", "features"):
        model = lorafamily.apply(nn.Sequential(nn.Linear(8, 8)), "lora", rank=2, dropout=0.25, dropout_kind=kind)
        lorafamily.save(model, tmp_path / kind)
        again = lorafamily.load(nn.Sequential(nn.Linear(8, 8)), tmp_path / kind)
        assert placement_of(again).adapters["0"].dropout == Dropout(0.25, kind)
