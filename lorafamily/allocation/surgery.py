"""Operating on an optimiser whose parameters change size."""

import torch
from torch import Tensor, nn

from lorafamily.adapter import Resize


def exchange(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter) -> None:
    """Let the optimiser train another parameter in the old one's place, without its state."""
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]


@torch.no_grad()
def follow_resize(optimizer: torch.optim.Optimizer, change: Resize) -> None:
    """Let the optimiser train the new parameter in the old one's place.

    Every state tensor of the old shape follows it: survivors' entries keep their bits, new ones are zero. Scalars such
    as the step count stay.
    """
    exchange(optimizer, change.old, change.new)
    state = optimizer.state.pop(change.old, None)
    if state is None:
        return
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == change.old.shape:
            kept = value.index_select(change.axis, change.keep)
            missing = list(change.new.shape)
            missing[change.axis] -= len(change.keep)
            state[key] = torch.cat([kept, kept.new_zeros(missing)], change.axis)
    optimizer.state[change.new] = state
