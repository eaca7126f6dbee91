"""The commands train, generate and evaluate as a user gives them, in an empty folder."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("tyro")

import chatting  # noqa: E402
import lorafamily  # noqa: E402
from conftest import assert_merged  # noqa: E402
from lorafamily.chat import exporting, training  # noqa: E402
from lorafamily.cli import main  # noqa: E402
from lorafamily.history import History  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base and a file of conversations."""
    found = tmp_path_factory.mktemp("empty")
    chatting.save_base(found / "base")
    chatting.write_lines(found / "chats.jsonl", chatting.chats())
    return found


@pytest.fixture
def here(folder, tmp_path, monkeypatch) -> Path:
    """A folder with them, and what these commands may change put back."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warnings.showwarning", lambda *args, **kwargs: None)
    return tmp_path


def run(command: str, *more: str) -> int:
    return main([*command.split(), *more])


TRAIN = "train --model base --data chats.jsonl --rank 4 --targets attention"


def test_from_a_file_of_conversations_to_answers_and_to_peft(here, capsys):
    peft = pytest.importorskip("peft")
    given = "--method alora --budget 4000 --lr 3e-2 --epochs 6 --evaluate-every 9 --export peft serving merged"
    assert run(f"train --model base --data chats.jsonl {given} --method-options rounds=2 --out out") == 0
    said = capsys.readouterr().out
    assert "24 rows" in said
    assert "evaluation at step 9" in said
    assert "→" in said
    assert all(ord(character) >= 32 or character == "\n" for character in said), "no bar where there is no terminal"
    assert {"adapter.safetensors", "run.yaml", "chat_template.jinja", "log", "peft", "serving", "merged"} <= {
        path.name for path in Path("out").iterdir()
    }
    losses = [json.loads(line)["loss"] for line in Path("out/log/steps.jsonl").read_text().splitlines()]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])

    ids = torch.arange(3, 40)[None]
    base = transformers.AutoModelForCausalLM.from_pretrained("base").eval()
    with torch.no_grad():
        start = base(ids).logits
        ours = lorafamily.load(base, "out")(ids).logits
        assert (ours - start).abs().max() > 0.1
        for layout in ("peft", "serving"):
            theirs = peft.AutoPeftModelForCausalLM.from_pretrained(f"out/{layout}").eval()
            assert_merged(theirs(ids).logits, ours)
        merged = transformers.AutoModelForCausalLM.from_pretrained("out/merged").eval()
        assert_merged(merged(ids).logits, ours)
    assert transformers.AutoTokenizer.from_pretrained("out/merged").chat_template == chatting.CHATML

    assert run("generate --adapter out --max-new 8 --json", "red cat", "dog") == 0  # the base is the run's
    found = json.loads(capsys.readouterr().out)
    assert len(found["answers"]) == 2
    assert found["model"] == "base"
    text = transformers.AutoTokenizer.from_pretrained("base").apply_chat_template(
        [{"role": "user", "content": "red cat"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = merged.generate(**text, max_new_tokens=8, do_sample=False, pad_token_id=0)[
        0, text["input_ids"].shape[1] :
    ]
    fast = transformers.AutoTokenizer.from_pretrained("base")
    assert found["answers"][0] == fast.decode(written, skip_special_tokens=True).strip()

    last = max(Path("out/log/checkpoints").iterdir())
    assert run(f"evaluate --adapter out {last} --data chats.jsonl --generate 6 --json") == 0
    columns = json.loads(capsys.readouterr().out)["columns"]
    assert next(iter(columns)) == "base"
    assert len(columns) == 3
    before, *after = columns.values()
    assert after[0] == after[1], "the last checkpoint is the adapter"
    assert after[0]["loss"] < 0.7 * before["loss"]
    assert 0 <= after[0]["exact match"] <= 1

    assert run(f"train --model base --data chats.jsonl {given} --method-options rounds=2 --out out --json") == 0
    assert json.loads(capsys.readouterr().out)["stopped"] == "all 18 steps done", "the same command changes nothing"
    assert run("train --config out/run.yaml --lr 1e-3 --out out") == 2
    assert "run with other options: --lr was 0.03, is 0.001" in capsys.readouterr().err


def test_the_likeliest_token_is_taken_whatever_the_model_prefers(here, capsys):
    ask = ["--max-new", "12", "red cat"]
    assert run("generate --model base", *ask) == 0
    likeliest = capsys.readouterr().out
    (here / "own").mkdir()
    for file in (here / "base").iterdir():
        shutil.copyfile(file, here / "own" / file.name)
    settings = json.loads((here / "base" / "generation_config.json").read_text())
    settings |= {"repetition_penalty": 5.0, "do_sample": True, "top_k": 1, "max_new_tokens": 2}
    (here / "own" / "generation_config.json").write_text(json.dumps(settings))
    assert run("generate --model own", *ask) == 0
    assert capsys.readouterr().out == likeliest
    assert run("generate --model own --temperature 2", *ask) == 0
    assert capsys.readouterr().out != likeliest, "drawn from more than the one likeliest token"


def test_samples_are_on_tensorboard_and_evaluations_stop_a_run(here, capsys):
    event_file = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    given = (
        "--lr 0 --steps 12 --evaluate-every 2 --patience 2 --eval-share 0.2 --samples 1 --pack --length 64 --batch 2"
    )
    assert run(f"{TRAIN} {given} --out out --json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stopped"] == "no lower validation loss in 2 evaluations"
    assert found["steps"] == 6
    texts = []
    for path in Path("out/log").glob("events*.samples"):
        events = event_file.EventAccumulator(str(path)).Reload()
        texts += [event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/1/text_summary")]
    assert len(texts) == 3
    assert all("**written**" in text and "<|im_start|>assistant" in text for text in texts)


def test_ranks_are_scored_on_rows_of_all_lengths(here, monkeypatch):
    """Evaluation goes by length, which needs little padding; the first rows would be the shortest."""
    rows = [
        {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "cat " * words}]}
        for words in range(1, 65)
    ]
    chatting.write_lines(here / "dev.jsonl", rows)
    given = []
    monkeypatch.setattr(lorafamily, "train", lambda *_, validation, **__: given.append(validation) or History())
    options = "--method alora --validation-data dev.jsonl --batch 8 --out out"
    assert run(f"{TRAIN} {options}") == 2  # no step was made
    lengths = [len(row) for row in given[0].rows]
    assert len(lengths) == 64
    first, least = lengths[:32], min(lengths)
    assert abs(sum(first) / 32 - least - 31.5) < 3 * 18.5 / 32**0.5  # three standard errors
    assert next(iter(given[0]))["input_ids"].shape == (8, max(lengths[:8]))


def test_a_run_that_was_stopped_goes_on_by_the_same_command(here, capsys, monkeypatch):
    command = f"{TRAIN} --method adalora --steps 8 --save-every 2 --seed 3 --pack --length 64 --batch 2 --lr 1e-2"
    assert run(f"{command} --out whole --json") == 0
    step = training.Reporter.step

    def stopped(self, record):
        step(self, record)
        if record.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as around:
        around.setattr(training.Reporter, "step", stopped)
        with pytest.raises(lorafamily.Interrupted):
            run(f"{command} --out again --json")
    said = capsys.readouterr().err
    assert "stopped by a signal after step 5 of 8; saved" in said or "after step 4 of 8; saved" in said
    assert "the same command continues from there" in said
    assert not Path("again/adapter.json").exists()
    assert run(f"{command} --out again --json") == 0
    for name in ("adapter.safetensors", "adapter.json"):
        assert Path("again", name).read_bytes() == Path("whole", name).read_bytes()


def test_a_config_file_says_everything_and_the_command_line_more(here, capsys, monkeypatch):
    taken = {}
    monkeypatch.setattr(lorafamily, "train", lambda model, data, **given: taken.update(given, model=model) or History())
    given = (
        "--warmup 3 --schedule cosine --export peft --also-train norm --method-options alpha=32 --no-check-gradients"
    )
    assert run(f"{TRAIN} --steps 5 {given} --out out") == 2  # no step was made
    first = dict(taken)
    assert taken["warmup"] == 3
    assert taken["schedule"] == "cosine"
    assert taken["check_gradients"] is False
    Path("out/run.yaml").rename("run.yaml")
    assert run("train --config run.yaml --epochs 2 --rank-budget 9 --floor 0.1 --out other") == 2
    same = set(first) - {"model", "steps", "floor", "loss_fn", "on_step", "log_dir", "evaluate", "validation"}
    assert {name: taken[name] for name in same - {"evaluate_every", "save_every"}} == {
        name: first[name] for name in same - {"evaluate_every", "save_every"}
    }
    assert (taken["steps"], taken["floor"]) == (6, 0.1)
    assert "no step was made" in capsys.readouterr().err


def test_a_rate_may_be_suggested_and_the_folder_has_a_card(here, capsys):
    given = "--method adalora --steps 12 --samples 0 --lr auto --out suggested"
    assert run(f"{TRAIN} {given} --method-options warmup=2 final=3 interval=2") == 0
    said = capsys.readouterr()
    (line,) = [line for line in (said.out + said.err).splitlines() if "times plain LoRA's" in line]
    suggested = float(re.search(r"lr (\S+):", line)[1])
    peak = max(json.loads(line)["lr"] for line in Path("suggested/log/steps.jsonl").read_text().splitlines())
    assert peak == pytest.approx(suggested, rel=0.06)  # printed with two digits
    assert peak != pytest.approx(1e-3, rel=0.06)
    assert "lr: auto" in Path("suggested/run.yaml").read_text()
    card = Path("suggested/README.md").read_text()
    assert "library_name: lorafamily" in card
    assert 'lorafamily.load(base, "THIS_FOLDER")' in card
    assert Path("suggested/ranks.png").is_file()


def test_a_dry_run_plans_and_writes_nothing(here, capsys):
    before = set(here.iterdir())
    assert run(f"{TRAIN} --dry-run --checkpoint-activations") == 0
    said = capsys.readouterr().out
    assert "frozen floor" in said
    assert "it fits" in said
    assert "nothing was trained or written" in said
    assert run(f"{TRAIN} --preview 2") == 0
    said = capsys.readouterr().out
    assert said.count("«") == 3
    assert "<|im_end|>»" in said
    assert set(here.iterdir()) == before


def test_a_base_in_four_bits_trains(here, capsys):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    given = "--quantise nf4 --dtype bfloat16 --checkpoint-activations --steps 6 --lr 1e-2 --eval-share 0"
    assert run(f"{TRAIN} {given} --out out --json --export merged") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"]["last"] < found["loss"]["first"]
    assert run("generate --adapter out --quantise nf4 --max-new 2 red") == 0  # warnings are errors here
    capsys.readouterr()
    warnings.simplefilter("always")
    for command in ("generate --adapter out --max-new 2 red", "evaluate --adapter out --data chats.jsonl --generate 0"):
        assert run(command) == 0
        assert "out: trained on the base in nf4; for that one --quantise nf4" in capsys.readouterr().err


def test_towers_that_no_text_passes_through_get_no_adapters(here, capsys):
    """Gemma 3's chat models see images; a budget is not spent there, and nothing waits for gradients there."""
    words = chatting.tokenizer()
    text = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained("seeing")
    words.save_pretrained("seeing")
    given = "train --model seeing --data chats.jsonl --method alora --budget 2500 --steps 12 --method-options rounds=2"
    assert run(f"{given} --exclude o_proj --out out") == 0
    assert "without adapters, since no text passes through: model.vision_tower\n" in capsys.readouterr().out
    modules = json.loads(Path("out/adapter.json").read_text())["modules"]
    assert modules
    assert all(name.startswith("model.language_model.layers.") and "o_proj" not in name for name in modules)
    assert run(f"{given} --dry-run") == 0
    assert "vision_tower" not in capsys.readouterr().out.partition("passes through: model.vision_tower")[2]


def test_what_is_exported_ends_its_answers_as_it_learnt_to(here):
    """A base may end texts with another token than the template ends turns with, as Qwen's do."""
    shutil.copytree(here / "base", here / "other")
    changed = {
        "tokenizer_config.json": {"eos_token": "<pad>"},
        "generation_config.json": {"eos_token_id": 1, "top_k": 7},
    }
    for file, entries in changed.items():
        (here / "other" / file).write_text(json.dumps(json.loads((here / "base" / file).read_text()) | entries))
    base = transformers.AutoTokenizer.from_pretrained("other")
    end = base.convert_tokens_to_ids("<|im_end|>")
    assert base.eos_token_id != end
    chatting.write_lines(here / "short.jsonl", 8 * chatting.chats(1))
    given = "--lr 3e-2 --epochs 40 --eval-share 0 --export peft serving merged"
    assert run(f"train --model other --data short.jsonl {given} --rank 8 --out out") == 0
    for folder in ("peft", "serving", "merged"):
        assert transformers.AutoTokenizer.from_pretrained(f"out/{folder}").eos_token_id == end
    config = transformers.GenerationConfig.from_pretrained("out/merged")
    assert set(config.eos_token_id) == {1, base.eos_token_id, end}
    assert config.top_k == 7
    text = base.apply_chat_template(
        chatting.chats(1)[0]["messages"][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    merged = transformers.AutoModelForCausalLM.from_pretrained("out/merged")
    written = merged.generate(**text, max_new_tokens=40)[0, text["input_ids"].shape[1] :].tolist()
    assert len(written) < 40
    assert written[-1] == end


def test_a_converter_that_is_found_is_asked_for_a_gguf_file(tmp_path, monkeypatch):
    """The real one is in llama.cpp's source: this is what we ask of it."""
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    converter = tmp_path / "convert_hf_to_gguf.py"
    converter.write_text("import sys; open(sys.argv[3], 'w').write(' '.join(sys.argv[1:3]))")
    exporting.check(["gguf"])
    written = exporting._gguf(tmp_path / "merged", tmp_path / "model.gguf")
    assert written.read_text() == f"{tmp_path / 'merged'} --outfile"
    converter.write_text("raise SystemExit('no such architecture')")
    with pytest.raises(lorafamily.FileError, match=r"failed .no such architecture.; the merged checkpoint is in"):
        exporting._gguf(tmp_path / "merged", tmp_path / "other.gguf")


BROKEN = [
    ("train", "needs --model, --data"),
    ("train --data chats.jsonl --out out", "needs --model"),
    ("train --model base --out out", "needs --data"),
    (f"{TRAIN}", "needs --out, a folder for the result"),
    (f"{TRAIN} --out out --leng 3", "no option --leng; did you mean --length?"),
    (f"{TRAIN} --out out --budgett 3", "no option --budgett; did you mean --budget?"),
    (f"{TRAIN} --out out --lr fast", "--lr 'fast': must be a number"),
    (f"{TRAIN} --out out --batch 2.5", "--batch '2.5': must be a whole number"),
    (
        f"{TRAIN} --out out --schedule lineal",
        "--schedule lineal: must be one of linear, cosine, constant; did you mean",
    ),
    (f"{TRAIN} --out out --export pefft", "--export pefft: must be one of .*did you mean peft"),
    (f"{TRAIN} --out out --export gguf", "--export gguf needs llama.cpp's convert_hf_to_gguf.py"),
    (f"{TRAIN} --out out --lr", "Missing value for argument '--lr'"),
    (f"{TRAIN} --out out --batch 0", "--batch 0: must be at least 1"),
    (f"{TRAIN} --out out --length 1", "--length 1: must be at least 2"),
    (f"{TRAIN} --out out --eval-share 1.5", "--eval-share 1.5: must be a share"),
    (f"{TRAIN} --out out --eval-share 0 --patience 2", "--patience has no effect"),
    (f"{TRAIN} --out out --epochs -1", "--epochs -1: must be more than 0"),
    (f"{TRAIN} --out out --epochs 1 --steps 2", "--steps and --epochs: give one of them"),
    (f"{TRAIN} --out out --compile", "--compile needs the model's own loss: add --chunk 0"),
    (f"{TRAIN} --out out --budget 3000", "budget.*rank"),
    (f"{TRAIN} --out out --method lorra", 'no method named "lorra"'),
    (f"{TRAIN} --out out --method-options alpha", "must be name=value"),
    (f"{TRAIN} --out out --method-options alfa=3", "alfa"),
    (f"{TRAIN} --out out --exclude nothing.at.all", "nothing.at.all"),
    (f"{TRAIN} --out out --warmup -1", "warmup=-1"),
    (f"{TRAIN} --out out --device cuda:99", "--device cuda:99: not on this machine"),
    (f"{TRAIN} --out out --template nowhere.jinja", "--template nowhere.jinja: cannot be read"),
    (f"{TRAIN} --out chats.jsonl", "--out chats.jsonl: is a file"),
    (f"{TRAIN} --out base", "the folder is not empty and not of a run"),
    (f"{TRAIN} --config nowhere.yaml", "--config nowhere.yaml: cannot be read"),
    (f"{TRAIN} --config", "--config needs a file"),
    (f"{TRAIN} --config typo.yaml --out out", "no option lenght; did you mean length?"),
    (f"{TRAIN} --config chats.jsonl --out out", "--config chats.jsonl: (not YAML|must have options)"),
    ("train --model ./bass --data chats.jsonl --out out", "--model ./bass: no such folder; did you mean base?"),
    ("train --model somebody/nothing --data chats.jsonl --out out", "--model somebody/nothing: no tokenizer"),
    ("train --model . --data chats.jsonl --out out", "--model .: the folder has no config.json"),
    ("train --model base --data chat.jsonl --out out", "chat.jsonl: no such file; did you mean chats.jsonl?"),
    ("train --model base --data broken.jsonl --out out", "broken.jsonl, line 2: not JSON"),
    ("train --model base --data one.jsonl --out out", "one row cannot be shared"),
    ("train --model base --data long.jsonl --length 8 --too-long drop --out out", "rows are longer than --length 8"),
    ("generate --model base", "nothing was asked"),
    ("generate hello", "needs --model"),
    ("generate --adapter bas hello", "--adapter bas: no adapter.json there; .*did you mean base"),
    ("generate --model base --temperature -1 hello", "--temperature -1"),
    ("evaluate --model base --data chats.jsonl --adapter base", "--adapter base: no adapter.json there"),
    ("evaluate --model base --data chats.jsonl --batch 0", "--batch 0: must be at least 1"),
    ("evaluate --model base", "needs --data"),
]


@pytest.mark.parametrize(("command", "reason"), BROKEN)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(here, command, reason, capsys, monkeypatch):
    Path("typo.yaml").write_text("data:\n  lenght: 3\n")
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text"\n')
    chatting.write_lines(Path("one.jsonl"), chatting.chats(1))
    chatting.write_lines(Path("long.jsonl"), chatting.chats(4))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    before = {path.name for path in here.iterdir()}
    assert run(command) == 2
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith(f"lorafamily {command.split()[0]}: ")
    assert re.search(reason, lines[0]), lines[0]
    assert {path.name for path in here.iterdir()} == before


def test_help_has_groups_and_examples_and_commands_have_nearest_names(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(part in said for part in ("Examples:", "lorafamily train --model Qwen", "data options", "--loss-on"))
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("lorafamily 0.")
    with pytest.raises(SystemExit) as stop:
        main(["trian"])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1
    assert "did you mean train?" in said


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_streams_that_are_not_utf_8(here, encoding, monkeypatch):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    with monkeypatch.context() as around:
        around.setattr(sys, "stdout", out)
        around.setattr(sys, "stderr", err)
        assert run(f"{TRAIN} --dry-run") == 0
        assert run("train --model base --data → --out out") == 2
        out.flush(), err.flush()
    assert b"-----" in out.buffer.getvalue()
    assert b"->" in err.buffer.getvalue()
