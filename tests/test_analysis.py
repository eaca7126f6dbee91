"""Analysis of updates against the definitions written out with dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lorafamily
from conftest import every_method, perturb_
from lorafamily.errors import StateError
from lorafamily.insight import analysis
from lorafamily.layers.placement import placement_of

BOUND = 1e-8  # relative, float64: decompositions of factors and cores against those of the dense matrices


def layer(method: str = "lora", rank: int = 4, d_in: int = 30, d_out: int = 20, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(d_in, d_out, bias=False)).double()
    return perturb_(lorafamily.apply(model, method, rank=rank, seed=seed), size=0.3, seed=seed)


def parts(model: nn.Module) -> tuple[lorafamily.Adapter, torch.Tensor, torch.Tensor]:
    """Adapter, W, ΔW."""
    adapter = placement_of(model).adapters["0"]
    return adapter, model[0].weight.detach(), adapter.delta()


def phi(one: torch.Tensor, other: torch.Tensor, i: int, j: int) -> float:
    """The paper's equation 4, for factors that are not decomposed."""
    V1, V2 = (torch.linalg.svd(factor, full_matrices=True)[2] for factor in (one, other))
    return ((V1[:i] @ V2[:j].T).norm() ** 2 / min(i, j)).item()


@every_method
@pytest.mark.parametrize("side", ["down", "up"])
def test_similarity_is_that_of_the_definition(method, side):
    one, other = layer(method, rank=3), layer(method, rank=5, seed=1)
    first, second = (placement_of(model).adapters["0"] for model in (one, other))
    found = analysis.similarity(analysis.directions(first, side), analysis.directions(second, side))
    factors = [adapter.factors() for adapter in (first, second)]
    A, B = (V.detach() if side == "down" else U.detach().T for U, V in factors)
    for i in range(1, found.shape[0] + 1):
        for j in range(1, found.shape[1] + 1):
            assert found[i - 1, j - 1] == pytest.approx(phi(A, B, i, j), rel=BOUND)


def test_a_subspace_is_like_itself_and_unlike_its_complement():
    rows = analysis.random_directions(6, 40, torch.Generator().manual_seed(0))
    same = analysis.similarity(rows, rows)
    assert same.diagonal() == pytest.approx(torch.ones(6), rel=BOUND)
    assert same[2] == pytest.approx(torch.ones(6), rel=BOUND)  # the smaller is contained in the larger
    turned = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q @ rows  # the same subspace, other directions
    assert analysis.similarity(rows, turned)[-1, -1] == pytest.approx(1, rel=BOUND)
    assert analysis.similarity(rows[:3], rows[3:]).abs().max() < BOUND


def test_random_subspaces_are_alike_by_max_i_j_over_d():
    """Mean over 200 pairs; five standard errors of that mean, from its own spread."""
    generator, d = torch.Generator().manual_seed(1), 50
    pairs = torch.stack(
        [analysis.similarity(*(analysis.random_directions(k, d, generator) for k in (4, 8))) for _ in range(200)]
    )
    i, j = torch.arange(1, 5)[:, None], torch.arange(1, 9)
    error = pairs.std(0) / 200**0.5
    assert ((pairs.mean(0) - torch.maximum(i, j) / d).abs() < 5 * error).all()


@every_method
def test_spectrum_amplification_and_overlap_are_those_of_dense_matrices(method):
    adapter, W, delta = parts(layer(method))
    U, S, V = torch.linalg.svd(delta, full_matrices=False)
    values = analysis.spectrum(adapter)
    r = int((S[0] * 1e-12 < S).sum())
    assert values[:r] == pytest.approx(S[:r], rel=BOUND)
    assert values[r:].abs().max() < 1e-12 if len(values) > r else True  # nothing beyond
    share = S[:r] / S[:r].sum()
    assert analysis.effective_rank(values) == pytest.approx(math.exp(-(share * share.log()).sum()), rel=BOUND)
    P, _, Q = torch.linalg.svd(W, full_matrices=False)
    found = analysis.amplification(adapter, W)
    assert found.rank == r
    assert found.delta == pytest.approx(delta.norm().item(), rel=BOUND)
    assert found.weight == pytest.approx(W.norm().item(), rel=BOUND)
    assert found.in_delta == pytest.approx((U[:, :r].T @ W @ V[:r].T).norm().item(), rel=BOUND)
    assert found.in_weight == pytest.approx(torch.linalg.svdvals(W)[:r].norm().item(), rel=BOUND)
    assert found.factor == found.delta / found.in_delta
    two = analysis.amplification(adapter, W, rank=2)
    assert two.rank == 2
    assert two.in_delta == pytest.approx((U[:, :2].T @ W @ V[:2].T).norm().item(), rel=BOUND)
    for k in (1, 3, 15, 20):
        expected = (P[:, :k].T @ delta @ Q[:k].T).norm() ** 2 / delta.norm() ** 2
        assert analysis.overlap(adapter, W, k) == pytest.approx(expected.item(), rel=1e-7)  # Lanczos stops at 1e-8
    assert analysis.overlap(adapter, W, 20) <= 1 + BOUND


def test_random_controls_are_what_a_random_matrix_gives():
    """‖Uᵀ W Vᵀ‖² has mean r² ‖W‖² / (d_in d_out) over random U, V; five standard errors over 300 seeds."""
    adapter, W, _ = parts(layer())
    squares = torch.tensor([analysis.amplification(adapter, W, seed=seed).in_random ** 2 for seed in range(300)])
    expected = 4**2 * W.norm() ** 2 / W.numel()
    assert abs(squares.mean() - expected) < 5 * squares.std() / 300**0.5


def test_large_weights_by_lanczos():
    torch.manual_seed(0)
    W = torch.randn(300, 200, dtype=torch.float64)
    U, V = analysis.leading(W, 5)
    P, S, Q = torch.linalg.svd(W, full_matrices=False)
    assert (U.T @ W @ V.T).diagonal() == pytest.approx(S[:5], rel=BOUND)
    assert (U.T @ P[:, :5]).abs() == pytest.approx(torch.eye(5), abs=1e-6)  # directions converge by the root
    assert (V @ Q[:5].T).abs() == pytest.approx(torch.eye(5), abs=1e-6)


def test_weights_whose_rows_add_up_to_zero():
    half = torch.randint(-3, 4, (10, 30), generator=torch.Generator().manual_seed(0)).double()  # sums are exact
    for centred in (torch.cat([half, -half]), torch.cat([half, -half]).T):
        U, _ = analysis.leading(centred, 2)
        assert (centred.T @ U).norm() == pytest.approx(float(torch.linalg.svdvals(centred)[:2].norm()))


def test_norms_by_layer_and_matrix():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(6, 6)}) for _ in range(2)])}).double()
    perturb_(lorafamily.apply(model, "lora", rank=2, targets="q", seed=0))
    rows = analysis.norms(model)
    assert [(row.module, row.layer, row.matrix, row.slices) for row in rows] == [
        ("blocks.0.q", 0, "q", 2),
        ("blocks.1.q", 1, "q", 2),
    ]
    for row in rows:
        adapter = placement_of(model).adapters[row.module]
        weight = model.get_submodule(row.module).weight
        assert row.delta == pytest.approx(adapter.norm(), rel=BOUND)
        assert row.relative == pytest.approx(adapter.norm() / weight.norm().item(), rel=BOUND)
        assert 1 <= row.effective_rank <= 2


def test_an_untrained_update_has_nothing_to_look_at():
    model = nn.Sequential(nn.Linear(8, 8))
    lorafamily.apply(model, "lora", rank=2, seed=0)
    adapter = placement_of(model).adapters["0"]
    assert len(analysis.directions(adapter, "up")) == 0
    assert analysis.effective_rank(analysis.spectrum(adapter)) == 0
    assert math.isnan(analysis.amplification(adapter, model[0].weight).factor)
    assert math.isnan(analysis.overlap(adapter, model[0].weight, 2))


def test_an_update_of_a_zero_weight_is_infinitely_larger():
    """Blocks whose last layer begins at zero (adaLN-zero), or all of a ControlNet's connections."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nn.init.zeros_(model[1].weight)
    lorafamily.apply(model, "lora", rank=2, seed=0)
    assert math.isnan(analysis.norms(model)[1].relative)
    perturb_(model)
    first, second = analysis.norms(model)
    assert first.relative == pytest.approx(first.delta / float(model[0].weight.norm()))
    assert second.relative == math.inf
    assert analysis.amplification(placement_of(model).adapters["1"], model[1].weight).factor == math.inf


def test_what_cannot_be_compared_is_refused():
    rows = torch.eye(5)[:2]
    with pytest.raises(StateError, match=r"R\^5 and in R\^4"):
        analysis.similarity(rows, torch.eye(4))
    with pytest.raises(StateError, match="not orthonormal"):
        analysis.similarity(rows, 2 * rows)
    with pytest.raises(StateError, match="down"):
        analysis.directions(placement_of(layer()).adapters["0"], "left")
    model = lorafamily.merge(layer())
    with pytest.raises(StateError, match="merged"):
        analysis.norms(model)
