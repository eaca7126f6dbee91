"""experiments/minimal.py: the plain loop runs as it stands, learns, prunes to its budget, and merges."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "experiments" / "minimal.py"


def test_the_plain_loop_learns_and_prunes_to_its_budget(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "40"])
    with torch.random.fork_rng():
        scope = runpy.run_path(str(SCRIPT))
    printed = capsys.readouterr().out
    bits = {
        when: float(value)
        for when, value in re.findall(
            r"^(before training|with adapters|after training|merged): +([\d.]+)", printed, re.M
        )
    }
    assert bits["with adapters"] == bits["before training"]  # ΔW is zero at first
    assert bits["after training"] < bits["before training"] - 0.05  # 0.08 lower where it was written
    assert bits["merged"] == pytest.approx(bits["after training"], abs=2e-3)  # the last printed digit
    counts = [tuple(map(int, found)) for found in re.findall(r"(\d+) slices → (\d+)", printed)]
    assert [after for _, after in counts[:-1]] == [before for before, _ in counts[1:]]
    assert counts[0][0] == sum(scope["session"].start.values())
    assert all(after < before for before, after in counts)
    assert counts[-1][1] == scope["session"].decisions[-1].total
