"""AB-LoRA against its definition: the same scores, for about half the price."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_batchedtensor
from torch.nn import functional as F
from torch.testing import assert_close

import lorafamily
from conftest import data, perturb_, tiny
from lorafamily.allocation.ablation import Ablation, AblationEstimate
from lorafamily.allocation.replay import PeakActivations, Tape
from lorafamily.allocation.run import Run
from lorafamily.batch import loss_of
from lorafamily.layers.placement import placement_of

ARCHITECTURES = ["bert", "llama", "gpt2"]


def pretended(architecture: str, layers: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small model of transformers with random weights in float64, and a batch."""
    transformers = pytest.importorskip("transformers", reason="transformers is an extra")
    torch.manual_seed(0)
    ids = torch.randint(1, 60, (4, 7), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": (ids % 9 > 0).long(), "labels": ids}
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2}
    if architecture == "bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(intermediate_size=32, **sizes))
        batch["labels"] = torch.tensor([0, 1, 1, 0])
    elif architecture == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=32, **sizes))
    else:
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=layers, n_head=2, n_positions=16)
        )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
    return model.double().eval(), batch


def scored(model: nn.Module, loss, memory: float | None) -> dict[str, Tensor]:
    run = Run(model, placement_of(model).adapters, 1, validation_loss=lambda rows: loss())
    return Ablation(run, scoring_memory=memory).scores()


@torch.no_grad()
def brute_force(model: nn.Module, loss) -> dict[str, Tensor]:
    """The definition: for every slice a forward of the whole network without it and one with it alone."""
    adapters = placement_of(model).adapters
    everything = {name: torch.ones(a.slices, dtype=torch.float64) for name, a in adapters.items()}
    nothing = {name: torch.zeros(a.slices, dtype=torch.float64) for name, a in adapters.items()}

    def loss_with(gates: dict[str, Tensor]) -> Tensor:
        for name, adapter in adapters.items():
            adapter._gate = gates[name]
        try:
            return loss().double()
        finally:
            for adapter in adapters.values():
                adapter._gate = None

    scores = {name: torch.zeros(a.slices, dtype=torch.float64) for name, a in adapters.items()}
    whole = loss_with(everything)
    for name, adapter in adapters.items():
        for i, only in enumerate(torch.eye(adapter.slices, dtype=torch.float64)):
            without = loss_with({**everything, name: 1 - only})
            scores[name][i] = without - whole - loss_with({**nothing, name: only})
    return scores


class Counter:
    """Counts how many times a model's batch passes through the given modules: n ablations in one batch count n."""

    def __init__(self, modules: list[nn.Module]):
        self.passes = 0
        for module in modules:
            module.forward = partial(self._count, module.forward)

    def _count(self, forward, *args, **kwargs):
        output = forward(*args, **kwargs)
        first = output if isinstance(output, Tensor) else output[0]
        self.passes += get_unwrapped(first).numel() // first.numel() if is_batchedtensor(first) else 1
        return output


def adapted(architecture: str, layers: int, rank: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model with trained ranks, and its loss."""
    model, batch = pretended(architecture, layers)
    perturb_(lorafamily.apply(model, "alora", rank=rank, seed=0), size=0.3)
    labels = batch.pop("labels")
    # transformers' own loss would round the logits to float32
    return model, lambda: F.cross_entropy(model(**batch).logits.flatten(0, -2), labels.flatten())


def passes_of_the_definition(model: nn.Module, layers: int) -> int:
    return layers * (2 * sum(adapter.slices for adapter in placement_of(model).adapters.values()) + 1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exact_ablation_is_the_definition(architecture):
    model, loss = adapted(architecture, layers=4, rank=2)
    blocks = Counter(next(list(m) for m in model.modules() if isinstance(m, nn.ModuleList)))
    expected = brute_force(model, loss)
    assert blocks.passes == passes_of_the_definition(model, layers=4)
    assert max(float(value.abs().max()) for value in expected.values()) > 0.1
    for memory in (None, 64.0):  # one by one, and in batches
        scores = scored(model, loss, memory)
        for name, value in expected.items():
            # float64: a score is a difference of losses near 4, whose sums run in another order in a batch.
            assert_close(scores[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exact_ablation_has_three_fifths_of_the_definition_s_price(architecture):
    model, loss = adapted(architecture, layers=8, rank=2)
    blocks = Counter(next(list(m) for m in model.modules() if isinstance(m, nn.ModuleList)))
    for memory in (None, 64.0):
        blocks.passes = 0
        scored(model, loss, memory)
        assert 0 < blocks.passes <= 0.6 * passes_of_the_definition(model, layers=8)


def test_ablations_in_a_batch_stay_within_the_memory_given():
    model = perturb_(lorafamily.apply(tiny(), "alora", rank=8, seed=0))
    loss = partial(loss_of, model, data(1)[0])
    peaks = []
    for memory in (1.0, 4.0):
        with PeakActivations() as measured:
            scored(model, loss, memory)
        peaks.append(measured.peak / 2**20)
    assert 0.5 < peaks[0] <= 1.0
    assert 2.0 < peaks[1] <= 4.0


class Awkward(nn.Module):
    """What a replay must not trip over: a layer used twice, one that is never used, activations written in place, and a
    way through the network that depends on the data."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared, self.last = (nn.Linear(8, 8).double() for _ in range(3))
        self.unused = nn.Linear(8, 8).double()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = self.relu(self.shared(h))
        h = self.shared(h) + h
        if h.sum() > 1e6:
            h = h / 2
        h.mul_(1.5)
        return self.last(h).square().mean()


def test_shared_unused_and_in_place_layers_are_scored_by_the_definition():
    model = perturb_(lorafamily.apply(Awkward().eval(), "alora", rank=2, seed=0))
    x = torch.randn(5, 8, dtype=torch.float64)
    before = vars(model.shared)["forward"]
    expected = brute_force(model, lambda: model(x))
    found = scored(model, lambda: model(x), None)
    assert found.keys() == expected.keys()
    # float64 both times: scores are differences of losses near 1, whose sums may run in another order.
    for name, value in expected.items():
        assert_close(found[name], value, rtol=1e-9, atol=1e-12)
    with pytest.warns(UserWarning, match="Awkward cannot run several ablations in one batch"):
        found = scored(model, lambda: model(x), 64.0)
    # As above.
    for name, value in expected.items():
        assert_close(found[name], value, rtol=1e-9, atol=1e-12)
    assert vars(model.shared)["forward"] is before
    assert not any(adapter.off for adapter in placement_of(model).adapters.values())


class Balanced(nn.Module):
    """Routers whose loads are in the loss: collected by hooks, as in transformers, or in a list."""

    def __init__(self, hooks: bool):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 8), "router": nn.Linear(8, 4)}) for _ in range(3))
        self.double()
        self.loads: list[Tensor] = []
        self.hooks = hooks
        for layer in self.layers:
            layer.forward = partial(self.layer, layer)
            if hooks:
                layer.router.register_forward_hook(lambda _, inputs, output: self.loads.append(output))

    def layer(self, layer: nn.ModuleDict, x: Tensor) -> Tensor:
        h = torch.tanh(layer.up(x))
        load = layer.router(h)
        if not self.hooks:
            self.loads.append(load)
        return x + h

    def forward(self, x: Tensor) -> Tensor:
        self.loads.clear()
        for layer in self.layers:
            x = layer(x)
        return x.square().mean() + sum(load.softmax(-1).square().mean() for load in self.loads)


def assert_scored_by_whole_forwards(model: nn.Module) -> None:
    """With a warning, and by the definition."""
    x = torch.randn(5, 8, dtype=torch.float64)
    expected = brute_force(model, lambda: model(x))
    with pytest.warns(UserWarning, match=f"modules of {type(model).__name__} hand on more than their outputs"):
        found = scored(model, lambda: model(x), None)
    # float64 both times: scores are differences of losses near 1, whose sums may run in another order.
    for name, value in expected.items():
        assert_close(found[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("hooks", [True, False])
def test_what_modules_leave_behind_besides_outputs_is_scored_by_the_definition(hooks):
    model = perturb_(lorafamily.apply(Balanced(hooks).eval(), "alora", rank=2, seed=0, targets="up"))
    assert_scored_by_whole_forwards(model)


class Sharing(nn.Module):
    """Blocks that read what an earlier one has left in `shared`, as layers do that share keys and values.

    `how`: "given": a dictionary made anew for each forward (Gemma 4); "kept": an attribute that stays, written by each
    block for the next."""

    def __init__(self, how: str):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.ModuleDict({m: nn.Linear(8, 8) for m in ("k", "q")}) for _ in range(4)).double()
        self.how, self.shared = how, {}
        for i, block in enumerate(self.blocks):
            block.forward = partial(self.block, i, block)

    def block(self, i: int, block: nn.ModuleDict, x: Tensor, shared: dict[str, Tensor]) -> Tensor:
        q = block["q"](x)
        read = shared["k"] if i and (self.how == "kept" or i > 1) else torch.zeros_like(q)
        if self.how == "kept" or i == 0:
            shared["k"] = block["k"](x)
        return x + torch.tanh(q + read)

    def forward(self, x: Tensor) -> Tensor:
        shared = {} if self.how == "given" else self.shared
        for block in self.blocks:
            x = block(x, shared)
        return x.square().mean()


@pytest.mark.parametrize("how", ["given", "kept"])
def test_layers_that_share_what_is_no_output_are_scored_by_the_definition(how):
    model = perturb_(lorafamily.apply(Sharing(how).eval(), "alora", rank=2, seed=0, targets=r"blocks\.\d\.q"))
    assert_scored_by_whole_forwards(model)


def test_a_tape_leaves_the_model_as_it_was_when_something_fails():
    model = lorafamily.apply(tiny(), "lora", rank=2)
    own = {name: vars(module).get("forward") for name, module in model.named_modules()}

    def fail():
        model(**data(1)[0])
        raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        Tape(model).run(fail)
    assert {name: vars(module).get("forward") for name, module in model.named_modules()} == own


def test_the_first_order_estimate_takes_a_layer_that_no_loss_reaches():
    model = perturb_(lorafamily.apply(Awkward().eval(), "alora", rank=2, seed=0))
    x = torch.randn(5, 8, dtype=torch.float64)
    scores = AblationEstimate(
        Run(model, placement_of(model).adapters, 1, validation_loss=lambda rows: model(x))
    ).scores()
    with torch.no_grad(), lorafamily.disabled(model):
        # float64: minus the loss twice over, once more rounded.
        assert_close(scores["unused"], -model(x).repeat(2), rtol=1e-12, atol=0)
