"""A problem where it is known which layers can help, and a variant that misleads methods which look at inputs alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from studies.problem import Batch, Problem


@dataclass(frozen=True)
class Fit:
    """`loss`: mean squared error."""

    loss: Float[Tensor, ""]


class Branches(nn.Module):
    """Layers side by side: each has inputs of its own, and their outputs are added.

    The inputs of different layers are independent, so no layer can correct the error of another.
    """

    def __init__(self, layers: int, width: int):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x: Float[Tensor, "batch layers width"], y: Float[Tensor, "batch width"]) -> Fit:
        return Fit(F.mse_loss(self.predicted(x), y))

    def predicted(self, x: Float[Tensor, "batch layers width"]) -> Float[Tensor, "batch width"]:
        return torch.stack([F.gelu(layer(x[:, i])) for i, layer in enumerate(self.branches)]).sum(0)


def _weight(model: Branches, layer: int) -> Tensor:
    return model.get_parameter(f"branches.{layer}.weight").data


class Planted(Problem):
    """Eight layers, of which four need an update of rank 4 and the others none; the budget is rank 2 for each.

    The seed draws everything: weights, which layers need an update, the updates, data. The target is the same network
    with its updates, plus noise, so that layers that cannot help still have gradients. The inputs of all layers have
    the same total variance; in `narrow` layers nearly all of it lies in four directions, in others it is spread evenly,
    and EVA looks at nothing else. In "planted" the narrow layers are those that need the update, which reads these
    directions; in "misleading" they are the others.
    """

    name = "planted"
    what = (
        "Eight linear layers of 32 × 32 side by side, with independent inputs. Four of them, drawn by the seed, need "
        "an update of rank 4; nothing is to be gained in the others. The budget is rank 2 for each of the eight, so "
        "that it suffices if all of it goes to the four."
    )
    metric = "share of the planted change that is missing"
    layers, width, rank = 8, 32, 4
    budget = 16 * (2 * 32 + 1)  # sixteen slices, also of AdaLoRA, whose slices each have a singular value
    steps, batch = 120, 64
    evaluations = 15
    margin = 0.05
    goal = 0.7
    rows, held_out = 64 * 120, 512
    noise, strength = 0.3, 2.0
    logs = False
    narrow: ClassVar[Literal["needed", "others"]] = "needed"

    @functools.cache  # noqa: B019 - as many as there are seeds
    def drawn(self, seed: int) -> dict[str, Any]:
        """Weights, updates and samples of a seed."""
        draw = torch.Generator().manual_seed(1000 + seed)
        chosen = set(torch.randperm(self.layers, generator=draw)[: self.layers // 2].tolist())
        base, target = Branches(self.layers, self.width), Branches(self.layers, self.width)
        scales = []
        for i in range(self.layers):
            weight = torch.randn(self.width, self.width, generator=draw) / self.width**0.5
            frame = torch.linalg.qr(torch.randn(self.width, self.width, generator=draw))[0]
            spread = torch.ones(self.width)
            if (i in chosen) == (self.narrow == "needed"):
                spread[: self.rank] = 0.95 * self.width / self.rank
                spread[self.rank :] = 0.05 * self.width / (self.width - self.rank)
            scales.append(frame * spread.sqrt())
            left = torch.linalg.qr(torch.randn(self.width, self.rank, generator=draw))[0]
            change = left @ frame[:, : self.rank].T / spread[: self.rank].mean().sqrt()
            _weight(base, i).copy_(weight)
            _weight(target, i).copy_(weight + (self.strength * change if i in chosen else 0.0))
        samples = {}
        for split, rows in (("training", self.rows), ("tuning", self.held_out), ("judging", self.held_out)):
            x = torch.stack([torch.randn(rows, self.width, generator=draw) @ scale.T for scale in scales], 1)
            with torch.no_grad():
                y = target.predicted(x)
            # The judging split has no noise, so that the metric is 0 where everything planted was learnt.
            noise = 0.0 if split == "judging" else self.noise
            samples[split] = (x, y + noise * torch.randn(y.shape, generator=draw))
        return {"chosen": chosen, "base": base.state_dict(), "samples": samples}

    def model(self, seed: int) -> nn.Module:
        model = Branches(self.layers, self.width)
        model.load_state_dict(self.drawn(seed)["base"])
        return model

    def planted(self, seed: int) -> frozenset[str]:
        return frozenset(f"branches.{i}" for i in self.drawn(seed)["chosen"])

    def training(self, seed: int) -> Any:
        x, y = self.drawn(seed)["samples"]["training"]
        return [{"x": a, "y": b} for a, b in zip(x.split(self.batch), y.split(self.batch), strict=True)]

    def tuning(self, seed: int) -> Sequence[Batch]:
        x, y = self.drawn(seed)["samples"]["tuning"]
        return [{"x": x, "y": y}]

    def judging(self, seed: int) -> Sequence[Batch]:
        x, y = self.drawn(seed)["samples"]["judging"]
        return [{"x": x, "y": y}]

    def quality(self, loss: float, seed: int) -> float:
        return loss / self._missing(seed)

    @functools.cache  # noqa: B019 - as many as there are seeds
    def _missing(self, seed: int) -> float:
        """The mean squared error of the model before training, against targets without noise."""
        return self.loss(self.model(seed), self.judging(seed))


class Misleading(Planted):
    """The planted problem with the layers' inputs exchanged: variance points to the layers that need nothing."""

    name = "misleading"
    what = (
        "The planted problem, but nearly all variance of a layer's inputs lies in four directions where the layer "
        "needs no update, and is spread evenly where it does."
    )
    narrow = "others"
