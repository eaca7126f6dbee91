"""EVA (Paischer et al. 2024, arXiv:2410.07170): LoRA from the directions of its inputs.   ΔW = s · B A.

Before training, the inputs of every layer are decomposed over some batches; A's rows are their leading principal
directions, B is zero, so the adapted model starts as the base. Ranks follow from the same decomposition: the shares of
variance that the directions of all layers explain are sorted together, and the highest that fit the budget win, at most
ρ r of one layer, where r is what every layer would have alike.
Trainable parameters: r (d_in + d_out).   Axes: d_in, d_out of the weight; r = rank.

As in `peft`'s code, which is the authors', inputs are centred, the scale is alpha / r for all layers, whatever rank
they get, and a layer is looked at no more once the directions that its rank takes have turned no further than a cosine
of τ allows from one batch to the next. That code goes round the data until all layers stop; here the data ends it too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lorafamily.adapter import Parametrisation
from lorafamily.budget import highest
from lorafamily.errors import MethodError
from lorafamily.evidence import LayerEvidence, Wanted
from lorafamily.method import FromEvidence, Room
from lorafamily.variants.lora import lora


@dataclass(frozen=True)
class LeadingInputs(FromEvidence):
    """`rho`: ρ, how many times its equal share of ranks a layer may get; 1 leaves ranks equal. `tau`: τ, from 0 to 1;
    None: all batches count."""

    wants: ClassVar[tuple[Wanted, ...]] = ("inputs",)
    one_scale: ClassVar[bool] = True

    rho: float = 2.0
    tau: float | None = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau is not None and not (isinstance(self.tau, int | float) and 0 <= self.tau <= 1):
            raise MethodError(f"tau={self.tau!r}: must be a cosine from 0 to 1, or None to look at all batches")
        if not isinstance(self.rho, int | float) or not 1 <= self.rho < float("inf"):
            raise MethodError(f"rho={self.rho!r}: must be a number from 1 on, how many times its share a layer may get")

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
        update.reset(generator)  # what the directions leave free stays at the parametrisation's own start
        assert evidence.directions is not None
        V = evidence.directions[: update.capacity].to(torch.promote_types(weight.dtype, torch.float32))
        update.represent(V.new_zeros(update.d_out, len(V)), V)


eva = lora.but(initialisation=LeadingInputs())
