"""The contract between a training loop and what moves rank between modules.

A method has an `Allocation`, which is plain settings. A run makes an `Allocator` of it, which the loop calls after
every optimizer step, before the gradients are cleared: it observes, decides, acts, and returns what it did as a
`Decision`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from lorafamily.allocation.run import Run
from lorafamily.allocation.scorer import Scorer, Scores
from lorafamily.errors import AllocationError
from lorafamily.history import Decision


class Allocator(ABC):
    """Moves rank during one run. It is deterministic: the same gradients and losses lead to the same decisions.

    `slices`: in use by module, those that exist and were not masked by the last decision. `settled`: whether no further
    decision will come. `observed`: steps that the scorer has observed. `now`: the step after which it was last called.
    """

    grows: ClassVar[bool] = False
    """Whether a module may end with more slices than it started with."""

    def __init__(self, run: Run):
        self.run = run
        self.slices = dict(run.start or {name: adapter.slices for name, adapter in run.adapters.items()})
        self.scorer: Scorer | None = None
        self.settled, self.observed, self.now = False, 0, 0

    def step(self, step: int, *, observe: bool = True) -> Decision | None:
        """Observe, decide and act; call it after optimizer step `step` (from 1), before the gradients are cleared.

        `observe`: False for a step that was skipped because its gradient was not finite. Raises as `scores` does.
        """
        if self.settled:
            return None
        self.now = step
        if observe:
            self.observe(step)
        decision = self.decide(step)
        if decision is not None or self.settled:
            self._note_settled()
        return decision

    @property
    def wants_task_gradient(self) -> bool:
        """Whether the loop must keep the task's gradient apart from the penalty's, for `run.task_gradient`."""
        return not self.settled and self.scorer is not None and self.scorer.wants_task_gradient

    def observe(self, step: int) -> None:
        """Let the scorer see the gradients of the step just made."""
        if self.scorer is not None:
            self.scorer.observe()
            self.observed += 1

    @abstractmethod
    def decide(self, step: int) -> Decision | None:
        """Decide after optimizer step `step`, and act; None if nothing is due."""

    def resize(self, name: str, keep: Tensor, add: int = 0) -> None:
        """Keep the slices with these indices and add `add` new ones to one adapter; the optimizer's state and the
        scorer's averages follow."""
        self.run.resize(name, keep, add)
        if self.scorer is not None:
            self.scorer.follow(name, keep, add)

    def state(self) -> dict[str, Any]:
        """The state as plain data and tensors, for `restore`."""
        scorer = None if self.scorer is None else self.scorer.state()
        return {"slices": dict(self.slices), "settled": self.settled, "scorer": scorer, "observed": self.observed}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from that `state`, made with the same settings; the adapters must have its slices already."""
        self.slices, self.settled, self.observed = dict(state["slices"]), state["settled"], state["observed"]
        if self.scorer is not None:
            self.scorer.restore(state["scorer"])
        self._note_settled()

    @property
    def has_scores(self) -> bool:
        """Whether there are scores: a scorer that observes steps needs at least one."""
        return self.scorer is not None and (self.observed > 0 or not self.scorer.observes)

    def scores(self) -> Scores:
        """The scores of all slices, the same in every process.

        Raises:
            AllocationError: the scorer has observed no step yet, does not give a number for each slice, or one that is
                not finite.
        """
        assert self.scorer is not None
        if not self.has_scores:
            raise AllocationError(
                f"ranks are to change after step {self.now}, but {type(self.scorer).__name__} has seen no step yet: "
                "each was skipped because its gradient was not finite; begin later (warmup), or lower lr"
            )
        scores = self.scorer.scores()
        self._check_shapes(scores)
        scores = self.run.agreed(scores)
        for name, values in scores.items():
            wrong = values[~values.isfinite()]
            if len(wrong):
                raise AllocationError(
                    f"{len(wrong)} of {len(values)} slices of {name} score {float(wrong[0])} after step {self.now}, so "
                    f"no rank can be moved by them: {self.scorer.why_not_finite()}"
                )
        return scores

    def _check_shapes(self, scores: Scores) -> None:
        name = type(self.scorer).__name__
        if scores.keys() != self.run.adapters.keys():
            raise AllocationError(f"{name} scores {len(scores)} modules; it must score all {len(self.run.adapters)}")
        for at, adapter in self.run.adapters.items():
            found = tuple(scores[at].shape) if isinstance(scores[at], Tensor) else type(scores[at]).__name__
            if found != (adapter.slices,):
                raise AllocationError(
                    f"{name} must give a tensor of {adapter.slices} scores for {at}, one for each slice, and gives "
                    f"{found} after step {self.now}; its follow() must go along when slices are dropped or added"
                )

    def highest(self, scores: Scores, slices: int, *, fit: bool = True) -> dict[str, Bool[Tensor, " r"]]:
        """Masks by module of the `slices` highest scores in the network; of equal scores, later modules win.

        `fit`: take fewer if the run's limits require it; a slice that costs more than is left of the limit is skipped.
        """
        flat = torch.cat(list(scores.values()))
        best = flat.argsort(stable=True).flip(0)
        if fit and self.run.slice_limit is not None:
            slices = min(slices, self.run.slice_limit)
        if fit and self.run.limit is not None:
            costs = [self.run.adapters[name].update.slice_cost for name, values in scores.items() for _ in values]
            room = self.run.limit - self.run.unsliced()
            fitting: list[int] = []
            for i in best.tolist():
                if len(fitting) < slices and costs[i] <= room:
                    fitting.append(i)
                    room -= costs[i]
            best = torch.tensor(fitting, dtype=torch.long, device=flat.device)
        keep = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
        keep[best[:slices]] = True
        return dict(zip(scores, keep.split([len(values) for values in scores.values()]), strict=True))

    def record(
        self, step: int, after: dict[str, int], reason: str, threshold: float | None, scores: Scores
    ) -> Decision:
        """The decision for a change that was made; `after`: the slices by module now."""
        before, self.slices = self.slices, after
        by_module = {name: values.tolist() for name, values in scores.items()}
        return Decision(step, before, dict(after), reason, threshold, by_module)

    def _note_settled(self) -> None:
        """Let adapters record, also in files, whether their ranks are settled: a second run then leaves them alone."""
        for adapter in self.run.adapters.values():
            adapter.settled = self.settled


@dataclass(frozen=True)
class Allocation(ABC):
    """Settings of an allocator. Its fields are options of the methods that use it."""

    def begin(self, run: Run) -> Allocator:
        """The allocator for one run; if `run.settled`, one that leaves the ranks alone. Raises as `allocator` does."""
        return Still(run) if run.settled else self.allocator(run)

    @abstractmethod
    def allocator(self, run: Run) -> Allocator:
        """The allocator for a run whose ranks may move. Raises AllocationError if the schedule does not fit the run, or
        needs something that the run lacks."""

    def end_share(self) -> float:
        """The share of all slices that is left at the end, for `budget_at="end"`."""
        return 1.0


@dataclass(frozen=True)
class Fixed(Allocation):
    """Every module keeps the rank it started with."""

    def allocator(self, run: Run) -> Allocator:
        return Still(run)


class Still(Allocator):
    """Changes nothing: the ranks are fixed, or an earlier run settled them."""

    def __init__(self, run: Run):
        super().__init__(run)
        self.settled = True

    def decide(self, step: int) -> None:
        return None

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue a run whose ranks had settled.

        Raises:
            AllocationError: that run had decisions to make.
        """
        if not state["settled"]:
            raise AllocationError(
                "the run to continue had ranks to settle, but the ranks of these adapters are settled already; give it "
                "adapters as they were when it began (lorafamily.apply), or let their ranks move once more (again=True)"
            )
        self.slices = dict(state["slices"])


def in_steps(value: float, steps: int, name: str) -> int:
    """A setting of a schedule in optimizer steps: a whole number is steps, a fraction is of the run's `steps`.

    Raises:
        AllocationError: the value is neither.
    """
    if isinstance(value, int) and value >= 0:
        return value
    if isinstance(value, float) and 0 <= value < 1:
        return round(value * steps)
    raise AllocationError(
        f"{name}={value!r}: must be a whole number of optimizer steps or a fraction of the run in [0, 1)"
    )
