"""Samples of one batch through adapters of their own give what each gives alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lorafamily
from conftest import METHODS, logits, perturb_, tiny, tokens
from lorafamily.layers.placement import placement_of
from lorafamily.layers.site import sites_in


def with_all() -> nn.Module:
    """One adapter of every method, of different ranks, one of them on some layers only."""
    model = tiny(dtype=torch.float64)
    for seed, method in enumerate(METHODS):
        targets = "mlp" if seed == 2 else None
        name = method.replace("+", "_")
        lorafamily.apply(model, method, rank=1 + seed % 4, name=name, seed=seed, targets=targets)
        perturb_(model, seed=seed)
    return model


def test_every_sample_gets_its_own_adapter():
    model = with_all()
    names = [None, *[method.replace("+", "_") for method in METHODS], None, "lora", "lora"]
    batch = tokens(rows=len(names))
    active = placement_of(model).name
    before = logits(model)
    with torch.no_grad():
        with lorafamily.routing(model, names):
            routed = model(batch).logits
        for i, name in enumerate(names):
            alone = model(batch[i : i + 1]).logits if name == active else None
            if name != active:
                lorafamily.switch(model, name)
                alone = model(batch[i : i + 1]).logits
                lorafamily.switch(model, active)
            # float64: the same products, padded with zeros and summed in another order.
            assert_close(routed[i : i + 1], alone, rtol=1e-10, atol=1e-12)
    assert len({float(sample.sum()) for sample in routed}) == len(names)
    assert placement_of(model).name == active
    assert torch.equal(logits(model), before)


def test_flattened_tokens_follow_their_sample():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 4, dtype=torch.float64)

        def forward(self, x):
            return self.layer(x.flatten(0, 1)).view(*x.shape[:2], 4)

    model = Flat()
    for name in ("a", "b"):
        perturb_(lorafamily.apply(model, "lora", rank=2, name=name, seed=ord(name)), seed=ord(name))
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    with lorafamily.routing(model, ["b", None, "a"]):
        routed = model(x)
        with pytest.raises(lorafamily.StateError, match="layer got 14 rows for a batch routed as 3 samples"):
            model(x[:2])
    for i, name in enumerate(["b", None, "a"]):
        lorafamily.switch(model, name)
        assert_close(routed[i], model(x)[i])
    assert all(site.route is None for _, site in sites_in(model))


def test_routes_that_cannot_be_are_refused():
    model = lorafamily.apply(tiny(), "lora", rank=1, name="a")
    lorafamily.apply(model, "lora", rank=1, name="head", also_train="norm")
    for names, message in (
        (["a", "c"], 'no adapter named "c"; this model has "a", "head"'),
        ("a", "must be a list with the name of an adapter"),
        ([], "must be a list"),
        (["a", "head"], 'adapter "head" has its own .*norm.*, trained along with it'),
    ):
        with pytest.raises(lorafamily.StateError, match=message), lorafamily.routing(model, names):
            pass
    lorafamily.merge(lorafamily.switch(model, "a"))
    with pytest.raises(lorafamily.StateError, match="is merged into the weights"), lorafamily.routing(model, ["a"]):
        pass
    embedding = lorafamily.apply(nn.Sequential(nn.Embedding(4, 3)), "lora", rank=1, targets="0", name="a")
    refused = pytest.raises(lorafamily.StateError, match=r"is on 0 \(embedding\); only layers called")
    with refused, lorafamily.routing(embedding, ["a"]):
        pass
