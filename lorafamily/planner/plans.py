"""What training will need, before anything is allocated: parameters, files and memory, beside full fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lorafamily import targets as targeting
from lorafamily.adapter import Adapter
from lorafamily.batch import LossFn
from lorafamily.choice import Choice, choose
from lorafamily.deploy.files import described
from lorafamily.deploy.saved import sizes
from lorafamily.errors import MethodError
from lorafamily.injection import put
from lorafamily.layers.quantised import counts_of, packed_parameters, quantised_layers, tensors_of
from lorafamily.layers.rows import Fused
from lorafamily.layers.site import base_parameters
from lorafamily.layers.state import Placement
from lorafamily.planner.blocks import repeated_blocks, without_values
from lorafamily.planner.costs import FLOOR, FULL, Memory, Plan, Use
from lorafamily.planner.tracing import NotTracedError, Penalty, Ready, peak_of_step
from lorafamily.training.guards import check_keys

COUNTER = 4  # bytes of the step count that AdamW keeps for each tensor


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
    **arguments: Any,
) -> Plan:
    """What `apply` with the same arguments, then training and `save`, will need. Nothing is allocated or changed.

    Args:
        model: best on the meta device (`with torch.device("meta")`); it is not changed.
        method, **arguments: as for `apply`: budget, rank, rank_budget, budget_at, targets, exclude, fused, also_train,
            and the method's options.
        batch: an example of what `train` will get, on any device; None: activations are not counted.
        loss_fn: as for `train`.
        dtype: of the base's weights, and so of activations; None: the one they have.
        factors: dtype of the adapters; None: float32 or higher, as `apply` makes them.
        states: dtype of AdamW's two states of a parameter; None: the parameter's, as in torch.
        checkpoint_activations: as for `train`: activations inside blocks are recomputed in the backward.

    Raises:
        MethodError, TargetError, BudgetError, StateError: as `apply`.
        DataError: the model does not take such a batch.
    """
    return Planner(model, batch, loss_fn, dtype, factors, states, checkpoint_activations).plan(method, **arguments)


@dataclass
class Planner:
    """Plans several methods for one model, with the same references. The fields are arguments of `plan`."""

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

    def plan(self, method: str = "lora", *, fused: Fused | None = None, **arguments: Any) -> Plan:
        """The plan of one method, with further arguments of `apply`."""
        choice = choose(self.model, method, fused=fused, **arguments)
        adapters = self._adapters(choice)
        extra = {path: without_values(parameter, self.dtype) for path, parameter in choice.extra_trained.items()}
        placement = Placement(choice.name, method, choice.method, choice.sizing, adapters, extra)

        def ready(model: nn.Module) -> Penalty | None:
            targets = targeting.match(model, lambda name, module: name in choice.targets, fused)
            present = {name: p for name, p in base_parameters(model).items() if name in choice.extra_trained}
            there = replace(choice, model=model, targets=targets, extra_trained=present)
            built = self._adapters(there)
            put(there, built)
            penalty = choice.method.penalty
            return None if penalty is None else lambda: penalty(built.values())

        trained = [*(p for adapter in adapters.values() for p in adapter.update.parameters()), *extra.values()]
        added = [*(p for adapter in adapters.values() for p in adapter.parameters()), *extra.values()]
        use = Use(
            method,
            sum(adapter.trainable() for adapter in adapters.values()),
            sum(value.numel() for value in extra.values()),
            0,
            sizes(described(choice.model, placement, choice.targets, extra)),
            self._memory(added, trained, ready, [*choice.targets, *choice.extra_trained]),
        )
        return Plan(
            model=type(self.model).__name__,
            base_parameters=sum(counts_of(self.model).values()),
            sizing=choice.sizing,
            options=choice.method.options(),
            slices={path: adapter.slices for path, adapter in adapters.items()},
            use=use,
            full=self.full,
            floor=self.floor,
            assumptions=self._assumptions(trained),
        )

    @cached_property
    def full(self) -> Use:
        """Full fine-tuning: everything trains."""
        packed = packed_parameters(self.model)
        names = {name for name, p in self.model.named_parameters() if p.is_floating_point() and id(p) not in packed}
        return self._without_adapters(FULL, names, {"weights": sum(tensor.nbytes for tensor in self._base())})

    @cached_property
    def floor(self) -> Use:
        """Gradients pass through the frozen model and nothing trains: no adapter needs less."""
        return self._without_adapters(FLOOR, set(), {})

    def _without_adapters(self, way: str, names: set[str], files: dict[str, int]) -> Use:
        """The use where the base's parameters of these names train."""

        def ready(model: nn.Module) -> None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in names)

        trained = [without_values(p, self.dtype) for name, p in base_parameters(self.model).items() if name in names]
        return Use(way, 0, 0, sum(p.numel() for p in trained), files, self._memory([], trained, ready, []))

    def _adapters(self, choice: Choice) -> dict[str, Adapter]:
        built = choice.build(torch.Generator(), meta=True, dtype=self.dtype)
        return {path: adapter.to(self.factors) for path, adapter in built.items()}

    def _base(self) -> list[Tensor]:
        """The base's parameters in the planned dtype; quantised ones as they are stored."""
        packed = {at for at, _, _ in quantised_layers(self.model)}
        named = tensors_of(self.model).items()
        return [t if name.partition(".weight")[0] in packed else without_values(t, self.dtype) for name, t in named]

    def _memory(self, added: list[Tensor], trained: list[Tensor], ready: Ready, marked: Sequence[str]) -> Memory:
        """`added`: tensors besides the base's; `trained`: those with a gradient and optimizer states; `marked`: names
        of what blocks must have alike to stand for each other."""
        base = [*self._base(), *(without_values(buffer, self.dtype) for buffer in self.model.buffers())]
        weights = sum(tensor.nbytes for tensor in [*base, *added])
        gradients = sum(tensor.nbytes for tensor in trained)
        states = sum(2 * t.numel() * (self.states or t.dtype).itemsize + COUNTER for t in trained)
        activations, within = None, gradients
        if self.batch is not None and self._not_traced is None:
            try:
                activations, with_gradients = peak_of_step(
                    self.model,
                    self.batch,
                    ready,
                    dtype=self.dtype,
                    loss_fn=self.loss_fn,
                    checkpoint_activations=self.checkpoint_activations,
                    blocks=repeated_blocks(self.model, marked),
                )
                within = max(gradients, with_gradients)
            except NotTracedError as error:
                self._not_traced = str(error)
        return Memory(weights, gradients, states, activations, weights + states + within)

    def _assumptions(self, trained: Sequence[Tensor]) -> tuple[str, ...]:
        of_base = _dtypes(self._base())
        states = "as what trains" if self.states is None else str(self.states).removeprefix("torch.")
        notes = [
            f"dtypes: weights {of_base}; what trains {_dtypes(trained)}, its gradients too; AdamW's two states "
            f"{states}; no second copy of weights in another precision"
        ]
        if self.batch is None:
            notes.append("activations: not counted, no batch was given; peak is weights + gradients + optimizer")
        elif self._not_traced is not None:
            notes.append(
                f"activations: not counted, a step of this {type(self.model).__name__} depends on tensors' values, "
                f"which a plan does not have ({self._not_traced}); peak is weights + gradients + optimizer"
            )
        else:
            kept = "recomputed in the backward, block by block" if self.checkpoint_activations else "kept"
            notes.append(
                f"activations: counted, of a batch of {_batch(self.batch)}, {kept}; the most alive at once with the "
                "CPU's kernels, without autocast"
            )
            notes.append("peak: may be less than the sum, since gradients come as activations go")
        notes.append(
            "file: all that lorafamily.save writes after apply; for full fine-tuning the weights; MB 10⁶, GB 10⁹ bytes"
        )
        return tuple(notes)


def _dtypes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def _batch(batch: Any) -> str:
    shapes = [" × ".join(map(str, leaf.shape)) or "1" for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    names = list(batch) if isinstance(batch, dict) and len(batch) == len(shapes) else ["tensor"] * len(shapes)
    return ", ".join(f"{name} {shape}" for name, shape in zip(names, shapes, strict=True))
