"""The arithmetic of "frozen linear + low-rank update", free of modules."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def padded(
    U: Float[Tensor, "d_out r"], V: Float[Tensor, "r d_in"], rank: int
) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"]]:
    """The same U V at a higher rank, by zeros."""
    missing = rank - len(V)
    return F.pad(U, (0, missing)), F.pad(V, (0, 0, 0, missing))


def low_rank_linear(
    x: Float[Tensor, "*batch d_in"],
    U: Float[Tensor, "d_out r"],
    V: Float[Tensor, "r d_in"],
    scale: float,
) -> Float[Tensor, "*batch d_out"]:
    """s · U (V x), right to left, so that ΔW is never formed.

    The factors are kept in float32 or higher and cast to the dtype of `x` here: they are small, a float32 copy of
    the activations would not be.
    """
    return F.linear(F.linear(x, V.to(x.dtype)), (U * scale).to(x.dtype))
