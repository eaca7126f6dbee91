"""Scorers that look at the update alone, or at nothing: what others must beat."""

from __future__ import annotations

import torch

from lorafamily.allocation.scorer import Scorer, Scores


class Magnitude(Scorer):
    """‖ΔW‖_F of the slice alone."""

    def scores(self) -> Scores:
        result = {}
        for name, adapter in self.run.adapters.items():
            norms = []
            for only in torch.eye(adapter.rank, device=adapter.device):
                with adapter.gated(only):
                    norms.append(adapter.norm())
            result[name] = torch.tensor(norms, dtype=torch.float64, device="cpu")
        return result


class Random(Scorer):
    """Uniform random numbers of the run's seed: the control that a scorer must beat."""

    def scores(self) -> Scores:
        draw = self.run.generator
        return {
            name: torch.rand(adapter.rank, dtype=torch.float64, device="cpu", generator=draw)
            for name, adapter in self.run.adapters.items()
        }


class Singular(Magnitude):
    """|λ| of a parametrisation that has a number for every slice (AdaLoRA's singular values, LoRA²'s E); of others
    ‖ΔW‖_F of the slice alone."""

    def scores(self) -> Scores:
        result = {}
        norms: Scores = {}
        for name, adapter in self.run.adapters.items():
            switch = adapter.update.get_parameter(adapter.update.zeroed)
            if switch.ndim == 1:
                result[name] = switch.detach().abs().double().cpu()
            else:
                norms = norms or super().scores()
                result[name] = norms[name]
        return result
