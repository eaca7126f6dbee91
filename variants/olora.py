"""OLoRA (Büyükakyüz 2024, arXiv:2406.01775): LoRA from an orthonormal start.   W = Q R;   B0 = Q[:, :r],  A0 = R[:r].

The paper moves the start into the base weight, W ← W − s B0 A0. Here the base stays as it is and the frozen start is
subtracted instead, ΔW = s (B A − B0 A0): the same function and gradients, and a second adapter, switching the adapter
off and merging in bfloat16 go right. Trainable parameters: as LoRA.   Axes: d_in, d_out of the weight; r = rank.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lorafamily.adapter import Factors, Parametrisation
from lorafamily.method import Initialisation
from lorafamily.variants.lora import lora


def leading_qr(W: Float[Tensor, "d_out d_in"], r: int) -> Factors:
    """The first r columns of Q and rows of R of W = Q R, with diag(R) ≥ 0 so that no backend chooses the signs.

    Q's first r columns come from W's first r columns alone, and R[:r] = Q[:, :r]ᵀ W, so a panel is enough. Where those
    columns are linearly dependent, that Q is not determined by them and the full QR decides.
    """
    Q, R = torch.linalg.qr(W[:, :r])
    pivots = R.diagonal().abs()
    if pivots.min() <= pivots.max() * torch.finfo(W.dtype).eps * max(W.shape):
        Q, R = torch.linalg.qr(W)
        Q = Q[:, :r]
    Q = Q * torch.where(R.diagonal()[:r] < 0, -1.0, 1.0).to(Q)
    return Q, Q.T @ W


@dataclass(frozen=True)
class QR(Initialisation):
    """Orthonormal start from the weight itself; in float32, since half precision has no QR."""

    frozen_initial: ClassVar[bool] = True

    def __call__(
        self, update: Parametrisation, weight: Float[Tensor, "d_out d_in"], generator: torch.Generator
    ) -> None:
        update.reset(generator)  # what the decomposition leaves free stays at the parametrisation's own start
        W = weight.to(torch.promote_types(weight.dtype, torch.float32))
        Q, R = leading_qr(W, update.capacity)
        update.represent(Q.cpu(), R.cpu())


olora = lora.but(initialisation=QR())
