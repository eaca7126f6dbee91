"""The claims harness: verdicts follow from the data alone, and the committed page is what the command writes."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

import claims
from claims import Claims
from studies import statements
from studies.intervals import holm
from studies.statements import STATEMENTS, Arm, Setting, Statement, judge, outcomes
from tasks.task import read_rows

STORED = Path(__file__).parents[1] / "docs" / "claims"
NOISE = np.array([0.31, -0.42, 0.17, -0.28, 0.22])  # mean zero


def rows(method, budget, metrics, curve=((0, 3.0), (10, 2.0), (20, 1.0))):
    return [
        {
            **{"method": method, "budget": budget, "rank": None, "targets": "all", "lr": 0.1, "seed": seed},
            **{"failed": None, "metric": float(metric), "validation_loss": curve[-1][1], "loss_curve": curve},
        }
        for seed, metric in enumerate(metrics)
    ]


def setting(*groups, higher=True, margin=0.5, chance=None):
    if chance is None:
        chance = -1e3 if higher else 1e3
    return Setting("here", "a test", "accuracy", higher, margin, chance, [row for group in groups for row in group])


BETTER = Statement("better", "", "", Arm("a"), Arm("b"))
NO_WORSE = Statement("no worse", "", "", Arm("a"), Arm("b"), relation="no worse")
QUICKER = Statement("quicker", "", "", Arm("a"), Arm("b"), measure="steps")


@pytest.mark.parametrize(
    ("shift", "statement", "verdict"),
    [
        (2.0, BETTER, "holds"),
        (0.1, BETTER, "undecided"),
        (-2.0, BETTER, "does not hold"),
        (2.0, NO_WORSE, "holds"),
        (0.2, NO_WORSE, "holds"),  # within the margin
        (-0.5, NO_WORSE, "undecided"),  # at the margin
        (-2.0, NO_WORSE, "does not hold"),
    ],
)
@pytest.mark.parametrize("higher", [True, False])
def test_verdicts(shift, statement, verdict, higher):
    """Five seeds, differences of standard deviation 0.31 around a known mean, whichever way the metric points."""
    sign = 1 if higher else -1
    own = setting(rows("a", 80, 5 + sign * (shift + NOISE)), rows("b", 80, [5] * 5), higher=higher)
    (outcome,) = outcomes([own], [statement])
    assert outcome.verdict == verdict
    assert outcome.difference == pytest.approx(shift)
    assert outcome.low < shift < outcome.high
    assert outcome.p == pytest.approx(scipy.stats.ttest_1samp(shift + NOISE, outcome.bound).pvalue)
    g = (shift - outcome.bound) / np.std(NOISE, ddof=1) * (1 - 3 / (4 * 4 - 1))  # Hedges 1981, 4 degrees of freedom
    assert outcome.effect == pytest.approx(g)


def test_an_arm_that_diverges_on_a_seed_is_not_judged_by_the_others():
    """On the sixth seed the arm fails where the other does not; on the first five it is better."""
    own = rows("a", 80, [*(7 + NOISE), 0])
    own[-1] |= {"failed": "step 7", "metric": None}
    (outcome,) = outcomes([setting(own, rows("b", 80, [5] * 6))], [BETTER])
    assert outcome.verdict == "void"
    assert outcome.void == "a run diverged, and the others would be judged alone: a (large)"


def test_differences_are_taken_seed_by_seed():
    """Between seeds the metric varies by 10, between the arms of a seed by 1: only a paired test can tell."""
    spread = np.array([0, 10, 20, 30, 40.0])
    own = setting(rows("a", 80, spread + 1 + 0.3 * NOISE), rows("b", 80, spread))
    assert outcomes([own], [BETTER])[0].verdict == "holds"
    swapped = [row | {"seed": 4 - row["seed"]} if row["method"] == "a" else row for row in own.rows]
    assert outcomes([setting(swapped)], [BETTER])[0].verdict == "undecided"


def test_steps_are_to_the_loss_that_both_reach():
    fast, slow = ((0, 3.0), (10, 1.0), (20, 0.5)), ((0, 3.0), (10, 2.0), (20, 1.0))
    flat = ((0, 1.0), (10, 1.5), (20, 2.0))  # which is at its last loss before it begins
    own = setting(rows("a", 80, [1] * 5, fast), rows("b", 80, [1] * 5, slow))
    outcome = judge(QUICKER, own)
    assert outcome.differences == (0.5,) * 5  # 10 steps of 20 fewer
    assert outcome.p == 0.5**4  # five differences that do not vary: the sign test
    assert outcome.verdict == "void"  # two evaluations
    assert judge(QUICKER, setting(rows("a", 80, [1] * 5, slow), rows("b", 80, [1] * 5, fast))).difference == -0.5
    assert judge(QUICKER, setting(rows("a", 80, [1] * 5, flat), rows("b", 80, [1] * 5, flat))).difference == 0.0


def test_holm():
    """The example of Holm (1979) as textbooks have it: 0.01, 0.02, 0.03, 0.04 and its order."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_to_equal_what_learnt_nothing_is_no_feat():
    """Both arms answer at random around chance, within the margin of each other to any test."""
    own = setting(rows("a", 80, 5 + 0.1 * NOISE), rows("b", 80, 5 - 0.1 * NOISE), chance=5.0)
    (outcome,) = outcomes([own], [NO_WORSE])
    assert outcome.adjusted < 0.05
    assert not outcome.learnt
    assert outcome.verdict == "undecided"
    same = setting(rows("a", 80, 5.1 + 0.01 * NOISE), rows("b", 80, 5.1 - 0.01 * NOISE), chance=5.0)
    assert outcomes([same], [NO_WORSE])[0].verdict == "holds"


def test_too_few_seeds_say_nothing():
    own = setting(rows("a", 80, NOISE[:4]), rows("b", 80, NOISE))
    with pytest.raises(ValueError, match=r"a \(large\) and b \(large\) share 4 seeds, 5 are the fewest"):
        judge(BETTER, own)


def test_rows_that_chose_rates_are_not_judged():
    tuning = [row | {"lr": lr, "seed": 9} for row in rows("a", 80, [100]) for lr in (0.1, 0.2)]
    own = setting(rows("a", 80, NOISE), rows("b", 80, NOISE), tuning)
    assert own.tuning_seeds == {9}
    assert len(own.runs) == 10
    assert judge(BETTER, own).difference == 0.0


def stored(tmp_path) -> Claims:
    shutil.copytree(STORED, tmp_path / "claims")
    return Claims(results=tmp_path / "claims", out=tmp_path / "claims.md")


def test_the_committed_page_is_what_the_command_writes(tmp_path):
    given = stored(tmp_path)
    found = claims.main(given)
    assert len(found) == len(STATEMENTS) * len(list(STORED.glob("*.jsonl.gz")))
    assert given.out.read_text() == STORED.with_suffix(".md").read_text()
    for outcome in found:
        assert len(outcome.differences) >= statements.SEEDS


def test_another_result_of_one_seed_is_another_table(tmp_path):
    given = stored(tmp_path)
    claims.main(given)
    before = given.out.read_text()
    path = given.results / "claims-code.jsonl.gz"
    changed = read_rows(path)
    row = next(row for row in changed if row["method"] == "olora" and row["seed"] == 3)
    row["metric"] -= 0.2
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in changed)
    claims.main(given)
    after = given.out.read_text()
    changed_lines = [a.split(" | ") for a, b in zip(before.splitlines(), after.splitlines(), strict=True) if a != b]
    verdicts = [line for line in changed_lines if len(line) == 7 and line[3].startswith("**")]
    assert "OLoRA beats LoRA" in {line[0].strip("| ") for line in verdicts}
    assert any(line[0].strip("| ") == "olora" for line in changed_lines if line not in verdicts)  # the runs


def test_an_optimum_at_an_edge_voids_the_arm():
    """Rates 0.1, 0.2, 0.3 were tried with seed 9, and the arm was judged at one of them."""

    def tried(method):
        return [row | {"lr": lr, "seed": 9} for row in rows(method, 80, [1]) for lr in (0.1, 0.2, 0.3)]

    for lr, verdict in ((0.1, "void"), (0.2, "holds"), (0.3, "void")):
        own = [row | {"lr": lr} for row in rows("a", 80, 7 + NOISE)]
        inside = [row | {"lr": 0.2} for row in rows("b", 80, [5] * 5)]
        (outcome,) = outcomes([setting(own, inside, tried("a"), tried("b"))], [BETTER])
        assert outcome.verdict == verdict
        assert ("edge" in outcome.void) == (verdict == "void")


def test_a_budget_of_the_end_is_not_judged_by_runs_with_one_of_the_peak():
    own = setting(rows("a", 80, 7 + NOISE), rows("b", 80, [5] * 5))
    (outcome,) = outcomes([own], [replace(BETTER, budget_at="end")])
    assert outcome.verdict == "void"
    assert outcome.adjusted != outcome.adjusted  # not a number: it takes no part in Holm's method


def test_what_is_stored_comes_back(tmp_path):
    run = tmp_path / "runs" / "claims-code"
    run.mkdir(parents=True)
    shutil.copytree(STORED, tmp_path / "claims")
    text = gzip.decompress((STORED / "claims-code.jsonl.gz").read_bytes())
    (run / "results.jsonl").write_bytes(text)
    before = (STORED / "claims-code.jsonl.gz").read_bytes()
    claims.main(Claims(store=(run / "results.jsonl",), results=tmp_path / "claims", out=tmp_path / "claims.md"))
    assert gzip.decompress((tmp_path / "claims" / "claims-code.jsonl.gz").read_bytes()) == text
    assert (tmp_path / "claims" / "claims-code.jsonl.gz").read_bytes() == before
    with pytest.raises(SystemExit, match="its folder must be claims-code or claims-sst2"):
        claims.main(Claims(store=(tmp_path / "x" / "results.jsonl",), results=tmp_path / "c", out=tmp_path / "c.md"))
