"""Pretrain the embedded byte-level decoder on English prose:   python experiments/embedded/pretrain.py

Writes `experiments/embedded/weights/prose-bytes.safetensors` (float16), with the command, the hash of the data,
versions and losses in its header, and a log next to it. Takes about 20 minutes on two CPU cores; `compare.py` runs it
if the file is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that rooms find each other

import waiting  # noqa: F401 - before torch

# isort: split
import json
import math
from dataclasses import asdict, dataclass

import torch
import tyro
from safetensors.torch import save_file

import lorafamily
from embedded import WEIGHTS, ByteDecoder, batches, digest, prose


@dataclass(frozen=True)
class Pretrain:
    """Pretrain the embedded byte-level decoder."""

    steps: int = 6000
    """optimizer steps"""
    batch: int = 32
    """sequences of 128 bytes per step"""
    lr: float = 3e-3
    """peak learning rate, cosine schedule"""
    seed: int = 0
    """seed of weights and batches"""
    out: Path = WEIGHTS
    """file of the weights; the log gets the same name with .log"""


def pretrain(settings: Pretrain) -> None:
    text = prose()
    cut = len(text) * 98 // 100
    torch.manual_seed(settings.seed)
    model = ByteDecoder().to("cuda" if torch.cuda.is_available() else "cpu")
    history = lorafamily.train(
        model,
        batches(text[:cut], settings.batch, seed=settings.seed),
        steps=settings.steps,
        lr=settings.lr,
        schedule="cosine",
        weight_decay=0.1,
        validation=batches(text[cut:], 64),
        evaluate_every=max(1, settings.steps // 20),
        seed=settings.seed,
    )
    bits = {e.step: round(e.metrics["loss"] / math.log(2), 4) for e in history.evaluations}
    made = {
        "command": " ".join(["python experiments/embedded/pretrain.py", *sys.argv[1:]]),
        "settings": json.dumps({k: str(v) for k, v in asdict(settings).items() if k != "out"}),
        "data": digest(text),
        "torch": torch.__version__,
        "validation bits per byte": str(bits[settings.steps]),
    }
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, settings.out, metadata={"made": json.dumps(made)})
    log = [*(f"{key}: {value}" for key, value in made.items()), "", "step  bits per byte (held-out prose)"]
    log += [f"{step:>5}  {value:.4f}" for step, value in bits.items()]
    settings.out.with_suffix(".log").write_text("\n".join(log) + "\n")
    print("\n".join(log))


if __name__ == "__main__":
    pretrain(tyro.cli(Pretrain))
