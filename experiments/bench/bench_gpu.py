"""The fast path on a GPU: first the checks that it is right, then all ratios.

    python experiments/bench/bench_gpu.py                   # LLaMA shape, 1.1B parameters, bfloat16, sequence 2048
    python experiments/bench/bench_gpu.py --device cpu --layers 1 --width 64 --inner 128 --tokens 16 --rounds 2

Prints every check with its bound, then the tables of steps and of forwards, and writes `bench_gpu.json`. Ends with exit
code 1 if a check fails.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that rooms find each other

import waiting  # noqa: F401 - before torch

# isort: split
import copy
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
import tyro
from torch import Tensor, nn

import lorafamily
from bench.bench import table
from bench.measuring import Setting, facts, forwards, llama, ready, steps
from embedded import tiny
from lorafamily.layers.placement import placement_of
from pages.report import as_text

CHECKED = ("lora", "olora", "alora", "lora2", "adalora")


@dataclass(frozen=True)
class Given:
    """Check and measure the fast path on a GPU."""

    device: str = "cuda"
    """cuda or cpu"""
    layers: int = 22
    """layers of the LLaMA-shaped model that is measured"""
    width: int = 2048
    """width of its hidden states, a multiple of 64"""
    inner: int = 5632
    """width of its feed-forward layers"""
    tokens: int = 2048
    """tokens of a sequence"""
    rows: int = 2
    """sequences in a batch"""
    vocabulary: int = 32000
    """size of the model's vocabulary"""
    methods: tuple[str, ...] = ("lora", "olora", "lora2")
    """methods to measure; all are checked"""
    rank: int = 8
    """rank of every adapter"""
    rounds: int = 15
    """timed rounds"""
    out: Path = Path("runs/bench_gpu")
    """folder for bench_gpu.json"""


@dataclass(frozen=True)
class Check:
    """What was checked, the measured number, and its upper bound."""

    what: str
    found: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the number is within the bound; nan is not."""
        return self.found <= self.bound


def main(given: Given) -> bool:
    about = facts(given.device)
    print("; ".join(f"{name} {value}" for name, value in about.items()))
    checks = []
    for check in checked(given.device):
        print(
            f"{'ok  ' if check.holds else 'FAIL'}  {check.what}: {check.found:.3g} (at most {check.bound:.3g})",
            flush=True,
        )
        checks.append(check)
    setting = Setting(given.device, torch.bfloat16, given.rank, 0.1, given.rounds, given.methods)
    model, batch = llama(
        layers=given.layers, width=given.width, inner=given.inner, rows=given.rows, tokens=given.tokens,
        vocabulary=given.vocabulary,
    )  # fmt: skip
    size = sum(parameter.numel() for parameter in model.parameters())
    model, batch = ready(model, batch, setting)
    results = {"facts": about, "parameters": size, "checks": [asdict(check) for check in checks]}
    for part, measure in (("steps", steps), ("forwards", forwards)):
        rows = measure(model, batch, setting)
        print(
            f"\n{part}: {size / 1e9:.2g}B parameters, bfloat16, {given.rows} × {given.tokens} tokens, rank {given.rank}"
        )
        print(as_text(table(rows)), flush=True)
        results[part] = [asdict(row) for row in rows]
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "bench_gpu.json").write_text(json.dumps(results, indent=1))
    return all(check.holds for check in checks)


def checked(device: str) -> Iterator[Check]:
    """The fast path against the plain formula in float64, then merging, saving, compiling and training on the
    device."""
    for method in CHECKED:
        for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):  # products of 64 terms; 8 bits
            yield from _against_float64(method, device, dtype, bound)
    for what in ("entries", "features"):
        yield Check(f"dropout of {what}: difference of the dropped share from 0.25", _dropped(what, device), 0.01)
    yield Check("merging and unmerging: weights that changed", _merged_and_back(device), 0)
    yield Check("saving and loading: largest difference", _saved_and_loaded(device), 0)
    yield Check("torch.compile(fullgraph=True): largest relative difference", _compiled(device), 0.05)
    yield Check("100 steps on one batch: last loss / first loss", _trained(device), 0.9)


def _layers(method: str, dtype: torch.dtype, device: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64)).to(device, dtype)
    lorafamily.apply(model, method, rank=4, seed=0)
    with torch.no_grad():
        for adapter in placement_of(model).adapters.values():
            for parameter in adapter.update.parameters():
                parameter.add_(torch.randn(parameter.shape).to(parameter) * 0.1)
    return model


def _against_float64(method: str, device: str, dtype: torch.dtype, bound: float) -> Iterator[Check]:
    """Output and gradients; differences are relative to the largest number of each tensor."""
    model = _layers(method, dtype, device)
    exact = copy.deepcopy(model).cpu().double()
    torch.manual_seed(1)
    x = torch.randn(300, 64).to(dtype)
    computed = _outcome(model, x.to(device))
    with lorafamily.fast_path(False):
        expected = _outcome(exact, x.double())
    output, *gradients = (
        ((found - right).abs().max() / right.abs().max()).item()
        for found, right in zip(computed, expected, strict=True)
    )
    name = str(dtype).removeprefix("torch.")
    yield Check(f"{method}, {name}: output against float64", output, bound)
    yield Check(f"{method}, {name}: gradients against float64", max(gradients), bound)


def _outcome(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of all trained parameters, on the CPU in float64."""
    x = x.clone().requires_grad_()
    y = model(x)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [value.detach().cpu().double() for value in (y, *torch.autograd.grad(y.square().sum(), [x, *trained]))]


def _dropped(what: str, device: str) -> float:
    linear = nn.Linear(4096, 8, bias=False, device=device)
    nn.init.zeros_(linear.weight)
    layer = nn.Sequential(linear)
    lorafamily.apply(layer, "lora", rank=8, dropout=0.25, dropout_kind=what, seed=0)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in placement_of(layer).adapters["0"].update.named_parameters():
            parameter.copy_(torch.ones_like(parameter) if name == "A" else torch.eye(8).to(parameter))
    torch.manual_seed(0)
    x = torch.ones(64, 4096, device=device)
    kept = [layer(x)[:, 0].mean() / placement_of(layer).adapters["0"].scale / 4096 * 0.75 for _ in range(20)]
    return abs(1 - torch.stack(kept).mean().item() - 0.25)


def _merged_and_back(device: str) -> float:
    model = _layers("lora2", torch.bfloat16, device)
    linears = [module for module in model if isinstance(module, nn.Linear)]
    before = [module.weight.clone() for module in linears]
    lorafamily.merge(model)
    lorafamily.unmerge(model)
    return sum((module.weight != old).sum().item() for module, old in zip(linears, before, strict=True))


def _saved_and_loaded(device: str) -> float:
    model = _layers("olora", torch.bfloat16, device)
    base = lorafamily.remove(copy.deepcopy(model))
    x = torch.randn(5, 64, device=device, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        lorafamily.save(model, folder)
        return (lorafamily.load(base, folder)(x) - model(x)).abs().max().item()


def _compiled(device: str) -> float:
    model = _layers("lora", torch.float32, device)
    x = torch.randn(32, 64, device=device)
    found = []
    backend = "inductor" if device == "cuda" else "aot_eager"  # inductor on a CPU needs a C++ compiler
    for run in (model, torch.compile(model, fullgraph=True, backend=backend)):
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    return max(((one - two).abs().max() / one.abs().max()).item() for one, two in zip(*found, strict=True))


def _trained(device: str) -> float:
    model = tiny().to(device)
    lorafamily.apply(model, "lora2", rank=8, seed=0)
    torch.manual_seed(0)
    batch = {"bytes": torch.randint(256, (4, 24))}
    history = lorafamily.train(model, [batch], steps=100, lr=1e-2, progress=False)
    return history.steps[-1].loss / history.steps[0].loss


if __name__ == "__main__":
    sys.exit(0 if main(tyro.cli(Given)) else 1)
