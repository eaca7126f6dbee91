"""Architectures of transformers: what docs/architectures.md says is checked here on four of them, and its list held
against the script's."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is an extra; nothing to test without it")
pytest.importorskip("peft", reason="peft is an extra; one of the checks loads with it")

import lorafamily
from checks import architectures, architectures_checks
from checks.architectures import examined
from checks.architectures_checks import CHECKS, stands
from checks.architectures_models import ARCHITECTURES, without_dropout
from checks.architectures_page import METHODS, Notes, Row, page_of

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "wavlm"])
def test_every_check_holds(name):
    """LoRA, and LoRA², whose factors are products themselves."""
    row = examined(BY_NAME[name], ("lora", "lora2"))
    assert {method: row.failed(method) for method in row.results} == {"lora": {}, "lora2": {}}
    assert all(list(results) == list(CHECKS) for results in row.results.values())
    assert row.generates == (name in ("llama", "t5"))


def test_the_list_is_wide():
    assert len(BY_NAME) == len(ARCHITECTURES) >= 40
    families = Counter(architecture.family.split(",")[0] for architecture in ARCHITECTURES)
    expected = {"decoder", "encoder", "encoder-decoder", "vision", "speech", "state-space", "vision-language"}
    assert families.keys() == expected
    assert min(families.values()) >= 3
    assert sum("experts" in architecture.family for architecture in ARCHITECTURES) >= 8
    assert sum("fused" in architecture.family for architecture in ARCHITECTURES) >= 5
    assert sum("GQA" in architecture.family for architecture in ARCHITECTURES) >= 5


def test_the_page_lists_what_the_script_has():
    table = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    head, _, *rows = table
    assert head[-len(METHODS) :] == list(METHODS)
    assert [(row[0], row[1]) for row in rows] == [(each.name, each.family) for each in ARCHITECTURES]
    assert {len(row) for row in rows} == {len(head)}
    named = {check for row in rows for cell in row[-len(METHODS) :] for check in re.findall(r"[a-z]+", cell)}
    assert named <= CHECKS.keys() | {"all"}


def test_the_totals_of_the_page_are_those_of_its_table():
    text = PAGE.read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    whole = sum(all(cell == "all" for cell in row[-len(METHODS) :]) for row in rows)
    assert f"- {whole} of {len(rows)} architectures hold under all of" in text
    for i, method in enumerate(METHODS, -len(METHODS)):
        assert re.search(rf"\b{method} {sum(row[i] == 'all' for row in rows)}\b", text)


class Idle(nn.Module):
    """A model that never calls one of its layers, and calls another one in vain."""

    def __init__(self):
        super().__init__()
        self.used, self.vain, self.idle = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return {"logits": self.used(x) + 0 * self.vain(x)}


def case_of(model: nn.Module, tmp_path: Path) -> architectures.Case:
    batch = {"x": torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))}
    architecture = architectures.Architecture("idle", "", "", dict, {})
    torch.manual_seed(0)
    return architectures.Case(architecture, "lora", model, batch, architectures.controlled(model, batch), tmp_path)


def test_adapters_without_gradient_or_effect_are_named(tmp_path):
    case = case_of(Idle(), tmp_path)
    assert architectures_checks.gradients(case) == "never called, no gradient: idle"
    assert architectures_checks.effect(case) == "without effect: idle and 1 more"
    assert architectures_checks.generate(case) == "–"


@pytest.mark.parametrize(
    ("function", "instead", "check", "reason"),
    [
        ("merge", lorafamily.remove, "merge", r"merged outputs are \S+ from adapted ones"),
        ("unmerge", lambda model: model, "merge", "unmerged outputs differ"),
        ("load", lambda model, folder: lorafamily.apply(model, rank=2, seed=0), "file", "loaded outputs differ"),
        ("remove", lambda model: model, "remove", "other tensors: .+"),
        (
            "apply",
            lambda model, *_, **__: model.requires_grad_(False),
            "effect",
            "outputs differ from the base's by 0e.00 only",
        ),
    ],
)
def test_the_checks_notice_what_goes_wrong(function, instead, check, reason, tmp_path, monkeypatch):
    """In the place of a function of the package stands another, which does something else or nothing."""
    case = case_of(Idle(), tmp_path)
    monkeypatch.setattr(lorafamily, function, instead)
    assert re.fullmatch(reason, CHECKS[check](case))


def test_an_error_is_a_reason(tmp_path):
    def failing(case):
        raise ValueError("first line\nsecond line")

    case = case_of(Idle(), tmp_path)
    assert architectures_checks.judged(failing, case) == "ValueError: first line"
    assert not stands("ValueError: first line")
    assert stands("holds (2 unvisited)")
    assert stands("–")


def test_notes_are_shared_by_what_differs_in_a_difference_only():
    notes = Notes()
    assert notes.cell({}) == "all"
    assert notes.cell({"merge": "merged outputs are 5e-02 from adapted ones"}) == "merge (1)"
    assert notes.cell({"start": "x", "merge": "merged outputs are 2e-01 from adapted ones", "file": "x"}) == (
        "start, file (2); merge (1)"
    )
    assert notes.lines() == ["1. merged outputs are up to 2e-01 from adapted ones", "2. x"]


def test_the_page_says_what_was_found():
    good = {method: dict.fromkeys(CHECKS, "holds") for method in METHODS}
    bad = good | {"lora": good["lora"] | {"start": "1e-01 from the base"}}
    rows = [
        Row(name, "f", "M", None, 10, 2, 0.5, "embedding", True, found) for name, found in (("a", good), ("b", bad))
    ]
    about = {"date": "2000-01-01", "torch": "1"}
    text = architectures.markdown("Architectures", page_of(rows, about), PAGE.parent)
    assert "| a | f | 10 | 2 (50%) | embedding | all | all | all | all | all |" in text
    assert "| b | f | 10 | 2 (50%) | embedding | start (1) | all | all | all | all |" in text
    assert "1 of 2 architectures hold" in text
    assert "1. up to 1e-01 from the base" in text
    assert "on 2000-01-01 with torch 1;" in text


def test_a_page_of_a_part_is_refused(tmp_path):
    for part in ({"only": ("llama",)}, {"methods": ("lora",)}):
        with pytest.raises(SystemExit, match="the page has all architectures and methods"):
            architectures.main(architectures.Settings(page=tmp_path / "page.md", out=tmp_path, **part))
    with pytest.raises(SystemExit, match="no architecture lama; there are llama, "):
        architectures.main(architectures.Settings(only=("lama",), out=tmp_path))


def test_no_dropout_is_left():
    for name in ("gpt2", "wav2vec2", "llava"):
        config = without_dropout(BY_NAME[name].build().config)
        nested = [config, *(value for value in vars(config).values() if hasattr(value, "model_type"))]
        assert not any(value for each in nested for key, value in vars(each).items() if "drop" in key)
