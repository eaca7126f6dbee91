"""Simple scorers to compare others with: by the size of the update, or at random."""

from __future__ import annotations

import torch

from lorafamily.allocation.scorer import Scorer, Scores


class Magnitude(Scorer):
    """‖ΔW‖_F of each slice by itself."""

    def scores(self) -> Scores:
        result = {}
        for name, adapter in self.run.adapters.items():
            norms = []
            for only in torch.eye(adapter.slices, device=adapter.device):
                with adapter.gated(only):
                    norms.append(adapter.norm())
            result[name] = torch.tensor(norms, dtype=torch.float64, device="cpu")
        return result


class Random(Scorer):
    """Uniformly random scores from the run's seed, the control that a scorer must beat."""

    def scores(self) -> Scores:
        draw = self.run.generator
        return {
            name: torch.rand(adapter.slices, dtype=torch.float64, device="cpu", generator=draw)
            for name, adapter in self.run.adapters.items()
        }


class Singular(Magnitude):
    """|λ| where a parametrisation has one entry per slice (AdaLoRA's singular values, LoRA²'s E), otherwise as
    `Magnitude`."""

    def scores(self) -> Scores:
        result = {}
        norms: Scores = {}
        for name, adapter in self.run.adapters.items():
            entries = adapter.update.get_parameter(adapter.update.zeroed)
            if entries.ndim == 1:
                result[name] = entries.detach().abs().double().cpu()
            else:
                norms = norms or super().scores()
                result[name] = norms[name]
        return result
