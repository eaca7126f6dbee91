"""What training will take, before anything is allocated: trainable numbers, files, memory, against full fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lorafamily import targets as targeting
from lorafamily.adapter import Adapter
from lorafamily.batch import LossFn
from lorafamily.deploy.files import described, sizes
from lorafamily.errors import MethodError
from lorafamily.injection import Choice, choose, put
from lorafamily.parts import Fused
from lorafamily.placement import Placement
from lorafamily.planner.blocks import alike_blocks, on_meta
from lorafamily.planner.costs import FLOOR, FULL, Memory, Plan, Use
from lorafamily.planner.tracing import Held, NotTracedError, Penalty, Ready, held_in_step
from lorafamily.quantised import counts_of, packed_parameters, quantised_layers, tensors_of
from lorafamily.site import base_parameters
from lorafamily.training.guards import check_keys

COUNTER = 4  # bytes of the number of steps that AdamW keeps for each tensor


def plan(
    model: nn.Module,
    method: str = "lora",
    *,
    batch: Any = None,
    loss_fn: LossFn | None = None,
    dtype: torch.dtype | None = None,
    factors: torch.dtype | None = None,
    states: torch.dtype | None = None,
    checkpoint_activations: bool = False,
    budget: float | None = None,
    rank: int | Mapping[str, int] | None = None,
    rank_budget: int | None = None,
    budget_at: Literal["peak", "end"] = "peak",
    targets: targeting.Targets = None,
    exclude: targeting.Targets = None,
    fused: Fused | None = None,
    also_train: str | Sequence[str] | None = None,
    **options: Any,
) -> Plan:
    """What `apply` with the same arguments, then training and `save`, will take. Nothing is allocated or changed.

    Args:
        model: best on the meta device (`with torch.device("meta")`); on any other it is left as it is.
        method, budget, rank, rank_budget, budget_at, targets, exclude, fused, also_train, **options: as `apply` takes
            them.
        batch: an example, also on the meta device, of what `train` will get; None: activations are not counted.
        loss_fn: as `train` takes it.
        dtype: of the base's weights, where another than they have; activations follow.
        factors: dtype of adapters; None: float32 or higher, as `apply` makes them.
        states: dtype of AdamW's two states a number; None: that of the number, as in torch.
        checkpoint_activations: as `train` takes it: activations inside blocks are computed again in the backward.

    Raises:
        MethodError, TargetError, BudgetError, StateError: as `apply`.
        DataError: the model does not take such a batch.
    """
    planner = Planner(model, batch, loss_fn, dtype, factors, states, checkpoint_activations)
    return planner.plan(
        method,
        budget=budget,
        rank=rank,
        rank_budget=rank_budget,
        budget_at=budget_at,
        targets=targets,
        exclude=exclude,
        fused=fused,
        also_train=also_train,
        **options,
    )


@dataclass
class Planner:
    """Plans of several methods for one model, against the same references; the fields are arguments of `plan`."""

    model: nn.Module
    batch: Any = None
    loss_fn: LossFn | None = None
    dtype: torch.dtype | None = None
    factors: torch.dtype | None = None
    states: torch.dtype | None = None
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        for name in ("dtype", "factors", "states"):
            given = getattr(self, name)
            if given is not None and not (isinstance(given, torch.dtype) and given.is_floating_point):
                raise MethodError(f"{name}={given!r}: must be a floating-point torch.dtype, such as torch.bfloat16")
        if self.batch is not None and self.loss_fn is None:
            check_keys(self.model, self.batch)
        self._not_traced: str | None = None

    def plan(self, method: str = "lora", *, fused: Fused | None = None, **chosen: Any) -> Plan:
        """The plan of one method; `chosen`: what else `apply` takes."""
        choice = choose(self.model, method, fused=fused, **chosen)
        adapters = self._built(choice)
        beside = {path: self._as_planned(parameter) for path, parameter in choice.beside.items()}
        placement = Placement(choice.name, method, choice.method, choice.sizing, adapters, beside)

        def ready(model: nn.Module) -> Penalty | None:
            targets = targeting.match(model, lambda name, module: name in choice.targets, fused)
            own = base_parameters(model)
            beside = {name: own[name] for name in choice.beside if name in own}
            there = replace(choice, model=model, targets=targets, beside=beside)
            built = self._built(there)
            put(there, built)
            penalty = choice.method.penalty
            return None if penalty is None else lambda: penalty(built.values())

        trained = [*(p for adapter in adapters.values() for p in adapter.update.parameters()), *beside.values()]
        added = [*(p for adapter in adapters.values() for p in adapter.parameters()), *beside.values()]
        use = Use(
            method,
            sum(adapter.trainable() for adapter in adapters.values()),
            sum(value.numel() for value in beside.values()),
            0,
            sizes(described(choice.model, placement, choice.targets, beside)),
            self._memory(added, trained, self._held(ready, [*choice.targets, *choice.beside])),
        )
        return Plan(
            model=type(self.model).__name__,
            base_parameters=sum(counts_of(self.model).values()),
            sizing=choice.sizing,
            options=choice.method.options(),
            ranks={path: adapter.rank for path, adapter in adapters.items()},
            use=use,
            full=self.full,
            floor=self.floor,
            assumptions=self._assumptions(trained),
        )

    @cached_property
    def full(self) -> Use:
        """Everything trains."""

        packed = packed_parameters(self.model)
        names = {name for name, p in self.model.named_parameters() if p.is_floating_point() and id(p) not in packed}

        def ready(model: nn.Module) -> None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in names)

        trained = [self._as_planned(p) for name, p in base_parameters(self.model).items() if name in names]
        memory = self._memory([], trained, self._held(ready, []))
        numbers = sum(parameter.numel() for parameter in trained)
        return Use(FULL, 0, 0, numbers, {"weights": sum(tensor.nbytes for tensor in self._base())}, memory)

    @cached_property
    def floor(self) -> Use:
        """Gradients pass through the frozen model; less than that no adapter takes."""

        def ready(model: nn.Module) -> None:
            model.requires_grad_(False)

        return Use(FLOOR, 0, 0, 0, {}, self._memory([], [], self._held(ready, [])))

    def _built(self, choice: Choice) -> dict[str, Adapter]:
        built = choice.build(torch.Generator(), meta=True, dtype=self.dtype)
        return {path: adapter.to(self.factors) for path, adapter in built.items()}

    def _base(self) -> list[Tensor]:
        """The base's parameters as planned; quantised ones as what they are stored in, whatever dtype is planned."""
        packed = {at for at, _, _ in quantised_layers(self.model)}
        named = tensors_of(self.model).items()
        return [t if name.partition(".weight")[0] in packed else self._as_planned(t) for name, t in named]

    def _as_planned(self, tensor: Tensor) -> Tensor:
        return on_meta(tensor, self.dtype)

    def _memory(self, added: Sequence[Tensor], trained: Sequence[Tensor], held: Held | None) -> Memory:
        """`added`: tensors beside the base's own; `trained`: those that have a gradient and states."""
        base = [*self._base(), *(self._as_planned(buffer) for buffer in self.model.buffers())]
        weights = sum(tensor.nbytes for tensor in [*base, *added])
        gradients = sum(tensor.nbytes for tensor in trained)
        states = sum(2 * t.numel() * (self.states or t.dtype).itemsize + COUNTER for t in trained)
        within = gradients if held is None else max(gradients, held.both)
        activations = None if held is None else held.activations
        return Memory(weights, gradients, states, activations, weights + states + within)

    def _held(self, ready: Ready, marked: Sequence[str]) -> Held | None:
        if self.batch is None or self._not_traced is not None:
            return None
        try:
            return held_in_step(
                self.model,
                self.batch,
                ready,
                dtype=self.dtype,
                loss_fn=self.loss_fn,
                checkpoint_activations=self.checkpoint_activations,
                blocks=alike_blocks(self.model, marked),
            )
        except NotTracedError as error:
            self._not_traced = str(error)
            return None

    def _assumptions(self, trained: Sequence[Tensor]) -> tuple[str, ...]:
        of_base = _dtypes(self._base())
        states = "as what trains" if self.states is None else str(self.states).removeprefix("torch.")
        said = [
            f"dtypes: weights {of_base}; what trains beside them {_dtypes(trained)}; gradients as what trains; AdamW's "
            f"two states {states}; no second copy of weights in another precision"
        ]
        if self.batch is None:
            said.append("activations: not counted, no batch was given; peak is weights + gradients + optimiser")
        elif self._not_traced is not None:
            said.append(
                f"activations: not counted, a step of this {type(self.model).__name__} asks for numbers, which a plan "
                f"has not ({self._not_traced}); peak is weights + gradients + optimiser"
            )
        else:
            kept = "computed again in the backward, block by block" if self.checkpoint_activations else "kept"
            said.append(
                f"activations: counted, of a batch of {_batch(self.batch)}, {kept}; the most alive at once of what the "
                "CPU's kernels make, without autocast"
            )
            said.append("peak: may be less than the sum, as gradients come when activations go")
        said.append(
            "file: all that lorafamily.save writes after apply; of full fine-tuning the weights; MB 10⁶, GB 10⁹ bytes"
        )
        return tuple(said)


def _dtypes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def _batch(batch: Any) -> str:
    shapes = [" × ".join(map(str, leaf.shape)) or "1" for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    names = list(batch) if isinstance(batch, dict) and len(batch) == len(shapes) else ["tensor"] * len(shapes)
    return ", ".join(f"{name} {shape}" for name, shape in zip(names, shapes, strict=True))
