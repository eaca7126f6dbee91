"""Everything a run must find again to go on as if it had never stopped."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.errors import AllocationError, StateError, TrainingError
from lorafamily.history import Decision, Evaluation, History, Step, Weights
from lorafamily.layers.fingerprints import added_up, fingerprints
from lorafamily.layers.offloaded import offloaded_value
from lorafamily.layers.quantised import tensors_of
from lorafamily.layers.sharded import is_sharded
from lorafamily.layers.site import base_parameters
from lorafamily.training.batches import Batches
from lorafamily.training.checkpoints import Checkpoint, Checkpoints, Resume, name_of, of_step
from lorafamily.training.guards import FiniteNumbers, check_base
from lorafamily.training.kept import Kept
from lorafamily.training.optimisation import Rates
from lorafamily.training.processes import Processes
from lorafamily.training.session import Session
from lorafamily.training.state import random_state, set_random_state


@dataclass
class RunState:
    """What a run has reached. `settings`: what must be the same when it goes on.

    `monitor`: the metric that decides which evaluation is the best, the lowest (`mode` "min") or highest ("max");
    `keep_best`: keep its weights in memory, for `restore_best`. `best`: (value, step) of the best evaluation so far;
    `since_best`: evaluations since then.
    """

    model: nn.Module
    session: Session
    settings: dict[str, Any]
    rates: Rates
    scaler: torch.amp.GradScaler
    batches: Batches
    finite: FiniteNumbers
    processes: Processes
    seed: int | None
    monitor: str = "loss"
    mode: Literal["min", "max"] = "min"
    keep_best: bool = False
    history: History = field(default_factory=History)
    best: tuple[float, int] = (math.inf, 0)
    since_best: int = 0
    base: dict[str, int] = field(default_factory=dict)
    kept: Kept | None = None
    hyperparameters: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise TrainingError(f'mode={self.mode!r}: must be "min" (lower is better) or "max"')
        self.best = self._none_yet()
        self.hyperparameters = hyperparameters(self.session.optimizer)  # as they were given: schedules move them
        self.history.ranks_start = dict(self.session.start)
        self.base = self.base_now()

    @property
    def device(self) -> torch.device:
        return self.batches.device

    def trained(self) -> list[nn.Parameter]:
        """Whatever trains now; resized adapters have new parameters."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def base_now(self) -> dict[str, int]:
        """Fingerprints of the frozen base weights, of quantised ones with their scales; of a sharded one those of all
        its pieces together."""
        own = [(name, p) for name, p in tensors_of(self.model).items() if not p.requires_grad]
        found = fingerprints((name, self._here(name, p)) for name, p in own)
        if sharded := [name for name, p in own if is_sharded(p)]:
            pieces = self.processes.gathered({name: found[name] for name in sharded})
            found |= {name: added_up([piece[name] for piece in pieces]) for name in sharded}
        return found

    def _here(self, name: str, value: Tensor) -> Tensor:
        """The value of a tensor of the base, also where it is offloaded."""
        found = offloaded_value(self.model, name) if value.is_meta else value
        if found is None:
            raise StateError(f"{name} has no value: it is on the meta device")
        return found

    def trained_now(self) -> dict[str, int]:
        """Fingerprints of what trains."""
        return fingerprints((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def _none_yet(self) -> tuple[float, int]:
        return (math.inf if self.mode == "min" else -math.inf, 0)

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        return self.session.adapters

    def improved(self, evaluation: Evaluation, patience: int | None) -> bool:
        """Take in an evaluation; whether it is the best since the allocation settled, or the run ended.

        Raises:
            TrainingError: what is waited for or kept is decided by a metric that `evaluate` did not give.
        """
        value = evaluation.metrics.get(self.monitor)
        if value is None and (patience is not None or self.keep_best or self.monitor != "loss"):
            asks = "patience" if patience is not None else "restore_best" if self.keep_best else "monitor"
            raise TrainingError(f'{asks} watches "{self.monitor}", but evaluate gave {", ".join(evaluation.metrics)}')
        if value is None or not (self.session.allocator.settled or evaluation.step == self.session.run.steps):
            return False
        if value < self.best[0] if self.mode == "min" else value > self.best[0]:
            self.best, self.since_best = (value, evaluation.step), 0
            self.history.best = Weights(evaluation.step, dict(evaluation.metrics))
            if self.keep_best:
                self._keep(Kept.of(self.model, self.adapters))
            return True
        self.since_best += 1
        return False

    def _keep(self, kept: Kept) -> None:
        assert self.history.best is not None
        self.kept = kept
        self.history.best = dataclasses.replace(self.history.best, tensors=kept.tensors)

    def restore_best(self) -> None:
        """Give the model the weights of the best evaluation, ranks included; those it has are kept in `history.last`.

        Call it when the run is over and saved: a checkpoint at the end holds the last weights, not these.

        Raises:
            StateError: there was no such evaluation, or its weights were not kept.
        """
        if self.kept is None:
            raise StateError(
                f'no best weights are kept: there was no evaluation with a finite "{self.monitor}" once the '
                "allocation had settled"
                if self.keep_best
                else "no best weights are kept: the run was not asked to (keep_best)"
            )
        if self.best[1] == len(self.history.steps):
            return  # the model has them
        if self.history.last is not None:
            last = Kept.of(self.model, self.adapters).tensors
            self.history.last = dataclasses.replace(self.history.last, tensors=last)
        self.kept.put_into(self.model, self.adapters, self.session.optimizer)
        self.history.ranks_end = {at: adapter.rank for at, adapter in self.adapters.items()}
        self.session.allocator.ranks = dict(self.history.ranks_end)

    def made(self, step: Step, decision: Decision | None) -> None:
        """Take in a step and what was decided after it."""
        self.history.steps.append(step)
        self.history.skipped = self.finite.skipped
        self.history.ranks_start = dict(self.session.start)  # the first batch may show that some have no effect
        if decision is not None:
            self.history.decisions.append(decision)

    def check_end(self) -> None:
        """What must hold when the run is over; notes in the history which weights are the last.

        Raises:
            TrainingError: the frozen base changed.
            AllocationError: the schedule never fired.
        """
        self.history.ranks_end = dict(self.session.allocator.ranks)
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
        """Write a checkpoint, by the first process, after a look at what should not have happened."""
        check_base(self.base, self.base_now())
        step = len(self.history.steps)
        self.processes.check_same(self.trained_now(), step)
        folder = f"checkpoints/{name_of(step)}" if checkpoints.folder is not None else None
        for name in ("best", "last"):
            weights = getattr(self.history, name)
            if weights is not None and weights.step == step:
                setattr(self.history, name, dataclasses.replace(weights, folder=folder))
        tree = self.to_save()
        if self.processes.first:
            placement = self.session.placement
            adapters = None if placement is None else placement.name
            checkpoints.write(step, self.model, adapters, tree, self.best[1] or None)
        self.processes.add_up([0.0])  # nobody goes on, or ends, before it is there

    def to_save(self) -> dict[str, Any]:
        """The state as a tree of plain data and tensors, without the adapters."""
        beside = {name: p.data for name, p in base_parameters(self.model).items() if p.requires_grad}
        return {
            "settings": self.settings,
            "has adapters": self.session.placement is not None,
            "step": len(self.history.steps),
            "total": self.session.run.steps,
            "optimizer": self.session.optimizer.state_dict(),
            "optimizer class": type(self.session.optimizer).__name__,
            "hyperparameters": self.hyperparameters,
            "scaler": self.scaler.state_dict(),
            "rates": self.rates.state(),
            "session": self.session.state_dict(adapters=False),
            "random": self.processes.gathered(random_state(self.device)),
            "batches": self.batches.state(),
            "not finite": (self.finite.skipped, self.finite.in_a_row),
            "history": _history_tree(self.history),
            "monitor": (self.monitor, self.mode),
            "best": self.best,
            "since best": self.since_best,
            "base": self.base,
            "trained": beside,
            "buffers": _persistent_buffers(self.model),
        }

    def go_on_from(self, found: Checkpoint, resume: Resume) -> None:
        """Take the state of a checkpoint. Everything is checked before anything is changed, but
        for adapters that the run left out as without effect: they are left out here too.

        Raises:
            StateError: it is of a run with other settings, or on another base.
        """
        state, session = found.state, self.session
        session.leave_out(state["session"]["left out"])
        own_optimizer, other_metric = self._check(found, resume)
        kept = None
        if self.keep_best and not other_metric and (best := state["best"][1]):
            kept = Kept.read(found if best == state["step"] else of_step(found, best), self.model)
        self.batches.restore(state["batches"], other=resume == "anyway")
        with torch.no_grad():
            if found.adapters is not None:
                for at, adapter in session.adapters.items():
                    session.exchange(adapter.take(found.adapters.adapters[at].state_dict()))
            parameters, buffers = dict(self.model.named_parameters()), dict(self.model.named_buffers())
            for name, value in state["trained"].items():
                parameters[name].copy_(value)
            for name, value in state["buffers"].items():
                buffers[name].copy_(value)
        if own_optimizer:
            self._load_optimizer(state)
        self.scaler.load_state_dict(state["scaler"])
        self.rates.restore(state["rates"])
        session.load_state_dict(state["session"])
        self.finite.skipped, self.finite.in_a_row = state["not finite"]
        self.history = _history(state["history"])
        if other_metric:
            self.history.best = None
        else:
            self.best, self.since_best = state["best"], state["since best"]
        if kept is not None:
            self._keep(kept)
        if self.history.stopped and self.session.run.steps > state["total"]:  # a longer run than it was
            self.history.stopped, self.history.ranks_end, self.history.last, self.since_best = "", {}, None, 0
        self._set_random(state["random"])

    def _check(self, found: Checkpoint, resume: Resume) -> tuple[bool, bool]:
        """Whether the optimiser's state can be taken, and whether another metric is watched than was."""
        state = found.state
        then, now = state["settings"], self.settings
        differing = [
            f"{k} was {then.get(k)!r}, is {now.get(k)!r}" for k in {**then, **now} if then.get(k) != now.get(k)
        ]
        its = {} if found.adapters is None else found.adapters.adapters
        if {at: list(a.state_dict()) for at, a in its.items()} != {
            at: list(a.state_dict()) for at, a in self.adapters.items()
        }:
            raise StateError(f"{found.folder} is of a run with other adapters than these; it cannot go on here")
        said = {k for k in ("lr", "weight decay") if then.get(k) != now.get(k)}
        other = self._other_optimizer(state)
        differing += [other] if other else [text for *_, text in self._other_hyperparameters(state, said)]
        watched = (self.monitor, self.mode)
        other_metric = tuple(state["monitor"]) != watched
        if other_metric:
            differing.append(f"monitor and mode were {', '.join(state['monitor'])}, are {', '.join(watched)}")
        differing += self.batches.differences(state["batches"])
        if differing and resume != "anyway":
            raise StateError(
                f"{found.folder} is of a run with other settings: {'; '.join(differing)}. Set them as they were, pass "
                'resume="anyway" to go on with the new ones, or give another folder'
            )
        done, steps = state["step"], self.session.run.steps
        if steps < done or (steps == done and not state["history"]["stopped"]):
            raise StateError(
                f"steps={steps}: the run of {found.folder} has made {done} steps and cannot be made shorter than that; "
                f"give more than {done}, or another folder"
            )
        check_base(state["base"], self.base)
        if differing:
            also = ". The optimiser begins without a state" if other else ""
            if steps != state["total"]:
                also += f". The learning rate is from here on that of step {done + 1} in a schedule of {steps} steps"
                settled = state["session"]["allocator"]["settled"]
                also += "; the ranks are settled and stay" if settled and self.adapters else ""
            said_all = f"going on from {found.folder} with other settings: {'; '.join(differing)}{also}"
            warnings.warn(said_all, stacklevel=4)
        return not other, other_metric

    def _other_optimizer(self, state: Mapping[str, Any]) -> str:
        """How the optimiser is so different that the state of the other says nothing to it; empty where it is not."""
        then, now = state["optimizer class"], type(self.session.optimizer).__name__
        if then != now:
            return f"optimizer was {then}, is {now}"
        groups = state["optimizer"]["param_groups"], self.session.optimizer.param_groups
        sizes = [[len(group["params"]) for group in of] for of in groups]
        return f"optimizer had groups of {sizes[0]} parameters, has {sizes[1]}" if sizes[0] != sizes[1] else ""

    def _other_hyperparameters(
        self, state: Mapping[str, Any], said: Collection[str] = ()
    ) -> list[tuple[int, str, str]]:
        """Group, name and a description of what the optimiser was given otherwise; `said`: settings of `train` that are
        named already."""
        found = []
        for number, (then, now) in enumerate(zip(state["hyperparameters"], self.hyperparameters, strict=True)):
            for name in then.keys() & now.keys():
                if then[name] != now[name] and name.replace("_", " ") not in said:
                    where = f" of group {number}" if len(self.hyperparameters) > 1 else ""
                    found.append((number, name, f"optimizer's {name}{where} was {then[name]!r}, is {now[name]!r}"))
        return sorted(found)

    def _load_optimizer(self, state: Mapping[str, Any]) -> None:
        """Its state, with the hyperparameters that were given now where they were others then."""
        given = [dict(group) for group in self.session.optimizer.param_groups]
        self.session.optimizer.load_state_dict(dict(state["optimizer"]))
        for number, name, _ in self._other_hyperparameters(state):
            self.session.optimizer.param_groups[number][name] = given[number][name]

    def _set_random(self, states: list[Mapping[str, Any]]) -> None:
        """Each process its own; where there are other numbers of processes than before, the new ones draw anew."""
        set_random_state(states[self.processes.rank if len(states) == self.processes.world else 0], self.device)
        if len(states) != self.processes.world:
            self.seed_by_process(len(self.history.steps))

    def seed_by_process(self, step: int = 0) -> None:
        """Processes other than the first draw other numbers, for dropout."""
        if self.processes.rank and self.seed is not None:
            torch.manual_seed((self.seed + 7919 * self.processes.rank + 104729 * step) % 2**63)


def hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What the optimiser was given, by group, as plain data."""
    return [{k: _plain(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return tuple(_plain(entry) for entry in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _history_tree(history: History) -> dict[str, Any]:
    """Steps as columns: a run has many."""
    columns = {}
    for name in (f.name for f in fields(Step)):
        values = [getattr(step, name) for step in history.steps]
        columns[name] = torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64, device="cpu")
    return {**dataclasses.replace(history, steps=[]).to_dict(), "steps": columns}


def _history(tree: Mapping[str, Any]) -> History:
    columns = {name: column.tolist() for name, column in tree["steps"].items()}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return History(
        **{
            **tree,
            "steps": [_step(row) for row in rows],
            "evaluations": [Evaluation(**entry) for entry in tree["evaluations"]],
            "decisions": [Decision(**entry) for entry in tree["decisions"]],
            **{name: tree[name] and Weights(**tree[name]) for name in ("best", "last")},
        }
    )


def _step(row: dict[str, Any]) -> Step:
    row |= {name: int(row[name]) for name in ("step", "rank", "trainable")}
    return Step(**row | {"orthogonality": None if math.isnan(row["orthogonality"]) else row["orthogonality"]})
