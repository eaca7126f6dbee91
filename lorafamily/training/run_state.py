"""Everything a run must find again to go on as if it had never stopped."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from lorafamily.errors import AllocationError, StateError, TrainingError
from lorafamily.history import Decision, Evaluation, History, Step
from lorafamily.site import base_parameters
from lorafamily.training.batches import Batches
from lorafamily.training.checkpoints import Checkpoint, Checkpoints, Resume
from lorafamily.training.guards import FiniteNumbers, added_up, check_base, fingerprints
from lorafamily.training.optimisation import Rates
from lorafamily.training.processes import Processes
from lorafamily.training.session import Session
from lorafamily.training.state import random_state, set_random_state


@dataclass
class RunState:
    """What a run has reached. `settings`: what must be the same when it goes on; `best`: (loss, step) of the best
    evaluation so far; `since_best`: evaluations since then."""

    model: nn.Module
    session: Session
    settings: dict[str, Any]
    rates: Rates
    scaler: torch.amp.GradScaler
    batches: Batches
    finite: FiniteNumbers
    processes: Processes
    seed: int | None
    history: History = field(default_factory=History)
    best: tuple[float, int] = (math.inf, 0)
    since_best: int = 0
    base: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.history.ranks_start = dict(self.session.start)
        self.base = self.base_now()

    @property
    def device(self) -> torch.device:
        return self.batches.device

    def trained(self) -> list[nn.Parameter]:
        """Whatever trains now; resized adapters have new parameters."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def base_now(self) -> dict[str, int]:
        """Fingerprints of the frozen base weights; of a sharded one those of all its pieces together."""
        own = [(name, p) for name, p in base_parameters(self.model).items() if not p.requires_grad]
        found = fingerprints(own)
        if sharded := [name for name, p in own if hasattr(p, "to_local")]:
            pieces = self.processes.gathered({name: found[name] for name in sharded})
            found |= {name: added_up([piece[name] for piece in pieces]) for name in sharded}
        return found

    def trained_now(self) -> dict[str, int]:
        """Fingerprints of what trains."""
        return fingerprints((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def improved(self, evaluation: Evaluation, patience: int | None) -> bool:
        """Take in an evaluation; whether its "loss" is the best since the allocation settled.

        Raises:
            TrainingError: `patience` waits for a "loss" that is not among the metrics.
        """
        loss = evaluation.metrics.get("loss")
        if loss is None and patience is not None:
            raise TrainingError(f'patience watches "loss", but evaluate gave {", ".join(evaluation.metrics)}')
        if loss is None or not self.session.allocator.settled:
            return False
        if loss < self.best[0]:
            self.best, self.since_best = (loss, evaluation.step), 0
            return True
        self.since_best += 1
        return False

    def made(self, step: Step, decision: Decision | None) -> None:
        """Take in a step and what was decided after it."""
        self.history.steps.append(step)
        self.history.skipped = self.finite.skipped
        self.history.ranks_start = dict(self.session.start)  # the first batch may show that some have no effect
        if decision is not None:
            self.history.decisions.append(decision)

    def check_end(self) -> None:
        """What must hold when the run is over.

        Raises:
            TrainingError: the frozen base changed.
            AllocationError: the schedule never fired.
        """
        allocator = self.session.allocator
        self.history.ranks_end = dict(allocator.ranks)
        check_base(self.base, self.base_now())
        if not allocator.settled and not self.history.decisions:
            raise AllocationError(
                f"{type(allocator).__name__} decided nothing in {len(self.history.steps)} steps: its schedule "
                "never fired, and the ranks are those of the start"
            )

    def save(self, checkpoints: Checkpoints) -> None:
        """Write a checkpoint, by the first process, after a look at what should not have happened."""
        check_base(self.base, self.base_now())
        step = len(self.history.steps)
        self.processes.check_same(self.trained_now(), step)
        tree = self.to_save()
        if self.processes.first:
            placement = self.session.placement
            name = None if placement is None else placement.name
            checkpoints.write(step, self.model, name, tree, self.best[1] or None)
        self.processes.add_up([0.0])  # nobody goes on, or ends, before it is there

    def to_save(self) -> dict[str, Any]:
        """The state as a tree of plain data and tensors, without the adapters."""
        beside = {name: p.data for name, p in base_parameters(self.model).items() if p.requires_grad}
        return {
            "settings": self.settings,
            "has adapters": self.session.placement is not None,
            "step": len(self.history.steps),
            "optimizer": self.session.optimizer.state_dict(),
            "rates": self.rates.state(),
            "scaler": self.scaler.state_dict(),
            "session": self.session.state_dict(adapters=False),
            "random": self.processes.gathered(random_state(self.device)),
            "batches": self.batches.state(),
            "not finite": (self.finite.skipped, self.finite.in_a_row),
            "history": _history_tree(self.history),
            "best": self.best,
            "since best": self.since_best,
            "base": self.base,
            "trained": beside,
            "buffers": _persistent_buffers(self.model),
        }

    def go_on_from(self, found: Checkpoint, resume: Resume) -> None:
        """Take the state of a checkpoint. Everything is checked before anything is changed, but for adapters that the
        run left out as without effect: they are left out here too.

        Raises:
            StateError: it is of a run with other settings, or on another base.
        """
        state, session = found.state, self.session
        session.leave_out(state["session"]["left out"])
        self._check(found, resume)
        with torch.no_grad():
            if found.adapters is not None:
                for at, adapter in session.adapters.items():
                    session.exchange(adapter.take(found.adapters.adapters[at].state_dict()))
            parameters, buffers = dict(self.model.named_parameters()), dict(self.model.named_buffers())
            for name, value in state["trained"].items():
                parameters[name].copy_(value)
            for name, value in state["buffers"].items():
                buffers[name].copy_(value)
        decays = [group.get("weight_decay") for group in session.optimizer.param_groups]
        session.optimizer.load_state_dict(state["optimizer"])
        for group, decay in zip(session.optimizer.param_groups, decays, strict=True):
            if decay is not None:
                group["weight_decay"] = decay  # what is asked for now, with resume="anyway"
        self.rates.restore(state["rates"])
        self.scaler.load_state_dict(state["scaler"])
        session.load_state_dict(state["session"])
        self.batches.restore(state["batches"])
        self.finite.skipped, self.finite.in_a_row = state["not finite"]
        self.history = _history(state["history"])
        self.best, self.since_best = state["best"], state["since best"]
        self._set_random(state["random"])

    def _check(self, found: Checkpoint, resume: Resume) -> None:
        then, now = found.state["settings"], self.settings
        differing = [
            f"{k} was {then.get(k)!r}, is {now.get(k)!r}" for k in {**then, **now} if then.get(k) != now.get(k)
        ]
        its = {} if found.adapters is None else found.adapters.adapters
        own = self.session.adapters
        if {at: list(a.state_dict()) for at, a in its.items()} != {at: list(a.state_dict()) for at, a in own.items()}:
            raise StateError(f"{found.folder} is of a run with other adapters than these; it cannot go on here")
        if differing and resume != "anyway":
            raise StateError(
                f"{found.folder} is of a run with other settings: {'; '.join(differing)}. Set them as they were, pass "
                'resume="anyway" to go on with the new ones, or give another folder'
            )
        if differing:
            warnings.warn(f"going on from {found.folder} with other settings: {'; '.join(differing)}", stacklevel=4)
        check_base(found.state["base"], self.base)

    def _set_random(self, states: list[Mapping[str, Any]]) -> None:
        """Each process its own; where there are other numbers of processes than before, the new ones draw anew."""
        set_random_state(states[self.processes.rank if len(states) == self.processes.world else 0], self.device)
        if len(states) != self.processes.world:
            self.seed_by_process(len(self.history.steps))

    def seed_by_process(self, step: int = 0) -> None:
        """Processes other than the first draw other numbers, for dropout."""
        if self.processes.rank and self.seed is not None:
            torch.manual_seed((self.seed + 7919 * self.processes.rank + 104729 * step) % 2**63)


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _history_tree(history: History) -> dict[str, Any]:
    """Steps as columns: a run has many."""
    columns = {}
    for name in (f.name for f in fields(Step)):
        values = [getattr(step, name) for step in history.steps]
        columns[name] = torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64, device="cpu")
    return {**dataclasses.asdict(dataclasses.replace(history, steps=[])), "steps": columns}


def _history(tree: Mapping[str, Any]) -> History:
    columns = {name: column.tolist() for name, column in tree["steps"].items()}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return History(
        **{
            **tree,
            "steps": [_step(row) for row in rows],
            "evaluations": [Evaluation(**entry) for entry in tree["evaluations"]],
            "decisions": [Decision(**entry) for entry in tree["decisions"]],
        }
    )


def _step(row: dict[str, Any]) -> Step:
    row |= {name: int(row[name]) for name in ("step", "rank", "trainable")}
    return Step(**row | {"orthogonality": None if math.isnan(row["orthogonality"]) else row["orthogonality"]})
