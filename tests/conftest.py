"""What the tests share: a tiny real transformer, a way to leave the start, and every method there is."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is there that a test needs; without a network each try takes a minute

import shapes  # noqa: F401 - before lorafamily, whose functions it checks

# isort: split
import embedded
import lorafamily
from embedded import ByteDecoder
from lorafamily.layers.placement import placement_of

SHARED = Path(__file__).parents[2] / "shared"
COMBINATIONS = ["adalora+olora", "lora2+olora", "olora+alora", "rslora+alora"]
PARTS = {"svd", "pruning", "dual-plane"}  # of AdaLoRA and LoRA², which run every line of theirs
INFORMED = {"eva", "gora"}  # they look at data first: tests/test_evidence.py
MOVING = {"elalora", "flexlora", "loraplus"}  # AdaLoRA and LoRA but for who moves, and rates: tests/test_moving.py
METHODS = [*sorted(lorafamily.methods().keys() - PARTS - INFORMED - MOVING), *COMBINATIONS]

every_method = pytest.mark.parametrize("method", METHODS)


def pytest_collection_finish() -> None:
    """What is imported stays: a collection of garbage, which Trainers ask for, need not look at it every time."""
    gc.collect()
    gc.freeze()


def pairwise(
    names: str, *axes: Sequence[Any], and_also: Sequence[tuple[Any, ...]] = (), ids: Any = None
) -> pytest.MarkDecorator:
    """Parametrises a test so that any two values of different axes meet in at least one case, but not every three.

    What fails, fails for a value or for two that do not go together; the product of three and more axes is many times
    as long, and found nothing that this would not have. The two largest axes are crossed; every further one is given
    to each row the value that brings most new pairs, and rows are added for the pairs that are left.
    """
    order = sorted(range(len(axes)), key=lambda axis: -len(axes[axis]))
    rows: list[dict[int, int]] = [{}]
    for axis in order[:2]:
        rows = [row | {axis: value} for row in rows for value in range(len(axes[axis]))]
    for done, axis in enumerate(order[2:], 2):
        before, size = order[:done], len(axes[axis])
        missing = {(other, v, w) for other in before for v in range(len(axes[other])) for w in range(size)}

        def new(row: dict[int, int], w: int, missing=missing) -> set[tuple[int, int, int]]:
            return {(other, v, w) for other, v in row.items()} & missing

        for number, row in enumerate(rows):
            # Of values that bring as many, the next one, so that a small axis is not all one value in places.
            best = max(range(size), key=lambda w: (len(new(row, w)), -((w - number) % size)))
            missing -= new(row, best)
            row[axis] = best
        while missing:
            w = min(missing)[2]
            row = {other: min((v for o, v, x in missing if (o, x) == (other, w)), default=0) for other in before}
            missing -= new(row, w)
            rows.append(row | {axis: w})
    cases = [tuple(values[row[axis]] for axis, values in enumerate(axes)) for row in rows]
    return pytest.mark.parametrize(names, [*cases, *and_also], ids=ids)


def in_turn(names: str, *axes: Sequence[Any], and_also: Iterable[tuple[Any, ...]] = ()) -> pytest.MarkDecorator:
    """Parametrises a test so that every value of every axis comes once: as many cases as the longest axis has values,
    and those that are asked for beside. For axes whose values do not act on each other."""
    longest = max(map(len, axes))
    cases = [tuple(values[i % len(values)] for values in axes) for i in range(longest)]
    return pytest.mark.parametrize(names, [*dict.fromkeys([*cases, *and_also])])


def few_rounds(method: str) -> dict[str, int]:
    """ALoRA scores exactly, two forwards a rank; two rounds show as much as eight."""
    return {"rounds": 2} if "alora" in method.split("+") else {}


def shared(path: str) -> Path:
    """A file beside the project, not part of it; the test is skipped where it is absent."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"{found} is not here; it holds reference data that is not part of the project")
    return found


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32) -> ByteDecoder:
    """The smallest real transformer."""
    return embedded.tiny(seed).to(dtype).eval()


def tokens(rows: int = 4, seed: int = 0) -> Tensor:
    return torch.randint(256, (rows, 24), generator=torch.Generator().manual_seed(seed))


def data(batches: int = 4) -> list[dict[str, Tensor]]:
    return [{"bytes": tokens(seed=i)} for i in range(batches)]


@torch.no_grad()
def perturb_(model: nn.Module, seed: int = 1, size: float = 0.5) -> nn.Module:
    """Move every trainable adapter tensor off its start: at the start ΔW = 0 and any merge would pass."""
    generator = torch.Generator().manual_seed(seed)
    placement_of(model).had_session = True  # a stand-in for training with all that the method does
    for adapter in placement_of(model).adapters.values():
        for parameter in adapter.update.parameters():
            noise = torch.empty(parameter.shape, dtype=parameter.dtype).normal_(generator=generator)
            parameter.add_(size * noise.to(parameter.device))
    return model


def assert_merged(found: Tensor, wanted: Tensor) -> None:
    """Outputs in float32 of what was merged or exported: each weight was rounded once, and sums run in another order.
    Within 1e-5 of the largest output; small outputs are differences of large terms."""
    assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@torch.no_grad()
def logits(model: nn.Module, rows: int = 4) -> Tensor:
    return model(tokens(rows)).logits
