"""What a step costs beyond the frozen model: ours, peft's, full fine-tuning, as ratios in one run.

    python experiments/bench.py                         # two shapes, some minutes on two cores
    python experiments/bench.py --shapes bert --methods lora lora2 --steps 30

Steps of all variants are interleaved, so that a slow minute of the machine falls on all of them; a ratio is the median
of the ratios to the floor's step of the same round. The floor is forward and backward of the frozen model, gradients of
activations only, nothing trained. All variants train the same model on the same batch, forward, backward and AdamW.
"""

from __future__ import annotations

import copy
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

import lorafamily
from cell import PeakMemory
from lorafamily.layers import Adapted
from lorafamily.placement import placement_of
from lorafamily.targets import match
from report import as_text

FLOOR = "frozen floor"


@dataclass(frozen=True)
class Bench:
    """Measure the step time of every method against the frozen floor, peft and full fine-tuning."""

    shapes: tuple[str, ...] = ("bert", "llama")
    """bert: 6 layers, width 384, 16 × 128 tokens; llama: 6 layers, width 512, 4 × 256 tokens; small: for a look"""
    methods: tuple[str, ...] = ("lora", "olora", "alora", "lora2", "adalora")
    """of ours; LoRA² in its dense formulation, peft and full fine-tuning stand beside them"""
    rank: int = 8
    """of every adapter, on all linear layers of the blocks"""
    dropout: float = 0.1
    """of the variants that have one"""
    steps: int = 15
    """rounds that count"""
    device: str = "cpu"
    """cpu or cuda"""
    dtype: str = "float32"
    """of the base"""
    out: Path = Path("runs/bench")
    """folder for bench.json"""


@dataclass(frozen=True)
class Measured:
    """`ratio`: median of step time over the floor's in the same round; `low`, `high`: its quartiles. `forward`: the
    same of the forward alone, in inference. `memory`: MiB that a step takes at its peak beyond the floor's."""

    variant: str
    seconds: float
    ratio: float
    low: float
    high: float
    forward: float
    memory: float | None


def main(settings: Bench) -> dict[str, list[Measured]]:
    found = {shape: measure(shape, settings) for shape in settings.shapes}
    for shape, rows in found.items():
        print(f"\n{shape}, rank {settings.rank}, {settings.dtype}, {settings.steps} interleaved rounds")
        lines = [("variant", "step (s)", "of the floor", "quartiles", "forward", "memory beyond floor (MiB)")]
        for row in rows:
            memory = "–" if row.memory is None else f"{row.memory:.0f}"
            spread = f"{row.low:.2f} to {row.high:.2f}"
            lines.append((row.variant, f"{row.seconds:.3f}", f"{row.ratio:.2f}", spread, f"{row.forward:.2f}", memory))
        print(as_text(lines))
    settings.out.mkdir(parents=True, exist_ok=True)
    told = {"facts": _facts(settings), "rows": {shape: [vars(row) for row in rows] for shape, rows in found.items()}}
    (settings.out / "bench.json").write_text(json.dumps(told, indent=1))
    print("\n" + "; ".join(f"{name} {value}" for name, value in _facts(settings).items()))
    return found


def measure(shape: str, settings: Bench) -> list[Measured]:
    """All variants at one shape, interleaved."""
    base, batch = SHAPES[shape](settings)
    variants = {name: _Variant(make(copy.deepcopy(base)), batch) for name, make in _variants(settings).items()}
    for variant in variants.values():
        variant.step()
        variant.step()
    memory = {name: variant.memory(settings.device) for name, variant in variants.items()}
    steps: dict[str, list[float]] = {name: [] for name in variants}
    forwards: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(settings.steps):
        for name, variant in variants.items():
            steps[name].append(_timed(variant.step, settings.device))
            forwards[name].append(_timed(variant.infer, settings.device))
    rows = []
    for name in variants:
        ratios = [own / floor for own, floor in zip(steps[name], steps[FLOOR], strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        forward = statistics.median(own / floor for own, floor in zip(forwards[name], forwards[FLOOR], strict=True))
        own, floor = memory[name], memory[FLOOR]
        beyond = None if own is None or floor is None else own - floor
        rows.append(Measured(name, statistics.median(steps[name]), ratio, low, high, forward, beyond))
    return rows


class _Variant:
    """A model that trains on one batch."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor]):
        self.model, self.batch = model, batch
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
        self.penalty = None
        if any(isinstance(module, Adapted) for module in model.modules()):
            placement = placement_of(model)
            if placement.method.penalty is not None:
                penalty = placement.method.penalty
                self.penalty = lambda: penalty(placement.adapters.values())

    def step(self) -> None:
        self.model.train()
        loss = self.model(**self.batch).loss
        loss.backward()
        if self.penalty is not None:
            self.penalty().backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    @torch.no_grad()
    def infer(self) -> None:
        self.model.eval()
        self.model(**self.batch)

    def memory(self, device: str) -> float | None:
        """MiB at the peak of a step beyond what is held before it."""
        gc.collect()
        peak = PeakMemory(device)
        before = peak.read()
        self.step()
        after = peak.read()
        return None if after is None or before is None else after - before


def _variants(settings: Bench) -> dict[str, Callable[[nn.Module], nn.Module]]:
    rank, dropout = settings.rank, settings.dropout

    def floor(model: nn.Module) -> nn.Module:
        return model.requires_grad_(False)

    def ours(method: str, **options: Any) -> Callable[[nn.Module], nn.Module]:
        return lambda model: lorafamily.apply(model, method, rank=rank, seed=0, **options)

    def theirs(**options: Any) -> Callable[[nn.Module], nn.Module]:
        def make(model: nn.Module) -> nn.Module:
            import peft

            names = list(match(model))
            config = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=names, **options)
            return peft.get_peft_model(model, config)

        return make

    found: dict[str, Callable[[nn.Module], nn.Module]] = {FLOOR: floor}
    found |= {method: ours(method) for method in settings.methods}
    found |= {f"lora, dropout {dropout:g}": ours("lora", dropout=dropout)}
    if "lora2" in settings.methods:
        found["lora2, dense product"] = lambda model: _dense(ours("lora2")(model))
    try:
        version("peft")
    except PackageNotFoundError:
        print("peft is not installed; its lines are missing")
    else:
        found |= {"peft": theirs(), f"peft, dropout {dropout:g}": theirs(lora_dropout=dropout)}
    found["full fine-tuning"] = lambda model: model
    return found


def _dense(model: nn.Module) -> nn.Module:
    """LoRA² as its authors' code computes it: the product of all factors, as large as the weight, in every forward."""
    for module in model.modules():
        if isinstance(module, Adapted):
            adapter = module.acting
            assert adapter is not None

            def forward(x: Tensor, module: Any = module, adapter: Any = adapter) -> Tensor:
                U, V = adapter.factors()
                return module.own(x) + adapter.scale * (x @ (U @ V).T)

            vars(module)["forward"] = forward
    return model


def _bert(settings: Bench, layers: int = 6, width: int = 384, rows: int = 16, tokens: int = 128) -> Any:
    import transformers

    config = transformers.BertConfig(
        vocab_size=1000, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
        intermediate_size=4 * width, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    ids = torch.randint(1000, (rows, tokens))
    return _ready(model, {"input_ids": ids, "labels": torch.randint(2, (rows,))}, settings)


def _llama(settings: Bench, layers: int = 6, width: int = 512, rows: int = 4, tokens: int = 256) -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        intermediate_size=round(width * 8 / 3 / 32) * 32, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(1000, (rows, tokens))
    return _ready(model, {"input_ids": ids, "labels": ids}, settings)


def _ready(model: Any, batch: dict[str, Tensor], settings: Bench) -> tuple[nn.Module, dict[str, Tensor]]:
    """On its device; the embeddings' output needs a gradient, so that every backward reaches the first layer."""
    model.enable_input_require_grads()
    model.to(settings.device, getattr(torch, settings.dtype))
    return model, {key: value.to(settings.device) for key, value in batch.items()}


SHAPES: dict[str, Callable[[Bench], Any]] = {
    "bert": _bert,
    "llama": _llama,
    "small": lambda settings: _bert(settings, layers=1, width=64, rows=2, tokens=16),
}


def _timed(step: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _facts(settings: Bench) -> dict[str, str]:
    facts = {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads", "torch": torch.__version__}
    if settings.device == "cuda":
        facts["machine"] += f", {torch.cuda.get_device_name()}"
    for name in ("transformers", "peft", "lorafamily"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    return facts


if __name__ == "__main__":
    main(tyro.cli(Bench))
