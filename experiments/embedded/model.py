"""The embedded model: a byte-level decoder of 0.8M parameters, pretrained on English prose."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights" / "prose-bytes.safetensors"
CONTEXT = 128  # bytes


@dataclass(frozen=True)
class Output:
    """`loss`: nats per byte, mean over all positions that have a next byte."""

    loss: Float[Tensor, ""]
    logits: Float[Tensor, "batch seq 256"]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch seq width"]:
        q, k, v = (
            rearrange(project(x), "batch seq (heads width) -> batch heads seq width", heads=self.heads)
            for project in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(rearrange(mixed, "batch heads seq width -> batch seq (heads width)"))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch seq width"]:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = MLP(width)

    def forward(self, x: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch seq width"]:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ByteDecoder(nn.Module):
    """A decoder-only transformer over bytes; the output head is tied to the embedding."""

    def __init__(self, width: int = 128, layers: int = 4, heads: int = 4, context: int = CONTEXT):
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02 if parameter.shape[1] == width else 0.02 / (2 * layers) ** 0.5)

    def forward(self, bytes: Int[Tensor, "batch seq"]) -> Output:
        places = torch.arange(bytes.shape[1], device=bytes.device)
        x = self.embedding(bytes) + self.position(places)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.embedding.weight)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), bytes[:, 1:].flatten())
        return Output(loss, logits)


def pretrained() -> ByteDecoder:
    """The shipped model, float32.

    Raises:
        FileNotFoundError: the weights are missing; `experiments/embedded/pretrain.py` makes them.
    """
    model = ByteDecoder()
    weights = load_file(WEIGHTS)
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model


def tiny(seed: int = 0) -> ByteDecoder:
    """A model for tests: two blocks of width 16 whose random weights are so large that updates change the outputs."""
    torch.manual_seed(seed)
    model = ByteDecoder(width=16, layers=2, heads=2, context=24)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
    return model


def provenance() -> dict[str, str]:
    """How the shipped weights were made: command, hash of the data, versions, losses; read from the file's header."""
    with safe_open(WEIGHTS, "pt") as file:
        return dict(json.loads(file.metadata()["made"]))
