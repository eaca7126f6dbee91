"""Simple scorers to compare others with: by the size of the update, or at random."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from lorafamily.adapter import Adapter
from lorafamily.allocation.scorer import Scorer, Scores


class Magnitude(Scorer):
    """‖ΔW‖_F of each slice by itself."""

    def scores(self) -> Scores:
        return {name: _norms(adapter) for name, adapter in self.run.adapters.items()}


class Random(Scorer):
    """Uniformly random scores from the run's seed, the control that a scorer must beat."""

    def scores(self) -> Scores:
        draw = partial(torch.rand, dtype=torch.float64, device="cpu", generator=self.run.generator)
        return {name: draw(adapter.slices) for name, adapter in self.run.adapters.items()}


class Singular(Scorer):
    """|λ| where a parametrisation has one entry per slice (AdaLoRA's singular values, LoRA²'s E), otherwise as
    `Magnitude`."""

    def scores(self) -> Scores:
        result = {}
        for name, adapter in self.run.adapters.items():
            entries = adapter.update.get_parameter(adapter.update.zeroed)
            result[name] = entries.detach().abs().double().cpu() if entries.ndim == 1 else _norms(adapter)
        return result


def _norms(adapter: Adapter) -> Float[Tensor, " r"]:
    norms = []
    for only in torch.eye(adapter.slices, device=adapter.device):
        with adapter.gated(only):
            norms.append(adapter.norm())
    return torch.tensor(norms, dtype=torch.float64, device="cpu")
