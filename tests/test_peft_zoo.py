"""The checks that peft's models go through: on models of ours, on broken ones, and on peft's where they are at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("tyro", reason="tyro is an extra; experiments need it")
pytest.importorskip("peft", reason="peft is an extra; nothing to write files for without it")

from checks import peft_cases, peft_zoo

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses what transformers is about to rename
ROOT = Path(__file__).parents[1]
MERGING = {"merge", "float64", "bfloat16", "float16"}


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.down(x).tanh().mean((-1, -2)))


class Entries(nn.Module):
    """An embedding and a head, which share their weight if tied."""

    def __init__(self, tied: bool = False):
        super().__init__()
        self.table = nn.Embedding(20, 6)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 20, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(self.inner(self.table(x)).tanh())


class Doubled(nn.Module):
    """Breaks what a layer promises: it reads the weight besides calling it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x):
        return self.layer(x) + 10 * nn.functional.linear(x, self.layer.weight)


class Counting(nn.Linear):
    """Changes a buffer whenever it is called."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Ignoring(nn.Module):
    """Has a layer that it does not use."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x):
        return x + 0 * self.layer(x)


def case(make, x, layers, **options) -> peft_cases.Case:
    return peft_cases.Case(make.__name__, peft_cases.built(make), x, layers, rank=2, **options)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def entries() -> torch.Tensor:
    return torch.arange(20).view(4, 5)


def not_holding(outcomes: dict[str, peft_zoo.Outcome]) -> dict[str, tuple[str, str]]:
    return {name: (o.status, o.reason) for name, o in outcomes.items() if o.status != "holds"}


@pytest.mark.parametrize(
    "one",
    [
        case(Convolutions, numbers(2, 3, 8, 8), ("down",), trained=("head",)),
        case(Entries, entries(), ("table", "inner")),
        case(Convolutions, numbers(2, 3, 8, 8), (), dropout=0.1),
    ],
    ids=lambda one: one.label,
)
def test_every_check_holds_on_models_of_ours(one):
    assert not_holding(peft_zoo.run(one)) == {}


def test_on_a_tied_weight_everything_holds_but_merging_which_is_refused():
    def tied():
        return Entries(tied=True)

    outcomes = not_holding(peft_zoo.run(case(tied, entries(), ("table",))))
    assert outcomes.keys() == MERGING
    assert {status for status, _ in outcomes.values()} == {"refused"}
    assert all("are one tied tensor" in reason for _, reason in outcomes.values())


@pytest.mark.parametrize(
    ("make", "layer", "wrong"),
    [
        (Doubled, "layer", MERGING),
        (lambda: nn.Sequential(Counting(5, 5)), "0", {*MERGING, "trains", "several"}),
    ],
    ids=["doubled", "counting"],
)
def test_the_checks_see_a_layer_that_breaks_its_promise(make, layer, wrong):
    outcomes = peft_zoo.run(case(make, numbers(4, 5), (layer,)))
    assert {name for name, outcome in outcomes.items() if outcome.status == "fails"} == wrong


def test_the_checks_see_a_layer_without_effect():
    outcomes = peft_zoo.run(case(Ignoring, numbers(4, 5), ("layer",)))
    assert outcomes["effect"] == peft_zoo.Outcome(
        "fails", "AssertionError: output with adapters is the same as without"
    )


def test_what_a_model_cannot_do_by_itself_is_not_held_against_its_adapters():
    class OnlyDouble(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x):
            return self.layer(x.double())

    outcomes = peft_zoo.run(case(OnlyDouble, numbers(4, 5), ("layer",)))
    assert outcomes["float64"].status == "holds"
    assert {outcome.status for name, outcome in outcomes.items() if name != "float64"} == {"base"}


def test_targets_are_read_as_peft_reads_them():
    from peft import LoraConfig

    model = nn.ModuleDict(
        {"lin": nn.Linear(2, 2), "a": nn.ModuleDict({"lin": nn.Linear(2, 2), "alin": nn.Linear(2, 2)})}
    )
    expected = {"lin": ["lin"], r".*\.lin": ["a.lin"]}
    for modules, names in expected.items():
        assert peft_cases.targeted(model, LoraConfig, {"target_modules": modules}) == names
    assert peft_cases.targeted(model, LoraConfig, {"target_modules": ["lin"]}) == ["lin", "a.lin"]
    assert peft_cases.targeted(model, LoraConfig, {"target_parameters": ["a.lin.weight"]}) == ["a.lin"]


def test_no_option_is_dropped_in_silence():
    understood = {"r": 4, "target_modules": ["lin0"], "init_lora_weights": False, "modules_to_save": ["lin1"]}
    assert peft_cases.without_equivalent(understood) == []
    assert peft_cases.without_equivalent(understood | {"use_dora": True}) == ["use_dora"]
    assert peft_cases.without_equivalent({"init_lora_weights": "mica"}) == ["init_lora_weights='mica'"]


def test_peft_s_models(tmp_path):
    checkout = os.environ.get("PEFT_CHECKOUT")
    if not checkout:
        pytest.skip("PEFT_CHECKOUT names no checkout of github.com/huggingface/peft, whose models this runs")
    command = [sys.executable, "experiments/checks/peft_zoo.py", "--peft", checkout, "--out", str(tmp_path)]
    done = subprocess.run([*command, "--page", str(tmp_path / "page.md")], cwd=ROOT, capture_output=True, text=True)
    assert (tmp_path / "zoo.json").exists(), done.stderr
    zoo = json.loads((tmp_path / "zoo.json").read_text())
    found = [(line["case"], name, check) for line in zoo["cases"] for name, check in line["checks"].items()]
    assert [(case, name, check["reason"]) for case, name, check in found if check["status"] == "fails"] == []
    # What the documentation says is refused, and nothing else: layers of other kinds, and attention in peft's file.
    refused = {
        (name if "MultiheadAttention" in c["reason"] else "", c["reason"].split(":")[0])
        for _, name, c in found
        if c["status"] == "refused"
    }
    assert refused <= {("", "TargetError"), ("peft's file", "StateError")}
    assert sum(len(line["sources"]) for line in zoo["cases"]) >= 331
    assert done.returncode == 0
