"""docs/study.md is what the command writes from the rows, and says what they say."""

from __future__ import annotations

import gzip
import json
import shutil
from collections import Counter
from pathlib import Path

from conftest import shared
from studies.arms import SVD, UNIFORM
from studies.findings import on_models, verdict_table
from studies.intervals import paired
from studies.page import missing, write
from studies.problems import PROBLEMS
from studies.results import Comparison, Study, read

STORED = Path(__file__).parents[1] / "docs" / "study"


def test_the_committed_page_is_what_the_command_writes(tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(STORED, folder)
    assert write(folder, tmp_path / "study.md") == STORED.with_suffix(".md").read_text(encoding="utf-8")


def test_another_row_is_another_page(tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(STORED, folder)
    path = folder / "planted.jsonl.gz"
    with gzip.open(path, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    changed = next(r for r in rows if r["arm"] == "EVA" and r["seed"] == 0)
    changed["metric"] += 1.0
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(r) + "\n" for r in rows)
    assert write(folder, tmp_path / "study.md") != STORED.with_suffix(".md").read_text(encoding="utf-8")


def test_the_answer_on_models_says_who_beats_uniform_lora_and_where():
    difference = paired([0.1, 0.2, 0.15, 0.12, 0.18])
    better, undecided = (
        Comparison("EVA", UNIFORM.name, difference, adjusted=adjusted, same=1.0) for adjusted in (0.01, 0.2)
    )
    control = Comparison("uniform at the peak size", UNIFORM.name, difference, adjusted=0.01, same=1.0)
    anew = Comparison("EVA's pattern anew", "EVA's pattern shuffled", difference, adjusted=1.0, same=0.01)
    embedded, sst2 = (Study(PROBLEMS[name], []) for name in ("embedded", "sst2"))
    begins = "At equal budgets, each at its own best rate, on embedded and sst2: "
    both = [(embedded, [better, control]), (sst2, [undecided, anew])]
    assert on_models(both) == (
        f"{begins}EVA (embedded) beats uniform LoRA (1 better, 1 undecided), "
        "and no found pattern, trained anew, beats the same ranks shuffled (1 on par)."
    )
    assert verdict_table(both) == [
        ["problem", "against", "better", "on par", "undecided", "worse"],
        ["embedded", "uniform LoRA", "EVA", "–", "–", "–"],
        ["sst2", "uniform LoRA", "–", "–", "EVA", "–"],
        ["sst2", "the same ranks shuffled", "–", "EVA's pattern anew", "–", "–"],
    ]
    formed = Comparison("AdaLoRA", SVD.name, difference, adjusted=0.01, same=1.0)
    both = [(embedded, [undecided, formed]), (sst2, [anew])]
    assert on_models(both) == (
        "At equal budgets, each at its own best rate, on embedded: nothing that moves rank beats uniform LoRA (1 "
        "undecided), AdaLoRA (embedded) beats equal ranks in the same form (1 better), "
        "and no found pattern, trained anew, beats the same ranks shuffled (1 on par)."
    )
    assert verdict_table(both)[2] == ["embedded", "the same form, equal ranks", "AdaLoRA", "–", "–", "–"]
    said = on_models([(embedded, [undecided, control]), (sst2, [undecided])])
    assert said == f"{begins}nothing that moves rank beats uniform LoRA (2 undecided)."
    said = on_models([(embedded, [better]), (sst2, [better])])
    assert said == f"{begins}EVA (embedded) and EVA (sst2) beat uniform LoRA (2 better)."
    assert on_models([(embedded, [control])]).startswith("Too few runs")


def test_runs_that_always_answer_the_same_are_named():
    for name in ("sst2", "mrpc"):
        with gzip.open(shared(f"data/{name}/test.jsonl.gz"), "rt") as lines:
            labels = Counter(json.loads(line)["label"] for line in lines)
        assert PROBLEMS[name].constant == min(labels.values()) / labels.total()
    stored = next(s for s in read(STORED) if s.problem.name == "mrpc")
    rows = [dict(row) for row in stored.rows]
    for row in rows:
        if row["arm"] == "EVA" and row["seed"] == 3:
            row["metric"] = PROBLEMS["mrpc"].constant
    assert "No better than the best constant answer on mrpc" in missing([stored])
    assert "EVA (seed 3)" in missing([Study(stored.problem, rows)])
    assert "EVA (seed 3)" not in missing([stored])


def test_an_arm_that_diverges_on_a_seed_is_not_judged_by_the_others():
    stored = next(s for s in read(STORED) if s.problem.name == "planted")
    bad = next(r["key"] for r in stored.rows if r["arm"] == "EVA" and r["seed"] == 2)
    one = next(r["key"] for r in stored.rows if r["arm"] == "ALoRA's pattern shuffled 2" and r["seed"] == 3)
    rows = [{**r, "failed": "step 7", "metric": None} if r["key"] in (bad, one) else r for r in stored.rows]
    study = Study(stored.problem, rows)
    before, after = ({(c.arm, c.other) for c in of.comparisons()} for of in (stored, study))
    gone = {("EVA", "uniform"), ("EVA", "EVA's pattern shuffled"), ("ALoRA's pattern shuffled 2", "uniform")}
    gone |= {(arm, "ALoRA's pattern shuffled") for arm in ("ALoRA", "ALoRA's pattern anew")}
    assert before - after == gone
    said = "Diverged on planted at the chosen rate, and so not compared: "
    assert f"{said}EVA (seed 2); ALoRA's pattern shuffled 2 (seed 3)." in missing([study])
    assert study.not_run() == []


def test_runs_that_lose_what_they_had_learnt_are_named():
    """One of the fifteen with shuffled patterns fell to chance on SST-2, and makes their mean and its interval wide."""
    stored = next(s for s in read(STORED) if s.problem.name == "sst2")
    lost = (
        "Lost on sst2 what they had learnt, and compared all the same: ALoRA first-order's pattern shuffled 2 (seed 4)"
    )
    assert f"{lost}." in missing([stored])
    kept = [r for r in stored.rows if not (r["arm"].endswith("shuffled 2") and r["seed"] == 4)]
    assert "had learnt" not in missing([Study(stored.problem, kept)])


def test_rows_that_are_too_few_to_compare_are_said_to_be_there():
    found = next(s for s in read(STORED) if s.problem.name == "planted")
    uniform = [r for r in found.rows if r["arm"] == "uniform"]
    tuning = [r for r in uniform if r["seed"] not in found.problem.seeds]
    assert tuning
    four = tuning + [r for r in uniform if r["seed"] in found.problem.seeds[:4]]
    begins = "On planted nothing is compared yet; "
    assert f"{begins}judged so far: uniform on 4 seeds." in missing([Study(found.problem, four)])
    assert f"{begins}rates are still being chosen." in missing([Study(found.problem, tuning)])


def test_the_page_names_what_is_absent_and_what_is_of_another_size():
    """Names have commas. On SST-2 a fourth rank of LoRA²'s would exceed the budget, so that it has a quarter less."""
    stored = next(s for s in read(STORED) if s.problem.name == "sst2")
    assert "; LoRA² (75 % of its parameters); " in missing([stored])
    few = [r for r in stored.rows if r["arm"] in ("uniform", "EVA") or r["seed"] not in stored.problem.seeds]
    said = missing([Study(stored.problem, few)])
    assert "on sst2, or with too few seeds: uniform at the peak size; ALoRA first-order; AdaLoRA; LoRA²; LoRA" in said
    assert "; ALoRA first-order's pattern anew; ALoRA first-order's pattern shuffled; AdaLoRA's pattern anew; " in said
    assert "of its parameters" not in said


def test_an_arm_is_compared_with_its_control_where_both_were_judged():
    stored = next(s for s in read(STORED) if s.problem.name == "embedded")
    arm, control = stored.metrics("LoRA² at 1/8"), stored.metrics("uniform, rank 1")
    found = next(c for c in stored.comparisons() if (c.arm, c.other) == ("LoRA² at 1/8", "uniform, rank 1"))
    assert found.found == paired([control[seed] - arm[seed] for seed in sorted(arm)])
    rows = [r for r in stored.rows if r["arm"] != "uniform, rank 1"]
    assert "uniform, rank 1" not in {c.other for c in Study(stored.problem, rows).comparisons()}
