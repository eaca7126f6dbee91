"""EVA (Paischer et al. 2024, arXiv:2410.07170): LoRA from the directions of its inputs.   ΔW = s · B A.

Before training, each layer's inputs over some batches are decomposed by an incremental SVD. A's rows are their leading
principal directions, B is zero, so the adapted model starts equal to the base. Ranks follow from the same
decomposition: the shares of variance that all layers' directions explain are sorted together, and the highest that fit
the budget win, at most ρ r of one layer, where r is the rank that all layers would have if ranks were equal.
Trainable parameters: r (d_in + d_out).   Axes: d_in, d_out of the weight; r = rank.

As in `peft`'s code, which is the authors', inputs are centred, and the scale is alpha / r for all layers, whatever rank
they get. A layer is finished once each direction that its rank takes has a cosine of at least τ to what it was one
batch before. That code repeats the data until all layers are finished; here the end of the data ends it, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lorafamily.budget import highest
from lorafamily.errors import MethodError
from lorafamily.evidence import LayerEvidence, Wanted
from lorafamily.method import FromEvidence, Room
from lorafamily.parametrisation import Parametrisation
from lorafamily.variants.lora import lora


@dataclass(frozen=True)
class LeadingInputs(FromEvidence):
    """`rho`: ρ, how many times the equal rank a layer may get; 1 leaves ranks equal. `tau`: τ, a cosine from 0 to 1;
    None: all batches count."""

    wants: ClassVar[tuple[Wanted, ...]] = ("inputs",)
    one_scale: ClassVar[bool] = True

    rho: float = 2.0
    tau: float | None = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau is not None and not (isinstance(self.tau, int | float) and 0 <= self.tau <= 1):
            raise MethodError(f"tau={self.tau!r}: must be a cosine from 0 to 1, or None to use all batches")
        if not isinstance(self.rho, int | float) or not 1 <= self.rho < float("inf"):
            raise MethodError(
                f"rho={self.rho!r}: must be a number from 1 on, how many times the equal rank a layer may get"
            )

    def directions(self, rank: int) -> int:
        return round(self.rho * rank)

    def stop_at(self) -> float | None:
        return self.tau

    def ranks(self, evidence: Mapping[str, LayerEvidence], room: Room) -> dict[str, int]:
        most = self.directions(room.rank)
        explained = {}
        for name, layer in evidence.items():
            assert layer.explained is not None
            explained[name] = layer.explained[: min(most, room.largest(name))]
        return highest(explained, room.cost, room.limit)

    def fill(
        self,
        update: Parametrisation,
        weight: Float[Tensor, "d_out d_in"],
        generator: torch.Generator,
        evidence: LayerEvidence,
        scale: float,
    ) -> None:
        assert evidence.directions is not None
        V = evidence.directions[: update.capacity].to(torch.promote_types(weight.dtype, torch.float32))
        update.represent(V.new_zeros(update.d_out, len(V)), V)


eva = lora.but(initialisation=LeadingInputs())
