"""Problems for a language model of one's own, in their short form on tiny ones."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from decimal import Decimal

import pytest
import torch

import compare
import presets
import tasks
from studies.arms import ARMS
from studies.problems import PROBLEMS
from studies.small import Sentences
from studies.trials import Trial, Trials, run
from tasks.maths import PROMPT, final
from test_compare import GOOD, rows, tiny_bert, write_task

transformers = pytest.importorskip("transformers", reason="transformers is an extra")


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("So it is 4 + 4 = 8. The answer is: 8", 8),
        ("He has 1,200 left.\n#### 1,200", 1200),
        ("#### $-3.50", Decimal("-3.5")),
        ("The answer is: 5. Or rather: The answer is 6.", 6),
        ("It is 7.", None),
        ("The answer is: x", None),
    ],
)
def test_the_number_that_an_answer_ends_with(answer, number):
    assert final(answer) == number


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A random decoder whose tokens are words, in a folder as a user would have it."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is an extra")
    folder = tmp_path_factory.mktemp("decoder")
    words = ["[PAD]", "[UNK]", "[END]", "Question:", "Think", "step", "by", "step.", "Answer:", "The", "answer", "is:"]
    words += ["one", "two", "three", "0", "1", "2", "3", "####"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


NUMBERS = {"one": 1, "two": 2, "three": 3}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    train = [{"query": word, "response": f"The answer is: {n}"} for word, n in NUMBERS.items()] * 40
    validation = [{"question": word, "answer": f"#### {n}"} for word, n in NUMBERS.items()]
    return write_task(tmp_path_factory.mktemp("data"), "gsm8k", train, validation)


def test_accuracy_counts_right_numbers_whatever_was_written_around_them(decoder, questions, monkeypatch):
    task = tasks.find("gsm8k", model=str(decoder), data=questions, batch=4, length=24)
    model = task.model(0)[0].eval()
    answers = {PROMPT.format(word): f"hm. The answer is: {n}" for word, n in NUMBERS.items()}
    monkeypatch.setattr(task, "written", lambda model, prompts, **how: [answers[prompt] for prompt in prompts])
    assert task.accuracy(model) == 1.0
    answers[PROMPT.format("two")] = "The answer is: 20"
    assert task.accuracy(model) == pytest.approx(2 / 3)
    batch = task.collate(task.train[:2])
    kept = batch["labels"][0][batch["labels"][0] != -100]
    assert task.tokenizer.decode(kept) == "The answer is: 1 [END]"
    assert len(task.train) + len(task.tuning) == 120


def test_prompts_of_different_length_are_answered_together_as_alone(decoder, questions):
    task = tasks.find("gsm8k", model=str(decoder), data=questions, batch=4, length=24)
    model = task.model(0)[0].eval()
    prompts = ["Question: one Answer:", "Question: one two three one two Think step by step. Answer:"]
    together = task.written(model, prompts, max_new_tokens=4)
    assert together == [task.written(model, [prompt], max_new_tokens=4)[0] for prompt in prompts]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_rows_that_are_no_questions_are_refused(tmp_path, decoder, split):
    good = {
        "train": {"query": "one", "response": "The answer is: 1"},
        "validation": {"question": "a", "answer": "#### 1"},
    }
    bad, message = {
        "train": ({"query": "a"}, "row 1: no text under response"),
        "validation": ({"question": "a", "answer": "1"}, "row 1: the answer has no number after ####"),
    }[split]
    write_task(tmp_path, "gsm8k", **{own: [bad if own == split else row] for own, row in good.items()})
    with pytest.raises(tasks.TaskError, match=message):
        tasks.find("gsm8k", model=str(decoder), data=tmp_path, batch=4, length=24)


def test_a_trial_in_the_short_form(tmp_path, decoder, questions, monkeypatch):
    problem = PROBLEMS["llm-gsm8k"]
    for name, value in (("steps", problem.steps), ("length", 24), ("evaluations", 2), ("logs", False)):
        monkeypatch.setattr(problem, name, value)
    trials = Trials("llm-gsm8k", tmp_path, str(decoder), questions, steps=6)
    assert trials.opened().steps == 6
    assert problem.budget == 8 * (2 * (4 * (32 + 32 + 1) + 3 * (32 + 64 + 1)))
    (eva,) = (arm for arm in ARMS["llm-gsm8k"] if arm.name == "EVA")
    row = run(Trial("llm-gsm8k", eva, -8, 0), tmp_path)
    assert row["failed"] is None
    assert row["metric"] in (pytest.approx(0), pytest.approx(1 / 3), pytest.approx(2 / 3), 1)  # of three questions
    assert row["parameters_peak"] <= problem.budget
    assert [step for step, _ in row["curve"]] == [0, 3, 6]
    assert row["curve"][-1][1] == pytest.approx(row["tuning_metric"])
    assert row["tuning_metric"] < row["curve"][0][1]


def test_a_run_shorter_than_its_curve_is_refused(tmp_path, decoder, questions):
    with pytest.raises(tasks.TaskError, match="--steps 6: a run has 20 evaluations"):
        Trials("llm-gsm8k", tmp_path, str(decoder), questions, steps=6).opened()


def test_a_text_is_tuned_on_one_half_and_judged_on_the_other(tmp_path, decoder, monkeypatch):
    problem = PROBLEMS["llm-text"]
    monkeypatch.setattr(problem, "length", 8)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(["one two three"] * 400))
    problem.read(str(decoder), text)
    tuning, judging = problem.tuning(0), problem.judging(0)
    pieces = len(problem.task.pieces[1])
    assert sum(len(b["input_ids"]) for b in tuning) + sum(len(b["input_ids"]) for b in judging) == pieces
    model = problem.model(0)
    assert problem.tuned(model, 0) == pytest.approx(problem.judged(model, 0), rel=0.1)  # the same text over and over


def sentences(folder, test, validation=GOOD[8:20]):
    """SST-2 in a tiny form: a BERT of words, and rows in which the label is whether "good" is there."""
    data = write_task(folder / "data", "sst2", GOOD[:8], validation)
    with gzip.open(data / "sst2" / "test.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in test)
    problem = Sentences("sst2", "", 0.15)
    problem.read(str(tiny_bert(folder / "bert", 2)), data)
    return problem


def test_sentences_are_tuned_on_the_validation_split_and_judged_on_the_test_split(tmp_path):
    longer = [row | {"sentence": "word1 " * (i % 3) + row["sentence"]} for i, row in enumerate(GOOD[20:])]
    problem = sentences(tmp_path, longer)
    collated = problem.task.collate(problem.task.held_out)
    (tuning,) = problem.tuning(0)
    assert sorted(tuning["input_ids"].tolist()) == sorted(collated["input_ids"].tolist())
    model = problem.model(0).eval()
    with torch.no_grad():
        alone = [model(**problem.task.collate([row])).logits.argmax().item() for row in longer]
    wrong = sum(found != row["label"] for found, row in zip(alone, longer, strict=True))
    assert 0 < wrong < len(longer)
    assert problem.judged(model, 0) == wrong / len(longer)


def test_ranks_are_scored_on_sentences_of_all_lengths(tmp_path):
    """Methods that score ranks take the first 32 rows."""
    rows = [{"sentence": " ".join(["word1"] * words), "label": words % 2} for words in range(1, 51) for _ in range(4)]
    first, *others = sentences(tmp_path, GOOD[20:], rows).tuning(0)
    assert len(first["labels"]) == 32
    assert [len(batch["labels"]) for batch in others] == [64, 64, 40]
    lengths = first["attention_mask"].sum(1).double()
    assert abs(lengths.mean() - 25.5 - 2) < 3 * 14.4 / 32**0.5  # with two special tokens; three standard errors
    assert lengths.std() > 10


def test_test_rows_without_labels_are_refused(tmp_path):
    """As GLUE has them: every arm would classify all of them wrongly, and be on par."""
    with pytest.raises(tasks.TaskError, match=r"test\.jsonl\.gz, row 1: label -1, not in 0 … 1"):
        sentences(tmp_path, [row | {"label": -1} for row in GOOD[20:]])


def test_the_preset_runs_in_its_short_form(tmp_path, decoder, questions):
    settings = presets.defaults("allocation-llm", quick=True)
    settings = replace(settings, model=str(decoder), data=questions, methods=("lora", "adalora:budget_at=end"))
    settings = replace(settings, budgets=("2e3",), steps=8, length=24, progress=False, workers=1, out=tmp_path)
    settings = replace(settings, pictures=False)
    compare.main(settings)
    judged = {row["method"]: row for row in rows(tmp_path / "allocation-llm-quick") if row["seed"] == 0}
    assert set(judged) == set(settings.methods)
    larger = judged["adalora:budget_at=end"]
    assert sum(larger["ranks_start"].values()) > sum(judged["lora"]["ranks_start"].values())
    assert sum(larger["ranks_end"].values()) < sum(larger["ranks_start"].values())
    assert json.dumps(larger)
