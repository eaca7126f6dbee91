"""The low-rank update of one weight, in any parametrisation:   ΔW = s · U V.

Axes as in `parametrisation.py`: d_in, d_out of the weight; r slices; m = inner size of the factors.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lorafamily.dropout import Dropout, DropoutKind, feature_mask
from lorafamily.functional import low_rank_linear, without_autocast
from lorafamily.parametrisation import Factors, Parametrisation, Resize


class Adapter(nn.Module):
    """The update of one weight. The adapted layer begins as the base layer.

    `update`: U V, trained; `initial`: where U V is not zero at first, a frozen copy of its initial values, which is
    subtracted, else None; `scale`: s; `dropout`: on the update's input, in training; `initial_slices`: slices at first;
    `settled`: whether a finished allocation chose the present rank.
    """

    def __init__(
        self,
        update: Parametrisation,
        *,
        scale: float,
        dropout: Dropout = Dropout(),
        initial_slices: int | None = None,
        settled: bool = False,
    ):
        super().__init__()
        update.check()
        self.update = update
        self.initial_slices = update.slices if initial_slices is None else initial_slices
        self.settled = settled
        self.initial: Parametrisation | None = None
        self.scale = scale
        self.dropout = dropout
        self.off = False
        """Whether the adapted layer computes as if it had no adapter."""
        self._gate: Tensor | None = None

    def freeze_initial(self) -> None:
        """Subtract the present values U0, V0 from now on: ΔW = s (U V − U0 V0), which is exactly zero now."""
        self.initial = copy.deepcopy(self.update).requires_grad_(False)

    def factors(self, *, dropping: bool = False) -> Factors:
        """(U, V) with ΔW = s · U V, gate and frozen initial update included: the only definition of the update.

        U V − U0 V0 is computed as (U − U0) V + U0 (V − V0): the same matrix, but exactly zero at first, and a
        difference of small values instead of large products. The factors keep their precision under autocast, so that
        the caller casts once. `dropping`: whether features of the input are dropped, in training.
        """
        with without_autocast(self.device):
            U, V = self.update(self._gate)
            if self.initial is not None:
                U0, V0 = self.initial(self._gate)
                U, V = torch.cat([U - U0, U0], 1), torch.cat([V, V - V0], 0)
            if dropping and self.drops("features"):
                V = V * feature_mask(V, self.drops("features"))
        return U, V

    def drops(self, kind: DropoutKind) -> float:
        """The probability with which entries, or features, of the input are dropped now; zero outside training."""
        return self.dropout.p if self.training and self.dropout.kind == kind else 0.0

    @torch.no_grad()
    def delta(self) -> Float[Tensor, "d_out d_in"]:
        """ΔW, in float32 or higher, also under autocast."""
        U, V = self.factors()
        U, V = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in (U, V))
        with without_autocast(self.device):
            return self.scale * einsum(U, V, "d_out m, m d_in -> d_out d_in")

    @torch.no_grad()
    def norm(self) -> float:
        """‖ΔW‖_F from the r×r Gram matrices of the factors, without forming ΔW; nan on the meta device."""
        if self.device.type == "meta":
            return math.nan
        U, V = (factor.cpu().double() for factor in self.factors())
        return self.scale * math.sqrt(max(float(((U.T @ U) * (V @ V.T)).sum()), 0.0))

    @torch.no_grad()
    def svd(self) -> tuple[Float[Tensor, "d_out m"], Float[Tensor, " m"], Float[Tensor, "m d_in"]]:
        """Left singular vectors, values and right vectors of ΔW in float64, from the m × m core of the factors' QR."""
        U, V = (factor.double() for factor in self.factors())
        Q, R = torch.linalg.qr(self.scale * U)
        K, L = torch.linalg.qr(V.T)
        left, S, right = torch.linalg.svd(R @ L.T, full_matrices=False)
        return Q @ left, S, right @ K.T

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """What the update adds to the output of its layer:   s · U V x."""
        U, V = self.factors(dropping=True)
        return low_rank_linear(F.dropout(x, self.drops("entries")) if self.drops("entries") else x, U, V, self.scale)

    @property
    def slices(self) -> int:
        """Number of slices present."""
        return self.update.slices

    @property
    def device(self) -> torch.device:
        """The one device of its tensors."""
        return next(self.update.parameters()).device

    def trainable(self) -> int:
        """Trainable parameters at the present size."""
        return sum(parameter.numel() for parameter in self.update.parameters())

    @contextmanager
    def gated(self, gate: Float[Tensor, " r"]) -> Iterator[None]:
        """Multiply the slices by `gate` inside the block, to measure what each is worth; the adapter is on there."""
        before = self._gate, self.off
        self._gate, self.off = gate, False
        try:
            yield
        finally:
            self._gate, self.off = before

    def mask(self, off: Int[Tensor, " n"]) -> None:
        """Make slices contribute nothing; in the frozen initial update too, because a slice contributes its change."""
        self.update.mask(off)
        if self.initial is not None:
            self.initial.mask(off)

    def resize(
        self, keep: Int[Tensor, " n"], add: int = 0, *, generator: torch.Generator | None = None
    ) -> list[Resize]:
        """Keep the slices with these indices and append `add` fresh ones, which leave the update as it is."""
        new: dict[str, Tensor] = {}
        if add:
            if generator is None:
                raise TypeError("adding slices draws random numbers: pass a generator")
            with torch.device("cpu"):  # where the generator is, whatever the default device
                new = self.update.grown(add, generator)
        if self.initial is not None:
            self.initial.resize(keep, {name: torch.zeros_like(value) for name, value in new.items()})
        return self.update.resize(keep, new)

    def differs_in_slices(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these tensors, named as in `state_dict()`, are those of this adapter with more or fewer slices."""
        along = {p: axis for update in (self.update, self.initial) if update is not None for p, axis in update.sliced()}
        present, given = set(), set()
        for name, parameter in self.named_parameters():
            shape, axis = list(tensors[name].shape), along.get(parameter)
            if axis is not None and axis < len(shape):
                given.add(shape[axis])
                present.add(parameter.shape[axis])
                shape[axis] = parameter.shape[axis]
            if shape != list(parameter.shape):
                return False
        return len(given) == 1 and given != present

    def take(self, tensors: Mapping[str, Tensor]) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Replace the parameters by tensors of any number of slices, named as in `state_dict()`: pairs (old, new)."""
        replaced = []
        for name, old in list(self.named_parameters()):
            inside, _, attribute = name.rpartition(".")
            new = nn.Parameter(tensors[name].to(old.device, old.dtype, copy=True), requires_grad=old.requires_grad)
            setattr(self.get_submodule(inside), attribute, new)
            replaced.append((old, new))
        return replaced

    def state(self) -> dict[str, Any]:
        """What, besides its tensors, rebuilds the adapter: plain data for a file."""
        return {
            "sizes": self.update.sizes(),
            "initial_slices": self.initial_slices,
            "settled": self.settled,
            "scale": self.scale,
            "dropout": self.dropout.p,
            "dropout_kind": self.dropout.kind,
            "frozen_initial": self.initial is not None,
        }

    def extra_repr(self) -> str:
        return f"slices={self.slices}, scale={self.scale:g}"
