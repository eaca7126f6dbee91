"""The state of a run, into a checkpoint and back, so that a resumed run goes on as if it had never stopped."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorafamily.errors import AllocationError, StateError
from lorafamily.history import Decision, History, Step, Weights
from lorafamily.layers.fingerprints import added_up, fingerprints
from lorafamily.layers.offloaded import offloaded_value
from lorafamily.layers.quantised import tensors_of
from lorafamily.layers.sharded import is_sharded
from lorafamily.layers.site import base_parameters
from lorafamily.layers.state import Placement
from lorafamily.penalty import orthogonality_error
from lorafamily.training.batches import Batches
from lorafamily.training.best import Best
from lorafamily.training.checkpoints import Checkpoint, Checkpoints, Resume, name_of, read
from lorafamily.training.guards import NonFiniteGuard, check_base
from lorafamily.training.optimisation import Rates, parameters_of
from lorafamily.training.optimizer_state import OptimizerState
from lorafamily.training.processes import Processes
from lorafamily.training.session import Session
from lorafamily.training.snapshot import Snapshot, copy_into
from lorafamily.training.state import history_from_tree, history_to_tree, random_state, set_random_state


@dataclass
class RunState:
    """The objects that hold the state of a run. `settings`: what must be the same to resume; `base`: fingerprints of
    the frozen weights when the run began."""

    model: nn.Module
    session: Session
    settings: Mapping[str, Any]
    rates: Rates
    scaler: torch.amp.GradScaler
    batches: Batches
    finite: NonFiniteGuard
    processes: Processes
    seed: int | None
    best: Best
    history: History = field(default_factory=History)

    def __post_init__(self) -> None:
        self.optimizer = OptimizerState(self.session.optimizer)
        self.history.slices_start = dict(self.session.start)
        self.base = self.base_now()

    def base_now(self) -> dict[str, int]:
        """Fingerprints of the frozen weights, and of the scales of quantised ones; a sharded weight has one of all its
        shards together."""
        frozen = [(name, p) for name, p in tensors_of(self.model).items() if not p.requires_grad]
        found = fingerprints((name, self._value(name, p)) for name, p in frozen)
        if sharded := [name for name, p in frozen if is_sharded(p)]:
            pieces = self.processes.gathered({name: found[name] for name in sharded})
            found |= {name: added_up([piece[name] for piece in pieces]) for name in sharded}
        return found

    def _value(self, name: str, value: Tensor) -> Tensor:
        """The value of a base tensor, also where it is offloaded."""
        found = offloaded_value(self.model, name) if value.is_meta else value
        if found is None:
            raise StateError(f"{name} has no value: it is on the meta device")
        return found

    @torch.no_grad()
    def record(self, step: int, loss: float, penalty: float, lr: float, gradient: float) -> Step:
        """The step as the history has it. The orthogonality error is measured a hundred times in a run."""
        measured = step % max(1, self.session.run.steps // 100) == 0
        error = orthogonality_error(self.session.adapters.values()) if measured else None
        slices = sum(self.session.allocator.slices.values())
        trainable = sum(parameter.numel() for parameter in parameters_of(self.model))
        return Step(step, loss, penalty, lr, gradient, slices, trainable, None if error is None else error.item())

    def add(self, step: Step, decision: Decision | None) -> None:
        """Add a step, and the decision after it, to the history."""
        self.history.steps.append(step)
        self.history.skipped = self.finite.skipped
        self.history.slices_start = dict(self.session.start)  # adapters may be left out after the first batch
        if decision is not None:
            self.history.decisions.append(decision)

    def check_end(self) -> None:
        """Record the ranks and weights at the end.

        Raises:
            TrainingError: the frozen base changed.
            AllocationError: the schedule never made a decision.
        """
        self.history.slices_end = dict(self.session.allocator.slices)
        check_base(self.base, self.base_now())
        if not self.session.allocator.settled and not self.history.decisions:
            raise AllocationError(
                f"{type(self.session.allocator).__name__} decided nothing in {len(self.history.steps)} steps: its "
                "schedule never fired, and the ranks are those of the start"
            )
        step, evaluations = len(self.history.steps), self.history.evaluations
        evaluated = bool(evaluations) and evaluations[-1].step == step
        self.history.last = Weights(step, dict(evaluations[-1].metrics) if evaluated else {})

    def save(self, checkpoints: Checkpoints) -> None:
        """Let the first process write a checkpoint. Raise TrainingError if the frozen base changed or the processes'
        weights differ, and FileError if it cannot be written."""
        check_base(self.base, self.base_now())
        step = len(self.history.steps)
        trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        self.processes.check_same(fingerprints(trained), step)
        for name in ("best", "last"):
            weights = getattr(self.history, name)
            if weights is not None and weights.step == step:
                folder = f"checkpoints/{name_of(step)}"
                setattr(self.history, name, dataclasses.replace(weights, folder=folder))
        tree = self.tree()
        placement = self.session.placement
        if self.processes.first:
            checkpoints.write(step, self.model, placement.name if placement else None, tree, self.best.step)
        self.processes.add_up([0.0])  # a barrier: no process goes on, or ends, before the checkpoint is written

    def tree(self) -> dict[str, Any]:
        """The state as plain data and tensors, without the adapters, which `lorafamily.save` writes."""
        trained = {name: p.data for name, p in base_parameters(self.model).items() if p.requires_grad}
        saved_buffers = self.model.state_dict().keys()
        return {
            "settings": self.settings,
            "has adapters": self.session.placement is not None,
            "step": len(self.history.steps),
            "total": self.session.run.steps,
            **self.optimizer.tree(),
            "scaler": self.scaler.state_dict(),
            "rates": self.rates.state(),
            "session": self.session.state_dict(adapters=False),
            "random": self.processes.gathered(random_state(self.processes.device)),
            "batches": self.batches.state(),
            "not finite": (self.finite.skipped, self.finite.in_a_row),
            "history": history_to_tree(self.history),
            "monitor": (self.best.monitor, self.best.mode),
            "best": (self.best.value, self.best.step),
            "since best": self.best.since,
            "base": self.base,
            "trained": trained,
            "buffers": {name: buffer for name, buffer in self.model.named_buffers() if name in saved_buffers},
        }

    def resume(self, found: Checkpoint, resume: Resume) -> None:
        """Go on from a checkpoint. Everything is checked before anything changes, except that adapters that the run had
        left out, because they had no effect, are left out first.

        Raises:
            StateError: the checkpoint is of other adapters or of a longer run, or of other settings and `resume` is not
                "anyway".
            TrainingError: it is of another base.
        """
        saved, session = found.state, self.session
        session.leave_out(saved["session"]["left out"])
        optimizer_fits, same_metric = self._check(found, resume)
        weights = None
        if self.best.keep and same_metric and (best := saved["best"][1]):
            of_best = found if best == saved["step"] else read(found.folder.with_name(name_of(best)))
            weights = Snapshot.read(of_best, self.model)
        self.batches.restore(saved["batches"], other=resume == "anyway")
        if found.adapters is not None:
            for at, adapter in session.adapters.items():
                session.replace_parameters(adapter.take(found.adapters.adapters[at].state_dict()))
        copy_into(self.model, saved["trained"] | saved["buffers"])
        if optimizer_fits:
            self.optimizer.load(saved)
        self.scaler.load_state_dict(saved["scaler"])
        self.rates.restore(saved["rates"])
        session.load_state_dict(saved["session"])
        self.finite.skipped, self.finite.in_a_row = saved["not finite"]
        self.history = history_from_tree(saved["history"])
        if same_metric:
            (self.best.value, self.best.step), self.best.since = saved["best"], saved["since best"]
        else:
            self.history.best = None
        if weights is not None:
            self.best.take(weights, self.history)
        if self.history.stopped and session.run.steps > saved["total"]:  # the run was over, and is now made longer
            self.history.stopped, self.history.slices_end, self.history.last, self.best.since = "", {}, None, 0
        states, processes = saved["random"], self.processes
        same_number = len(states) == processes.world
        set_random_state(states[processes.rank if same_number else 0], processes.device)
        if not same_number:
            self.seed_by_process(len(self.history.steps))

    def _check(self, found: Checkpoint, resume: Resume) -> tuple[bool, bool]:
        """Whether the optimizer's state can be loaded, and whether the same metric decides which evaluation is best.
        Raises what `resume` raises."""
        saved, then, now = found.state, found.state["settings"], self.settings
        changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
        differing = [f"{name} was {then.get(name)!r}, is {now.get(name)!r}" for name in changed]
        adapters = {} if found.adapters is None else found.adapters.adapters
        tensors, present = ({at: [*a.state_dict()] for at, a in of.items()} for of in (adapters, self.session.adapters))
        if tensors != present:
            raise StateError(f"{found.folder} is of a run with other adapters than these; apply those to resume it")
        mismatch = self.optimizer.mismatch(saved)
        named = {"lr", "weight decay"}.intersection(changed)
        differing += [mismatch] if mismatch else [text for *_, text in self.optimizer.changed(saved, named)]
        monitor = (self.best.monitor, self.best.mode)
        same_metric = tuple(saved["monitor"]) == monitor
        if not same_metric:
            differing.append(f"monitor and mode were {', '.join(saved['monitor'])}, are {', '.join(monitor)}")
        differing += self.batches.differences(saved["batches"])
        if differing and resume != "anyway":
            raise StateError(
                f"{found.folder} is of a run with other settings: {'; '.join(differing)}. Set them as they were, pass "
                'resume="anyway" to go on with the new ones, or give another folder'
            )
        done, steps = saved["step"], self.session.run.steps
        if steps < done or (steps == done and not saved["history"]["stopped"]):
            raise StateError(
                f"steps={steps}: the run of {found.folder} has made {done} steps and cannot be made shorter than that; "
                f"give more than {done}, or another folder"
            )
        check_base(saved["base"], self.base)
        if differing:
            also = ". The optimizer begins without its state" if mismatch else ""
            if steps != saved["total"]:
                also += f". The learning rate goes on at step {done + 1} of a schedule of {steps} steps"
                settled = saved["session"]["allocator"]["settled"]
                also += "; the ranks are settled and stay" if settled and adapters else ""
            message = f"going on from {found.folder} with other settings: {'; '.join(differing)}{also}"
            warnings.warn(message, stacklevel=4)
        return not mismatch, same_metric

    def seed_by_process(self, step: int = 0) -> None:
        """Give every process but the first another seed, for dropout."""
        if self.processes.rank and self.seed is not None:
            torch.manual_seed((self.seed + 7919 * self.processes.rank + 104729 * step) % 2**63)


def method_settings(placement: Placement | None) -> dict[str, Any]:
    """The settings of `apply`, by name."""
    if placement is None:
        return {"method": "none"}
    sizing, options = placement.sizing, placement.method.options()
    dropout = next(iter(placement.adapters.values())).dropout
    found = {"method": placement.spec, "start rank": sizing.rank, "budget at": sizing.budget_at, **options}
    found |= {"dropout": dropout.p, "dropout kind": dropout.kind}
    found |= {"budget": sizing.budget or 0, "rank budget": sizing.rank_budget or 0}
    found |= dict.fromkeys(placement.method.layered, "by layer")
    return {name: value if isinstance(value, (int, float)) else str(value) for name, value in found.items()}
