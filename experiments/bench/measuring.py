"""Times a training step and a forward of one model under every method; the benchmarks share it.

A slow minute of the machine must not fall on one variant alone, so steps of all variants are interleaved. A ratio is
the median over the rounds of the time relative to the floor's step in the same round. The floor is forward and backward
of the frozen model: gradients of activations only, nothing trained. All variants train the same model on the same
batch: forward, backward, AdamW, and the allocator's work between its decisions.
"""

from __future__ import annotations

import waiting  # noqa: F401 - before torch

# isort: split
import copy
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorafamily
from lorafamily.allocation.replay import PeakActivations
from lorafamily.allocation.run import Run
from lorafamily.functional import adapted_linear
from lorafamily.layers import standard
from lorafamily.layers.placement import placement_of
from lorafamily.layers.site import sites_in
from lorafamily.targets import match

FLOOR, FROZEN, KEPT = "frozen floor", "frozen model", "inputs kept, no update"
DENSE, FULL = "lora2, dense product", "full fine-tuning"
PLAIN = "plain formulation"
FACTORED = "factored"  # the fast path without folding the update into W
COMPARED = (FLOOR, FROZEN, KEPT, DENSE, FULL)  # neither our methods nor peft
Batch = dict[str, Tensor]
Make = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Setting:
    """How to measure. `dtype`: of the base; `rank`: of every adapter; `dropout`: probability in variants with
    dropout."""

    device: str
    dtype: torch.dtype
    rank: int
    dropout: float
    rounds: int
    methods: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """`ratios`: for every round the time relative to the first variant's; `ratio`, `low`, `high`: their median and
    quartiles. `memory`: MiB of tensors that a step adds at its peak; `resident`: MiB of weights and optimizer state,
    which are there before the step; both None for a forward."""

    variant: str
    seconds: float
    ratio: float
    low: float
    high: float
    ratios: tuple[float, ...]
    memory: float | None = None
    resident: float | None = None


def steps(base: nn.Module, batch: Batch, setting: Setting) -> list[Measured]:
    """Times a training step of every variant against the frozen floor."""
    variants = trained_variants(setting)
    made = {name: _Trained(make(copy.deepcopy(base)), batch, name) for name, make in variants.items()}
    for variant in made.values():
        variant.step()
        variant.step()
    memory = {name: _peak(variant.step, setting.device) for name, variant in made.items()}
    rows = _interleaved({name: variant.step for name, variant in made.items()}, setting)
    return [replace(row, memory=memory[row.variant], resident=made[row.variant].resident()) for row in rows]


def forwards(base: nn.Module, batch: Batch, setting: Setting) -> list[Measured]:
    """Times a forward in inference of every variant, merged and unmerged, against the frozen model."""
    made = {name: make(copy.deepcopy(base)).eval() for name, make in served_variants(setting).items()}

    def forward(name: str, model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad(), computed_as(name):
                model(**batch)

        return run

    runs = {name: forward(name, model) for name, model in made.items()}
    for run in runs.values():
        run()
    return _interleaved(runs, setting)


def _interleaved(runs: Mapping[str, Callable[[], None]], setting: Setting) -> list[Measured]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(setting.rounds):
        for name, run in runs.items():
            times[name].append(timed(run, setting.device))
    first = next(iter(times.values()))
    rows = []
    for name, seconds in times.items():
        ratios = [one / other for one, other in zip(seconds, first, strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
        rows.append(Measured(name, statistics.median(seconds), ratio, low, high, tuple(ratios)))
    return rows


def timed(run: Callable[[], object], device: str) -> float:
    """The seconds that a call takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _peak(run: Callable[[], None], device: str) -> float:
    """The most MiB of new tensors alive at once."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with PeakActivations() as measured:
        run()
    return measured.peak / 2**20


@contextmanager
def computed_as(variant: str) -> Iterator[None]:
    """Inside the block adapted layers use the formulation that the variant's name says."""
    factored = partial(adapted_linear, folded=False)
    with ExitStack() as how:
        how.enter_context(lorafamily.fast_path(PLAIN not in variant))
        if FACTORED in variant:
            how.enter_context(mock.patch.object(standard, "adapted_linear", factored))
        yield


class _Trained:
    """A model that trains on one batch, with the penalty and the allocator's bookkeeping."""

    def __init__(self, model: nn.Module, batch: Batch, name: str):
        self.model, self.batch, self.steps, self.name = model.train(), batch, 0, name
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None
        self.penalty: Callable[[], Tensor] | None = None
        self.allocator = None
        if any(sites_in(model)):
            method, adapters = placement_of(model).method, placement_of(model).adapters
            if (penalty := method.penalty) is not None:
                self.penalty = lambda: penalty(adapters.values())
            # A run so long that no decision falls into the measured steps.
            self.allocator = method.allocation.begin(
                Run(model, adapters, 10**6, validation_loss=lambda rows: self._loss())
            )

    def _loss(self) -> Tensor:
        loss: Tensor = self.model(**self.batch).loss
        return loss

    def resident(self) -> float:
        """MiB of weights and optimizer state."""
        states = [] if self.optimizer is None else self.optimizer.state.values()
        state = [tensor for of_parameter in states for tensor in of_parameter.values()]
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *state)) / 2**20

    def step(self) -> None:
        with computed_as(self.name):
            self._loss().backward()
        if self.penalty is not None:
            self.penalty().backward()
        if self.optimizer is not None:
            self.optimizer.step()
        if self.allocator is not None:
            self.steps += 1
            self.allocator.step(self.steps)
        if self.optimizer is not None:
            self.optimizer.zero_grad()


def trained_variants(setting: Setting) -> dict[str, Make]:
    """By name, the function that turns a copy of the base into the variant; the first is the floor."""
    found: dict[str, Make] = {FLOOR: lambda model: model.requires_grad_(False)}
    found |= {method: _ours(method, setting) for method in setting.methods}
    if setting.dropout:
        drops = f"dropout {setting.dropout:g}"
        found[f"lora, {drops}"] = _ours("lora", setting, dropout=setting.dropout)
        found[f"lora, {drops} of features"] = _ours("lora", setting, dropout=setting.dropout, dropout_kind="features")
        found[f"lora, {drops}, {PLAIN}"] = _ours("lora", setting, dropout=setting.dropout)
    for how in (PLAIN, FACTORED):
        found[f"lora, {how}"] = _ours("lora", setting)
    found[KEPT] = _keeping
    if "lora2" in setting.methods:
        found[DENSE] = lambda model: _dense(_ours("lora2", setting)(model))
    if _has_peft():
        found["peft"] = _theirs(setting)
        if setting.dropout:
            found[f"peft, {drops}"] = _theirs(setting, lora_dropout=setting.dropout)
    found[FULL] = lambda model: model
    return found


def served_variants(setting: Setting) -> dict[str, Make]:
    """The variants for inference; the first is the frozen model."""
    found: dict[str, Make] = {FROZEN: lambda model: model.requires_grad_(False)}
    for method in setting.methods:
        found[method] = _ours(method, setting)
        found[f"{method}, merged"] = _merged(_ours(method, setting))
    found[f"lora, {FACTORED}"] = _ours("lora", setting)
    if _has_peft():
        found["peft"] = _theirs(setting)
        found["peft, merged"] = lambda model: cast(Any, _theirs(setting)(model)).merge_and_unload()
    return found


def _ours(method: str, setting: Setting, **options: Any) -> Make:
    return lambda model: lorafamily.apply(model, method, rank=setting.rank, seed=0, **options)


class _Keeping(torch.autograd.Function):
    """A frozen linear layer that keeps its input until the backward, as every update must, but does not use it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, W)
        return F.linear(x, W, b)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        _, W = ctx.saved_tensors
        return gradient @ W, None, None


def _keeping(model: nn.Module) -> nn.Module:
    for target in match(model).values():
        vars(target.layer)["forward"] = lambda x, layer=target.layer: _Keeping.apply(x, layer.weight, layer.bias)
    return model.requires_grad_(False)


def _merged(make: Make) -> Make:
    return lambda model: lorafamily.merge(make(model))


def _theirs(setting: Setting, **options: Any) -> Make:
    def make(model: nn.Module) -> Any:
        import peft

        config = peft.LoraConfig(r=setting.rank, lora_alpha=16, target_modules=list(match(model)), **options)
        return peft.get_peft_model(model, config)

    return make


def _has_peft() -> bool:
    try:
        version("peft")
    except PackageNotFoundError:
        print("peft is not installed; its rows are left out")
        return False
    return True


def _dense(model: nn.Module) -> nn.Module:
    """LoRA² as in its authors' code: every forward multiplies all factors to a matrix as large as the weight."""
    for _, site in sites_in(model):
        ((_, adapter),) = site.acting()

        def forward(x: Tensor, site: Any = site, adapter: Any = adapter) -> Tensor:
            U, V = adapter.factors()
            return site.base_forward(x) + adapter.scale * (x @ (U @ V).T.to(x.dtype))

        vars(site.layer)["forward"] = forward
    return model


def bert(*, layers: int = 6, width: int = 384, rows: int = 16, tokens: int = 128) -> tuple[nn.Module, Batch]:
    """A BERT-shaped classifier and a batch."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=1000, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
        intermediate_size=4 * width, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    ids = torch.randint(1000, (rows, tokens))
    return transformers.BertForSequenceClassification(config), {"input_ids": ids, "labels": torch.randint(2, (rows,))}


def llama(
    *, layers: int = 6, width: int = 512, inner: int = 1376, rows: int = 4, tokens: int = 256, vocabulary: int = 1000
) -> tuple[nn.Module, Batch]:
    """A LLaMA-shaped language model and a batch."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        intermediate_size=inner, use_cache=False, max_position_embeddings=max(2048, tokens),
    )  # fmt: skip
    torch.manual_seed(0)
    ids = torch.randint(vocabulary, (rows, tokens))
    return transformers.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


def ready(model: Any, batch: Batch, setting: Setting) -> tuple[nn.Module, Batch]:
    """Model and batch on the device. The embeddings' output requires a gradient, so that each backward reaches all
    layers."""
    model.enable_input_require_grads()
    model.to(setting.device, setting.dtype)
    return model, {key: value.to(setting.device) for key, value in batch.items()}


def facts(device: str) -> dict[str, str]:
    """The machine and the versions, for the report."""
    found = {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads", "torch": torch.__version__}
    if device == "cuda":
        found["machine"] += f", {torch.cuda.get_device_name()}"
    for name in ("transformers", "peft", "lorafamily"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
