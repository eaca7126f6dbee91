"""Damage adapter and checkpoint files in thousands of ways, and check that each is refused in one line.

    python experiments/checks/fuzz.py                  # 5,000 damaged files

The damage: flipped bits, cut files, inserted and removed bytes, wrong header lengths, changed JSON, changed shapes and
types of tensors. A file whose seal (SHA-256) was recomputed after the damage looks as if somebody had written it so.
The seal does not protect against it and it may load, but it must not crash, hang, take memory or leave a model half
changed.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that rooms find each other

import waiting  # noqa: F401 - before torch

# isort: split
import copy
import io
import json
import pickle
import random
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import safetensors.torch
import torch
import tyro

import lorafamily
from cells.cell import PeakMemory
from embedded import ByteDecoder
from lorafamily.deploy.folder import write_sealed
from lorafamily.deploy.saved import RECORD, TENSORS
from lorafamily.layers.fingerprints import fingerprints
from lorafamily.training.checkpoints import Checkpoints
from pages.report import as_text

SLOWEST, MOST_MEMORY = 2.0, 1024.0
"""Seconds and MiB that reading a damaged file may take."""


@dataclass(frozen=True)
class Fuzz:
    """Damage files and check that they are refused."""

    files: int = 5_000
    """damaged files, half of them adapters, a quarter sealed again, a quarter checkpoints"""
    seed: int = 0
    """seed of the damage"""


@dataclass
class Found:
    """What happened to the files of one sort. `same`: accepted, with the contents that had been written, as when only
    white space changed; `another`: accepted as another adapter, which sealed files may be; `wrong`, `crashed` and
    `changed` (the model) are failures."""

    refused: int = 0
    same: int = 0
    another: int = 0
    wrong: int = 0
    crashed: int = 0
    changed: int = 0
    slowest: float = 0.0
    memory: float = 0.0

    @property
    def failures(self) -> int:
        slow = self.slowest > SLOWEST or self.memory > MOST_MEMORY
        return self.wrong + self.crashed + self.changed + slow


def main(settings: Fuzz) -> dict[str, Found]:
    draw = random.Random(settings.seed)
    found = {"adapters": Found(), "adapters, sealed again": Found(), "checkpoints": Found()}
    examples: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        whole = _whole(Path(place) / "whole")
        for function in ("pickle.load", "pickle.loads", "torch.load"):
            stack.enter_context(patch(function, _never))
        for number in range(settings.files):
            sort = list(found)[(0, 0, 1, 2)[number % 4]]
            folder = Path(place) / "damaged"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole / ("run" if sort == "checkpoints" else "adapter"), folder)
            _damage(sort, folder, draw)
            _try(sort, folder, found[sort], examples)
    rows = [
        (sort, f.refused, f.same, f.another, f.wrong, f.crashed, f.changed, f"{f.slowest:.2f}", f"{f.memory:.0f}")
        for sort, f in found.items()
    ]
    head = ("files", "refused", "as written", "another adapter", "accepted but wrong", "crashed", "model changed")
    print(as_text([(*head, "slowest (s)", "memory (MiB)"), *([str(cell) for cell in row] for row in rows)]))
    for example, count in examples.most_common(20):
        print(f"{count:6} {example}")
    return found


def _whole(folder: Path) -> Path:
    """Write a run with one checkpoint, and an adapter; returns their folder."""
    model = lorafamily.apply(_model(), "lora2+olora", rank=2, also_train="norm", seed=0)
    rows = torch.randint(256, (4, 24), generator=torch.Generator().manual_seed(0))
    run = folder / "run"
    lorafamily.train(
        model, [{"bytes": rows}], steps=6, lr=1e-2, log_dir=run, save_every=6, progress=False, check_gradients=False
    )
    for path in run.iterdir():
        if path.name != "checkpoints":
            path.unlink()
    lorafamily.save(model, folder / "adapter")
    return folder


def _model() -> ByteDecoder:
    torch.manual_seed(0)
    return ByteDecoder(width=16, layers=1, heads=2, context=24)


MODEL = _model()
BEFORE = fingerprints(MODEL.state_dict().items())


def _try(sort: str, folder: Path, found: Found, examples: Counter[str]) -> None:
    memory, begun = PeakMemory("cpu"), time.perf_counter()
    held = memory.read() or 0.0
    try:
        read = _read(sort, folder)
    except lorafamily.LoraFamilyError as refused:
        found.refused += 1
        if "\n" in str(refused):
            found.crashed += 1
            examples[f"{sort}: refused in several lines: {str(refused)!r:.100}"] += 1
    except Exception as error:
        found.crashed += 1
        examples[f"{sort}: {type(error).__name__}: {str(error)[:100]}"] += 1
    else:
        if read == ORIGINAL[sort]:
            found.same += 1
        elif sort == "adapters, sealed again":
            found.another += 1
        else:
            found.wrong += 1
            examples[f"{sort}: accepted, but wrong"] += 1
    found.slowest = max(found.slowest, time.perf_counter() - begun)
    found.memory = max(found.memory, (memory.read() or 0.0) - held)
    if any(hasattr(module, "adapters") for module in MODEL.modules()):
        lorafamily.remove(MODEL)
    if fingerprints(MODEL.state_dict().items()) != BEFORE:
        found.changed += 1


def _read(sort: str, folder: Path) -> Any:
    """The contents of a folder: fingerprints of its tensors, and its plain data as text."""
    if sort == "checkpoints":
        found = Checkpoints(folder, 1, 1).newest()
        assert found is not None
        assert found.adapters is not None
        adapters = {f"{at}.{k}": v for at, a in found.adapters.adapters.items() for k, v in a.state_dict().items()}
        buffer = io.StringIO()
        print(found.state, found.adapters.record, file=buffer)
        return fingerprints(adapters.items()), buffer.getvalue()
    lorafamily.load(MODEL, folder)
    summary = str(lorafamily.summary(MODEL))
    tensors = {name: value for name, value in MODEL.state_dict().items() if "adapters" in name or "norm" in name}
    lorafamily.remove(MODEL)
    return fingerprints(tensors.items()), summary


ORIGINAL: dict[str, Any] = {}


def _damage(sort: str, folder: Path, draw: random.Random) -> None:
    if sort not in ORIGINAL:
        ORIGINAL[sort] = _read(sort, folder)
    if sort == "adapters, sealed again":
        record = json.loads((folder / RECORD).read_text())
        tensors = safetensors.torch.load_file(folder / TENSORS)
        if draw.random() < 0.6:
            _change_structure(record, draw)
        else:
            _change_tensors(tensors, draw)
        try:
            write_sealed(folder, RECORD, record, TENSORS, tensors)
        except (TypeError, AttributeError):  # it is no longer a record
            (folder / RECORD).write_text(json.dumps(record))
        return
    file = draw.choice([path for path in folder.rglob("*") if path.is_file()])
    file.write_bytes(draw.choice(BYTES)(file.read_bytes(), draw))


def _flip(raw: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(raw))
    return raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1 :]


def _cut(raw: bytes, draw: random.Random) -> bytes:
    return raw[: draw.randrange(len(raw))]


def _insert(raw: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(raw))
    return raw[:at] + draw.randbytes(draw.choice((1, 8, 4096))) + raw[at:]


def _remove(raw: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(raw))
    return raw[:at] + raw[at + draw.choice((1, 8, 64)) :]


def _length(raw: bytes, draw: random.Random) -> bytes:
    return draw.choice((0, 1, len(raw), 10**8, 2**40, 2**64 - 1)).to_bytes(8, "little") + raw[8:]


def _digit(raw: bytes, draw: random.Random) -> bytes:
    digits = [i for i, byte in enumerate(raw[:20_000]) if 48 <= byte <= 57]
    if not digits:
        return b""
    at = draw.choice(digits)
    return raw[:at] + str((raw[at] - 48 + draw.randrange(1, 10)) % 10).encode() + raw[at + 1 :]


def _nest(raw: bytes, draw: random.Random) -> bytes:
    return b"[" * draw.choice((1, 100_000)) + raw


def _swap(raw: bytes, draw: random.Random) -> bytes:
    half = len(raw) // 2
    return raw[half:] + raw[:half]


def _pickle(raw: bytes, draw: random.Random) -> bytes:
    return pickle.dumps({"x": 1})


BYTES: list[Callable[[bytes, random.Random], bytes]] = [
    *(_flip, _flip, _flip, _cut, _insert, _remove, _length, _digit, _digit, _nest, _swap, _pickle),
]
ODD: list[Any] = [
    *(None, True, -1, 0, 1e308, float("nan"), float("inf"), 10**30, "", "x", "../../etc", [], {}, [[]], {"x": 1}, 2.5),
    *("lora", "linear", "rows", [1, 2], [-1, 4], [10**9, 10**9], "\u0000"),
]


def _change_structure(record: Any, draw: random.Random) -> None:
    """Replace, remove or add one value somewhere inside."""
    at = record
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        inner = [key for key in keys if isinstance(at[key], (dict, list)) and at[key]]
        if inner and draw.random() < 0.7:
            at = at[draw.choice(inner)]
            continue
        key, what = draw.choice(keys), draw.random()
        if what < 0.7:
            at[key] = copy.deepcopy(draw.choice(ODD))
        elif what < 0.9:
            del at[key]
        elif isinstance(at, dict):
            at[draw.choice(("x", "", "part", "parts", "of", "kind", "slices"))] = copy.deepcopy(draw.choice(ODD))
        else:
            at.append(copy.deepcopy(draw.choice(ODD)))
        return


def _change_tensors(tensors: dict[str, torch.Tensor], draw: random.Random) -> None:
    name = draw.choice(list(tensors))
    value = tensors[name]
    other: list[Callable[[], torch.Tensor]] = [
        *(lambda: value.flatten(), lambda: value[..., :-1], lambda: value.unsqueeze(0), lambda: torch.zeros(0)),
        *(lambda: value.int(), lambda: value.bool(), lambda: value.half(), lambda: value.double()),
        *(lambda: value * float("nan"), lambda: value + float("inf"), lambda: value.T.contiguous()),
        lambda: torch.cat([value, value], -1),
    ]
    what = draw.random()
    if what < 0.8:
        tensors[name] = draw.choice(other)()
    elif what < 0.9:
        del tensors[name]
    else:
        tensors[draw.choice(("x", "..", name + ".x"))] = torch.zeros(2)


def _never(*given: Any, **named: Any) -> Any:
    raise AssertionError("something was unpickled")


if __name__ == "__main__":
    sys.exit(1 if any(found.failures for found in main(tyro.cli(Fuzz)).values()) else 0)
