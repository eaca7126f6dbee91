"""A method of the family: a parametrisation, an initialisation, an allocation, a penalty and a scale."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lorafamily.adapter import Adapter
from lorafamily.allocation.allocator import Allocation, Fixed
from lorafamily.dropout import Dropout
from lorafamily.errors import MethodError
from lorafamily.evidence import LayerEvidence, Wanted
from lorafamily.parametrisation import Parametrisation

Scaling = Literal["alpha/r", "alpha/sqrt(r)", "alpha"]
"""How s follows from alpha and the layer's initial rank r. "alpha/r" is LoRA's, "alpha/sqrt(r)" rsLoRA's (Kalajdzievski
2023, arXiv:2312.03732); "alpha" is the same for all layers, whatever their ranks."""


@dataclass(frozen=True)
class Initialisation(ABC):
    """The values of a parametrisation before training. Its fields are options of the methods that use it."""

    frozen_initial: ClassVar[bool] = False
    """Whether U V is not zero at first, so that the adapter must subtract a frozen copy of it."""

    def freezes(self) -> bool:
        """`frozen_initial`; to be overridden where it depends on a setting."""
        return self.frozen_initial

    @abstractmethod
    def __call__(
        self, update: Parametrisation, weight: Float[Tensor, "d_out d_in"], generator: torch.Generator
    ) -> None:
        """Set what `update` shall have instead of its parametrisation's own initialisation, which it has already.

        `weight` must not change; `generator` lives on the CPU.
        """


@dataclass(frozen=True)
class Room:
    """Bounds for initial ranks that follow from evidence.

    `shapes`: (d_in, d_out) by layer; `rank`: that of equal ranks; `limit`: for all layers together, in trainable
    parameters if the budget counts those, else in slices; `cost(layer, rank)`: what counts against it; `exact`: whether
    the user set the limit, which otherwise is the cost of equal ranks; `weight(layer)`: W.
    """

    shapes: Mapping[str, tuple[int, int]]
    rank: int
    limit: float
    cost: Callable[[str, int], int]
    exact: bool
    weight: Callable[[str], Tensor]

    def largest(self, layer: str) -> int:
        """The largest rank that ΔW of a layer can have."""
        return min(self.shapes[layer])


@dataclass(frozen=True)
class FromEvidence(Initialisation):
    """An initialisation, and initial ranks, from data that is looked at before training; see `evidence.py`.

    `evidence_batches`: the most batches of `apply`'s data to look at. `evidence_memory`: MiB of memory for sums of
    gradients, which are as large as the weights in float32; the rest goes to a temporary file. None: all in memory.
    """

    wants: ClassVar[tuple[Wanted, ...]]
    """What must be gathered: "inputs", "gradients", or both."""
    one_scale: ClassVar[bool] = False
    """Whether all layers have the scale of equal ranks, instead of that of their own rank."""

    evidence_batches: int = 64
    evidence_memory: float | None = None

    def __post_init__(self) -> None:
        if (bound := self.evidence_memory) is not None and not (isinstance(bound, int | float) and bound >= 0):
            raise MethodError(f"evidence_memory={bound!r}: must be a number of MiB, 0 or more, or None")
        n = self.evidence_batches
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise MethodError(f"evidence_batches={n!r}: must be a whole number of at least 1")

    def directions(self, rank: int) -> int:
        """How many directions of a layer's inputs are needed; `rank`: that of equal ranks."""
        return rank

    def stop_at(self) -> float | None:
        """The smallest |cosine| between a direction before and after a batch with which it counts as settled. A layer
        with as many settled directions as `ranks` gives it ignores further batches; once all layers do, gathering
        stops. None: all batches count."""
        return None

    def ranks(self, evidence: Mapping[str, LayerEvidence], room: Room) -> dict[str, int]:
        """The initial rank of every layer; the same for all unless overridden."""
        return dict.fromkeys(evidence, room.rank)

    @abstractmethod
    def fill(
        self,
        update: Parametrisation,
        weight: Float[Tensor, "d_out d_in"],
        generator: torch.Generator,
        evidence: LayerEvidence,
        scale: float,
    ) -> None:
        """As `Initialisation.__call__`; ΔW will be `scale` times U V."""

    def __call__(self, update: Parametrisation, weight: Tensor, generator: torch.Generator) -> None:
        raise MethodError(f"{type(self).__name__} needs evidence: apply(..., data=batches)")


@dataclass(frozen=True)
class DefaultInitialisation(Initialisation):
    """The initialisation of the parametrisation's paper, with U V = 0."""

    def __call__(self, update: Parametrisation, weight: Tensor, generator: torch.Generator) -> None:
        pass


@dataclass(frozen=True)
class Penalty(ABC):
    """A term added to the task loss. Its fields are options of the methods that use it."""

    @abstractmethod
    def __call__(self, adapters: Iterable[Adapter]) -> Float[Tensor, ""]:
        """The penalty of all adapters together, differentiable."""


AXES = ("parametrisation", "initialisation", "allocation", "penalty", "scaling", "up_ratio")
OPTIONS = ("alpha", "scaling", "up_ratio")
"""Options that every method has."""


@dataclass(frozen=True)
class Method:
    """A method for low-rank fine-tuning.

    `alpha` and `scaling` give s, see `scale`. `up_ratio`: by what the learning rate of the tensors that make U is
    multiplied (LoRA+'s λ); the optimizer must do so, see `parameter_groups`. `parametrisation_options` override the
    sizes in `own_sizes` of the parametrisation. `alpha` and these sizes are one value for all layers, or values by
    layer; `at` then gives the method of one layer.
    `claimed`: the axes that this method decides; a combination `a+b` takes every claimed axis from the method that
    claims it. A new method claims the axes that it sets; one made by `but` claims those that it changes.
    """

    parametrisation: type[Parametrisation]
    initialisation: Initialisation = DefaultInitialisation()
    allocation: Allocation = Fixed()
    penalty: Penalty | None = None
    scaling: Scaling = "alpha/r"
    alpha: float | Mapping[str, float] = 16.0
    up_ratio: float = 1.0
    rank: int = 8
    """The rank if neither a rank nor a budget is given."""
    parametrisation_options: Mapping[str, int | Mapping[str, int]] = field(default_factory=dict)
    claimed: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        given, sizes = self.parametrisation_options, self.parametrisation.own_sizes
        object.__setattr__(self, "parametrisation_options", {name: given.get(name, sizes[name]) for name in sizes})
        if not self.claimed:
            defaults = {f.name: f.default for f in fields(Method)}
            changed = frozenset(axis for axis in AXES if getattr(self, axis) != defaults[axis])
            object.__setattr__(self, "claimed", changed)
        settings = [f.name for choice in self._configurable() for f in fields(choice)]
        names = [*OPTIONS, self.parametrisation.sized_by, *sizes, *settings]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise MethodError(f"option {', '.join(twice)} means two things in this method; rename one")

    def but(self, **axes: Any) -> Method:
        """This method with some axes changed, which are then the ones that it claims."""
        return replace(self, **axes, claimed=frozenset(axes) & frozenset(AXES))

    def combined(self, other: Method, names: str) -> Method:
        """This method with the axes that the other one claims; `names`: the combination, for messages.

        Raises:
            MethodError: both claim an axis and differ on it.
        """
        for axis in sorted(self.claimed & other.claimed):
            mine, theirs = getattr(self, axis), getattr(other, axis)
            if mine != theirs:
                raise MethodError(
                    f'"{names}" has no meaning: both methods decide the {axis} '
                    f"({_describe(mine)} and {_describe(theirs)}); combine methods that differ on other axes"
                )
        changes = {axis: getattr(other, axis) for axis in other.claimed}
        if "parametrisation" in other.claimed:  # these settings belong to it
            changes |= {name: getattr(other, name) for name in ("alpha", "rank", "parametrisation_options")}
        return replace(self, **changes, claimed=self.claimed | other.claimed)

    def options(self) -> dict[str, Any]:
        """Every option with its present value, flat; `with_options(**options())` gives the method back."""
        flat = {name: getattr(self, name) for name in OPTIONS} | dict(self.parametrisation_options)
        for choice in self._configurable():
            flat |= {f.name: getattr(choice, f.name) for f in fields(choice)}
        return flat

    def with_options(self, **options: Any) -> Method:
        """The method with options set, each on the axis that has it.

        Raises:
            MethodError: an option has an impossible value, or no axis of this method has it; the message lists those
                it has.
        """
        known = self.options()
        if unknown := sorted(set(options) - set(known)):
            raise MethodError(
                f"unknown option{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}; "
                f"this method takes {', '.join(sorted(known))}"
            )
        changes: dict[str, Any] = {name: options[name] for name in OPTIONS if name in options}
        sizes = {name: value for name, value in options.items() if name in self.parametrisation.own_sizes}
        changes["parametrisation_options"] = {**self.parametrisation_options, **sizes}
        for axis in ("initialisation", "allocation", "penalty"):
            if (choice := getattr(self, axis)) is not None:
                settings = {f.name: options[f.name] for f in fields(choice) if f.name in options}
                changes[axis] = replace(choice, **settings)
        method = replace(self, **changes)
        ratio = method.up_ratio
        if not isinstance(ratio, int | float) or not math.isfinite(ratio) or ratio <= 0:
            raise MethodError(f"up_ratio={ratio!r}: must be a positive, finite number")
        alphas = options.get("alpha", self.alpha)
        for alpha in alphas.values() if isinstance(alphas, Mapping) else [alphas]:
            replace(method, alpha=alpha).scale(rank=1)  # refuses a wrong alpha before any adapter is placed
        for name, value in sizes.items():
            least = 0 if isinstance(value, Mapping) else 1
            for size in value.values() if isinstance(value, Mapping) else [value]:
                if not isinstance(size, int) or isinstance(size, bool) or size < least:
                    raise MethodError(f"{name}={value!r}: must be a whole number of at least {least}")
        return method

    @property
    def looks_at_data(self) -> bool:
        """Whether `apply` needs data, for the initialisation."""
        return isinstance(self.initialisation, FromEvidence)

    @property
    def layered(self) -> dict[str, Mapping[str, Any]]:
        """Options with a value for every layer."""
        options = {"alpha": self.alpha, **self.parametrisation_options}
        return {name: value for name, value in options.items() if isinstance(value, Mapping)}

    def at(self, layer: str) -> Method:
        """The method of one layer, by full name."""
        if not self.layered:
            return self
        values = {name: value[layer] for name, value in self.layered.items()}
        sizes = {name: values.get(name, value) for name, value in self.parametrisation_options.items()}
        return replace(self, alpha=values.get("alpha", self.alpha), parametrisation_options=sizes)

    def scale(self, rank: int) -> float:
        """s for a layer with `rank` slices at first.

        Raises:
            MethodError: alpha is no positive number, or the scaling is unknown.
        """
        if not isinstance(self.alpha, (int, float)) or not math.isfinite(self.alpha) or self.alpha <= 0:
            raise MethodError(f"alpha={self.alpha!r}: must be a positive, finite number, or such numbers by layer")
        if self.scaling == "alpha/r":
            return self.alpha / rank
        if self.scaling == "alpha/sqrt(r)":
            return self.alpha / math.sqrt(rank)
        if self.scaling == "alpha":
            return float(self.alpha)
        raise MethodError(f'scaling={self.scaling!r}: must be "alpha/r", "alpha/sqrt(r)" or "alpha"')

    def _configurable(self) -> list[Initialisation | Allocation | Penalty]:
        """The axes whose fields are options."""
        return [choice for choice in (self.initialisation, self.allocation, self.penalty) if choice is not None]

    def count(self, d_in: int, d_out: int, rank: int) -> int:
        """Trainable parameters of one adapter at `rank`, capped by the layer's size."""
        return self.parametrisation.count(d_in, d_out, **self.capped(d_in, d_out, rank))

    def capped(self, d_in: int, d_out: int, rank: int) -> dict[str, int]:
        """Sizes for one layer: at most min(d_in, d_out), the largest rank that ΔW can have; all 0 at rank 0."""
        sizes = {self.parametrisation.sized_by: rank, **self.parametrisation_options}
        return {name: min(cast(int, size), d_in, d_out) if rank else 0 for name, size in sizes.items()}

    def slices(self, d_in: int, d_out: int, rank: int) -> int:
        """Number of slices of a layer at first."""
        return self.capped(d_in, d_out, rank)[self.parametrisation.sliced_by]

    def build(
        self,
        weight: Float[Tensor, "d_out d_in"],
        rank: int,
        *,
        dropout: Dropout,
        generator: torch.Generator,
        scaled_as: int | None = None,
        evidence: LayerEvidence | None = None,
    ) -> Adapter:
        """An initialised adapter for `weight`, on its device, in float32, or in float64 if the weight is.

        `scaled_as`: the number of slices that sets s; None: the layer's own. A layer without slices needs it, because
        it may get some later. `evidence`: for an initialisation that needs it.
        """
        d_out, d_in = weight.shape
        dtype = torch.promote_types(weight.dtype, torch.float32)
        home = torch.device("meta" if weight.is_meta else "cpu")  # drawn on the CPU: the same values for every device
        with home:
            update = self.parametrisation(d_in, d_out, **self.capped(d_in, d_out, rank)).to(dtype)
        update.check()
        adapter = Adapter(update, scale=self.scale(scaled_as or update.slices), dropout=dropout)
        if not weight.is_meta:
            with torch.no_grad(), home:
                update.reset(generator)  # what the initialisation leaves keeps the parametrisation's own values
                if evidence is not None and isinstance(self.initialisation, FromEvidence) and update.capacity:
                    self.initialisation.fill(update, weight.detach(), generator, evidence, adapter.scale)
                elif update.capacity:
                    self.initialisation(update, weight.detach(), generator)
        if self.initialisation.freezes():
            adapter.freeze_initial()
        return adapter.to(weight.device)


def _describe(value: Any) -> str:
    if isinstance(value, type):
        return value.__name__
    return type(value).__name__ if dataclasses.is_dataclass(value) else repr(value)
