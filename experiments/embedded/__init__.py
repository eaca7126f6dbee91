"""The embedded setting: a small byte-level decoder that knows English prose, and Python code to adapt it to.

Both texts come with every Python: prose is the language reference of `pydoc_data.topics` and the docstrings of the
standard library, code is the source of the standard library. Nothing is downloaded.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

WEIGHTS = Path(__file__).parent / "weights" / "prose-bytes.safetensors"
# Tests, demos and tables of characters are not what one would call the library's code; topics is the prose itself.
LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "turtledemo",
    "pydoc_data",
    "encodings",
    "lib2to3",
    "site-packages",
    "ensurepip",
}
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
        FileNotFoundError: the weights are not there; `experiments/embedded/pretrain.py` makes them.
    """
    model = ByteDecoder()
    weights = load_file(WEIGHTS)
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model


def tiny(seed: int = 0) -> ByteDecoder:
    """Two blocks of width 16 with random weights, large enough that updates matter: for tests and measurements."""
    torch.manual_seed(seed)
    model = ByteDecoder(width=16, layers=2, heads=2, context=24)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
    return model


def provenance() -> dict[str, str]:
    """How the shipped weights were made: command, data hash, versions, losses; from the file's own header."""
    with safe_open(WEIGHTS, "pt") as file:
        return dict(json.loads(file.metadata()["made"]))


class Chunks(Dataset[dict[str, Tensor]]):
    """A text in consecutive pieces of `context` bytes."""

    def __init__(self, text: bytes, context: int = CONTEXT):
        whole = len(text) // context * context
        self.pieces = torch.frombuffer(bytearray(text[:whole]), dtype=torch.uint8).view(-1, context)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"bytes": self.pieces[index].long()}


def batches(text: bytes, batch: int, *, seed: int | None = None) -> DataLoader[dict[str, Tensor]]:
    """The text in batches; with a seed in a shuffled order of its own, without one as it stands."""
    chunks = Chunks(text)
    if seed is None:
        return DataLoader(chunks, batch)
    return DataLoader(chunks, batch, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed))


@functools.cache
def library() -> dict[str, str]:
    """Source of the standard library's modules by path, in order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = {}
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if not LEFT_OUT.intersection(inside.parts):
            try:
                sources[inside.as_posix()] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a few modules are written in an old encoding
    return sources


def held_out(path: str) -> bool:
    """One module in ten is for validation; chosen by name, so that every Python holds out the same."""
    return hashlib.sha256(path.encode()).digest()[0] % 10 == 0


def code(*, validation: bool) -> bytes:
    """The library's source code, of the modules held out or of the others."""
    return "\n".join(source for path, source in library().items() if held_out(path) == validation).encode()


def prose() -> bytes:
    """The language reference and the docstrings, except those of modules held out for validation."""
    topics_text = "\n\n".join(topics.values()).encode()
    return topics_text + b"\n\n" + docstrings([path for path in library() if not held_out(path)])


def docstrings(paths: Iterable[str]) -> bytes:
    """The longer docstrings of these modules of `library()`."""
    texts = []
    for path in paths:
        for node in ast.walk(ast.parse(library()[path])):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(node, clean=False)
                if docstring and len(docstring) > 80:
                    texts.append(inspect.cleandoc(docstring))
    return "\n\n".join(texts).encode()


def digest(text: bytes) -> str:
    """Short SHA-256 of a text, with the Python it comes from."""
    return f"sha256:{hashlib.sha256(text).hexdigest()[:16]} ({len(text):,} bytes, Python {sys.version.split()[0]})"
