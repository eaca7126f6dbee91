"""The README's example of a method is complete and works."""

import re
from pathlib import Path

import torch
from torch.testing import assert_close

import lorafamily
from conftest import data, logits, perturb_, tiny
from lorafamily import registry

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_method_in_one_file(monkeypatch):
    (code,) = re.findall(r"```python\n(from dataclasses.*?)```", README, re.DOTALL)
    scope: dict = {}
    exec(code, scope)
    installed = lorafamily.methods()
    monkeypatch.setattr(registry, "methods", lambda: installed | {"pissa": scope["pissa"]})
    model = tiny()
    base = logits(model)
    lorafamily.apply(model, "pissa+alora", rank=3)
    assert torch.equal(logits(model), base)
    adapter = model.blocks[0].mlp.up.adapters["default"]
    U, V = adapter.update.factors()
    truncated = torch.linalg.svd(model.blocks[0].mlp.up.weight)
    best = truncated.U[:, :3] * truncated.S[:3] @ truncated.Vh[:3]
    assert_close(U @ V, best, rtol=1e-4, atol=1e-5)  # float32 SVD
    lorafamily.train(model, data(), steps=40, validation=data(1), progress=False)
    adapted = logits(perturb_(model))
    assert_close(logits(lorafamily.merge(model)), adapted, rtol=1e-4, atol=1e-4)  # float32, another order of sums
