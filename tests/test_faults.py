"""Processes killed and files damaged: some of what faults.py and fuzz.py in experiments/checks do; docs/results.md."""

from __future__ import annotations

import pytest

from checks import faults, fuzz


@pytest.mark.parametrize("method", ["alora", "adalora"])  # what is saved of every method: tests/test_resume.py
def test_killed_processes_go_on_and_end_as_if_nothing_had_been(method, tmp_path):
    outcome = faults.outcome(method, faults.Faults(kills=3, steps=25), tmp_path)
    assert outcome.kills >= 3
    assert outcome.identical == outcome.runs > 0


def test_a_thousand_damaged_files(capsys):
    found = fuzz.main(fuzz.Fuzz(files=1000))
    assert {sort: f.failures for sort, f in found.items()} == dict.fromkeys(found, 0), capsys.readouterr().out
    assert found["adapters"].refused > 480
    assert found["checkpoints"].refused > 240
