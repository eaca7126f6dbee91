"""Costs of deployment: drift over ten thousand merges, switching, routing, merging on disk.

    python experiments/bench/deploying.py --model PATH

Every measurement and its comparison come from the same run.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that rooms find each other

import waiting  # noqa: F401 - before torch

# isort: split
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor, nn

import lorafamily
from bench.measuring import timed
from embedded import tiny
from lorafamily.layers.placement import placement_of
from pages.report import as_text

FIVE = {"a": ("lora", 2), "b": ("olora", 3), "c": ("lora2", 4), "d": ("adalora", 1), "e": ("rslora+alora", 5)}


@dataclass(frozen=True)
class Settings:
    """Measure drift and costs of deployment."""

    model: str
    """folder or hub id of a transformers model, for switching and routing"""
    cycles: int = 10_000
    """cycles of merging, unmerging and switching"""
    repeats: int = 100
    """repetitions of what is timed"""


def main(settings: Settings) -> None:
    drift(settings.cycles)
    switching(settings.model, settings.repeats)
    routing(settings.model, settings.repeats)
    merging_on_disk()


def drift(cycles: int) -> None:
    """Base weights after cycles of switch, merge, unmerge over five adapters, compared with peft and one LoRA."""
    lines = [
        ["dtype", "weights that differ", "largest difference", "same merged logits", "peft: differ", "peft: largest"]
    ]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model, batch = tiny().to(dtype).eval(), torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(0))
        base = {name: value.clone() for name, value in model.state_dict().items()}
        for seed, (name, (method, rank)) in enumerate(FIVE.items()):
            lorafamily.apply(model, method, rank=rank, name=name, seed=seed)
            _perturb(placement_of(model, name).adapters.values(), seed)
        seen: dict[str, Tensor] = {}
        same = True
        with torch.no_grad():
            for cycle in range(cycles):
                name = list(FIVE)[cycle % 5]
                lorafamily.merge(lorafamily.switch(model, name))
                if cycle < 5 or cycle >= cycles - 5:
                    logits = model(batch).logits
                    same = same and torch.equal(logits, seen.setdefault(name, logits))
                lorafamily.unmerge(model)
        lorafamily.remove(model)
        lines.append([str(dtype).removeprefix("torch."), *_differences(model.state_dict(), base), str(same)])
        lines[-1] += _differences(_peft_cycles(tiny().to(dtype).eval(), cycles), base)
    print(f"Base weights after {cycles:,} cycles of switching among five adapters, merging and unmerging")
    print(as_text(lines), flush=True)


def switching(path: str, repeats: int) -> None:
    model = _model(path)
    for name in ("a", "b"):
        lorafamily.apply(model, "lora", rank=8, name=name, seed=0)
        _perturb(placement_of(model).adapters.values(), 0)
    names = iter(["a", "b"] * repeats * 10)
    unmerged = _seconds(lambda: lorafamily.switch(model, next(names)), repeats)
    weights = [model.get_submodule(at).get_parameter("weight") for at in placement_of(model).adapters]
    copying, merged = [], []
    for _ in range(repeats):  # in turn, so that other work on the machine slows both
        copying.append(_seconds(lambda: [weight.data.clone() for weight in weights], 1))
        lorafamily.merge(model)
        merged.append(_seconds(lambda: lorafamily.merge(lorafamily.switch(lorafamily.unmerge(model), next(names))), 1))
        lorafamily.unmerge(model)
    once, between = statistics.median(copying), statistics.median(merged)
    print(f"\nSwitching between two adapters of rank 8 on {len(weights)} layers, median of {repeats}, milliseconds")
    print(f"unmerged: {unmerged * 1e3:.3f}")
    print(
        f"merged: {between * 1e3:.2f}, copying the adapted weights once: {once * 1e3:.2f}, ratio {between / once:.2f}"
    )
    sys.stdout.flush()


def routing(path: str, repeats: int) -> None:
    model = _model(path)
    names = [f"adapter{i}" for i in range(8)]
    for seed, name in enumerate(names):
        lorafamily.apply(model, "lora", rank=8, name=name, seed=seed)
        _perturb(placement_of(model).adapters.values(), seed)
    ids = torch.randint(1000, 20000, (32, 48), generator=torch.Generator().manual_seed(0))
    of_sample = [names[i % 8] for i in range(32)]
    single, routed = [], []

    def through_eight() -> None:
        with lorafamily.routing(model, of_sample):
            model(ids)

    with torch.no_grad():
        for _ in range(max(3, repeats // 5)):
            single.append(_seconds(lambda: model(ids), 1))
            routed.append(_seconds(through_eight, 1))
        with lorafamily.routing(model, of_sample):
            together = model(ids).last_hidden_state
        largest = 0.0
        for i, name in enumerate(names):
            alone = lorafamily.switch(model, name)(ids[i::8]).last_hidden_state
            largest = max(largest, float((together[i::8] - alone).abs().max()))
    one, many = statistics.median(single), statistics.median(routed)
    print("\nA batch of 32 samples of 48 tokens over 8 adapters of rank 8, in one forward")
    print(f"routed: {many:.3f} s, one adapter for all: {one:.3f} s, ratio {many / one:.2f}")
    print(f"largest difference to separate runs: {largest:.1e} (of outputs up to {float(together.abs().max()):.1f})")
    sys.stdout.flush()


def merging_on_disk() -> None:
    """A sharded checkpoint of more than a gigabyte, merged by the command in a process of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **sizes))
        model.save_pretrained(folder / "base", max_shard_size="300MB")
        lorafamily.apply(model, "lora", rank=8, seed=0)
        _perturb(placement_of(model).adapters.values(), 0)
        lorafamily.save(model, folder / "adapter")
        lorafamily.merge(model).save_pretrained(folder / "expected", max_shard_size="300MB")
        del model
        arguments = [f"--{name}={folder / name}" for name in ("base", "adapter", "out")]
        # The process prints its own peak; the value that its parent could read includes the parent's memory.
        code = "import sys; from lorafamily.cli import main; main(); print(open('/proc/self/status').read())"
        command = [sys.executable, "-c", code, "merge", "--json", *arguments]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peak = int(printed.split("VmHWM:")[1].split()[0]) / 2**10
        shards = sorted((folder / "base").glob("*.safetensors"))
        equal = all(_same_bytes(folder / "out" / shard.name, folder / "expected" / shard.name) for shard in shards)
        sizes_of = [shard.stat().st_size / 2**20 for shard in shards]
    print(
        f"\nlorafamily merge on {len(shards)} shards of {sum(sizes_of):,.0f} MiB, the largest {max(sizes_of):,.0f} MiB"
    )
    print(f"peak memory of the process: {peak:,.0f} MiB; same bytes as merging in memory: {equal}")


def _same_bytes(one: Path, other: Path) -> bool:
    with open(one, "rb") as a, open(other, "rb") as b:
        while True:
            first, second = a.read(1 << 24), b.read(1 << 24)
            if first != second or not first:
                return first == second


def _model(path: str) -> nn.Module:
    from transformers import AutoModel

    model: nn.Module = AutoModel.from_pretrained(path)
    return model.eval()


def _peft_cycles(model: nn.Module, cycles: int) -> dict[str, Tensor]:
    from peft import LoraConfig, get_peft_model

    targets = ["query", "key", "value", "output", "up", "down"]
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=16, target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
        for _ in range(cycles):
            adapted.merge_adapter()
            adapted.unmerge_adapter()
    return dict(adapted.unload().state_dict())


@torch.no_grad()
def _perturb(adapters: Iterable[lorafamily.Adapter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for adapter in adapters:
        for parameter in adapter.update.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def _differences(after: dict[str, Tensor], before: dict[str, Tensor]) -> list[str]:
    differ = sum(int((after[name] != value).sum()) for name, value in before.items())
    largest = max(float((after[name].double() - value.double()).abs().max()) for name, value in before.items())
    return [f"{differ:,} of {sum(value.numel() for value in before.values()):,}", f"{largest:.1e}"]


def _seconds(run: Callable[[], object], repeats: int) -> float:
    """The median over repetitions."""
    return statistics.median(timed(run, "cpu") for _ in range(repeats))


if __name__ == "__main__":
    main(tyro.cli(Settings))
