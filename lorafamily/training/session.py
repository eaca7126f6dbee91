"""What a method does during training, as one object that any loop can hold: penalty, rank allocation, and the guards.

session = lorafamily.session(model, optimizer, steps=1000, validation=batches)
for batch in loader:
    session.backward(model(**batch).loss)
    optimizer.step()
    session.step()
    optimizer.zero_grad()
"""

from __future__ import annotations

import functools
import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorafamily.adapter import Adapter
from lorafamily.allocation.allocator import Allocator, Fixed
from lorafamily.allocation.run import Run
from lorafamily.allocation.surgery import exchange
from lorafamily.batch import LossFn, LossOver, gather_rows, loss_of, to_device, weigher
from lorafamily.deploy.folder import listed
from lorafamily.errors import StateError, TrainingError
from lorafamily.history import Decision
from lorafamily.placement import Placement, noted, placement_of, refuse_merged, refuse_untold, targets_of
from lorafamily.reading import Reads, leave_out
from lorafamily.training.around_steps import AroundSteps, check_optimizer, steppers
from lorafamily.training.execution import evaluating
from lorafamily.training.guards import CUT, FrozenBuffers, silence
from lorafamily.training.optimisation import check_up_rate
from lorafamily.training.processes import Processes, give_gradient
from lorafamily.training.state import seed_all

PATIENCE = (
    10  # steps in which something of every kind must have got a gradient: layers may be dropped, experts unvisited
)


@dataclass(frozen=True)
class Surroundings:
    """What a loop knows and a session asks for; the defaults are right in a plain loop.

    `precision()`: the context of a forward. `scaler`: float16's. `agreed(value)`: what the first of several processes
    has. `reduces`: whether the loop adds up the gradients of new tensors over processes. `last_backward()`: where DDP
    leaves the adapters' gradients to the session, whether a backward is a step's last, after which they are averaged.
    `progress`: show a bar while ranks are scored.
    """

    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    scaler: torch.amp.GradScaler | None = None
    agreed: Callable[[Any], Any] | None = None
    reduces: bool = False
    last_backward: Callable[[], bool] | None = None
    progress: bool = False
    compiled: bool = False


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
        check_optimizer(optimizer)
        self.optimizer = steppers(optimizer)[0]
        self.method = None if self.placement is None else self.placement.method
        self.steps_done = 0
        self.decisions: list[Decision] = []
        self.left_out: list[str] = []
        self._processes = Processes(self.device) if dist.is_available() and dist.is_initialized() else None
        self._validation = validation
        self._check_gradients, self._again = check_gradients, again
        self._penalised = self._stepped = False
        self._own_gradient = False  # whether what arrives at a parameter now is the penalty's, or a scorer's
        self._averaging = False  # whether the backward under way ends with an average over processes
        self._task: dict[nn.Parameter, Tensor] = {}
        self._reached_now: set[str] = set()  # adapters that got a gradient from the task since the last step
        self._scored: dict[int, list[tuple[Any, float]]] = {}
        self._weigh = weigher(loss_over, model, loss_fn)
        AroundSteps(optimizer, self.adapters)  # no empty tensor is stepped; decay pulls to ΔW = 0
        if self.placement is not None:
            refuse_untold(self.owner, self.placement)
            self._check_held()
            check_up_rate(self.model, self.optimizer)
        self.start = dict(start or {name: adapter.rank for name, adapter in self.adapters.items()})
        self.run = self._run(steps)
        self.allocator = self._begin()
        engine = None if self.allocator.settled or around.reduces else _holds_on(model, optimizer)
        if engine is not None and (engine != "DDP" or around.last_backward is None):
            raise StateError(
                f"{engine} holds on to the tensors it was given, and this method changes their size; use "
                "lorafamily.train under torchrun, or a method with fixed ranks"
            )
        self._buffers = None if self.placement is None else FrozenBuffers(self.owner)
        self._unreached = {*self.adapters, *self._beside()} if check_gradients else set()
        self._hooks: dict[nn.Parameter, RemovableHandle] = {}
        if around.last_backward is not None:
            self._same_start()
        self._listen()
        if self.placement is not None and not around.compiled:
            self._watch()
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

        Zero for a method without one. In the sum the task's gradient cannot be told from the penalty's, so an adapter
        that the task does not reach goes unnoticed; `backward` tells them apart.

        Raises:
            TrainingError: ranks are scored on the task's gradient alone, which then cannot be told apart.
        """
        if self._apart:
            raise TrainingError(
                "ranks are scored on the task's gradient alone, and in a sum with the penalty it cannot be told apart: "
                "use session.backward(loss)"
            )
        self._penalised = True
        term = None if self.method is None or self.method.penalty is None else self.method.penalty
        return torch.zeros((), device=self.device) if term is None else term(self.adapters.values())

    def add_penalty(self) -> float:
        """Add the penalty's gradient, if this step has not had it; the penalty. `backward` does it."""
        penalty = None if self.method is None else self.method.penalty
        if penalty is None or self._penalised:
            return 0.0
        self._penalised = True
        term = penalty(self.adapters.values())
        if term.requires_grad:
            own = [p for a in self.adapters.values() for p in a.update.parameters() if p.requires_grad]
            if self._tells_use:  # after a backward; also where other processes' was added up
                has_gradient = {p for p in own if p.grad is not None}
                self._reached_now |= {at for at, a in self.adapters.items() if has_gradient & {*a.update.parameters()}}
            self._own_gradient = True
            gradients = torch.autograd.grad(self._scaled(term), own, allow_unused=True)
            self._own_gradient = False
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
        self._check_reached()
        self._own_gradient = True
        decision = self.allocator.step(self.steps_done, observe=self._stepped and self._finite())
        self._own_gradient = False
        if decision is not None:
            self.decisions.append(decision)
            self._listen()
        self._penalised = self._stepped = False
        self._task.clear()
        self._reached_now.clear()
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
            "unreached": sorted(self._unreached),
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
        self.steps_done, self._unreached = state["steps done"], set(state["unreached"])
        self._behind = False
        self._listen()

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
            self._unreached -= before - set(self.adapters)
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
            task_gradient=self._task.get,
            reached=lambda at: not self._tells_use or at in self._reached_now,
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
        return {} if self.placement is None else {at: self.owner.get_parameter(at) for at in self.placement.parked}

    def _check_held(self) -> None:
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        own = {f"{at}: {name}": p for at, a in self.adapters.items() for name, p in a.update.named_parameters()}
        missing = [
            at for at, p in (own | self._beside()).items() if p.requires_grad and p.numel() and id(p) not in held
        ]
        if missing:
            raise TrainingError(
                f"the optimiser does not hold {len(missing)} of the tensors that train ({listed(missing)}): make "
                "it after lorafamily.apply, of all parameters with requires_grad"
            )

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

    # What arrives at a parameter from the task. A hook sees it before it is added up, whoever calls `backward`.

    def _listen(self) -> None:
        wanted: dict[nn.Parameter, str] = {}
        for at, adapter in self.adapters.items():
            if self._apart or self._tells_use or at in self._unreached or self.around.last_backward is not None:
                wanted |= {p: at for p in adapter.update.parameters() if p.requires_grad and p.numel()}
        wanted |= {p: at for at, p in self._beside().items() if at in self._unreached and p.requires_grad}
        for parameter in self._hooks.keys() - wanted.keys():
            self._hooks.pop(parameter).remove()
        for parameter in wanted.keys() - self._hooks.keys():
            self._hooks[parameter] = parameter.register_hook(
                functools.partial(self._arrived, wanted[parameter], parameter)
            )

    def _arrived(self, at: str, parameter: nn.Parameter, gradient: Tensor | None) -> None:
        if self._own_gradient or gradient is None:  # None: of an expert that no token went to
            return
        if self.around.last_backward is not None and not self._averaging and self.around.last_backward():
            self._averaging = True
            torch.autograd.Variable._execution_engine.queue_callback(self._average)  # when this backward is done
        self._reached_now.add(at)
        if at in self._unreached and (at not in self.adapters or bool(gradient.any())):
            self._unreached.discard(at)
        if self._apart:
            scale = 1.0 if self.around.scaler is None else self.around.scaler.get_scale()
            before = self._task.get(parameter)
            self._task[parameter] = gradient / scale if before is None else before + gradient / scale

    def _average(self) -> None:
        """Of the adapters' gradients over processes, as DDP does with those that it was given."""
        self._averaging = False
        assert self._processes is not None
        parameters = [p for a in self.adapters.values() for p in a.update.parameters() if p.requires_grad]
        self._processes.add_up_gradients(parameters)
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], self._processes.world)

    def _same_start(self) -> None:
        for adapter in self.adapters.values():
            for parameter in adapter.parameters():
                dist.broadcast(parameter.data, 0)

    def _check_reached(self) -> None:
        """Layers may be dropped and experts unvisited, so one batch proves little: of every kind of layer something
        must have got a gradient in the first steps, and what none of the run's batches reached is named at its end."""
        if not self._check_gradients:
            return
        last = self.steps_done == self.run.steps
        self._unreached = {at for at in self._unreached if at not in self.adapters or self.adapters[at].rank}
        if self._hooks:
            self._listen()
        if self._unreached and (self.steps_done == PATIENCE or last):
            everything = {*self.adapters, *self._beside()}
            reached = {_kind(at) for at in everything - self._unreached}
            silent = sorted(at for at in self._unreached if _kind(at) not in reached)
            if silent:
                raise TrainingError(silence(silent, self.adapters, self._beside(), self.steps_done))
        if self._unreached and last:
            warnings.warn(
                f"no batch of the run reached {len(self._unreached)} of {len(self.adapters)} adapters: "
                f"{listed(sorted(self._unreached))}. Nothing of the task is in them",
                stacklevel=3,
            )

    def _watch(self) -> None:
        """See at the first batch which targets' weights the model reads without calling the layers."""
        reads = Reads(targets_of(self.owner))
        hooks: list[RemovableHandle] = []

        def begin(module: nn.Module, inputs: Any) -> None:
            if module.training:  # not in an evaluation before
                reads.__enter__()

        def end(module: nn.Module, inputs: Any, output: Any) -> None:
            if module.training:
                for hook in hooks:
                    hook.remove()
                reads.__exit__(None, None, None)
                if output is not None:  # nothing was raised
                    self.leave_out(reads.without_effect())

        hooks += [
            self.model.register_forward_pre_hook(begin),
            self.model.register_forward_hook(end, always_call=True),
        ]


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
        session._listen()


def _kind(at: str) -> str:
    """A name without its numbers: the same layer of every block, every expert."""
    return re.sub(r"\d+", "#", at)


def _holds_on(model: nn.Module, optimizer: Any) -> str | None:
    """What keeps references to the tensors that train, so that they must not be replaced."""
    names = {type(module).__name__ for module in model.modules()}
    for engine, found in (("DDP", "DistributedDataParallel"), ("FSDP", "FullyShardedDataParallel")):
        if found in names:
            return engine
    if "deepspeed" in type(optimizer).__module__ or any("DeepSpeed" in name for name in names):
        return "DeepSpeed"
    if any(hasattr(p, "to_local") for p in model.parameters() if p.requires_grad):
        return "FSDP"
    return "DDP" if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else None
