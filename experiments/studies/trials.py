"""One trial: an arm on a problem at a rate and a seed, trained, measured, judged."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import lorafamily
from cells.sweep import wait_until_free
from lorafamily.registry import find as find_method
from studies.arms import Arm, Dropped
from studies.problem import Problem
from studies.problems import PROBLEMS
from tasks import TaskError


@dataclass(frozen=True)
class Trial:
    """`quarter`: the peak rate is 10^(quarter / 4). `pattern`: ranks by layer that the arm is given."""

    problem: str
    arm: Arm
    quarter: int
    seed: int
    pattern: tuple[tuple[str, int], ...] | None = None

    @property
    def lr(self) -> float:
        return 10.0 ** (self.quarter / 4)

    @property
    def key(self) -> str:
        """Names it in files and folders."""
        return f"{re.sub(r'[^a-z0-9²+]+', '-', self.arm.name.lower())}-quarter{self.quarter}-seed{self.seed}"


class Forgetful(torch.optim.AdamW):
    """AdamW that loses its state whenever parameters change their size; and, as where released code makes a new
    optimizer that the schedule does not know, from then on keeps the peak rate.

    The shapes at the last step, and how often they changed, are in the parameter group, and so in checkpoints: a
    resumed run loses its state when an uninterrupted one does.
    """

    def __init__(self, parameters: Any, lr: float, dropped: Dropped):
        super().__init__(parameters, lr=lr, weight_decay=0.0)
        self.peak, self.dropped = lr, dropped
        self.param_groups[0] |= {"shapes": self._shapes(), "losses": 0}

    def _shapes(self) -> list[list[int]]:
        return [list(parameter.shape) for parameter in self.param_groups[0]["params"]]

    @property
    def losses(self) -> int:
        return int(self.param_groups[0]["losses"])

    def step(self, closure: Any = None) -> Any:
        (group,) = self.param_groups
        if (now := self._shapes()) != group["shapes"]:
            group["shapes"], group["losses"] = now, group["losses"] + 1
            self.state.clear()
        if self.dropped == "state and schedule" and group["losses"]:
            group["lr"] = self.peak
        return super().step(closure)


@dataclass(frozen=True)
class Trials:
    """What a worker needs to run trials of a problem. `folder`: of all; `steps`: in place of the problem's."""

    problem: str
    folder: Path
    model: str | None = None
    data: Path | None = None
    steps: int | None = None

    def __call__(self) -> Callable[[Trial], dict[str, Any]]:
        self.opened()
        return self.run

    def opened(self) -> Problem:
        """The problem, with its model and data read.

        Raises:
            TaskError: they cannot be, or a run would have too few steps.
        """
        problem = PROBLEMS[self.problem]
        problem.read(self.model, self.data)
        if self.steps is not None:
            if self.steps < problem.evaluations:
                raise TaskError(f"--steps {self.steps}: a run has {problem.evaluations} evaluations, and as many steps")
            problem.steps = self.steps
        return problem

    def run(self, trial: Trial) -> dict[str, Any]:
        folder = self.folder / trial.key
        wait_until_free(folder)
        return run(trial, folder)


def run(trial: Trial, folder: Path) -> dict[str, Any]:
    """The trial's row, in plain data. A run that diverged is a row too: `failed` says at which step.

    `curve`: the metric on the split to tune on, by step; `metric`: on the split to judge on, at the end. `forgetting`:
    what the loss on the source text rose by, in bits per byte. `moved`: times that the optimizer lost its state.
    """
    problem, arm = PROBLEMS[trial.problem], trial.arm
    begun = time.perf_counter()
    model = problem.model(trial.seed).to("cuda" if torch.cuda.is_available() else "cpu")
    source_before = problem.loss(model, problem.source()) if problem.source() else None
    adapt(model, trial, problem)
    adapters = lorafamily.summary(model)
    start = {row.module: row.slices for row in adapters.rows}
    head = sum(p.numel() for p in model.parameters() if p.requires_grad) - adapters.parameters
    forgetful: list[Forgetful] = []

    def optimizer(trained: lorafamily.Trained) -> torch.optim.Optimizer:
        assert arm.dropped is not None
        forgetful.append(Forgetful(list(trained), trial.lr, arm.dropped))
        return forgetful[0]

    rates: dict[str, Any] = {"optimizer": optimizer} if arm.dropped else {"lr": trial.lr}
    if arm.up_ratio is not None:
        rates["up_lr"] = arm.up_ratio * trial.lr
    if problem.head_lr is not None and not arm.dropped:
        rates["head_lr"] = problem.head_lr
    before = problem.tuned(model, trial.seed)
    every = problem.steps // problem.evaluations
    failed, history = None, lorafamily.History()
    logged: dict[str, Any] = {"log_dir": folder, "pictures": False, "save_every": every, "resume": "auto"}
    try:
        history = lorafamily.train(
            model,
            problem.training(trial.seed),
            steps=problem.steps,
            **rates,
            validation=problem.tuning(trial.seed),
            evaluate=lambda model: {"metric": problem.tuned(model, trial.seed)},
            evaluate_every=every,
            seed=trial.seed,
            progress=False,
            **(logged if problem.logs else {}),
        )
    except lorafamily.NonFiniteError as error:
        failed = str(error)
    end, parameters = history.slices_end, [step.trainable - head for step in history.steps]
    if arm.cut_from is not None and not failed:
        report = lorafamily.compress(model, budget=round(problem.budget * arm.size))
        end = {row.module: row.rank_after for row in report}
    curve = [[0, before]]
    curve += [[e.step, e.metrics["metric"]] for e in history.evaluations]
    row: dict[str, Any] = {
        **{"key": trial.key, "problem": trial.problem, "arm": arm.name, "quarter": trial.quarter, "seed": trial.seed},
        **{"failed": failed, "metric": None, "tuning_metric": None, "curve": curve, "forgetting": None, "bytes": None},
        **{"parameters_peak": max(parameters, default=None), "parameters_end": None, "moved": 0},
        **{"ranks_start": start, "ranks_end": end, "planted": None},
        **{"seconds": history.seconds, "wall": time.perf_counter() - begun, "threads": torch.get_num_threads()},
    }
    if failed:
        return row
    row["metric"] = problem.judged(model, trial.seed)
    row["tuning_metric"] = problem.tuned(model, trial.seed)
    if source_before is not None:
        row["forgetting"] = (problem.loss(model, problem.source()) - source_before) / 0.6931471805599453
    row["parameters_end"] = lorafamily.summary(model).parameters
    row["bytes"] = sum(p.stat().st_size for p in lorafamily.save(model, folder / "adapter").iterdir())
    row["moved"] = forgetful[0].losses if forgetful else 0
    if chosen := problem.planted(trial.seed):
        row["planted"] = sum(rank for name, rank in end.items() if name in chosen) / max(1, sum(end.values()))
    return row


def adapt(model: torch.nn.Module, trial: Trial, problem: Problem) -> None:
    """Give the model the adapters that the trial begins with."""
    arm = trial.arm
    sizing: dict[str, Any] = {"budget": round(problem.budget * arm.size * (arm.cut_from or 1.0))}
    if trial.pattern is not None:
        sizing = {"rank": dict(trial.pattern)}
    elif arm.budget_at == "end":
        sizing["budget_at"] = "end"
    looks = find_method(arm.method).looks_at_data
    data = problem.training(trial.seed) if looks else None
    options = dict(arm.options)
    lorafamily.apply(model, arm.method, seed=trial.seed, data=data, also_train=problem.head, **sizing, **options)


def shuffled(ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, int]:
    """The same ranks, permuted among layers of equal shape."""
    draw = torch.Generator().manual_seed(seed)
    found: dict[str, int] = {}
    for shape in dict.fromkeys(shapes[name] for name in ranks):
        names = [name for name in ranks if shapes[name] == shape]
        order = torch.randperm(len(names), generator=draw).tolist()
        found |= {name: ranks[names[i]] for name, i in zip(names, order, strict=True)}
    return {name: found[name] for name in ranks}


def with_pattern(trial: Trial, ranks: Mapping[str, int]) -> Trial:
    """The trial of an arm that trains with ranks found by another."""
    if trial.arm.shuffle is not None:
        model = PROBLEMS[trial.problem].model(trial.seed)
        shapes = {name: tuple(model.get_parameter(f"{name}.weight").shape) for name in ranks}
        ranks = shuffled(ranks, shapes, 100 * trial.seed + trial.arm.shuffle)
    return replace(trial, pattern=tuple(ranks.items()))
