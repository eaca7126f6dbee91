"""The published counts and claims, from names of models; and the command `lorafamily plan`."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest
import torch

import lorafamily
from lorafamily.cli import main
from lorafamily.planner import Planner
from lorafamily.planner.bars import memory_bars
from lorafamily.planner.costs import Memory
from lorafamily.planner.models import SHAPES, example_batch, model_of, targets_of
from lorafamily.terminal import in_units

transformers = pytest.importorskip("transformers", reason="builds the models of the names")
shape = functools.cache(model_of)  # plans leave models alone, so that tests can share them


def planned(name, method, targets=None, dtype=None, factors=None, **size):
    model = shape(name)
    which, fused = targets_of(model, targets)
    return Planner(model, dtype=dtype, factors=factors).plan(method, targets=which, fused=fused, **size)


# METHODS of this project, sec. 1 and 4: computed from shapes; the LoRA paper prints 0.35M and 0.77M for GPT-2 M and L,
# and r = 8 for DeBERTa XXL, where its scripts have 16.
@pytest.mark.parametrize(
    ("name", "method", "targets", "size", "numbers"),
    [
        ("roberta-base", "lora", "qv", {"rank": 8}, 294_912),
        ("roberta-large", "lora", "qv", {"rank": 8}, 786_432),
        ("deberta-xxl", "lora", "qv", {"rank": 16}, 4_718_592),
        ("gpt2-medium", "lora", "qv", {"rank": 4}, 393_216),
        ("gpt2-large", "lora", "qv", {"rank": 4}, 737_280),
        ("gpt3-175b", "lora", "qv", {"rank": 1}, 4_718_592),
        ("gpt3-175b", "lora", "qv", {"rank": 8}, 37_748_736),
        ("gpt3-175b", "lora", "qv", {"rank": 64}, 301_989_888),
        ("gpt3-175b", "lora", "qkvo", {"rank": 2}, 18_874_368),
        ("gpt3-175b", "lora", "qv", {"rank": 4}, 18_874_368),
        ("deberta-v3-base", "lora2", None, {"rank": 8}, 1_336_896),
        ("deberta-v3-base", "lora2", None, {"budget": 0.34e6}, 334_656),
        ("deberta-v3-base", "lora2", None, {"budget": 0.17e6}, 167_616),
    ],
)
def test_published_counts(name, method, targets, size, numbers):
    assert planned(name, method, targets, **size).use.adapters == numbers


# As published, in millions or billions; heads of two classes in place of the pre-training ones.
@pytest.mark.parametrize(
    ("name", "numbers", "published"),
    [
        ("bert-base", 109_483_778, "110M"),
        ("roberta-base", 124_647_170, "125M"),
        ("roberta-large", 355_361_794, "355M"),
        ("deberta-v3-base", 184_423_682, "184M"),
        ("deberta-xxl", 1_566_913_538, "1.5B"),
        ("gpt2", 124_439_808, "124M"),
        ("gpt2-medium", 354_823_168, "355M"),
        ("gpt2-large", 774_030_080, "774M"),
        ("gpt3-175b", 174_604_259_328, "175B"),
        ("llama-2-7b", 6_738_415_616, "6.7B"),
    ],
)
def test_shapes_have_the_published_sizes(name, numbers, published):
    assert sum(parameter.numel() for parameter in shape(name).parameters()) == numbers


def test_every_shape_has_its_size_checked():
    (mark,) = test_shapes_have_the_published_sizes.pytestmark
    assert {name for name, *_ in mark.args[1]} == set(SHAPES)


def test_claims_of_the_lora_paper_and_what_they_assume():
    """Sec. 4.2: GPT-3 training memory 1.2 TB → 350 GB, checkpoint 350 GB → 35 MB (q and v, r = 4)."""
    plan = planned("gpt3-175b", "lora", "qv", torch.float16, torch.float16, rank=4)
    weights = plan.full.memory.weights
    assert plan.full.file_bytes == weights == pytest.approx(350e9, rel=0.005)  # 2 bytes a number, 175 billion
    # 18.9 million numbers of 2 bytes are 37.7 MB or 36.0 MiB; names and shapes of 384 tensors are the rest.
    assert plan.use.files["adapter.safetensors"] == pytest.approx(2 * 18_874_368, rel=0.002)
    assert 2 * 18_874_368 == 36 * 2**20
    assert plan.use.memory.peak == pytest.approx(350e9, rel=0.005)  # no activations
    # Full fine-tuning with everything in 16 bit, weights, gradients and two states: 1.27 TiB, the paper's 1.2 TB.
    # Without gradients it is 1.05 TB, with states in 32 bit 2.1 TB.
    assert plan.full.memory.peak == pytest.approx(4 * weights, rel=1e-6)
    assert plan.full.memory.peak / 2**40 == pytest.approx(1.27, abs=0.005)
    wider = Planner(shape("gpt3-175b"), dtype=torch.float16, states=torch.float32).full.memory
    assert wider.peak == pytest.approx(2.1e12, rel=0.005)
    # What apply makes, float32 factors, is twice the file.
    assert planned("gpt3-175b", "lora", "qv", torch.float16, rank=4).use.file_bytes == pytest.approx(75.5e6, rel=0.003)


@pytest.mark.parametrize(
    ("name", "count"), [("gpt2", 6), ("llama-2-7b", 7), ("deberta-v3-base", 6), ("roberta-base", 6), ("bert-base", 6)]
)
def test_short_names_are_of_every_matrix(name, count):
    every = planned(name, "lora", rank=1)
    short = planned(name, "lora", ["q", "k", "v", "o", "gate", "up", "down"][: 4 if count < 7 else 7], rank=1)
    layers = shape(name).config.num_hidden_layers
    assert len(short.slices) == layers * (4 if count < 7 else 7)
    ends = planned(name, "lora", ["up", "down"], rank=1)
    assert len(ends.slices) == 2 * layers
    if name != "gpt2":  # whose q, k and v are one layer
        assert len(every.slices) == layers * count
        assert {*short.slices, *ends.slices} == set(every.slices)


def test_expressions_go_beside_short_names():
    model = shape("bert-base")
    assert targets_of(model, ["q", "pooler"]) == ([r"attention\.self\.query$", "pooler"], None)
    assert targets_of(model, ["attention"]) == ("attention", None)
    assert targets_of(model, None) == (None, None)


@pytest.mark.parametrize(
    ("name", "keys"), [("gpt2", {"input_ids": (2, 8), "labels": (2, 8)}), ("bert-base", {"labels": (2,)})]
)
def test_an_example_has_what_the_task_wants(name, keys):
    batch = example_batch(shape(name), 2, 8)
    for key, size in keys.items():
        assert (batch[key].shape, batch[key].device.type) == (size, "meta")


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(lorafamily.DataError, match=r"length=1025: this GPT2LMHeadModel has 1024 positions"):
        example_batch(shape("gpt2"), 1, 1025)
    with pytest.raises(lorafamily.DataError, match="batch=0: must be at least 1"):
        example_batch(shape("gpt2"), 0, 8)


def test_command_prints_counts_and_draws(capsys, tmp_path):
    picture = tmp_path / "plan.png"
    command = ["plan", "deberta-v3-base", "--method", "lora2", "lora", "--budget", "0.17e6", "--png", str(picture)]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "167,616" in text
    assert "165,888" in text
    assert "activations: not counted, no batch was given" in text
    assert picture.stat().st_size > 10_000
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [plan["use"]["adapters"] for plan in result["plans"]] == [167_616, 165_888]
    assert result["plans"][0]["use"]["memory"]["activations"] is None


def test_command_reads_a_config_and_shows_every_method(capsys, tmp_path):
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        architectures=["BertForSequenceClassification"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--rank", "2"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n{method} " in text for method in lorafamily.methods())
    command = ["plan", str(tmp_path), "--method", "lora", "--also-train", "classifier", "--recompute"]
    assert main([*command, "--batch", "4", "--length", "16"]) == 0
    text = capsys.readouterr().out
    assert "of a batch of input_ids 4 × 16, labels 4, recomputed in the backward" in text
    arguments = ["--architecture", "BertForMaskedLM", "--json", "--method", "lora", "--targets", "query"]
    assert main(["plan", str(tmp_path / "config.json"), *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["plans"][0]["model"] == "BertForMaskedLM"


def test_methods_that_a_budget_is_too_small_for_are_named(capsys):
    assert main(["plan", "bert-base", "--budget", "165_900"]) == 0
    text = capsys.readouterr().out
    assert "\nlora " in text
    assert "\nlora2: budget 165,900 is too small" in text
    assert main(["plan", "bert-base", "--budget", "100"]) == 2
    assert "budget 100 is too small" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt3"], "no such file or folder, and no shape of that name; did you mean gpt"),
        (["{folder}"], "no config.json there"),
        (["{folder}/broken.json"], "no config that transformers reads"),
        (["{folder}/bare.json"], "its config names no architecture; name one by --architecture, such as BertFor"),
        (["gpt2", "--fused", "c_attn$"], '--fused c_attn$: must be a regular expression, "=" and names'),
        (["gpt2", "--targets", "nothing"], 'target "nothing" matches no layer'),
        (["gpt2", "--method", "lora3"], 'no method named "lora3"'),
    ],
)
def test_command_says_what_is_wrong(arguments, message, capsys, tmp_path):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "bare.json").write_text('{"model_type": "bert"}')
    assert main(["plan", *(part.format(folder=tmp_path) for part in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_without_transformers_the_command_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["plan", "gpt2"]) == 2
    assert 'pip install "lorafamily[tasks]"' in capsys.readouterr().err


def test_importing_imports_no_extra_and_nothing_slow():
    extras = {"transformers", "peft", "accelerate", "bitsandbytes", "torchao", "tyro", "matplotlib", "scipy.optimize"}
    script = f"import sys, lorafamily.cli; sys.exit(' '.join({extras} & sys.modules.keys()) or None)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_000, "1.00 kB"),
        (999_700, "1.00 MB"),
        (37_748_736, "37.7 MB"),
        (349.2e9, "349 GB"),
    ],
)
def test_bytes_in_units(size, text):
    assert in_units(int(size)) == text


def test_picture_has_a_bar_for_each_way_and_a_mark_where_the_peak_is_less_than_the_sum():
    whole = Memory(10**9, 10**9, 2 * 10**9, 3 * 10**9, 6 * 10**9)
    ways = {"lora": Memory(10**9, 10**6, 2 * 10**6, 3 * 10**9, 4_003 * 10**6), "full fine-tuning": whole}
    (axes,) = memory_bars(ways, "a title").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(ways)
    parts = {container.get_label(): [bar.get_width() for bar in container] for container in axes.containers}
    assert parts["weights"] == pytest.approx([memory.weights / 1e9 for memory in ways.values()])
    assert parts["activations"] == pytest.approx([memory.activations / 1e9 for memory in ways.values()])
    (marks,) = axes.lines
    assert list(marks.get_xdata()) == [6]
    assert axes.get_xlabel() == "memory of a training step (GB)"
