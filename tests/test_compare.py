"""The main job: small grids end to end, resuming, and clear refusals before any training."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import json
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

import compare
import embedded
import lorafamily
import tasks
from cells import cell as cells
from cells.settings import Compare, training_of
from pages import report
from pages.groups import Group

ROOT = Path(__file__).parents[1]
TINY = {"steps": 12, "evaluations": 2, "batch": 4, "held_out": 8, "lr": ("2e-3",), "workers": 1}
TINY |= {"progress": False, "pictures": False}


def small(tmp_path, **changes) -> Compare:
    options = ("alora.scorer=first-order", "alora.rounds=2")
    return Compare(**({"out": tmp_path, "options": options, **TINY} | changes))


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_small_grid_gives_table_plots_and_logs(tmp_path, capsys):
    methods = ("none", "full", "lora", "lora2", "alora")
    compare.main(small(tmp_path, seeds=1, budgets=("10e3",), methods=methods, pictures=True))
    folder = tmp_path / "embedded"
    done = rows(folder)
    assert [row["method"] for row in done] == list(methods)
    drawn = {path.parent.name for path in folder.glob("cells/*/rank-by-layer.png")}
    assert drawn == {row["key"] for row in done if row["budget"]}
    for name in ("quality-by-step.png", "quality-by-size.png", "allocation.png"):
        assert (folder / name).stat().st_size > 10_000
    text = (folder / "report.md").read_text()
    assert "differ from the methods' defaults: alora.scorer=first-order, alora.rounds=2." in text
    for word in (
        "bits per byte",
        "learning rate",
        "steps to LoRA's loss",
        "versions",
        "torch 2",
        "| seeds | 0 |",
    ):
        assert word in text
    table = capsys.readouterr().out
    for row in done:
        assert row["method"] in table
        if row["budget"]:
            assert row["trainable"] <= row["budget"]
            assert row["merge_difference"] < 1e-3
            assert list((folder / "cells" / row["key"]).glob("events.*"))
            loaded = lorafamily.load(embedded.pretrained(), folder / "cells" / row["key"] / "adapter")
            assert sum(r.slices for r in lorafamily.summary(loaded).rows) == sum(row["ranks_end"].values())
    by_method = {row["method"]: row for row in done}
    assert by_method["none"]["trainable"] == 0
    assert by_method["none"]["metric"] > by_method["lora"]["metric"]


def test_what_is_cut_after_training_and_what_looks_at_data_first(tmp_path):
    larger = "lora:train_times=2"
    compare.main(small(tmp_path, seeds=1, budgets=("10e3",), methods=("lora", larger, "eva", "gora")))
    done = {row["method"]: row for row in rows(tmp_path / "embedded")}
    assert all(row["failed"] is None and row["trainable"] <= 10_000 for row in done.values())
    cut = done[larger]
    assert sum(cut["ranks_start"].values()) == 2 * sum(done["lora"]["ranks_start"].values())
    assert len(set(cut["ranks_end"].values())) > 1
    assert 0 < cut["cut_error"] < 1
    assert done["lora"]["cut_error"] is None
    assert cut["metric"] != cut["curve"][-1][1]  # measured after the cut
    saved = tmp_path / "embedded" / "cells" / cut["key"] / "adapter"
    assert lorafamily.slices_at(saved) == cut["ranks_end"]
    for looked in ("eva", "gora"):
        assert done[looked]["ranks_start"] == done[looked]["ranks_end"]
        assert len(set(done[looked]["ranks_end"].values())) > 1
    text = (tmp_path / "embedded" / "report.md").read_text()
    assert larger in text
    assert "from before the cut" in text


def test_finished_cells_are_read_back_and_only_missing_ones_run(tmp_path, monkeypatch):
    settings = small(tmp_path, seeds=1, budgets=("10e3",), methods=("none", "lora"))
    compare.main(settings)
    first = rows(tmp_path / "embedded")
    path = tmp_path / "embedded" / "results.jsonl"
    path.write_text(path.read_text() + '{"key": "lora@10000-lr0.002-se')  # a run killed while writing
    ran = []
    real = compare.run
    monkeypatch.setattr(compare, "run", lambda cell, *rest: ran.append(cell.key) or real(cell, *rest))
    compare.main(small(tmp_path, seeds=2, budgets=("10e3",), methods=("none", "lora")))
    assert ran == ["none-lr0.002-seed1", "lora@10000-lr0.002-seed1"]
    assert rows(tmp_path / "embedded")[:2] == first


def test_a_cell_that_was_interrupted_goes_on_to_the_same_row(tmp_path, monkeypatch):
    settings = {"seeds": 1, "budgets": ("10e3",), "methods": ("adalora",), "evaluations": 3}
    compare.main(small(tmp_path / "whole", **settings))
    real, calls = tasks.Bytes.evaluate, []

    def interrupted(task, model):
        calls.append(model.training)
        if len(calls) == 3:  # before training, after a third of it, after two thirds
            os.kill(os.getpid(), signal.SIGTERM)
        return real(task, model)

    monkeypatch.setattr(tasks.Bytes, "evaluate", interrupted)
    with pytest.raises(SystemExit) as stopped:
        compare.main(small(tmp_path / "broken", **settings))
    assert stopped.value.code == 75
    assert not (tmp_path / "broken" / "embedded" / "results.jsonl").exists()
    compare.main(small(tmp_path / "broken", **settings))
    assert len(calls) == 3 + 2  # before training again, and at the end
    (whole,), (broken,) = (rows(tmp_path / name / "embedded") for name in ("whole", "broken"))
    measured = ("seconds_per_step", "peak_mib")
    assert {k: v for k, v in whole.items() if k not in measured} == {
        k: v for k, v in broken.items() if k not in measured
    }
    assert not list(tmp_path.rglob("checkpoints"))


def test_two_processes_give_the_table_of_one(tmp_path):
    given = {"steps": 6, "seeds": 1, "budgets": ("10e3",), "methods": ("none", "lora2"), "evaluations": 1}
    compare.main(small(tmp_path / "one", **given, options=("lora2.warmup=1",)))
    arguments = ["--steps", "6", "--seeds", "1", "--budgets", "10e3", "--methods", "none", "lora2", "--held-out", "8"]
    arguments += [
        "--lr",
        "2e-3",
        "--evaluations",
        "1",
        "--options",
        "lora2.warmup=1",
        "--no-progress",
        "--no-pictures",
        "--batch",
        "4",
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, compare.__file__, *arguments, "--out", str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("cells on cpu") == 1
    found = [rows(tmp_path / name / "embedded") for name in ("one", "two")]
    assert [row["method"] for row in found[1]] == ["none", "lora2"]
    for one, two in zip(*found, strict=True):
        assert one["ranks_end"] == two["ranks_end"]
        # float32: the mean over a batch is taken in two halves.
        assert one["metric"] == pytest.approx(two["metric"], abs=1e-4)
        assert one["file_bytes"] == two["file_bytes"]


@pytest.mark.parametrize("method", ["none", "full", "lora"])
def test_the_head_has_a_rate_of_its_own_the_same_for_every_method(method):
    """One step of AdamW moves every entry with a gradient by its rate: the head by 0.01, whatever the cell's."""
    model = torch.nn.Sequential()
    model.add_module("linear", torch.nn.Linear(8, 8, bias=False))
    model.add_module("head", torch.nn.Linear(8, 4, bias=False))
    if method == "lora":
        lorafamily.apply(model, "lora", rank=2, targets="linear", also_train="^head", seed=0)
    elif method == "none":
        model.linear.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training = dataclasses.replace(training_of(Compare(steps=1, evaluations=1), rows=10), head_lr=1e-2)
    cell = cells.Cell(method, None, None, lr=1e-4, seed=0)
    batch = {"input": torch.randn(16, 8, generator=torch.Generator().manual_seed(0))}
    lorafamily.train(
        model,
        [batch],
        steps=1,
        loss_fn=lambda m, b: m(b["input"]).square().mean(),
        **cells.rates(cell, "^head", training),
        warmup=0,
        schedule="constant",
        seed=0,
        progress=False,
    )
    moved = {name: (p - before[name]).abs().max().item() for name, p in model.named_parameters()}
    assert moved.pop("head.weight") == pytest.approx(1e-2, rel=1e-3)
    if method != "none":
        assert max(moved.values()) == pytest.approx(1e-4, rel=1e-3)


def test_cells_of_other_settings_are_not_mixed_in(tmp_path):
    compare.main(small(tmp_path, seeds=1, methods=("none",)))
    with pytest.raises(tasks.TaskError, match=r"other settings \(steps 12 → 13\)"):
        compare.main(small(tmp_path, seeds=1, methods=("none",), steps=13))


def test_several_learning_rates_are_said_in_the_report(tmp_path):
    compare.main(small(tmp_path, seeds=1, budgets=("10e3",), methods=("none", "lora"), lr=("1e-3", "1e-2"), steps=3))
    text = (tmp_path / "embedded" / "report.md").read_text()
    assert "2 learning rates were tried for every method (0.001, 0.01)" in text
    assert "lora @ 10,000 0.001" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "sst3"}, "unknown task 'sst3'; there are code, text, e2e, gsm8k, cola"),
        ({"task": "sst2"}, "needs --model"),
        ({"task": "text"}, "--task text needs --data"),
        ({"task": "text", "data": Path("/nowhere")}, "/nowhere: no such file"),
        ({"model": "bert"}, "--task code adapts the embedded model"),
        ({"methods": ("lora3",)}, 'no method named "lora3"'),
        ({"methods": ()}, "nothing to compare"),
        ({"methods": ("lora:train_times=0.5",)}, "train_times=0.5 must be a number, 1 or more"),
        ({"budgets": ("100",)}, "budget 100 is too small"),
        ({"options": ("alora",)}, "must be METHOD.OPTION=VALUE"),
        ({"options": ("lora.gamma=1",)}, "unknown option gama|unknown option gamma"),
        ({"methods": ("alora",), "options": (), "steps": 5}, "do not fit into 5 steps"),
        ({"options": ("alroa.scorer=exact",)}, "--options alroa.scorer=exact: no method named"),
        ({"lr": ("1e-3", "lroa=1e-2")}, "--lr lroa=1e-2: no method named"),
        ({"lr": ("fast",)}, "must be a number or METHOD=NUMBER"),
        ({"lr": ("1e-3", "lora=1e-3", "lora=1e-2")}, "fair comparison gives every method equally many"),
    ],
)
def test_what_cannot_work_is_refused_before_any_training(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(compare, "run", lambda *_: pytest.fail("trained"))
    with pytest.raises((tasks.TaskError, lorafamily.LoraFamilyError), match=message):
        compare.main(small(tmp_path, **arguments))


def write_task(folder: Path, name: str, train: list[dict], validation: list[dict]) -> Path:
    (folder / name).mkdir(parents=True)
    for split, lines in (("train", train), ("validation", validation)):
        with gzip.open(folder / name / f"{split}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    return folder


GOOD = [{"sentence": f"word{i} good" if i % 2 else f"word{i} bad", "label": i % 2} for i in range(32)]


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (GOOD, [], "the validation split is empty"),
        ([], GOOD, "the train split is empty"),
        (
            [{"text": "a", "label": 0}],
            GOOD,
            "row 1: no sentence; sst2 rows have sentence, label, this one has text, label",
        ),
        ([{"sentence": "a", "label": 2}], GOOD, "row 1: label 2, not in 0 … 1"),
    ],
)
def test_wrong_data_is_refused_by_row(tmp_path, train, validation, message):
    write_task(tmp_path, "sst2", train, validation)
    with pytest.raises(tasks.TaskError, match=message):
        tasks.find("sst2", model="anything", data=tmp_path, batch=2, length=8)


def test_a_missing_or_damaged_file_is_refused(tmp_path):
    with pytest.raises(tasks.TaskError, match=r"sst2/train\.jsonl\.gz: no such file"):
        tasks.find("sst2", model="anything", data=tmp_path, batch=2, length=8)
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "train.jsonl.gz").write_text("plain text")
    with pytest.raises(tasks.TaskError, match="not gzipped JSON lines"):
        tasks.find("sst2", model="anything", data=tmp_path, batch=2, length=8)


def tiny_bert(folder: Path, labels: int) -> Path:
    """A random BERT with a vocabulary of its own, saved as a user would have it."""
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"] + [f"word{i}" for i in range(32)]
    torch.manual_seed(0)  # not every random BERT of this size learns in sixty steps
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is an extra")
def test_a_glue_task_runs_end_to_end(tmp_path):
    model = tiny_bert(tmp_path / "bert", 2)
    data = write_task(tmp_path / "data", "sst2", GOOD * 4, GOOD)
    compare.main(
        small(
            tmp_path,
            name="sst2",
            task="sst2",
            model=str(model),
            data=data,
            methods=("none", "full", "lora", "lora2", "alora"),
            budgets=("2000",),
            seeds=1,
            lr=("2e-2",),
            head_lr=2e-2,
            steps=60,
        )
    )
    by_method = {row["method"]: row for row in rows(tmp_path / "sst2")}
    assert by_method["none"]["extra_trained"] == by_method["lora"]["extra_trained"] == 34
    assert by_method["lora"]["metric"] > 0.9
    assert "accuracy" in (tmp_path / "sst2" / "report.md").read_text()


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is an extra")
def test_regression_and_causal_text_tasks(tmp_path):
    import transformers

    bert = tiny_bert(tmp_path / "bert", 1)
    pairs = [{"sentence1": f"word{i}", "sentence2": "good", "label": i / 8} for i in range(32)]
    task = tasks.find("stsb", model=str(bert), data=write_task(tmp_path / "d", "stsb", pairs, pairs), batch=4, length=8)
    model, head = task.model(0)
    assert head is not None
    with torch.no_grad():
        held_out = [(model.eval()(**batch).logits.flatten(), batch["labels"]) for batch in task.validation()]
    predicted, true = map(torch.cat, zip(*held_out, strict=True))
    expected = (scipy.stats.pearsonr(predicted, true).statistic + scipy.stats.spearmanr(predicted, true).statistic) / 2
    assert task.evaluate(model)[task.metric] == pytest.approx(expected, abs=1e-4)  # other padding, float32

    gpt = tmp_path / "gpt"
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    tokenizer.save_pretrained(gpt)
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=16)
    ).save_pretrained(gpt)
    text = tmp_path / "text.txt"
    text.write_text("good bad word1 word2 " * 400)
    compare.main(
        small(
            tmp_path,
            name="text",
            task="text",
            model=str(gpt),
            data=text,
            length=16,
            methods=("none", "lora"),
            budgets=("500",),
            seeds=1,
        )
    )
    none, lora = rows(tmp_path / "text")
    assert lora["metric"] < none["metric"]


def test_the_embedded_model_takes_a_text_of_ones_own(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question: " * 2000)
    compare.main(small(tmp_path, task="text", data=text, methods=("none", "lora"), seeds=1))
    none, *adapted = rows(tmp_path / "embedded")
    assert all(row["metric"] < none["metric"] for row in adapted)


def test_glue_scores():
    predicted, true = np.array([1, 1, 0, 1]), np.array([1, 0, 0, 1])
    assert tasks.glue_score("accuracy", predicted, true) == 0.75
    # tp 2, fp 1, fn 0, tn 1: F1 = 4/5; Matthews = (2·1 − 1·0) / √(3·2·2·1)
    assert tasks.glue_score("mean of accuracy and F1", predicted, true) == pytest.approx((0.75 + 0.8) / 2)
    assert tasks.glue_score("Matthews correlation", predicted, true) == pytest.approx(2 / 12**0.5)
    assert tasks.glue_score("Matthews correlation", np.ones(4), true) == 0.0
    up = np.array([0.1, 0.2, 0.4, 0.9])
    assert tasks.glue_score("mean of Pearson and Spearman correlation", up, 3 * up) == pytest.approx(1.0)


def test_steps_to_reach_the_loss_of_lora():
    def group(method, curves, size="10"):
        made = [
            {
                "seed": seed,
                "trainable": 1,
                "loss_curve": list(zip((0, 10, 20), own, strict=True)),
                "validation_loss": own[-1],
            }
            for seed, own in enumerate(curves)
        ]
        return Group(method, size, None if size is None else "all", 1.0, tuple(made))

    lora = group("lora", [[3, 2, 1], [3, 2, 1.5]])
    fast = group("a", [[3, 1, 1], [3, 0, 1]])
    half = group("b", [[3, 1, 1], [3, 2, 2]])
    slow = group("c", [[3, 3, 3]] * 2)
    full = group("full", [[3, 1, 1], [3, 1.5, 1]], size=None)
    groups = [lora, fast, half, slow, full]
    assert [report.steps_to_reach(groups, g) for g in groups] == ["20", "8", "10 (1 of 2 seeds)", "not reached", "10"]


def test_peak_memory_sees_what_was_held():
    memory = cells.PeakMemory("cpu")
    before = memory.read()
    mebibyte = bytes([1]) * 2**20
    with mmap.mmap(-1, 64 * 2**20) as fresh:  # what torch allocates may be memory that the process holds already
        for _ in range(64):
            fresh.write(mebibyte)
    assert 50 < memory.read() - before < 80
    assert cells.PeakMemory("cpu").read() < before + 30  # the mark is set back


def test_a_method_of_another_package_is_found_and_trains(tmp_path):
    """A package outside the repository, built and installed; it brings a start of its own in one file."""
    source = tmp_path / "outside"
    (source / "outside_lora").mkdir(parents=True)
    (source / "outside_lora" / "__init__.py").write_text(
        "from dataclasses import dataclass\n"
        "from lorafamily import Initialisation\n"
        "from lorafamily.variants.lora import lora\n\n"
        "@dataclass(frozen=True)\n"
        "class Ones(Initialisation):\n"
        "    value: float = 0.1\n"
        "    def __call__(self, update, weight, generator):\n"
        "        update.A.fill_(self.value)\n\n"
        "ones = lora.but(initialisation=Ones())\n"
    )
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "outside-lora"\nversion = "1"\n'
        '[project.entry-points."lorafamily.variants"]\nones = "outside_lora:ones"\n'
    )
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        site,
        source,
    ]
    subprocess.run(install, check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [
        sys.executable, ROOT / "experiments" / "compare.py", "--methods", "none", "ones", "--budgets", "10e3",
        "--seeds", "1", "--steps", "12", "--evaluations", "1", "--held-out", "8", "--workers", "1", "--no-progress",
        "--no-pictures", "--out", tmp_path / "runs", "--options", "ones.value=0.2", "--lr", "2e-3",
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    none, ones = rows(tmp_path / "runs" / "embedded")
    assert ones["method"] == "ones"
    assert ones["metric"] < none["metric"]
    assert '"value": 0.2' in (tmp_path / "runs" / "embedded" / "report.md").read_text()


def test_the_command_line_says_in_one_line_what_is_wrong(tmp_path):
    command = [sys.executable, ROOT / "experiments" / "compare.py", "--methods", "lora3", "--out", tmp_path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith('compare.py: no method named "lora3" is installed')
    assert "Traceback" not in done.stderr
