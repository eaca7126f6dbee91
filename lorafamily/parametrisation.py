"""How the factors of an update are made of trainable tensors:   U V = Σ of slices.

Axes: d_in, d_out of the weight; r = number of slices; m = inner size of the factors, r unless said otherwise. A *slice*
is one term of the sum U V; allocation drops and adds slices.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorafamily.errors import MethodError

Factors = tuple[Float[Tensor, "d_out m"], Float[Tensor, "m d_in"]]


class Parametrisation(nn.Module, ABC):
    """How U and V are computed from trainable tensors. Forward, merge, export and pictures need only `factors`.

    A subclass registers its tensors as parameters in `__init__(d_in, d_out, rank, **own_sizes)`, uninitialised; the
    third argument has the name in `sized_by`. `slice_axes` says which axis of which tensor counts slices, which is all
    that dropping, adding, masking and scoring slices need.
    """

    slice_axes: ClassVar[Mapping[str, int]]
    """Name of each tensor that has slices -> the axis that counts them."""
    zeroed: ClassVar[str]
    """The tensor of `slice_axes` whose zeros make a slice contribute nothing, while the slice can still learn."""
    sized_by: ClassVar[str] = "rank"
    """Name of the size that a budget chooses: `rank`, or another where slices are counted apart (LoRA²: `width`)."""
    sliced_by: ClassVar[str] = "rank"
    """Name of the size that is the number of slices: that of `sized_by`, or one of `own_sizes`."""
    own_sizes: ClassVar[Mapping[str, int]] = {}
    """Further sizes with their defaults; they are options of every method that uses the parametrisation."""
    count: ClassVar[Callable[..., int]]
    """Static: the sizes that `__init__` takes -> trainable parameters, which a budget adds up."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.d_in, self.d_out = d_in, d_out

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Present sizes as keywords of `__init__`: that of `sized_by`, and `own_sizes`."""

    @abstractmethod
    def factors(self, gate: Float[Tensor, " r"] | None = None) -> Factors:
        """(U, V), differentiable; `gate` multiplies each slice (1 keeps it, 0 takes it out)."""

    def forward(self, gate: Float[Tensor, " r"] | None = None) -> Factors:
        """`factors`; called as a module is, so that the hooks run which load offloaded tensors."""
        return self.factors(gate)

    @abstractmethod
    def reset(self, generator: torch.Generator) -> None:
        """Initialise so that U V = 0, as the paper does. `generator` lives on the CPU."""

    @abstractmethod
    def represent(self, U: Float[Tensor, "d_out m"], V: Float[Tensor, "m d_in"]) -> None:
        """Set values so that the product of `factors()` is U V; m is at most `capacity`."""

    @abstractmethod
    def fresh(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """n new slices, by tensor name, that leave U V as it is."""

    def frames(self) -> list[Float[Tensor, "_ _"]]:
        """Matrices whose rows should be orthonormal, for penalties; none by default."""
        return []

    @property
    def slices(self) -> int:
        """Number of slices present."""
        return cast(Tensor, getattr(self, self.zeroed)).shape[self.slice_axes[self.zeroed]]

    @property
    def largest_rank(self) -> int:
        """The largest rank that ΔW can have, whatever the number of slices."""
        return min(self.d_in, self.d_out)

    @property
    def capacity(self) -> int:
        """The largest rank of U V that the present tensors can hold."""
        return self.slices

    @property
    def slice_cost(self) -> int:
        """Trainable parameters of one slice."""
        return sum(
            math.prod(size for axis, size in enumerate(parameter.shape) if axis != along)
            for parameter, along in self.sliced()
        )

    def check(self) -> None:
        """Check which tensors are parameters.

        Raises:
            MethodError: a parameter is frozen, or `slice_axes` or `zeroed` name something that is no parameter.
        """
        parameters = dict(self.named_parameters())
        if self.zeroed not in self.slice_axes:
            among = ", ".join(self.slice_axes)
            raise MethodError(f"{type(self).__name__}: zeroed = {self.zeroed!r} must be one of slice_axes: {among}")
        if frozen := [name for name, p in parameters.items() if not p.requires_grad]:
            raise MethodError(
                f"{type(self).__name__}: {', '.join(frozen)} has requires_grad=False, but every parameter of an "
                "adapter trains; register a frozen tensor as a buffer (register_buffer)"
            )
        if missing := [name for name in self.slice_axes if name not in parameters]:
            raise MethodError(
                f"{type(self).__name__}: {', '.join(missing)} must be parameters, because only trained slices can be "
                "dropped, added and scored; leave frozen tensors out of `slice_axes`, so that they keep theirs"
            )

    def tensors(self) -> Iterable[nn.Parameter]:
        """The parameters; `parameters()` of all adapters would take a millisecond, which is much of a step."""
        return cast(dict[str, nn.Parameter], self._parameters).values()

    def sliced(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Each tensor that has slices, with their axis."""
        for name, axis in self.slice_axes.items():
            yield self.get_parameter(name), axis

    def role(self, name: str) -> Literal["down", "up", "gate"]:
        """Which factor a tensor belongs to: "down" (V), "up" (U), or "gate": one value for each slice."""
        shape = self.get_parameter(name).shape
        if len(shape) == 1:
            return "gate"
        along = self.slice_axes.get(name)
        up = shape[0] == self.d_out and shape[-1] != self.d_in if along is None else along == 1
        return "up" if up else "down"

    @torch.no_grad()
    def mask(self, off: Int[Tensor, " n"]) -> None:
        """Make the slices with these indices contribute nothing; they keep training and may come back."""
        self.get_parameter(self.zeroed).index_fill_(self.slice_axes[self.zeroed], off, 0)

    def resize(self, keep: Int[Tensor, " n"], new: Mapping[str, Tensor]) -> list[Resize]:
        """Keep the slices with these indices, in that order, and append `new` ones, by tensor name.

        Resized tensors are new parameters, because an autograd graph may still refer to the shapes of the old ones.
        Returns what the optimizer state needs to follow.
        """
        done = []
        for name, axis in self.slice_axes.items():
            old = self.get_parameter(name)
            kept = old.data.index_select(axis, keep)
            data = torch.cat([kept, new[name].to(kept)], axis) if name in new else kept
            parameter = nn.Parameter(data, requires_grad=old.requires_grad)
            setattr(self, name, parameter)
            done.append(Resize(old, parameter, axis, keep))
        return done

    def grown(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """`fresh`, checked.

        Raises:
            MethodError: `fresh` left out a tensor that has slices, or gave one of another shape.
        """
        new = self.fresh(n, generator)
        wanted = {name: [*self.get_parameter(name).shape] for name in self.slice_axes}
        for name, axis in self.slice_axes.items():
            wanted[name][axis] = n
        if (found := {name: [*value.shape] for name, value in new.items()}) != wanted:
            raise MethodError(
                f"{type(self).__name__}.fresh({n}) must give tensors of the shapes {wanted}, and gave {found}"
            )
        return new


@dataclass(frozen=True)
class Resize:
    """`old` was replaced by `new`: its slices `keep` along `axis`, then the appended ones."""

    old: nn.Parameter
    new: nn.Parameter
    axis: int
    keep: Tensor
