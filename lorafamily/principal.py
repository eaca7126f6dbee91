"""Leading principal directions of vectors that arrive batch by batch."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

EXACT = 512
"""Up to so many rows or columns a full SVD is cheap; for larger matrices a randomised one is used, as in peft."""


class Principal:
    """The k leading principal directions, by incremental SVD with an updated mean (Ross et al. 2008), as in EVA's code,
    so that directions are the same."""

    turned: Float[Tensor, " k"]
    """|cosine| between each direction before and after the last batch; 0 after the first."""
    mean: Float[Tensor, " d_in"]
    S: Float[Tensor, " k"]
    V: Float[Tensor, "k d_in"]

    def __init__(self, k: int):
        self.k, self.rows = k, 0
        self.scatter = 0.0
        """Sum over all rows of their squared distance from the mean."""

    def add(self, x: Float[Tensor, "n d_in"]) -> None:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        n, mean = len(x), x.mean(0)
        x = x - mean
        self.scatter += float(x.square().sum(dtype=torch.float64))
        if begun := self.rows > 0:
            shared = self.rows * n / (self.rows + n)
            apart = self.mean - mean
            self.scatter += shared * float(apart.square().sum(dtype=torch.float64))
            x = torch.cat([self.S[:, None] * self.V, x, math.sqrt(shared) * apart[None]])
            mean = mean + apart * (self.rows / (self.rows + n))
        self.mean, self.rows = mean, self.rows + n
        if min(x.shape) <= max(EXACT, 2 * self.k):
            _, S, V = torch.linalg.svd(x, full_matrices=False)
        else:
            _, S, V = torch.svd_lowrank(x, 2 * self.k, niter=4)
            V = V.T
        self.turned = torch.zeros(self.k)
        if begun:
            known = min(len(V), len(self.V))
            self.turned[:known] = (V[:known] * self.V[:known]).sum(1).abs().cpu()
        self.S, self.V = S[: self.k], V[: self.k]

    def result(self) -> tuple[Float[Tensor, "k d_in"], Float[Tensor, " k"]]:
        """Directions and the share of the variance along each. The largest entry of each direction is made positive,
        because backends differ in the signs."""
        largest = self.V.gather(1, self.V.abs().argmax(1, keepdim=True))
        V = self.V * torch.where(largest < 0, -1.0, 1.0).to(self.V)
        return V.cpu(), (self.S.double().square() / self.scatter).cpu() if self.scatter else self.S.double().cpu()
