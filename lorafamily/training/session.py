"""What a method does during training, as one object that any loop can hold: penalty, rank allocation, and the guards.

session = lorafamily.session(model, optimizer, steps=1000, validation=batches)
for batch in loader:
    session.backward(model(**batch).loss)
    optimizer.step()
    session.step()
    optimizer.zero_grad()
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.allocation.allocator import Allocator, Fixed
from lorafamily.allocation.run import Run
from lorafamily.allocation.surgery import exchange
from lorafamily.batch import LossFn, LossOver, gather_rows, loss_of, to_device, weigher
from lorafamily.errors import StateError, TrainingError
from lorafamily.history import Decision
from lorafamily.layers.offloaded import refuse_offloaded_adapters
from lorafamily.layers.placement import noted, placement_of, refuse_merged, refuse_unsaved, targets_of
from lorafamily.layers.state import Placement
from lorafamily.layers.uncalled import leave_out, watch_first_batch
from lorafamily.training.around_steps import AroundSteps, check_optimizer, steppers
from lorafamily.training.execution import evaluating
from lorafamily.training.guards import CUT, FrozenBuffers
from lorafamily.training.optimisation import check_up_rate
from lorafamily.training.processes import Processes, give_gradient
from lorafamily.training.state import seed_all
from lorafamily.training.surroundings import Surroundings, check_held, holding_engine
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
    """Everything that the active adapters' method does during training, for a loop of one's own.

    Args:
        model: with adapters; it may be wrapped.
        optimizer: holds everything that trains, see `parameter_groups`; it may be wrapped (`accelerate`, Lightning).
        steps: optimiser steps of the whole run, which the method's schedule divides.
        validation: batches, needed by methods that score ranks on them.
        loss_fn: from model and batch to the task loss, for scoring; None: the output's `.loss`.
        scaler: of a loop in float16; `backward` scales with it.
        autocast: makes the context in which the loop computes its forwards, for scoring.
        seed: of the numbers that new ranks start from, and of the scoring batch.
        check_gradients: refuse to go on where adapters get no gradient from the task.
        again: whether ranks that an earlier run settled may move once more.

    Raises:
        StateError: no adapter is active, one is merged, or ranks would change where something (DDP, FSDP, DeepSpeed)
            holds on to the tensors it was given.
        AllocationError: the method's schedule does not fit the run, or it scores on validation data and has none.
        TrainingError: `steps` is no number of steps, or the optimiser does not hold what trains.
    """
    placement_of(model)
    around = Surroundings(precision=autocast, scaler=scaler)
    return Session(
        model,
        optimizer,
        steps=steps,
        validation=validation,
        loss_fn=loss_fn,
        seed=seed,
        check_gradients=check_gradients,
        around=around,
        again=again,
    )


class Session:
    """One run of a method in somebody's loop; made by `lorafamily.session`.

    `decisions`: every change of the allocation so far. `steps_done`: optimiser steps so far.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        steps: int,
        validation: Iterable[Any] | None,
        loss_fn: LossFn | None,
        seed: int,
        check_gradients: bool,
        around: Surroundings,
        loss_over: LossOver = "auto",
        again: bool = False,
        start: Mapping[str, int] | None = None,
    ):
        """`start`: ranks when the run began, where the adapters are beyond that already."""
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise TrainingError(f"steps={steps!r}: must be a whole number of optimiser steps, at least 1")
        self.model, self.around, self.seed, self.loss_fn = model, around, seed, loss_fn
        self.owner, state = noted(model)
        refuse_merged(state)
        self.placement: Placement | None = None if state is None else placement_of(self.owner)
        self.adapters = {} if self.placement is None else self.placement.adapters
        refuse_offloaded_adapters(self.adapters)
        check_optimizer(optimizer)
        self.optimizer = steppers(optimizer)[0]
        self.method = None if self.placement is None else self.placement.method
        self.steps_done = 0
        self.decisions: list[Decision] = []
        self.left_out: list[str] = []
        self._processes = Processes(self.device) if dist.is_available() and dist.is_initialized() else None
        self._validation = validation
        self._again = again
        self._penalised = self._stepped = False
        self._scored: dict[int, list[tuple[Any, float]]] = {}
        self._weigh = weigher(loss_over, model, loss_fn)
        AroundSteps(optimizer, self.adapters)  # no empty tensor is stepped; decay pulls to ΔW = 0
        if self.placement is not None:
            refuse_unsaved(self.owner, self.placement)
            check_held(self.optimizer, self._trained())
            check_up_rate(self.model, self.optimizer)
        self.start = dict(start or {name: adapter.rank for name, adapter in self.adapters.items()})
        self.run = self._run(steps)
        self.allocator = self._begin()
        engine = None if self.allocator.settled or around.reduces else holding_engine(model, optimizer)
        if engine is not None and (engine != "DDP" or around.last_backward is None):
            raise StateError(
                f"{engine} holds on to the tensors it was given, and this method changes their size; use "
                "lorafamily.train under torchrun, or a method with fixed ranks"
            )
        self._buffers = None if self.placement is None else FrozenBuffers(self.owner)
        self.gradients = TaskGradients(
            self.adapters,
            self._beside,
            guard=check_gradients,
            wanted=lambda: (self._apart, self._tells_use),
            around=around,
            processes=self._processes,
        )
        if self.placement is not None and not around.compiled:
            watch_first_batch(model, targets_of(self.owner), self.leave_out)
        self.optimizer.register_step_post_hook(self._after_optimizer)
        self._behind = False  # whether the model went on to other ranks and the session was not told
        if self.placement is not None:
            self.placement.had_session = True
            if self.owner not in _SESSIONS:
                self.owner.register_load_state_dict_pre_hook(_before_loading)
            _SESSIONS[self.owner] = weakref.ref(self)

    @property
    def device(self) -> torch.device:
        """Of the model's trained tensors."""
        return next(p for p in self.model.parameters() if p.requires_grad).device

    def backward(self, loss: Tensor) -> None:
        """The loss's gradient, and once a step the penalty's, unscaled by how many batches make a step.

        Several calls before `step` add up, as `loss.backward()` does.

        Raises:
            TrainingError: the loss depends on nothing that trains.
        """
        self.task_backward(loss)
        self.add_penalty()

    def task_backward(self, loss: Tensor) -> None:
        """The loss's gradient alone, for a loop that has something to do before the penalty's is added.

        Raises:
            TrainingError: the loss depends on nothing that trains.
        """
        if self._depends(loss):
            self._scaled(loss).backward()

    def penalty(self) -> Tensor:
        """The method's penalty, for a loop that calls `backward` itself: add it to the loss once a step.

        Zero for a method without one. `backward` is faster where ranks move: here the penalty's gradient is computed
        twice, to know it from the task's in their sum.

        Raises:
            TrainingError: ranks are scored on the task's gradient alone, which then cannot be told apart.
        """
        if self._apart:
            raise TrainingError(
                "ranks are scored on the task's gradient alone, and in a sum with the penalty it cannot be told apart: "
                "use session.backward(loss)"
            )
        self._penalised = True
        if self.method is None or self.method.penalty is None:
            return torch.zeros((), device=self.device)
        return self.gradients.told_apart(self.method.penalty(self.adapters.values()), self._factors())

    def add_penalty(self) -> float:
        """Add the penalty's gradient, if this step has not had it; the penalty. `backward` does it."""
        penalty = None if self.method is None else self.method.penalty
        if penalty is None or self._penalised:
            return 0.0
        self._penalised = True
        term = penalty(self.adapters.values())
        if term.requires_grad:
            own = self._factors()
            if self._tells_use:
                self.gradients.note_reached(own)
            with self.gradients.paused():
                gradients = torch.autograd.grad(self._scaled(term), own, allow_unused=True)
            for parameter, gradient in zip(own, gradients, strict=True):
                if gradient is not None and parameter.grad is None:
                    give_gradient(parameter, gradient)
                elif gradient is not None:
                    parameter.grad.add_(gradient)
        return float(term.detach())

    def step(self) -> Decision | None:
        """Call it after the optimiser's step, with the gradients still there: ranks may change now, and tensors with
        them, in the model and in the optimiser. The decision, None most of the time.

        Raises:
            TrainingError: the penalty is in no gradient, or adapters got none in the first steps.
            StateError: the model was given a state dict of other ranks, and the session not the one that goes with it.
        """
        if self._behind:
            raise StateError(
                "the model went on from a state dict with adapters of other ranks, and the session did not: load the "
                "session's state of then too (session.load_state_dict, accelerator.register_for_checkpointing(session))"
            )
        if self.method is not None and self.method.penalty is not None and not self._penalised:
            raise TrainingError(
                "the gradient of this step lacks the method's penalty: call session.backward(loss) instead of "
                "loss.backward(), or add session.penalty() to the loss"
            )
        self.steps_done += 1
        if self._buffers is not None and self.steps_done in (1, self.run.steps):
            self._buffers.put_back()
        self.gradients.check(self.steps_done, last=self.steps_done == self.run.steps)
        with self.gradients.paused():
            decision = self.allocator.step(self.steps_done, observe=self._stepped and self._finite())
        if decision is not None:
            self.decisions.append(decision)
            self.gradients.listen()
        self._penalised = self._stepped = False
        self.gradients.stepped()
        return decision

    def state_dict(self, *, adapters: bool = True) -> dict[str, Any]:
        """Where the run is, as plain data and tensors: what `load_state_dict` takes. With the adapters' tensors and
        what trains beside them, at the ranks they have now, unless `adapters` is False."""
        state: dict[str, Any] = {
            "steps done": self.steps_done,
            "steps": self.run.steps,
            "start": dict(self.start),
            "allocator": self.allocator.state(),
            "generator": self.run.generator.get_state(),
            "decisions": [vars(decision) for decision in self.decisions],
            "left out": list(self.left_out),
            "unreached": sorted(self.gradients.unreached),
        }
        if adapters:
            state["adapters"] = {at: dict(adapter.state_dict()) for at, adapter in self.adapters.items()}
            state["beside"] = {at: parameter.data for at, parameter in self._beside().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another session was. Ranks, in the model and in the optimiser, become those of then; load the
        optimiser's own state afterwards. Loading the model's state dict before makes the ranks fit as well, and then
        the optimiser's state may come first.

        Raises:
            StateError: it is of a run with other adapters, or other ranks at the start.
        """
        self.leave_out(state["left out"])
        if state["start"] != self.start:
            raise StateError("the session's state is of a run with other adapters than these, or other start ranks")
        for at, tensors in state.get("adapters", {}).items():
            self.exchange(self.adapters[at].take(tensors))
        with torch.no_grad():
            for at, value in state.get("beside", {}).items():
                self._beside()[at].copy_(value)
        if self.allocator.settled and not state["allocator"]["settled"]:  # back to where ranks could move
            self._again = True
            self.run = self._run(self.run.steps)
            self.allocator = self._begin()
        self.allocator.restore(state["allocator"])
        self.run.generator.set_state(state["generator"].cpu())
        self.decisions = [Decision(**decision) for decision in state["decisions"]]
        self.steps_done, self.gradients.unreached = state["steps done"], set(state["unreached"])
        self._behind = False
        self.gradients.listen()

    def exchange(self, replaced: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> None:
        """Let the optimiser train new parameters in the place of old ones."""
        for old, new in replaced:
            exchange(self.optimizer, old, new)
            if old in self.optimizer.state:
                self.optimizer.state[new] = self.optimizer.state.pop(old)

    def leave_out(self, names: Iterable[str]) -> None:
        """Take away adapters that have no effect, and begin anew with the others.

        Raises:
            TargetError: somebody named these targets, or no other is left.
        """
        before = set(self.adapters)
        if self.placement is not None and leave_out(self.owner, self.placement, list(names), self.optimizer):
            self.left_out = sorted({*self.left_out, *(before - set(self.adapters))})
            self.start = {name: rank for name, rank in self.start.items() if name in self.adapters}
            self.gradients.unreached -= before - set(self.adapters)
            self.run = self._run(self.run.steps)
            self.allocator = self._begin()

    # -- What it is made of -------------------------------------------------------------------------------------------

    @property
    def _apart(self) -> bool:
        """Whether the task's gradient is wanted apart from the penalty's."""
        return self.allocator.wants_task_gradient

    @property
    def _tells_use(self) -> bool:
        """Whether a scorer averages gradients that a penalty has a share in, also where the task has none."""
        scorer = None if self.allocator.settled else self.allocator.scorer
        penalised = self.method is not None and self.method.penalty is not None
        return penalised and scorer is not None and scorer.observes

    def _run(self, steps: int) -> Run:
        sizing = None if self.placement is None else self.placement.sizing
        run = Run(
            model=self.model,
            adapters=self.adapters,
            steps=steps,
            # With a budget for the end the start may be larger; the allocator must be below it when it is done.
            limit=None if sizing is None else sizing.budget,
            rank_limit=None if sizing is None else sizing.rank_budget,
            start=self.start,
            again=self._again,
            task_gradient=lambda parameter: self.gradients.kept.get(parameter),
            reached=lambda at: not self._tells_use or at in self.gradients.reached,
            optimizer=self.optimizer,
            validation_loss=None if self._validation is None else self._validation_loss,
            progress=self.around.progress,
            agreed=self.around.agreed or (self._processes.agreed if self._processes else lambda value: value),
        )
        run.generator.manual_seed(self.seed)
        return run

    def _begin(self) -> Allocator:
        allocation = Fixed() if self.method is None else self.method.allocation
        return allocation.begin(self.run)

    def _scoring_rows(self, rows: int) -> list[tuple[Any, float]]:
        """The first rows of the validation data, as batches and what each counts."""
        if rows not in self._scored:
            assert self._validation is not None
            seed_all(self.seed)  # the same rows after resuming, whatever the loader draws; `evaluating` undoes it
            pieces = gather_rows(self._validation, rows, self._weigh)
            self._scored[rows] = [(to_device(piece, self.device), share) for piece, share in pieces]
        return self._scored[rows]

    def _validation_loss(self, rows: int) -> Tensor:
        """The task loss on a fixed number of rows of validation data, in eval mode."""
        with evaluating(self.model, self.device), self.around.precision():
            pieces = self._scoring_rows(rows)
            return torch.stack([share * loss_of(self.model, piece, self.loss_fn) for piece, share in pieces]).sum()

    def _beside(self) -> dict[str, nn.Parameter]:
        names = () if self.placement is None else self.placement.inactive_values
        return {at: self.owner.get_parameter(at) for at in names}

    def _factors(self) -> list[nn.Parameter]:
        return [p for a in self.adapters.values() for p in a.update.parameters() if p.requires_grad]

    def _trained(self) -> dict[str, nn.Parameter]:
        own = {f"{at}: {name}": p for at, a in self.adapters.items() for name, p in a.update.named_parameters()}
        return own | self._beside()

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.around.scaler is None else self.around.scaler.scale(loss)

    def _depends(self, loss: Tensor) -> bool:
        """Whether the loss has gradients to give. It must, unless an allocation ended at rank 0 everywhere."""
        emptied = self.adapters and not self._beside() and not any(a.rank for a in self.adapters.values())
        if not loss.requires_grad and not emptied:
            raise TrainingError(f"the loss depends on nothing that trains: it was computed without gradients, or {CUT}")
        return loss.requires_grad

    def _finite(self) -> bool:
        """Whether the gradients of this step are, where a scorer is about to average them; a scaler skips others."""
        scorer = self.allocator.scorer
        if self.around.scaler is None or scorer is None or not scorer.observes:
            return True
        gradients = [p.grad for a in self.adapters.values() for p in a.update.parameters() if p.grad is not None]
        return not gradients or bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())

    def _after_optimizer(self, *_: Any) -> None:
        self._stepped = True


_SESSIONS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Session]] = weakref.WeakKeyDictionary()
"""The newest session of a model that adapters were placed in."""


def fit_ranks(
    model: nn.Module, adapters: Mapping[str, Adapter], state_dict: Mapping[str, Tensor], prefix: str = ""
) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Give adapters the ranks of a state dict that is about to be loaded into their model; which parameters replaced
    which. What differs in more than its rank is left to torch to refuse."""
    names = {id(parameter): prefix + name for name, parameter in model.named_parameters()}
    replaced = []
    for adapter in adapters.values():
        at = {name: names[id(parameter)] for name, parameter in adapter.named_parameters()}
        if all(name in state_dict for name in at.values()):
            tensors = {own: state_dict[name] for own, name in at.items()}
            if adapter.differs_in_rank(tensors):
                replaced += adapter.take(tensors)
    return replaced


def _before_loading(model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
    """Frameworks load the model first. A function of the module, which pickles, and does nothing for copies."""
    session = _SESSIONS.get(model, lambda: None)()
    if session is not None and (replaced := fit_ranks(model, session.adapters, state_dict, prefix)):
        session.exchange(replaced)
        session._behind = True
        session.gradients.listen()
