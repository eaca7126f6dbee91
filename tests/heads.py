"""Small models of transformers with a loss, and batches for them."""

from __future__ import annotations

import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)


def small(kind, config, **sizes):
    settings = config(vocab_size=50, pad_token_id=0, **sizes)
    for name, value in vars(settings).items():
        if "drop" in name and isinstance(value, float):
            setattr(settings, name, 0.0)
    return kind(settings).double()


def gpt2():
    return small(GPT2LMHeadModel, GPT2Config, n_embd=16, n_layer=1, n_head=2, n_positions=32)


def llama():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return small(LlamaForCausalLM, LlamaConfig, **sizes)


BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}


def bart():
    return small(BartForConditionalGeneration, BartConfig, **BART)


def bart_decoder():
    return small(BartForCausalLM, BartConfig, **BART)


BERT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def masked():
    return small(BertForMaskedLM, BertConfig, **BERT)


def classifier():
    return small(BertForSequenceClassification, BertConfig, num_labels=3, **BERT)


def padded(seed, length, rows=4):
    """Token batches in which rows have labels of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (rows, length), generator=generator)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : int(torch.randint(1, length - 1, (), generator=generator))] = -100
    return {"input_ids": ids, "labels": labels}


def classes(seed, length, rows=4):
    return padded(seed, length, rows) | {"labels": torch.arange(rows) % 3}
