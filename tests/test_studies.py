"""The studies' statistics, protocol and planted problem."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

import lorafamily
import study
from lorafamily.registry import find
from studies import protocol
from studies.arms import ARMS, UNIFORM, Arm
from studies.intervals import equivalence, holm, paired
from studies.problems import PROBLEMS
from studies.results import Study, area, read, steps_to
from studies.trials import Forgetful, Trial, Trials, adapt, run, shuffled, with_pattern
from tasks import TaskError

STORED = Path(__file__).parents[1] / "docs" / "study"


@pytest.mark.parametrize("n", [5, 8])
def test_intervals_cover_what_they_say(n):
    """4000 samples: the standard error of a share of 0.95 is 0.0034, so that 2 % are six of them."""
    intervals = [paired(sample) for sample in np.random.default_rng(n).normal(size=(4000, n)).tolist()]
    hits = [interval.low <= 0.0 <= interval.high for interval in intervals]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.02)


def test_the_interval_that_was_used_before_does_not_cover():
    """The percentile bootstrap of five numbers: what the coverage test is able to reject."""
    hits, draw = 0, np.random.default_rng(0)
    for sample in draw.normal(size=(400, 5)):
        means = draw.choice(sample, (1000, 5)).mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        hits += low <= 0 <= high
    assert hits / 400 < 0.90


def test_equivalence_takes_a_margin_that_the_data_can_tell():
    near = [0.01, -0.01, 0.02, -0.02, 0.0]
    assert equivalence(near, 0.05) < 0.05
    assert equivalence(near, 0.01) > 0.05
    assert equivalence([value + 0.1 for value in near], 0.05) > 0.9
    with pytest.raises(ValueError, match="must be positive"):
        equivalence(near, 0.0)


@pytest.mark.parametrize("n", [5, 8])
def test_equivalence_is_seldom_found_of_a_difference_as_large_as_the_margin(n):
    """4000 samples: the standard error of a share of 0.05 is 0.0034, so that 2 % are six of them."""
    samples = np.random.default_rng(n).normal(10.0, 1.0, size=(4000, n)).tolist()
    assert np.mean([equivalence(sample, 10.0) < 0.05 for sample in samples]) == pytest.approx(0.05, abs=0.02)


def test_differences_that_do_not_vary_are_not_certain():
    same = paired([0.1] * 5)
    assert (same.low, same.high, same.p) == (0.1, 0.1, 0.5**4)
    assert math.isnan(same.effect)
    assert paired([0.0] * 5).p == 1.0
    assert holm([same.p, 0.9])[0] > 0.05


def test_paired_is_students_t():
    values = [0.3, -0.1, 0.4, 0.2, 0.05]
    found = paired(values)
    test = scipy.stats.ttest_1samp(values, 0.0)
    interval = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(test.pvalue)


def row(arm, quarter, seed, quality):
    return {"arm": arm.name, "quarter": quarter, "seed": seed, "failed": None, "ranks_end": {}} | {
        "tuning_metric": quality,
        "key": "",
    }


def test_the_grid_is_extended_until_the_best_is_inside():
    """A quality with its best at quarter −12, from a start at −8: five steps outwards."""
    tried: dict[int, float] = {}
    while more := protocol.to_try(-8, tried):
        tried |= {quarter: abs(quarter + 12) for quarter in more}
    assert sorted(tried) == list(range(-13, -6))
    assert protocol.best_quarter(tried) == -12


@pytest.mark.parametrize("order", [(-9, -8, -7), (-7, -8, -9)])
def test_rates_do_not_depend_on_the_order_of_rows(order):
    """Shares of some hundred sentences are often equal. Where every run diverged, lower rates are tried."""
    equal = {-9: 0.3, -8: 0.2, -7: 0.2}
    tried = {quarter: equal[quarter] for quarter in order}
    assert (protocol.to_try(-8, tried), protocol.best_quarter(tried)) == ([], -8)
    assert protocol.to_try(-8, dict.fromkeys(order, math.inf)) == [-10]


def test_a_pattern_is_that_of_the_arm_at_its_chosen_rate():
    """Among the rows is one at a rate that is not chosen any more."""
    problem, found = PROBLEMS["planted"], [UNIFORM, Arm("EVA", "eva"), Arm("anew", pattern="EVA", rates_of="uniform")]
    rows = [row(arm, q, s, abs(q + 8)) for arm in found[:2] for q in (-9, -8, -7) for s in problem.tuning_seeds]
    for quarter, rank in ((-8, 1), (-7, 2)):
        rows.append(row(found[1], quarter, 0, 1.0) | {"ranks_end": {"branches.0": rank}})
    (anew,) = [t for t in protocol.judging_trials(problem, found, rows) if t.arm.pattern]
    assert anew.pattern == (("branches.0", 1),)


def test_an_optimum_at_an_edge_voids_the_arm():
    """Quality that gets better the larger the rate, to the end of what may be tried."""
    problem, rows = PROBLEMS["planted"], []
    while trials := [t for t in protocol.tuning_trials(problem, [UNIFORM], rows) if t.quarter <= protocol.HIGHEST]:
        rows += [row(UNIFORM, t.quarter, t.seed, -t.quarter) | {"key": t.key} for t in trials]
    assert max(r["quarter"] for r in rows) == protocol.HIGHEST
    assert protocol.rates(problem, [UNIFORM], rows) == {}
    assert protocol.judging_trials(problem, [UNIFORM], rows) == []


def test_seeds_and_splits_of_tuning_are_not_those_of_judging():
    for problem in PROBLEMS.values():
        assert not set(problem.tuning_seeds) & set(problem.seeds)
        assert problem.evaluations >= 15
        assert len(problem.seeds) >= (8 if problem.name in ("planted", "misleading", "embedded") else 5)
    for problem in (PROBLEMS["planted"], PROBLEMS["misleading"], PROBLEMS["embedded"]):
        key = next(iter(problem.tuning(0)[0]))
        assert not torch.equal(problem.tuning(0)[0][key], problem.judging(0)[0][key])
        splits = [problem.training(0), problem.tuning(0), problem.judging(0)]
        rows = [{row.numpy().tobytes() for batch in split for row in batch[key]} for split in splits]
        assert len(set.union(*rows)) == sum(map(len, rows))  # no row is in two of them


def test_nothing_that_is_judged_chooses_a_rate():
    for stored in read(STORED):
        other = [row | {"metric": -row["seed"]} if row["metric"] is not None else row for row in stored.rows]
        other = [row | {"tuning_metric": 0.0} if row["seed"] in stored.problem.seeds else row for row in other]
        assert Study(stored.problem, other).quarters == stored.quarters


def test_arms_name_what_exists():
    for problem, arms in ARMS.items():
        names = [arm.name for arm in arms]
        assert len({Trial(problem, arm, -8, 0).key for arm in arms}) == len(names)  # by which rows are known
        for arm in arms:
            assert arm.method in lorafamily.methods()
            assert {arm.rates_of, arm.control} <= {None, *names}
            assert arm.pattern is None or names.index(arm.pattern) < names.index(arm.name)


@pytest.mark.parametrize("name", ["planted", "embedded"])
def test_every_arm_can_be_sized(name):
    """No arm has more parameters than its size allows, or less than nine tenths; `run` would end at one that cannot
    be."""
    problem = PROBLEMS[name]
    for arm in ARMS[name]:
        if arm.pattern is None and not find(arm.method).looks_at_data:
            model = problem.model(0)
            adapt(model, Trial(name, arm, -8, 0), problem)
            allowed = problem.budget * arm.size * (arm.cut_from or (1.5 if arm.budget_at == "end" else 1.0))
            assert 0.9 * allowed < lorafamily.summary(model).parameters <= round(allowed), arm.name


def test_a_shuffled_pattern_stays_among_layers_of_equal_shape():
    ranks = {f"a{i}": i for i in range(6)} | {f"b{i}": 10 + i for i in range(6)}
    shapes = {name: (4, 4) if name[0] == "a" else (4, 8) for name in ranks}
    found = shuffled(ranks, shapes, 1)
    assert found != ranks
    for kind in "ab":
        own = [name for name in ranks if name[0] == kind]
        assert sorted(found[name] for name in own) == sorted(ranks[name] for name in own)
    assert list(found) == list(ranks)
    other = with_pattern(Trial("planted", Arm("x", shuffle=1), -8, 0), {f"branches.{i}": i for i in range(8)})
    assert sorted(rank for _, rank in other.pattern) == list(range(8))


def test_only_planted_layers_can_help():
    """The base computes the target but for the planted layers' updates: with these, what is judged is exact."""
    problem = PROBLEMS["planted"]
    model = problem.model(0)
    assert problem.quality(problem.loss(model, problem.judging(0)), 0) == pytest.approx(1.0)
    assert len(problem.planted(0)) == 4
    for batch in problem.judging(0):
        model.zero_grad()
        (model.predicted(batch["x"]) - batch["y"]).square().mean().backward()
    norms = {name.removesuffix(".weight"): p.grad.norm().item() for name, p in model.named_parameters()}
    smallest = min(norms[name] for name in problem.planted(0))
    assert smallest > 2 * max(norm for name, norm in norms.items() if name not in problem.planted(0))


@pytest.mark.parametrize("name", ["uniform", "AdaLoRA", "EVA", "LoRA then cut", "EVA's pattern shuffled 1"])
def test_a_row_is_of_the_saved_adapter(tmp_path, monkeypatch, name):
    """Metrics are those of the adapter as it is at the end, cut if it is cut, and within the budget."""
    problem = PROBLEMS["planted"]
    monkeypatch.setattr(problem, "steps", 48)
    (arm,) = (arm for arm in ARMS["planted"] if arm.name == name)
    trial = Trial("planted", arm, -8, 0)
    ranks = {f"branches.{i}": i % 5 for i in range(8)}
    trial = trial if arm.pattern is None else with_pattern(trial, ranks)
    found = run(trial, tmp_path)
    model = problem.model(0)
    lorafamily.load(model, tmp_path / "adapter")
    rows = lorafamily.summary(model).rows
    assert problem.judged(model, 0) == pytest.approx(found["metric"], rel=1e-5)
    assert problem.tuned(model, 0) == pytest.approx(found["tuning_metric"], rel=1e-5)
    assert {row.module: row.slices for row in rows if row.slices} == {
        at: r for at, r in found["ranks_end"].items() if r
    }
    assert found["parameters_end"] == lorafamily.summary(model).parameters <= problem.budget
    assert (found["parameters_peak"] > problem.budget) == (name in ("AdaLoRA", "LoRA then cut"))
    if trial.pattern is not None:
        assert found["ranks_start"] == found["ranks_end"] == dict(trial.pattern) != ranks
        assert sorted(found["ranks_end"].values()) == sorted(ranks.values())


def test_an_optimiser_that_forgets():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = Forgetful([weight], 0.1, "state and schedule")
    weight.grad = torch.ones(3)
    optimizer.param_groups[0]["lr"] = 0.01
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.01
    larger = torch.nn.Parameter(torch.ones(4))
    larger.grad = torch.ones(4)
    optimizer.state[larger] = optimizer.state.pop(weight)
    optimizer.param_groups[0]["params"] = [larger]
    optimizer.step()
    assert optimizer.losses == 1
    assert optimizer.state[larger]["step"] == 1  # of the step just made
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("killed_at", [5, 7])
def test_an_optimiser_that_forgets_does_so_once_though_its_run_was_killed(tmp_path, monkeypatch, killed_at):
    """Ranks move after steps 5 to 12, and every third has a checkpoint: the newest is that of step 9, after which they
    move, or of step 15."""
    problem, calls = PROBLEMS["planted"], 0
    monkeypatch.setattr(problem, "steps", 48)
    monkeypatch.setattr(problem, "logs", True)
    options = (("scorer", "first-order"), ("drop", 1))
    trial = Trial("planted", Arm("x", "alora", options, dropped="state and schedule"), -8, 0)
    whole = run(trial, tmp_path / "whole")

    def killed(model, seed):
        nonlocal calls
        calls += 1
        if calls == killed_at:
            raise KeyboardInterrupt
        return problem.measure(model, problem.tuning(seed), seed)

    with monkeypatch.context() as patched:
        patched.setattr(problem, "tuned", killed)
        with pytest.raises(KeyboardInterrupt):
            run(trial, tmp_path / "killed")
    resumed = run(trial, tmp_path / "killed")
    assert whole["moved"] > 1
    assert resumed | {"seconds": 0, "wall": 0} == whole | {"seconds": 0, "wall": 0}


def test_area_and_steps_of_a_curve():
    one = {"curve": [[0, 2.0], [10, 1.0], [20, 1.0]]}
    assert area(one) == 1.25
    assert steps_to(one, 1.5) == 5.0
    assert steps_to(one, 0.5) is None


def test_a_study_runs_what_is_missing_and_nothing_else(tmp_path, capsys):
    """All rows are there but one: that one is made again, as it was but for rounding."""
    rows = [json.loads(line) for line in study.stored("planted").splitlines()]
    lost = next(r for r in rows if r["arm"] == "uniform" and r["seed"] == 0)
    path = tmp_path / "study-planted" / "results.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(r) + "\n" for r in rows if r is not lost) + '{"arm": "unif')  # and one was cut
    found = study.run(study.Run("planted", arms=("uniform",), seeds=1, workers=1, out=tmp_path))
    assert len(found) == len(rows)
    again = found[-1]
    assert again["key"] == lost["key"]
    assert again["metric"] == pytest.approx(lost["metric"], rel=1e-3)  # 120 steps, on another processor perhaps
    assert again["ranks_end"] == lost["ranks_end"]
    assert again["parameters_peak"] == lost["parameters_peak"]
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == [r["key"] for r in found]


def test_a_study_that_is_killed_while_it_begins_keeps_its_rows(tmp_path, monkeypatch):
    path = tmp_path / "study-planted" / "results.jsonl"
    path.parent.mkdir()
    path.write_text(study.stored("planted"))

    def killed(path, text):
        path.write_bytes(text[:100].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        study.run(study.Run("planted", arms=("uniform",), seeds=1, workers=1, out=tmp_path))
    assert path.read_text() == study.stored("planted")


def test_a_study_that_has_no_rows_of_its_own_begins_with_the_stored_ones(tmp_path):
    found = study.run(study.Run("planted", arms=("uniform",), seeds=1, workers=1, out=tmp_path))
    assert len(found) == len(study.stored("planted").splitlines())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"problem": "plnted"}, "plnted: no such problem; there are planted, misleading"),
        ({"arms": ("unform",)}, "unform: no such arm; there are uniform, "),
        ({"data": Path("x")}, "the problem planted comes with its model and data"),
        ({"problem": "sst2"}, "the problem sst2 needs --model"),
    ],
)
def test_a_study_that_cannot_be_run_is_refused(tmp_path, given, message):
    with pytest.raises(TaskError, match=message):
        study.run(study.Run(**{"problem": "planted", "workers": 1, "out": tmp_path} | given))


def test_an_entry_of_pefts_benchmark_is_what_peft_reads(tmp_path):
    """With the rate that the planted problem's rows choose, which says nothing of language models."""
    peft = pytest.importorskip("peft", reason="peft is an extra")
    study.entry(study.Entry("planted", tmp_path / "entry"))
    config = peft.PeftConfig.from_pretrained(tmp_path / "entry")
    assert (config.init_r, config.target_r, config.tinit, config.tfinal, config.deltaT) == (48, 32, 500, 2500, 50)
    chosen = json.loads((tmp_path / "entry" / "training_params.json").read_text())
    assert chosen == {"optimizer_kwargs": {"lr": 0.018, "weight_decay": 0.1}}
    with pytest.raises(TaskError, match="no stored rows of llm-gsm8k"):
        study.entry(study.Entry("llm-gsm8k", tmp_path / "other"))


def test_trials_can_be_sent_to_workers(tmp_path):
    trial = with_pattern(Trial("planted", Arm("x", shuffle=1), -8, 0), {f"branches.{i}": i for i in range(8)})
    assert pickle.loads(pickle.dumps(trial)) in {trial}
    assert pickle.loads(pickle.dumps(Trials("planted", tmp_path, steps=48))) == Trials("planted", tmp_path, steps=48)
