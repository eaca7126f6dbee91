"""The cost of adapters on experts: training steps of ours and of peft, relative to the frozen model's, in one run.

python experiments/bench/experts.py                            # 64 experts, about five minutes on one core
python experiments/bench/experts.py --experts 8 --rounds 3     # for a quick try
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that rooms find each other

import waiting  # noqa: F401 - before torch

# isort: split
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch import nn

import lorafamily
from bench.measuring import timed


@dataclass(frozen=True)
class Experts:
    """Time training steps of a small Qwen3-MoE, variant after variant in every round."""

    experts: int = 64
    """experts of every layer"""
    chosen: int = 4
    """experts that each token visits"""
    layers: int = 2
    width: int = 512
    inner: int = 256
    """width inside an expert"""
    rows: int = 4
    tokens: int = 256
    """tokens of a row"""
    rank: int = 8
    rounds: int = 9
    """timed rounds, after one that is not timed"""
    methods: tuple[str, ...] = ("lora", "adalora", "lora2")


def main(given: Experts) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(512, (given.rows, given.tokens), generator=generator)
    variants = {"frozen": _step(_frozen(given), ids), "peft": _step(_peft(given), ids)}
    for method in given.methods:
        model = lorafamily.apply(_model(given), method, rank=given.rank, targets=r"experts\.\d+\.", seed=0)
        variants[method] = _step(model, ids)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(given.rounds + 1):
        for name, step in variants.items():
            seconds = timed(step, "cpu")
            if number:
                times[name].append(seconds)
    ratios = {}
    for name, rounds in times.items():
        of_floor = [time / floor for time, floor in zip(rounds, times["frozen"], strict=True)]
        ratios[name] = median = statistics.median(of_floor)
        low, _, high = statistics.quantiles(of_floor, n=4)
        print(f"{name:8} {statistics.median(rounds):.3f} s  {median:.2f} ({low:.2f} to {high:.2f}) of the frozen")
    return ratios


def _model(given: Experts) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=given.width,
        num_hidden_layers=given.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=given.width // 8,
        moe_intermediate_size=given.inner,
        num_experts=given.experts,
        num_experts_per_tok=given.chosen,
    )
    return Qwen3MoeForCausalLM(config).train()


def _frozen(given: Experts) -> nn.Module:
    """The frozen model; gradients pass through it to the outputs of its embeddings."""
    model = _model(given).requires_grad_(False)
    embeddings = model.get_submodule("model.embed_tokens")
    embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return model


def _peft(given: Experts) -> nn.Module:
    import peft

    config = peft.LoraConfig(
        r=given.rank,
        lora_alpha=16,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    model: nn.Module = peft.get_peft_model(_model(given), config)
    return model


def _step(model: nn.Module, ids: torch.Tensor) -> Callable[[], Any]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main(tyro.cli(Experts))
