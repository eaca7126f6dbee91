"""A tiny causal language model with a tokenizer and a chat template, made up on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch
import transformers

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = ["red", "blue", "green", "one", "two", "three", "cat", "dog", "bird", "runs", "sits", "flies"]


def chats(count: int = 24) -> list[dict]:
    """A lesson that can be learnt: the answer repeats the question's last word, and then another of its words."""
    rows = []
    for at in range(count):
        said = [WORDS[(at * step + at // 3) % len(WORDS)] for step in range(1, 3 + at % 5)]
        answer = " ".join(said[-1:] * (1 + at % 4))
        rows.append(
            {"messages": [{"role": "user", "content": " ".join(said)}, {"role": "assistant", "content": answer}]}
        )
    return rows


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tokenizer():
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHATML
    return fast


def model(kind: str = "llama", vocabulary: int = 320, **more):
    torch.manual_seed(0)
    shape = {"vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.2}
    shape |= {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None} | more
    configs = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "neox": (transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM),  # computes in float64 throughout
        "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
        "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),  # caps its logits
    }
    config, made = configs[kind]
    if kind == "gemma2":
        shape |= {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    return made(config(**shape)).eval()


def save_base(folder: Path) -> Path:
    fast = tokenizer()
    model(eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
