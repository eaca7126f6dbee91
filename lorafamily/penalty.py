"""Penalties: what a method adds to the task loss."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lorafamily.adapter import Adapter
from lorafamily.errors import MethodError
from lorafamily.method import Penalty


@dataclass(frozen=True)
class Orthogonality(Penalty):
    """γ · mean over all frames F of ‖F Fᵀ − I‖_F, un-squared, as AdaLoRA's and LoRA²'s authors compute it.

    AdaLoRA's eq. 4 squares the norm, its code does not. `gamma` is γ.
    """

    gamma: float = 0.1

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise MethodError(f"gamma={self.gamma!r}: must be zero or positive")

    def __call__(self, adapters: Iterable[Adapter]) -> Float[Tensor, ""]:
        errors = [orthogonality_error(frame) for adapter in adapters for frame in adapter.update.frames()]
        return self.gamma * torch.stack(errors).mean() if errors else torch.zeros(())


def orthogonality_error(frame: Float[Tensor, "rows columns"]) -> Float[Tensor, ""]:
    """‖F Fᵀ − I‖_F; zero where the rows of F are orthonormal."""
    gram = frame @ frame.T
    return torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
