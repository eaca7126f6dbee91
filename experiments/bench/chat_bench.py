"""Memory and speed of `lorafamily train`: the chunked loss, and a LLaMA in 4 bits compared with peft and Trainer.

    python experiments/bench/chat_bench.py loss     # a vocabulary of 150,000: logits at once and in chunks
    python experiments/bench/chat_bench.py llama    # 300M parameters, nf4, checkpointed activations, ours and peft's

Each measurement is a process of its own, whose peak memory the system reports (ru_maxrss); the ways take turns.
Weights are random, the text is made up, and the speed is that of the steps after the first.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that rooms find each other

import waiting  # noqa: F401 - before torch

# isort: split
import dataclasses
import json
import os
import random
import resource
import subprocess
import tempfile
import time
from typing import Any, Literal

import torch
import tyro

os.environ.setdefault("HF_HUB_OFFLINE", "1")

PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
RANK = 8


@dataclasses.dataclass(frozen=True)
class Settings:
    """Measure the chunked loss, or training in 4 bits."""

    what: tyro.conf.Positional[Literal["loss", "llama"]]
    rounds: int = 2
    """how often each way is measured"""
    steps: int = 4
    """optimizer steps of a measurement of "llama"; the first is not timed"""
    rows: int = 2
    """rows of a batch"""
    length: int = 128
    """tokens of a row of the "llama" measurement"""
    tokens: int = 2048
    """tokens in the batch of the "loss" measurement"""
    vocabulary: int = 150_000
    """vocabulary of the "loss" measurement"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype in which "llama" computes; bfloat16 is slow on CPUs without instructions for it"""
    way: str = ""
    """run only this way, once and in this process"""
    folder: Path | None = None
    """folder of the model of "llama", when --way is given"""


def main(settings: Settings) -> None:
    if settings.way:
        found = {"loss": one_loss, "llama": one_llama}[settings.what](settings)
        print(json.dumps(found))
        return
    ways = {"loss": ["nothing", "whole", "chunked"], "llama": ["lorafamily", "peft"]}[settings.what]
    with tempfile.TemporaryDirectory() as folder:
        if settings.what == "llama":
            make_llama(Path(folder), settings)
        rows: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for _ in range(settings.rounds):
            for way in ways:
                rows[way].append(measured(settings, way, Path(folder)))
                print(way, json.dumps(rows[way][-1]), flush=True)
    for way in ways:
        best = {key: min(row[key] for row in rows[way]) for key in rows[way][0] if key != "tokens/s"}
        if "tokens/s" in rows[way][0]:
            best["tokens/s"] = max(row["tokens/s"] for row in rows[way])
        print(f"{way:<12}" + "  ".join(f"{key} {value:,.6g}" for key, value in best.items()))


def measured(settings: Settings, way: str, folder: Path) -> dict[str, Any]:
    given = ["--steps", settings.steps, "--rows", settings.rows, "--length", settings.length]
    given += ["--tokens", settings.tokens, "--vocabulary", settings.vocabulary, "--dtype", settings.dtype]
    command = [sys.executable, __file__, settings.what, *map(str, given), "--way", way, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def peak() -> float:
    """The peak of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one_loss(settings: Settings) -> dict[str, Any]:
    """Loss and backward of a tiny model with a huge vocabulary; the way "nothing" has the model and the batch alone."""
    import transformers

    import lorafamily
    from lorafamily.chat.loss import ChunkedLoss, own_loss

    config = transformers.LlamaConfig(
        vocab_size=settings.vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    lorafamily.apply(model, "lora", rank=RANK, seed=0)
    ids = torch.randint(settings.vocabulary, (settings.rows, settings.tokens // settings.rows))
    batch = {"input_ids": ids, "labels": ids}
    before = peak()
    begun = time.perf_counter()
    if settings.way != "nothing":
        loss_fn = own_loss if settings.way == "whole" else ChunkedLoss()
        loss_fn(model, batch).backward()
    return {"peak above the model, MiB": peak() - before, "seconds": time.perf_counter() - begun}


def make_llama(folder: Path, settings: Settings) -> None:
    """A random LLaMA of 300M parameters, a tokenizer of bytes, and rows that fill their length."""
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({letter: at for at, letter in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="<pad>")
    fast.chat_template = PLAIN
    fast.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=32_000, hidden_size=1024, intermediate_size=3584, num_hidden_layers=16, num_attention_heads=16
    )
    model = transformers.LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    generator = random.Random(0)
    rows = []
    for _ in range(settings.rows * settings.steps):
        text = "".join(generator.choice("abcdefgh ") for _ in range(settings.length))
        rows.append({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}]})
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def one_llama(settings: Settings) -> dict[str, Any]:
    assert settings.folder is not None
    return {"lorafamily": ours, "peft": theirs}[settings.way](settings, settings.folder)


def ours(settings: Settings, folder: Path) -> dict[str, Any]:
    """The command `lorafamily train` in this process."""
    import contextlib
    import io

    from lorafamily.cli import main as lorafamily

    said = io.StringIO()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(said):
        command = f"train --model {folder} --data {folder}/chats.jsonl --eval-share 0 --rank {RANK} --quantise nf4"
        command += (
            f" --dtype {settings.dtype} --checkpoint-activations --steps {settings.steps} --batch {settings.rows}"
        )
        command += f" --length {settings.length} --save-every 1000 --out {out}/adapter --json"
        assert lorafamily(command.split()) == 0, said.getvalue()
    found = json.loads(said.getvalue())
    return {"tokens/s": found["tokens per second"], "peak, MiB": peak(), "loss": found["loss"]["first"]}


def theirs(settings: Settings, folder: Path) -> dict[str, Any]:
    """peft's LoRA of the same rank on the same layers, with transformers.Trainer."""
    import peft
    import transformers

    from lorafamily.chat.forms import conversations
    from lorafamily.chat.rows import read
    from lorafamily.chat.templates import Template
    from lorafamily.chat.tokens import tokenised

    quantisation = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=settings.dtype,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantisation, dtype=getattr(torch, settings.dtype), device_map={"": "cpu"}
    )
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    found = tokenised(conversations(read(f"{folder}/chats.jsonl")), Template(fast, PLAIN), length=settings.length)
    rows = [
        {
            "input_ids": row.ids.tolist(),
            "attention_mask": [1] * len(row),
            "labels": [int(token) if learnt else -100 for token, learnt in zip(row.ids, row.learnt, strict=True)],
        }
        for row in found.rows
    ]
    times: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        arguments = transformers.TrainingArguments(
            out, per_device_train_batch_size=settings.rows, max_steps=settings.steps, learning_rate=1e-3,
            gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, save_strategy="no",
            report_to=[], logging_steps=1, disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[Clock()])
        trainer.train()
    tokens = settings.rows * settings.length * (settings.steps - 1)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"tokens/s": tokens / (times[-1] - times[0]), "peak, MiB": peak(), "loss": logged[0]}


if __name__ == "__main__":
    main(tyro.cli(Settings))
