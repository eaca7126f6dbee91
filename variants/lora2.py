"""LoRA² (Zhang et al. 2024, arXiv:2408.06854): two scales of low rank.   ΔW = s · (bb·aa) diag(E) (B·A).

The factors of AdaLoRA's SVD are low-rank products themselves: A (k, d_in), B (r, k), E (r), aa (k, r), bb (d_out, k).
A budget buys width k; the r slices in between, each with a singular value E_i, cost almost nothing, and ΔW has at most
rank min(k, r). E is zero at first, the rest from N(0, 0.02²). s = alpha / r with the initial number of slices r.
Trainable parameters: k (d_in + d_out) + 2kr + r.   Axes: d_in, d_out of the weight; k = `width`; r = `slices`.

Slice i is (aa[:, i], E_i, B[i]). Only these tensors are scored for pruning, never A and bb, which is how the paper
saves importance scores. Forward, schedule and scores are as in the authors' code; its merge, which is wrong for
r > 1, and its penalty, which raises, are not.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorafamily.allocation.pruning import ImportancePruning
from lorafamily.method import Method
from lorafamily.parametrisation import Factors, Parametrisation
from lorafamily.penalty import Orthogonality
from lorafamily.variants.adalora import gaussian


class DualPlane(Parametrisation):
    """Two planes, B·A on the input's side and bb·aa on the output's, coupled by diag(E)."""

    slice_axes = {"aa": 1, "E": 0, "B": 0}
    zeroed = "E"
    sized_by = "width"
    sliced_by = "slices"
    own_sizes = {"slices": 8}

    def __init__(self, d_in: int, d_out: int, width: int, slices: int):
        super().__init__(d_in, d_out)
        self.A = nn.Parameter(torch.empty(width, d_in))
        self.B = nn.Parameter(torch.empty(slices, width))
        self.E = nn.Parameter(torch.empty(slices))
        self.aa = nn.Parameter(torch.empty(width, slices))
        self.bb = nn.Parameter(torch.empty(d_out, width))

    @staticmethod
    def count(d_in: int, d_out: int, width: int, slices: int) -> int:
        return width * (d_in + d_out) + 2 * width * slices + slices

    def sizes(self) -> dict[str, int]:
        return {"width": self.width, "slices": self.slices}

    @property
    def width(self) -> int:
        """k."""
        return self.A.shape[0]

    @property
    def largest_rank(self) -> int:
        """More slices than the width cannot raise the rank of ΔW."""
        return min(self.width, self.d_in, self.d_out)

    @property
    def capacity(self) -> int:
        return min(self.width, self.slices)

    def factors(self, gate: Float[Tensor, " r"] | None = None) -> Factors:
        """The k×k core aa diag(E) B is multiplied into bb, so that the update costs what LoRA of rank k costs."""
        E = self.E if gate is None else self.E * gate
        return self.bb @ ((self.aa * E) @ self.B), self.A

    def reset(self, generator: torch.Generator) -> None:
        for tensor in (self.A, self.B, self.aa, self.bb):
            tensor.copy_(gaussian(*tensor.shape, generator=generator))
        self.E.zero_()

    def represent(self, U: Float[Tensor, "d_out m"], V: Float[Tensor, "m d_in"]) -> None:
        """E takes the norms of V's rows; a row of B and a column of aa pick one direction; other slices keep E = 0."""
        m, norms = V.shape[0], V.norm(dim=1)
        self.A[:m] = V / norms.clamp_min(torch.finfo(V.dtype).tiny)[:, None]
        self.bb[:, :m] = U
        self.E.zero_()[:m] = norms
        self.B[:m] = torch.eye(m, self.width)
        self.aa[:, :m] = torch.eye(self.width, m)

    def fresh(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "aa": gaussian(self.width, n, generator=generator),
            "E": torch.zeros(n),
            "B": gaussian(n, self.width, generator=generator),
        }

    def frames(self) -> list[Float[Tensor, "_ _"]]:
        """A and bb on their side k, B and aa on their smaller side: for r < k, BᵀB = I_k has no solution."""
        inner = [self.B, self.aa.T] if self.slices <= self.width else [self.B.T, self.aa]
        return [self.A, self.bb.T, *inner]


lora2 = Method(
    parametrisation=DualPlane,
    allocation=ImportancePruning(target=3 / 8),  # the paper's setting for MNLI: 3 of 8 slices on average
    penalty=Orthogonality(gamma=0.1),
)
dual_plane = Method(parametrisation=DualPlane, penalty=lora2.penalty)  # without pruning
