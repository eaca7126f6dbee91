"""LoRA (Hu et al. 2021, arXiv:2106.09685, sec. 4.1):   ΔW = s · B A,   s = alpha / r.

A (r, d_in) is random at first and B (d_out, r) zero, so the adapted model starts equal to the base.
Trainable parameters: r (d_in + d_out).   Axes: d_in, d_out of the weight; r = rank.

rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) changes only the scale:   s = alpha / √r.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorafamily.errors import MethodError
from lorafamily.method import Initialisation, Method
from lorafamily.parametrisation import Factors, Parametrisation


def kaiming_uniform(rows: int, d_in: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """From U(−1/√d_in, 1/√d_in), which is what `kaiming_uniform_(a=√5)` of the authors' code draws from."""
    bound = 1 / math.sqrt(d_in)
    return torch.empty(rows, d_in, dtype=dtype).uniform_(-bound, bound, generator=generator)


class Plain(Parametrisation):
    """ΔW / s as the product of two matrices, B A."""

    slice_axes = {"B": 1, "A": 0}
    zeroed = "B"

    def __init__(self, d_in: int, d_out: int, rank: int):
        super().__init__(d_in, d_out)
        self.A = nn.Parameter(torch.empty(rank, d_in))
        self.B = nn.Parameter(torch.empty(d_out, rank))

    @staticmethod
    def count(d_in: int, d_out: int, rank: int) -> int:
        return rank * (d_in + d_out)

    def sizes(self) -> dict[str, int]:
        return {"rank": self.slices}

    def factors(self, gate: Float[Tensor, " r"] | None = None) -> Factors:
        return (self.B if gate is None else self.B * gate), self.A

    def reset(self, generator: torch.Generator) -> None:
        """As in the authors' code; the paper says Gaussian, see `LoRAStart`."""
        self.A.copy_(kaiming_uniform(len(self.A), self.d_in, generator, self.A.dtype))
        self.B.zero_()

    def represent(self, U: Float[Tensor, "d_out m"], V: Float[Tensor, "m d_in"]) -> None:
        m = V.shape[0]
        self.B.zero_()[:, :m].copy_(U)
        self.A.zero_()[:m].copy_(V)

    def fresh(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"A": kaiming_uniform(n, self.d_in, generator, self.A.dtype), "B": torch.zeros(self.d_out, n)}


@dataclass(frozen=True)
class LoRAStart(Initialisation):
    """`init`: "kaiming", as in the authors' code and `peft`, or "gaussian", as in the paper, which gives no variance:
    N(0, 1/r²) is what `peft` takes."""

    init: Literal["kaiming", "gaussian"] = "kaiming"

    def __call__(self, update: Parametrisation, weight: Tensor, generator: torch.Generator) -> None:
        if self.init not in ("kaiming", "gaussian"):
            raise MethodError(f'init={self.init!r}: must be "kaiming" or "gaussian"')
        if self.init == "gaussian":
            A = update.get_parameter("A")
            A.copy_(torch.empty_like(A).normal_(std=1 / A.shape[0], generator=generator))


lora = Method(parametrisation=Plain, initialisation=LoRAStart())
rslora = lora.but(scaling="alpha/sqrt(r)")
