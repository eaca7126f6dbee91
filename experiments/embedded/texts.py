"""The texts of the embedded setting, prose for pretraining and code to adapt to; both come with every Python."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from embedded.model import CONTEXT

# Tests, demos and character tables are not typical code; pydoc_data is the prose itself.
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


class Chunks(Dataset[dict[str, Tensor]]):
    """A text cut into consecutive pieces of `context` bytes."""

    def __init__(self, text: bytes, context: int = CONTEXT):
        whole = len(text) // context * context
        self.pieces = torch.frombuffer(bytearray(text[:whole]), dtype=torch.uint8).view(-1, context)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"bytes": self.pieces[index].long()}


def batches(text: bytes, batch: int, *, seed: int | None = None) -> DataLoader[dict[str, Tensor]]:
    """The text in batches, in an order that the seed shuffles, or in its own order without a seed."""
    chunks = Chunks(text)
    if seed is None:
        return DataLoader(chunks, batch)
    return DataLoader(chunks, batch, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed))


@functools.cache
def library() -> dict[str, str]:
    """The source of the standard library's modules by path, sorted by path."""
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
    """Whether a module is for validation. One in ten is, chosen by its name, so that every Python holds out the
    same."""
    return hashlib.sha256(path.encode()).digest()[0] % 10 == 0


def code(*, validation: bool) -> bytes:
    """The source code of the held-out modules of the library, or of the others."""
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
    """The beginning of a text's SHA-256, with its size and the Python version."""
    return f"sha256:{hashlib.sha256(text).hexdigest()[:16]} ({len(text):,} bytes, Python {sys.version.split()[0]})"
