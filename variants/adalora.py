"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512):   ΔW = s · P diag(λ) Q,   pruned by the importance of its triplets.

P (d_out, r) and Q (r, d_in) are from N(0, 0.02²) at first, λ (r) is zero; sec. 3.1. Triplet i is (P[:, i], λ_i, Q[i]);
its importance is the sensitivity of all three (sec. 3.2), and the total rank falls on a cubic schedule (sec. 3.3). A
penalty keeps P and Q near orthonormal (eq. 4). s = alpha / r with the initial rank r throughout.
Trainable parameters: r (d_in + d_out + 1).   Axes: d_in, d_out of the weight; r = rank.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorafamily.allocation.pruning import ImportancePruning
from lorafamily.method import Method
from lorafamily.parametrisation import Factors, Parametrisation
from lorafamily.penalty import Orthogonality
from lorafamily.variants.lora import lora


def gaussian(*shape: int, generator: torch.Generator) -> Tensor:
    """From N(0, 0.02²), as in the authors' code; the paper says only "random Gaussian"."""
    return torch.empty(*shape).normal_(std=0.02, generator=generator)


class SVD(Parametrisation):
    """ΔW / s as P diag(λ) Q; `singular` is λ."""

    slice_axes = {"P": 1, "singular": 0, "Q": 0}
    zeroed = "singular"

    def __init__(self, d_in: int, d_out: int, rank: int):
        super().__init__(d_in, d_out)
        self.P = nn.Parameter(torch.empty(d_out, rank))
        self.singular = nn.Parameter(torch.empty(rank))
        self.Q = nn.Parameter(torch.empty(rank, d_in))

    @staticmethod
    def count(d_in: int, d_out: int, rank: int) -> int:
        return rank * (d_in + d_out + 1)

    def sizes(self) -> dict[str, int]:
        return {"rank": self.slices}

    def factors(self, gate: Float[Tensor, " r"] | None = None) -> Factors:
        singular = self.singular if gate is None else self.singular * gate
        return self.P * singular, self.Q

    def reset(self, generator: torch.Generator) -> None:
        self.P.copy_(gaussian(*self.P.shape, generator=generator))
        self.Q.copy_(gaussian(*self.Q.shape, generator=generator))
        self.singular.zero_()

    def represent(self, U: Float[Tensor, "d_out m"], V: Float[Tensor, "m d_in"]) -> None:
        m, norms = V.shape[0], V.norm(dim=1)
        self.P[:, :m] = U
        self.singular.zero_()[:m] = norms
        self.Q[:m] = V / norms.clamp_min(torch.finfo(V.dtype).tiny)[:, None]

    def fresh(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "P": gaussian(self.d_out, n, generator=generator),
            "singular": torch.zeros(n),
            "Q": gaussian(n, self.d_in, generator=generator),
        }

    def frames(self) -> list[Float[Tensor, "_ _"]]:
        return [self.P.T, self.Q]


adalora = Method(
    parametrisation=SVD,
    allocation=ImportancePruning(target=2 / 3),  # sec. 4.1: the initial rank is 1.5 times the final one
    penalty=Orthogonality(gamma=0.1),
)

# AdaLoRA's axes by themselves, to combine with others; svd+pruning is adalora.
svd = Method(parametrisation=SVD, penalty=adalora.penalty)
pruning = lora.but(allocation=adalora.allocation)
