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
"""What is dropped: entries of the input, each on its own; or whole features, for a whole batch, which costs nothing."""


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


ROWS = 64  # of `Mask.within`
PIECE = 4  # rows of `Mask.across` that a CPU expands at once: 256 rows of an input stay in its cache


@dataclass(frozen=True)
class Mask:
    """Which entries of an input (n, d) are kept: entry (i, j) where within[i % T, j] ^ across[i // T, j] > threshold.

    Entries of different features are independent, and so are any three of one feature. The mean and the covariance of
    whatever is linear in the masked input are therefore those of wholly independent entries. Both tables together
    have (T + n / T) d entries, and the mask is computed from them whenever it is needed.
    """

    within: Int[Tensor, "T d"]
    across: Int[Tensor, "S d"]
    threshold: float
    """The tables hold integers whose bits, after ^, are those of a positive, finite float to compare."""
    scale: float
    """What the kept entries are multiplied by so that the mean stays."""
    dtype: torch.dtype
    """Of the input, and of the floats to compare."""

    @classmethod
    def draw(cls, x: Float[Tensor, "n d"], p: float) -> Mask:
        """A new mask for x; p counts in steps of 2⁻²⁹ (half precision: 2⁻¹³), at least one."""
        threshold, scale, low = _compared(p, x.dtype)
        rows = min(ROWS, max(1, len(x)))
        within = _random_bits(rows, x) & (low - 1)
        across = _random_bits(-(-len(x) // rows), x) & (low - 1) | low
        return cls(within, across, threshold, scale, x.dtype)

    def pieces(self, n: int) -> Iterator[tuple[slice, Float[Tensor, "_ d"]]]:
        """Slices of rows of the input, each with the floats that decide which entries are kept."""
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
        # One pass, where comparing, converting and multiplying are three.
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
    """Threshold and scale, and the lowest of the 2ᵏ patterns of bits that are drawn; the highest is twice that."""
    integer = _INTEGERS[dtype]
    low = 2 ** (torch.iinfo(integer).bits - 3)
    dropped = min(max(round(p * low), 1), low - 1)
    last = torch.tensor(low + dropped - 1, dtype=integer).view(dtype)
    return last.item(), low / (low - dropped), low


def _random_bits(rows: int, like: Float[Tensor, "_ d"]) -> Int[Tensor, "rows d"]:
    integer, d = _INTEGERS[like.dtype], like.shape[-1]
    words = torch.empty(-(-rows * d * integer.itemsize // 8), dtype=torch.int64, device=like.device)
    words.random_(-(2**63), None)  # a number for every 8 bytes
    return words.view(integer)[: rows * d].view(rows, d)


def feature_mask(V: Float[Tensor, "m d_in"], p: float) -> Float[Tensor, " d_in"]:
    """What the columns of V are multiplied by where features are dropped."""
    return torch.nn.functional.dropout(V.new_ones(V.shape[1]), p)
