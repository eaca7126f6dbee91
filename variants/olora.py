"""OLoRA (Büyükakyüz 2024, arXiv:2406.01775): LoRA, initialised orthonormally.   W = Q R;   B0 = Q[:, :r],  A0 = R[:r].

The paper subtracts the initial update from the base weight, W ← W − s B0 A0. Here the base stays as it is, and a frozen
copy is subtracted instead, ΔW = s (B A − B0 A0): function and gradients are the same, and a second adapter, switching
adapters off and merging in bfloat16 work, too.
Trainable parameters: r (d_in + d_out), as LoRA.   Axes: d_in, d_out of the weight; r = rank.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lorafamily.method import Initialisation
from lorafamily.parametrisation import Factors, Parametrisation
from lorafamily.variants.lora import lora


def leading_qr(W: Float[Tensor, "d_out d_in"], r: int) -> Factors:
    """The first r columns of Q and rows of R of W = Q R, with diag(R) ≥ 0 so that signs do not depend on the backend.

    W's first r columns determine Q's, and R[:r] = Q[:, :r]ᵀ W, so it is enough to decompose those columns. Where they
    are linearly dependent, they do not determine Q, and the full QR decides.
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
    """The QR factors of the weight itself, computed in float32 at least, since half precision has no QR."""

    frozen_initial: ClassVar[bool] = True

    def __call__(
        self, update: Parametrisation, weight: Float[Tensor, "d_out d_in"], generator: torch.Generator
    ) -> None:
        W = weight.to(torch.promote_types(weight.dtype, torch.float32))
        Q, R = leading_qr(W, update.capacity)
        update.represent(Q.cpu(), R.cpu())


olora = lora.but(initialisation=QR())
