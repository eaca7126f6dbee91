"""What the tests share: a tiny real transformer, a way to leave the start, and every method there is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

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


@torch.no_grad()
def logits(model: nn.Module, rows: int = 4) -> Tensor:
    return model(tokens(rows)).logits
