"""Presets of compare.py, the axes of its grid, and what it does with learning rates and runs that diverge."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace

import pytest
import torch

import compare
import embedded
import lorafamily
import presets
import tasks
from cells.cell import MATRICES, Cell, Size, layers_named
from cells.settings import Compare, cells_of, suggested, training_of
from compare import _check
from lorafamily.layers.placement import placement_of
from lorafamily.registry import find as find_method
from lorafamily.targets import match
from pages import page
from test_compare import TINY, rows, tiny_bert, write_task

EMBEDDED = ("embedded", "which-weights", "rank-sweep", "budget-sweep", "scorers", "axes", "claims")
EVERY = [(name, task) for name in presets.names() for task in (None, *presets.find(name).by_task)]


FEW = {"steps": 3, "evaluations": 1}  # where what a run leaves is looked at, and not how far it came


def small(tmp_path, **changes) -> Compare:
    return replace(Compare(out=tmp_path, **TINY), **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a comparison that is only read."""
    out = tmp_path_factory.mktemp("finished")
    compare.main(small(out, methods=("none", "lora"), budgets=("10e3",), seeds=1, name="one", **FEW))
    return out / "one"


def test_all_presets_are_known_and_mentioned_where_one_looks():
    expected = [*EMBEDDED, "glue-deberta", "glue-roberta", "e2e-gpt2", "allocation-llm"]
    assert sorted(presets.names()) == sorted(expected)
    for name in expected:
        assert name in (Compare.__doc__ or "")
    with pytest.raises(tasks.TaskError, match="no such preset; there are allocation-llm, axes, "):
        presets.find("embeded")


@pytest.mark.parametrize(("name", "task"), EVERY)
@pytest.mark.parametrize("quick", [False, True])
def test_every_preset_makes_cells_with_options_that_its_methods_take(name, task, quick):
    settings = presets.defaults(name, quick, task)
    training = training_of(settings, rows=10_000)
    cells = cells_of(settings, settings.run_seeds)
    assert len({cell.key for cell in cells}) == len(cells)
    for method in {cell.method for cell in cells if cell.size}:
        find_method(method.partition(":")[0]).with_options(**training.options_of(method))


@pytest.mark.parametrize("name", EMBEDDED)
@pytest.mark.parametrize("quick", [False, True])
def test_presets_of_the_embedded_model_pass_every_check_before_training(name, quick):
    settings = presets.defaults(name, quick)
    task = tasks.find(settings.task, model=None, data=None, batch=settings.batch, length=settings.length)
    _check(cells_of(settings, [0]), task, training_of(settings, task.rows))


def test_what_is_given_overrides_the_preset():
    given = presets.chosen(["--preset", "which-weights", "--quick", "--steps", "7", "--targets", "q", "[wv]o"])
    assert given == replace(presets.defaults("which-weights", quick=True), steps=7, targets=("q", "[wv]o"))
    assert given.folder.name == "which-weights-quick"
    assert presets.chosen(["--preset=glue-roberta", "--task=cola"]).epochs == 80


def test_settings_of_the_papers():
    """LoRA² on MNLI as METHODS and the paper have it, and LoRA on STS-B."""
    mnli = presets.defaults("glue-deberta", task="mnli")
    options = training_of(mnli, rows=392_702).options["lora2"]
    assert options == {
        **{"gamma": 0.1, "warmup": 8000, "final": 50000, "interval": 100},
        **{"target": 3, "slices": 8, "alpha": 16},
    }
    assert (mnli.length, mnli.epochs, mnli.lr[0]) == (256, 7, "5e-4")
    assert training_of(mnli, rows=392_702).steps == 7 * (392_702 // 32)
    stsb = presets.defaults("glue-roberta", task="stsb")
    assert (stsb.batch, stsb.epochs, stsb.lr[0], stsb.weight_decay, stsb.targets) == (16, 40, "4e-4", 0.1, ("qv",))


@pytest.mark.parametrize("name", ["glue-deberta", "glue-roberta"])
def test_a_preset_without_its_weights_says_so_in_one_line(name, tmp_path):
    settings = presets.defaults(name, quick=True)
    data = write_task(tmp_path, "rte", PAIRS, PAIRS)
    with pytest.raises(tasks.TaskError, match=f"--model {settings.model}: AutoTokenizer cannot load it") as refused:
        compare.main(replace(settings, data=data, model=str(settings.model), out=tmp_path))
    assert "\n" not in str(refused.value)


PAIRS = [{"sentence1": "good", "sentence2": f"word{i}", "label": i % 2} for i in range(32)]


def test_letters_name_the_matrices_of_every_architecture():
    transformers = pytest.importorskip("transformers", reason="transformers is an extra")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.device("meta"):
        models = [
            embedded.ByteDecoder(),
            transformers.BertModel(transformers.BertConfig(**sizes)),
            transformers.DebertaV2Model(transformers.DebertaV2Config(**sizes)),
            transformers.LlamaModel(transformers.LlamaConfig(**sizes)),
            transformers.DistilBertModel(transformers.DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=32)),
            transformers.GPT2Model(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2)),
        ]
    for model in models:
        fused = {"c_attn$": ["q", "k", "v"]} if isinstance(model, transformers.GPT2Model) else None
        layers = 4 if isinstance(model, embedded.ByteDecoder) else 1
        found = {letter: list(match(model, layers_named(letter), fused)) for letter in MATRICES}
        assert [len(own) for own in found.values()] == [layers] * 4, type(model)
        assert len({name for own in found.values() for name in own}) == 4 * layers
        assert set(match(model, layers_named("qv"), fused)) == {*found["q"], *found["v"]}


def test_targets_and_ranks_are_axes_of_the_grid(tmp_path):
    settings = small(tmp_path, methods=("none", "lora"), budgets=(), ranks=(1, 2), targets=("q", "all"), seeds=1)
    compare.main(replace(settings, name="axes", lr=("1e-2",), **FEW))
    found = {(row["targets"], row["rank"]): row for row in rows(tmp_path / "axes")}
    assert list(found) == [(None, None), ("q", 1), ("q", 2), ("all", 1), ("all", 2)]
    assert len({f"{row['metric']:.4f}" for row in found.values()}) == 5  # so that none can stand in another's place
    assert found["q", 2]["trainable"] == 4 * 2 * 256
    assert set(found["q", 2]["ranks_end"]) == {f"blocks.{i}.attention.query" for i in range(4)}
    text = (tmp_path / "axes" / "report.md").read_text()
    assert "| targets | rank 1 | rank 2 |" in text
    for targets in ("q", "all"):
        line = f"| {targets} | {found[targets, 1]['metric']:.4f} | {found[targets, 2]['metric']:.4f} |"
        assert line in text


def test_options_and_budgets_of_one_method_are_its_own(tmp_path):
    settings = small(
        tmp_path,
        methods=("lora2", "lora2:gamma=0,target=1.0"),
        budgets=("10e3", "lora2=40e3"),
        options=("lora2.slices=4",),
    )
    training = training_of(settings, rows=1000)
    assert training.options_of("lora2") == {"slices": 4}
    assert training.options_of("lora2:gamma=0,target=1.0") == {"slices": 4, "gamma": 0, "target": 1.0}
    sizes = {cell.method: cell.size for cell in cells_of(settings, [0])}
    assert sizes == {"lora2": Size("budget", 40_000), "lora2:gamma=0,target=1.0": Size("budget", 10_000)}
    for cell in cells_of(settings, [0]):
        assert re.fullmatch(r"[\w.+=@-]+", cell.key)  # a folder's name, on any system


def test_learning_rates_are_chosen_with_a_seed_of_their_own(tmp_path):
    settings = small(
        tmp_path,
        methods=("full", "lora"),
        budgets=("10e3",),
        lr=("full=1e-4", "full=1e-2", "lora=1e-7", "lora=1e-4"),
        tuning_seed=9,
        seeds=2,
        name="tuned",
        **FEW,
    )
    compare.main(settings)
    done = rows(tmp_path / "tuned")
    assert [row["seed"] for row in done] == [9, 9, 9, 9, 0, 1, 0, 1]
    # Of full's two rates the smaller one is better, of lora's the larger.
    assert {(row["method"], row["lr"]) for row in done if row["seed"] != 9} == {("full", 1e-4), ("lora", 1e-4)}
    for method in settings.methods:
        tried = {row["lr"]: row["metric"] for row in done if row["method"] == method and row["seed"] == 9}
        run = {row["lr"] for row in done if row["method"] == method and row["seed"] != 9}
        assert run == {min(tried, key=lambda lr: tried[lr])}
    text = (tmp_path / "tuned" / "report.md").read_text()
    assert "tried at 1e-07, 0.0001, 0.01 with seed 9" in text
    assert "over 2 seeds" in text
    before = (tmp_path / "tuned" / "results.jsonl").read_bytes()
    compare.main(settings)
    assert (tmp_path / "tuned" / "results.jsonl").read_bytes() == before  # nothing was run again


def test_a_run_that_diverges_is_a_row_and_the_others_go_on(tmp_path):
    settings = small(tmp_path, methods=("full", "lora"), budgets=("10e3",), lr=("1e-3", "1e30"), seeds=1)
    settings = replace(settings, name="wild", **FEW)
    compare.main(settings)
    done = rows(tmp_path / "wild")
    assert [bool(row["failed"]) for row in done] == [False, True, False, True]
    for row in done[1::2]:
        assert re.match(r"loss \S+, gradient norm (nan|inf) at step \d+ \(batches", row["failed"])
    assert done[1]["metric"] is None
    assert "1e+30" not in (tmp_path / "wild" / "report.md").read_text().split("## Settings")[0].split("| method")[1]
    with pytest.raises(tasks.TaskError, match="training failed at every learning rate for full"):
        compare.main(replace(settings, methods=("full",), lr=("1e29", "1e30"), tuning_seed=3, name="wilder"))


def test_parts_of_methods_combine_to_the_methods_of_the_papers():
    for parts, whole in (("svd+pruning", "adalora"), ("dual-plane+pruning", "lora2")):
        made, named = find_method(parts), find_method(whole)
        differing = {f.name for f in fields(named) if getattr(made, f.name) != getattr(named, f.name)}
        assert differing <= {"claimed", "allocation"}  # LoRA² prunes to 3 of 8, AdaLoRA to 2 of 3
    model = lorafamily.apply(embedded.tiny(), "dual-plane+olora+alora", rank=2)
    assert placement_of(model).method.penalty is not None


def test_the_html_report_is_one_file_that_tells_what_the_markdown_tells(finished):
    text = (finished / "report.html").read_text()
    assert text.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|@import|url\(", text)
    for line in (finished / "report.md").read_text().splitlines():
        for word in line.strip("|# ").split(" | ") if line.startswith("|") and "---" not in line else ():
            assert page.escape(word.strip().replace("\\|", "|")) in text
    assert "<script>alert" not in page.html("t", [page.Table([["a", "b"], ["<script>alert", "&"]])])


def test_rows_are_plain_json(finished):
    lines = (finished / "results.jsonl").read_text().splitlines()
    _, lora = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for line in lines]
    assert lora["seed"] == 0
    assert Cell("lora", Size("budget", 10_000), "all", 2e-3, 0).key == lora["key"]


def test_the_e2e_challenge(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="transformers is an extra")
    pytest.importorskip("sacrebleu", reason="sacrebleu is an extra")
    bert = tiny_bert(tmp_path / "bert", 2)
    tokenizer = transformers.BertTokenizerFast.from_pretrained(bert, eos_token="[SEP]")
    (tmp_path / "gpt").mkdir()
    tokenizer.save_pretrained(tmp_path / "gpt")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=96, eos_token_id=3, bos_token_id=2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt")
    pairs = [
        {"meaning_representation": f"word{i % 4}", "human_reference": f"good bad good word{i % 4} bad"}
        for i in range(32)
    ]
    data = write_task(tmp_path / "d", "e2e", pairs, pairs)
    settings = presets.defaults("e2e-gpt2", quick=True)
    settings = replace(settings, model=str(tmp_path / "gpt"), data=data, methods=("lora",), budgets=("600",))
    settings = replace(settings, lr=("5e-2",), steps=30, batch=8, dropout=0.0, progress=False, out=tmp_path)
    settings = replace(settings, held_out=4, evaluations=1)  # every evaluation writes a text for each row
    compare.main(settings)
    (row,) = rows(tmp_path / "e2e-gpt2-quick")
    assert set(row["ranks_end"]) == {"transformer.h.0.attn.c_attn.q", "transformer.h.0.attn.c_attn.v"}
    assert row["validation_loss"] < row["loss_curve"][0][1]
    task = tasks.find("e2e", model=str(tmp_path / "gpt"), data=data, batch=2, length=20, held_out=2)
    assert list(task.references) == ["word0", "word1"]
    model = task.model(0)[0]
    assert 0 <= task.evaluate(model.eval())["BLEU"] < 100
    monkeypatch.setattr(task, "write", lambda model, meaning: f"good bad good {meaning} bad")
    assert task.evaluate(model)["BLEU"] == pytest.approx(100)  # the references themselves
    batch = next(iter(task.validation()))
    kept = batch["labels"][0][batch["labels"][0] != -100]
    assert tokenizer.decode(kept) == "[CLS] good bad good word0 bad [SEP] [SEP]"  # BERT's tokenizer adds its own marks
    bad = write_task(tmp_path / "bad", "e2e", [{"meaning_representation": "a"}], pairs)
    with pytest.raises(tasks.TaskError, match="row 1: no text under human_reference"):
        tasks.find("e2e", model=str(tmp_path / "gpt"), data=bad, batch=2, length=20)


def test_suggested_rates_are_plain_loras_times_a_ratio_and_others_as_given(tmp_path):
    settings = small(tmp_path, methods=("none", "full", "lora", "olora", "lora2"), budgets=("10e3",), name="auto")
    settings = replace(settings, lr=("auto", "1e-2", "full=2e-3", "lora2=3e-2"))
    found = suggested(
        settings, cells_of(settings, [0, 1]), lambda cell, rate: {"lora": 1.0, "olora": 0.25}[cell.method] * rate
    )
    rates = {cell.method: rate for cell, rate in found.items()}
    assert rates == {"none": 1e-2, "full": 2e-3, "lora": 1e-2, "olora": 2.5e-3, "lora2": 3e-2}
    assert {cell.lr for cell in cells_of(settings, [0], found) if cell.method == "olora"} == {2.5e-3}


@pytest.mark.parametrize(
    ("lr", "more", "message"),
    [
        (("auto",), {}, "--lr auto takes one rate, plain LoRA's"),
        (("auto", "1e-2", "2e-2"), {}, "--lr auto takes one rate"),
        (("auto", "1e-2"), {"tuning_seed": 100}, "no --tuning-seed"),
        (("auto", "1e-2"), {"methods": ("full", "lora")}, "give full=RATE"),
    ],
)
def test_rates_that_cannot_be_suggested_are_refused(tmp_path, lr, more, message):
    settings = replace(small(tmp_path, methods=("lora",), budgets=("10e3",), name="auto"), lr=lr, **more)
    with pytest.raises(tasks.TaskError, match=message):
        suggested(settings, cells_of(settings, [0]), lambda cell, rate: rate)


def test_a_comparison_at_suggested_rates(tmp_path, capsys):
    settings = small(tmp_path, methods=("lora", "olora"), budgets=("10e3",), seeds=1, name="auto", lr=("auto", "1e-2"))
    compare.main(replace(settings, **FEW))
    rates = {row["method"]: row["lr"] for row in rows(tmp_path / "auto")}
    assert rates["lora"] == pytest.approx(1e-2, rel=1e-3)
    assert rates["olora"] < 8e-3
    assert f"olora at 10,000: lr {rates['olora']:.2g}: " in capsys.readouterr().out
    assert "by lorafamily.suggest_lr, untried" in (tmp_path / "auto" / "report.md").read_text()
