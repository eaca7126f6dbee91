"""Dropout on the input of an update, without a masked copy of that input or a random mask of its size."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorafamily.errors import MethodError

DropoutKind = Literal["entries", "features"]
"""What is dropped: single entries of the input; or features, for a whole batch, which takes no time or memory."""


@dataclass(frozen=True)
class Dropout:
    """What an adapter drops of its input in training, with probability p."""

    p: float = 0.0
    kind: DropoutKind = "entries"

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or not isinstance(self.p, (int, float)) or not 0 <= self.p < 1:
            raise MethodError(f"dropout={self.p!r}: must be a probability in [0, 1)")
        if self.kind not in get_args(DropoutKind):
            raise MethodError(f"dropout_kind={self.kind!r}: must be one of {', '.join(get_args(DropoutKind))}")


ROWS = 64  # T: rows of `Mask.within`
PIECE = 4  # rows of `Mask.across` that a CPU expands at once, so that 256 rows of the input stay in its cache


@dataclass(frozen=True)
class Mask:
    """Which entries of an input (n, d) are kept: entry (i, j) where within[i % T, j] ^ across[i // T, j] > threshold.

    Entries of different features are independent, and so are any three entries of one feature. So anything linear in
    the masked input has the mean and covariance that it has with independent entries. Both tables together have only
    (T + n / T) d entries; the mask is computed from them whenever it is needed.
    """

    within: Int[Tensor, "T d"]
    across: Int[Tensor, "S d"]
    threshold: float
    """The bits of `within ^ across` are compared with it as floats, all positive and finite."""
    scale: float
    """Factor of the kept entries, so that the mean stays."""
    dtype: torch.dtype
    """Dtype of the input, and of the floats that are compared."""

    @classmethod
    def draw(cls, x: Float[Tensor, "n d"], p: float) -> Mask:
        """A new mask for x; p is rounded to a multiple of 2⁻²⁹ (half precision: 2⁻¹³), at least one of them."""
        threshold, scale, low = _compared(p, x.dtype)
        rows = min(ROWS, max(1, len(x)))
        within = _random_bits(rows, x) & (low - 1)
        across = _random_bits(-(-len(x) // rows), x) & (low - 1) | low
        return cls(within, across, threshold, scale, x.dtype)

    def pieces(self, n: int) -> Iterator[tuple[slice, Float[Tensor, "_ d"]]]:
        """Slices of the input's rows, each with the floats that decide which entries are kept."""
        at_once = PIECE if self.within.device.type == "cpu" else max(1, 2**25 // max(1, self.within.nbytes))
        begun = 0
        for some in self.across.split(at_once):
            bits = (self.within ^ some[:, None]).flatten(0, 1)[: n - begun]
            yield slice(begun, begun + len(bits)), bits.view(self.dtype)
            begun += len(bits)

    def applied(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """The whole input, with zeros where entries are dropped."""
        rows = x.reshape(-1, x.shape[-1])
        return torch.cat([self.kept(rows[piece], numbers) for piece, numbers in self.pieces(len(rows))]).view(x.shape)

    def kept(self, x: Float[Tensor, "_ d"], numbers: Float[Tensor, "_ d"]) -> Float[Tensor, "_ d"]:
        """x, with zeros where entries are dropped."""
        # One pass instead of three for comparing, converting and multiplying.
        masked: Tensor = torch.ops.aten.threshold_backward(x, numbers, self.threshold)
        return masked


_INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


@functools.cache
def _compared(p: float, dtype: torch.dtype) -> tuple[float, float, int]:
    """Threshold, scale, and `low`: bit patterns are drawn from `low` up to 2 `low` − 1."""
    integer = _INTEGERS[dtype]
    low = 2 ** (torch.iinfo(integer).bits - 3)
    dropped = min(max(round(p * low), 1), low - 1)
    last = torch.tensor(low + dropped - 1, dtype=integer).view(dtype)
    return last.item(), low / (low - dropped), low


def _random_bits(rows: int, like: Float[Tensor, "_ d"]) -> Int[Tensor, "rows d"]:
    integer, d = _INTEGERS[like.dtype], like.shape[-1]
    words = torch.empty(-(-rows * d * integer.itemsize // 8), dtype=torch.int64, device=like.device)
    words.random_(-(2**63), None)  # one draw for every 8 bytes
    return words.view(integer)[: rows * d].view(rows, d)


def feature_mask(V: Float[Tensor, "m d_in"], p: float) -> Float[Tensor, " d_in"]:
    """Factors of the columns of V that drop features of the input."""
    return torch.nn.functional.dropout(V.new_ones(V.shape[1]), p)
