"""Simple scorers, by the update alone or at random, to compare others with."""

from __future__ import annotations

import torch

from lorafamily.allocation.scorer import Scorer, Scores


class Magnitude(Scorer):
    """‖ΔW‖_F of each slice alone."""

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
    """Uniformly random scores from the run's seed: the control that a scorer must beat."""

    def scores(self) -> Scores:
        draw = self.run.generator
        return {
            name: torch.rand(adapter.rank, dtype=torch.float64, device="cpu", generator=draw)
            for name, adapter in self.run.adapters.items()
        }


class Singular(Magnitude):
    """|λ| where a parametrisation has one entry a slice (AdaLoRA's singular values, LoRA²'s E), otherwise ‖ΔW‖_F of
    each slice alone."""

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
