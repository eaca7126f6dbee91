"""What a method does during training, as one object for any loop: its penalty, its rank allocation, and its checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorafamily.allocation.allocator import Allocator, Fixed
from lorafamily.allocation.run import Run
from lorafamily.allocation.surgery import replace_parameter
from lorafamily.batch import LossFn, LossOver, weigher
from lorafamily.errors import StateError, TrainingError
from lorafamily.history import Decision
from lorafamily.layers.extra_trained import extra_trained_values
from lorafamily.layers.offloaded import refuse_offloaded_adapters
from lorafamily.layers.placement import noted, placement_of, refuse_merged, refuse_unsaved, targets_of
from lorafamily.layers.state import Placement
from lorafamily.layers.uncalled import leave_out, watch_first_batch
from lorafamily.training.evaluation import ScoringLoss
from lorafamily.training.fitting import fit_ranks, follow_state_dicts
from lorafamily.training.guards import CUT, FrozenBuffers, OptimizerSteps, refuse_other_adapters
from lorafamily.training.loop_context import LoopContext, check_optimizer_has, refuse_holding_engine
from lorafamily.training.optimisation import check_up_rate
from lorafamily.training.processes import Processes
from lorafamily.training.snapshot import copy_into
from lorafamily.training.step_hooks import StepHooks, steppers
from lorafamily.training.task_gradients import TaskGradients


def session(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    validation: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    scaler: torch.amp.GradScaler | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    seed: int = 0,
    check_gradients: bool = True,
    again: bool = False,
) -> Session:
    """Everything that the active adapters' method does during training, for a loop that you write.

    Args:
        model: with adapters; it may be wrapped.
        optimizer: has everything that trains, see `parameter_groups`; it may be wrapped (`accelerate`, Lightning).
        steps: optimizer steps of the whole run, which the method's schedule is made for.
        validation: batches, for methods that score ranks on the first rows, see `train`.
        loss_fn: function from model and batch to the task loss, for scoring; None: the output's `.loss`.
        scaler: the loop's, if it trains in float16; `backward` scales the loss with it.
        autocast: makes the context in which the loop computes its forwards, for scoring.
        seed: for the initialisation of new slices and the choice of rows to score on.
        check_gradients: refuse to go on if adapters get no gradient from the task.
        again: let ranks that an earlier run settled change once more.

    Raises:
        StateError: no adapter is active, one is merged, or ranks would change while DDP, FSDP or DeepSpeed holds on to
            the tensors it was given.
        AllocationError: the method's schedule does not fit the run, or it scores on validation data and there is none.
        DataError: `validation` is a single batch, or an iterator.
        TrainingError: `steps` is no number of steps, or the optimizer lacks something that trains or cannot train it.
    """
    placement_of(model)
    return Session(
        model,
        optimizer,
        steps=steps,
        validation=validation,
        loss_fn=loss_fn,
        seed=seed,
        check_gradients=check_gradients,
        loop=LoopContext(precision=autocast, scaler=scaler or getattr(optimizer, "scaler", None)),  # accelerate's
        again=again,
    )


class Session:
    """One run of a method in any loop; made by `lorafamily.session`.

    `decisions`: every decision of the allocation so far. `steps_done`: optimizer steps so far.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        steps: int,
        loop: LoopContext,
        validation: Iterable[Any] | None = None,
        loss_fn: LossFn | None = None,
        seed: int = 0,
        check_gradients: bool = True,
        loss_over: LossOver = "auto",
        again: bool = False,
        start: Mapping[str, int] | None = None,
    ):
        """`loss_over`: as in `train`. `start`: ranks when the run began, if the adapters have others by now."""
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise TrainingError(f"steps={steps!r}: must be a whole number of optimizer steps, at least 1")
        self.model, self.loop, self.seed = model, loop, seed
        self.owner, self._state = noted(model)
        refuse_merged(self._state)
        self.placement: Placement | None = None if self._state is None else placement_of(self.owner)
        self.adapters = {} if self.placement is None else self.placement.adapters
        refuse_offloaded_adapters(self.adapters)
        StepHooks(optimizer, self.adapters)  # refuses an optimizer that cannot train adapters
        self.optimizer = steppers(optimizer)[0]
        self.method = None if self.placement is None else self.placement.method
        self._penalty_of = None if self.method is None else self.method.penalty
        self.steps_done = 0
        self.decisions: list[Decision] = []
        self.left_out: list[str] = []
        self._processes = Processes(self.device) if dist.is_available() and dist.is_initialized() else None
        self._again = again
        self._penalised = self._awaits_state = False
        scoring = (loss_fn, weigher(loss_over, model, loss_fn), loop.precision, seed)
        self._scoring_loss = None if validation is None else ScoringLoss(model, validation, *scoring)
        if self.placement is not None:
            refuse_unsaved(self.owner, self.placement)
            factors = {f"{at}: {name}": p for at, a in self.adapters.items() for name, p in a.update.named_parameters()}
            check_optimizer_has(self.optimizer, factors | self._extra_trained())
            check_up_rate(self.model, self.optimizer)
        self.start = dict(start or {name: adapter.slices for name, adapter in self.adapters.items()})
        self._begin_allocation(steps)
        if not self.allocator.settled and not loop.reduces:
            refuse_holding_engine(model, optimizer, loop)
        self.gradients = TaskGradients(
            self.adapters, self._extra_trained, check_gradients, loop, self._processes, self._wanted_gradients
        )
        self._optimizer_steps = OptimizerSteps(self.optimizer, self.adapters, self._extra_trained)
        self._buffers = None if self.placement is None else FrozenBuffers(self.owner)
        if self.placement is not None:
            watched = {} if loop.compiled else targets_of(self.owner)
            self._first_batch_over = watch_first_batch(model, watched, self.placement, self.leave_out)
            self.placement.had_session = True
            follow_state_dicts(self.owner, self._follow)

    @property
    def device(self) -> torch.device:
        """The device of the parameters that train."""
        return next(p for p in self.model.parameters() if p.requires_grad).device

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the loss, and once a step that of the penalty.

        Call it for every batch of a step: gradients add up, as those of `loss.backward()` do.

        Raises:
            TrainingError: the loss depends on nothing that trains.
        """
        self.task_backward(loss)
        self.add_penalty()

    def task_backward(self, loss: Tensor) -> None:
        """`backward` without the penalty, for a loop that does something else before it is added.

        Raises:
            TrainingError: the loss has no gradient, although something trains.
        """
        if loss.requires_grad:
            self.loop.scaled(loss).backward()
        elif not self.adapters or self._extra_trained() or any(a.slices for a in self.adapters.values()):
            # Without any rank left, which an allocation may come to, nothing trains and nothing is wrong.
            raise TrainingError(f"the loss depends on nothing that trains: it was computed without gradients, or {CUT}")

    def penalty(self) -> Tensor:
        """The method's penalty, a scalar, for a loop that calls `backward` itself: add it to the loss once a step.

        Zero for a method without one. `session.backward` is faster where ranks change: here the penalty's gradient is
        computed a second time, to tell it from the task's in their sum.

        Raises:
            TrainingError: ranks are scored on the task's gradient alone, which such a sum does not show.
        """
        if self.allocator.wants_task_gradient:
            raise TrainingError(
                "ranks are scored on the task's gradient alone, and in a sum with the penalty it cannot be told apart: "
                "use session.backward(loss)"
            )
        self._penalised = True
        if self._penalty_of is None:
            return torch.zeros((), device=self.device)
        return self.gradients.tell_apart(self._penalty_of(self.adapters.values()))

    def add_penalty(self) -> float:
        """Add the penalty's gradient, unless this step has it; returns the penalty added. `backward` calls this."""
        if self._penalty_of is None or self._penalised:
            return 0.0
        self._penalised = True
        penalty = self._penalty_of(self.adapters.values())
        if penalty.requires_grad:
            self.gradients.add(self.loop.scaled(penalty))
        return float(penalty.detach())

    def step(self) -> Decision | None:
        """Call it after the optimizer's step, before the gradients are cleared. Ranks may change here, and tensors with
        them, in the model and in the optimizer. Returns the decision, None most of the time.

        Raises:
            TrainingError: the optimizer made no step, or on other tensors; its gradients are cleared already; the
                penalty's gradient was not added, or adapters got no gradient in the first steps.
            StateError: other adapters are active, or replaced these; or a state dict with other ranks was loaded into
                the model, but not the session's state of then.
        """
        if self.placement is not None and self._state is not None:
            refuse_other_adapters(self._state, self.placement, self.adapters)
            self._first_batch_over()
        may_skip = self.loop.reduces or self.loop.scaler is not None  # a step whose gradient is not finite
        self._optimizer_steps.check_order(None if may_skip else self.gradients.finite)
        if self._awaits_state:
            raise StateError(
                "the model went on from a state dict with adapters of other ranks, and the session did not: load the "
                "session's state of then too (session.load_state_dict, accelerator.register_for_checkpointing(session))"
            )
        if self._penalty_of is not None and not self._penalised:
            raise TrainingError(
                "the gradient of this step lacks the method's penalty: call session.backward(loss) instead of "
                "loss.backward(), or add session.penalty() to the loss"
            )
        self.steps_done += 1
        if self._buffers is not None and self.steps_done in (1, self.run.steps):
            self._buffers.put_back(last=self.steps_done == self.run.steps)
        self.gradients.check(self.steps_done, last=self.steps_done == self.run.steps)
        scorer = self.allocator.scorer
        averages = self.loop.scaler is not None and scorer is not None and scorer.observes
        skipped = averages and not self.gradients.finite()  # by the scaler
        with self.gradients.paused():
            decision = self.allocator.step(self.steps_done, observe=self._optimizer_steps.made and not skipped)
        if decision is not None:
            self.decisions.append(decision)
            self.gradients.listen()
        self._penalised = False
        self._optimizer_steps.begin_next()
        self.gradients.stepped()
        return decision

    def state_dict(self, *, adapters: bool = True) -> dict[str, Any]:
        """The state of the run as plain data and tensors, for `load_state_dict`. Unless `adapters` is False, it has the
        adapters' tensors at their present ranks, the extra trained parameters and the buffers that moved."""
        state: dict[str, Any] = {
            "steps done": self.steps_done,
            "steps": self.run.steps,
            "start": dict(self.start),
            "allocator": self.allocator.state(),
            "generator": self.run.generator.get_state(),
            "decisions": [vars(decision) for decision in self.decisions],
            "left out": list(self.left_out),
            "unreached": sorted(self.gradients.unreached),
            "in eval mode": [] if self._buffers is None else sorted(self._buffers.stilled),
        }
        if adapters:
            state["adapters"] = {at: dict(adapter.state_dict()) for at, adapter in self.adapters.items()}
            if self._state is not None and self.placement is not None:
                state["beside"] = extra_trained_values(self.owner, self._state, self.placement)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from another session's state. The model and the optimizer get the ranks of then, so load the
        optimizer's state afterwards; or load the model's state dict first, which sets the ranks as well, and then these
        two in any order.

        Raises:
            StateError: the state is of a run with other adapters, or with other ranks at its start.
        """
        self.leave_out(state["left out"])
        if state["start"] != self.start:
            raise StateError("the session's state is of a run with other adapters than these, or other initial ranks")
        for at, tensors in state.get("adapters", {}).items():
            self.replace_parameters(self.adapters[at].take(tensors))
        if self.placement is not None and "beside" in state:
            copy_into(self.owner, {**self.placement.inactive_buffers, **state["beside"]})
        if self._buffers is not None:
            self._buffers.still(state.get("in eval mode", ()))
        if self.allocator.settled and not state["allocator"]["settled"]:  # back to where ranks could move
            self._again = True
            self._begin_allocation(self.run.steps)
        self.allocator.restore(state["allocator"])
        self.run.generator.set_state(state["generator"].cpu())
        self.decisions = [Decision(**decision) for decision in state["decisions"]]
        self.steps_done, self.gradients.unreached = state["steps done"], set(state["unreached"])
        self._awaits_state = False
        self.gradients.listen()

    def replace_parameters(self, replaced: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> None:
        """Let the optimizer train new parameters in place of old ones, with the state of the old ones."""
        for old, new in replaced:
            replace_parameter(self.optimizer, old, new)
            if old in self.optimizer.state:
                self.optimizer.state[new] = self.optimizer.state.pop(old)

    def await_state(self) -> None:
        """Call it when the model got other ranks: `step` refuses until the session's state is loaded, too."""
        self._awaits_state = True
        self.gradients.listen()

    def _follow(self, state_dict: Mapping[str, Tensor], prefix: str) -> None:
        """Take the ranks of a state dict that is about to be loaded into the model."""
        if replaced := fit_ranks(self.owner, self.adapters, state_dict, prefix):
            self.replace_parameters(replaced)
            self.await_state()

    def leave_out(self, names: Iterable[str]) -> None:
        """Remove adapters that have no effect, and begin the allocation anew with the others. Raises TargetError if
        these targets were named in `apply`, or no other is left."""
        before = set(self.adapters)
        if self.placement is not None and leave_out(self.owner, self.placement, list(names), self.optimizer):
            self.left_out = sorted({*self.left_out, *(before - set(self.adapters))})
            self.start = {name: rank for name, rank in self.start.items() if name in self.adapters}
            self.gradients.unreached -= before - set(self.adapters)
            self._begin_allocation(self.run.steps)

    def _wanted_gradients(self) -> tuple[bool, bool]:
        """Whether the task's gradient must be kept apart from the penalty's, and whether it must be noted which
        adapters the task reached: a scorer that averages gradients cannot see it, as the penalty adds to all of them.
        """
        scorer = None if self.allocator.settled else self.allocator.scorer
        averages = scorer is not None and scorer.observes
        return self.allocator.wants_task_gradient, averages and self._penalty_of is not None

    def _begin_allocation(self, steps: int) -> None:
        sizing = None if self.placement is None else self.placement.sizing
        self.run = Run(
            model=self.model,
            adapters=self.adapters,
            steps=steps,
            # A budget for the end may be exceeded at the start; the allocator must meet it when it is done.
            limit=None if sizing is None else sizing.budget,
            slice_limit=None if sizing is None else sizing.rank_budget,
            start=self.start,
            again=self._again,
            task_gradient=lambda parameter: self.gradients.kept.get(parameter),
            reached=lambda at: not self._wanted_gradients()[1] or at in self.gradients.reached,
            optimizer=self.optimizer,
            validation_loss=self._scoring_loss,
            progress=self.loop.progress,
            agreed=self._processes.agreed if self._processes else lambda value: value,
        )
        self.run.generator.manual_seed(self.seed)
        allocation = Fixed() if self.method is None else self.method.allocation
        self.allocator: Allocator = allocation.begin(self.run)

    def _extra_trained(self) -> dict[str, nn.Parameter]:
        return {at: self.owner.get_parameter(at) for at in (self.placement.inactive_values if self.placement else ())}
