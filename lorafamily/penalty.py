"""Penalties: what a method adds to the task loss."""

from collections import defaultdict
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
    """γ · mean over all frames F of ‖F Fᵀ − I‖_F. AdaLoRA's eq. 4 squares the norm; its code and LoRA²'s do not.

    `gamma`: γ.
    """

    gamma: float = 0.1

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise MethodError(f"gamma={self.gamma!r}: must be zero or positive")

    def __call__(self, adapters: Iterable[Adapter]) -> Float[Tensor, ""]:
        error = orthogonality_error(adapters)
        return torch.zeros(()) if error is None else self.gamma * error


def orthogonality_error(adapters: Iterable[Adapter]) -> Float[Tensor, ""] | None:
    """Mean of ‖F Fᵀ − I‖_F over all frames F, zero where their rows are orthonormal; None where there are no frames."""
    # Frames are many and small, so one product serves all of a shape on a device.
    by_shape: dict[tuple[torch.Size, torch.device], list[Tensor]] = defaultdict(list)
    for adapter in adapters:
        for frame in adapter.update.frames():
            by_shape[frame.shape, frame.device].append(frame)
    if not by_shape:
        return None
    errors = []
    for frames in by_shape.values():
        stacked = torch.stack(frames)
        gram = stacked @ stacked.mT
        errors.append(torch.linalg.matrix_norm(gram - torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)))
    return torch.cat([error.to(errors[0]) for error in errors]).mean()
