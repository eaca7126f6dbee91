"""The loop: what it optimises, what it records, what it refuses."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BatchEncoding

import lorafamily
from conftest import data, every_method, few_rounds, logits, tiny, tokens
from heads import bart, classes, classifier, gpt2, llama, padded
from lorafamily.allocation.allocator import Allocation, Allocator
from lorafamily.layers.placement import placement_of


@every_method
def test_every_method_learns(method):
    model = lorafamily.apply(tiny(), method, rank=3, seed=0, **few_rounds(method))
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad and "initial" not in n}
    history = lorafamily.train(model, data(1), steps=60, lr=2e-2, validation=data(1), progress=False)
    assert history.steps[-1].loss < 0.9 * history.steps[0].loss
    # The same batch; the recorded loss is from before the last step, the evaluated one from after it.
    assert history.metrics["loss"] == pytest.approx(history.steps[-1].loss, rel=0.2)
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in frozen.items())


def test_the_same_loop_trains_a_plain_model():
    model = tiny()
    history = lorafamily.train(model, data(1), steps=20, lr=1e-2, progress=False)
    assert history.steps[-1].loss < 0.7 * history.steps[0].loss
    assert history.steps[-1].trainable == sum(p.numel() for p in model.parameters())


def test_accumulated_batches_equal_one_large_batch():
    ends = []
    for accumulate in (1, 2):
        model = lorafamily.apply(tiny(dtype=torch.float64), "lora", rank=3, seed=0)
        halves = data(2)
        batches = halves if accumulate == 2 else [{"bytes": torch.cat([half["bytes"] for half in halves])}]
        lorafamily.train(model, batches, steps=5, accumulate=accumulate, progress=False)
        ends.append(logits(model))
    # Same mathematics, gradients summed in another order; Adam divides by their size, so rounding is amplified.
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-8, atol=1e-8)


ACCUMULATED = {
    "causal": (gpt2, [padded(seed, 12) for seed in range(4)]),
    "encoder and decoder": (bart, [padded(seed, 12) for seed in range(4)]),
    "classes": (classifier, [classes(seed, 12, rows) for seed, rows in enumerate((4, 1, 3, 4))]),
    "a batch without labels": (
        llama,
        [padded(0, 12), {**padded(1, 12), "labels": torch.full((4, 12), -100)}, padded(2, 12), padded(3, 12)],
    ),
}


@pytest.mark.parametrize("named", ACCUMULATED)
def test_batches_of_unequal_tokens_equal_one_large_batch(named):
    make, batches = ACCUMULATED[named]
    large = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    torch.manual_seed(0)
    base = make().state_dict()
    ends, losses, evaluated = [], [], []
    for data_ in (batches, [large]):
        model = make()
        model.load_state_dict(base)
        lorafamily.apply(model, "lora", rank=2, seed=0, targets="all-linear")
        history = lorafamily.train(
            model,
            data_,
            steps=3,
            accumulate=len(data_),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
            max_grad_norm=math.inf,
            validation=data_,
            precision="float32",
            progress=False,
        )
        ends.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
        losses.append([step.loss for step in history.steps])
        evaluated.append(history.metrics["loss"])
    assert max((value - base.get(name, 0)).abs().max() for name, value in ends[1].items()) > 1e-3
    for name, value in ends[1].items():
        torch.testing.assert_close(ends[0][name], value, rtol=1e-6, atol=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-6)


def test_what_the_loss_is_a_mean_over_can_be_said():
    """Losses of two batches, 1 and 3 times a weight that trains: their mean as it is asked for."""

    class Weight(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, x, labels):
            return SimpleNamespace(loss=self.w * x.mean())

    one = {"x": torch.full((3,), 1.0), "labels": torch.tensor([1, -100, -100])}
    other = {"x": torch.full((1,), 3.0), "labels": torch.tensor([5])}
    own = lambda model, batch: model(**batch).loss  # noqa: E731
    cases = [({}, 2.0), ({"loss_over": "rows"}, 1.5), ({"loss_fn": own}, 1.5)]
    cases += [({"loss_fn": own, "loss_over": "tokens"}, 2.0), ({"loss_over": lambda batch: batch["x"][0] ** 2}, 2.8)]
    for named, expected in cases:
        history = lorafamily.train(Weight(), [one, other], steps=1, accumulate=2, lr=0.0, progress=False, **named)
        assert history.steps[0].loss == pytest.approx(expected)
        history = lorafamily.train(Weight(), [one], steps=1, lr=0.0, validation=[one, other], progress=False, **named)
        assert history.metrics["loss"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"bytes": tokens()}, "is a dict with the keys bytes, and must be batches"),
        (BatchEncoding({"bytes": tokens()}), "is a BatchEncoding with the keys bytes"),
        (tokens(), r"is a Tensor of shape \(4, 24\)"),
        ((tokens(), tokens()), "is a tuple of 2 tensors"),
        (namedtuple("Pair", "x y")(1, 2), "is a Pair with x, y"),
        ("text", "is a str, and"),
        (3, "is a int, and"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_batch_is_not_taken_for_batches(batch, message):
    model = lorafamily.apply(tiny(), "lora", rank=2)
    with pytest.raises(lorafamily.DataError, match=f"data {message}"):
        lorafamily.train(model, batch, steps=1, progress=False)
    with pytest.raises(lorafamily.DataError, match=f"validation {message}"):
        lorafamily.train(model, data(), steps=1, validation=batch, progress=False)


def test_penalty_is_in_the_gradient_and_in_the_record():
    recorded = {}
    for gamma in (0.0, 0.5):
        model = lorafamily.apply(tiny(), "adalora", rank=3, seed=0, gamma=gamma)
        history = lorafamily.train(model, data(1), steps=30, lr=1e-2, progress=False)
        recorded[gamma] = history.steps
    assert recorded[0.0][0].penalty == 0.0
    # Frames of three rows of size 0.02 √16: ‖F Fᵀ − I‖ is nearly √3.
    assert recorded[0.5][0].penalty == pytest.approx(0.5 * math.sqrt(3), rel=0.02)
    assert recorded[0.5][-1].penalty < 0.5 * recorded[0.5][0].penalty
    assert recorded[0.5][0].loss == recorded[0.0][0].loss  # the task loss is what is logged


def test_history_holds_decisions_and_ranks():
    model = lorafamily.apply(tiny(), "adalora", rank=3, seed=0)
    history = lorafamily.train(model, data(), steps=40, progress=False)
    assert sum(history.slices_start.values()) == 36
    assert history.decisions[-1].reason == "final pattern"
    assert history.slices_end == {n: a.slices for n, a in placement_of(model).adapters.items()}
    assert sum(history.slices_end.values()) == 24
    assert history.stopped == "all 40 steps done"


def test_early_stopping_stops():
    model = lorafamily.apply(tiny(), "lora", rank=2)
    history = lorafamily.train(
        model,
        data(),
        steps=100,
        evaluate=lambda model: {"loss": 1.0},
        evaluate_every=5,
        patience=2,
        progress=False,
    )
    assert len(history.steps) == 15
    assert history.stopped == "no lower validation loss in 2 evaluations"


def test_early_stopping_waits_for_the_allocation():
    model = lorafamily.apply(tiny(), "adalora", rank=3)
    history = lorafamily.train(
        model, data(), steps=40, evaluate=lambda m: {"loss": 1.0}, evaluate_every=2, patience=1, progress=False
    )
    assert len(history.steps) == 24  # the pattern is final at step 21; best at 22, no better at 24
    assert history.slices_end == {n: a.slices for n, a in placement_of(model).adapters.items()}


def test_epochs_become_steps():
    model = lorafamily.apply(tiny(), "lora", rank=2)
    assert len(lorafamily.train(model, data(4), epochs=1.5, accumulate=2, progress=False).steps) == 3


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_learning_rate_rises_then_follows_the_schedule(schedule):
    model = lorafamily.apply(tiny(), "lora", rank=2)
    history = lorafamily.train(model, data(), steps=20, lr=1.0, warmup=0.2, schedule=schedule, progress=False)
    rates = [step.lr for step in history.steps]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1.0
    if schedule == "constant":
        assert set(rates[4:]) == {1.0}
    else:
        assert all(a > b for a, b in pairwise(rates[4:]))
        assert rates[-1] < 0.1


def test_bfloat16_autocast_keeps_float32_factors_and_learns():
    model = lorafamily.apply(tiny(), "olora", rank=3, seed=0)
    history = lorafamily.train(model, data(1), steps=40, lr=2e-2, precision="bfloat16", progress=False)
    assert history.steps[-1].loss < 0.9 * history.steps[0].loss
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_an_optimiser_of_ones_own_follows_resizing():
    model = lorafamily.apply(tiny(), "adalora", rank=3, seed=0)
    made = []

    def sgd(parameters):
        made.append(torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
        return made[0]

    lorafamily.train(model, data(), steps=40, optimizer=sgd, progress=False)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in made[0].param_groups for p in group["params"]} == trained
    for parameter, state in made[0].state.items():
        assert state["momentum_buffer"].shape == parameter.shape


class Bypassing(nn.Module):
    """Has a layer that takes no part in the loss: an adapter there learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.bypassed = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        self.bypassed(x)
        return SimpleNamespace(loss=self.used(x).square().mean())


def test_an_adapter_without_gradient_is_named():
    model = lorafamily.apply(Bypassing(), "lora", rank=2)
    with pytest.raises(lorafamily.TrainingError, match=r"1 of 2 adapters got no gradient.*: bypassed\. "):
        lorafamily.train(model, [(torch.ones(2, 4),)], steps=3, progress=False)
    lorafamily.train(model, [(torch.ones(2, 4),)], steps=3, progress=False, check_gradients=False)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's hint, without saying where
@pytest.mark.parametrize(
    ("beside", "message"),
    [
        (None, r"the loss depends on nothing that trains.*use_reentrant=True"),
        ("the last norm", r"12 of 12 adapters got no gradient.*use_reentrant=True"),
    ],
)
def test_reentrant_checkpointing_of_a_frozen_input_is_said(beside, message):
    model = lorafamily.apply(tiny(), "lora", rank=2, also_train=beside and r"^norm\.")
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=True)
    with pytest.raises(lorafamily.TrainingError, match=message):
        lorafamily.train(model, data(1), steps=1, progress=False)


def test_the_penalty_alone_does_not_pass_for_a_gradient():
    model = lorafamily.apply(Bypassing(), "adalora", rank=2)
    with pytest.raises(lorafamily.TrainingError, match="bypassed"):
        lorafamily.train(model, [(torch.ones(2, 4),)], steps=10, progress=False)


def test_a_loss_that_is_not_finite_stops_before_it_does_harm():
    model = lorafamily.apply(tiny(), "lora", rank=2)

    def poisoned(model, batch):
        loss = model(batch["bytes"]).loss
        return loss * float("nan") if batch["poison"] else loss

    batches = [{"bytes": tokens(), "poison": i == 3} for i in range(5)]
    with pytest.raises(lorafamily.TrainingError, match=r"loss nan.*at step 4 \(batches 3 to 3.*first adapter"):
        lorafamily.train(model, batches, steps=10, loss_fn=poisoned, progress=False)
    assert torch.isfinite(logits(model)).all()


def test_steps_that_are_not_finite_can_be_skipped_and_are_counted():
    batches = [{"bytes": tokens(), "poison": i in (3, 4, 7)} for i in range(10)]

    def poisoned(model, batch):
        loss = model(batch["bytes"]).loss
        return loss * float("nan") if batch["poison"] else loss

    model = lorafamily.apply(tiny(), "adalora", rank=2, seed=0)
    history = lorafamily.train(model, batches, steps=20, loss_fn=poisoned, skip_nonfinite=2, progress=False)
    assert history.skipped == 6
    assert [step.step for step in history.steps if not math.isfinite(step.loss)] == [4, 5, 8, 14, 15, 18]
    assert history.decisions[-1].reason == "final pattern"
    assert torch.isfinite(logits(model)).all()
    with pytest.raises(lorafamily.TrainingError, match=r"at step 5 .*after 1 steps skipped for the same reason"):
        lorafamily.train(model, batches, steps=20, loss_fn=poisoned, skip_nonfinite=1, progress=False)


def test_a_base_weight_that_changed_is_named():
    model = lorafamily.apply(tiny(), "lora", rank=2)

    def meddling(model, batch):
        model.blocks[1].mlp.up.weight.data[0, 0] += 1e-6
        return model(batch["bytes"]).loss

    with pytest.raises(
        lorafamily.TrainingError, match=r"1 frozen base weights are not what .*: blocks\.1\.mlp\.up\.we"
    ):
        lorafamily.train(model, data(1), steps=2, loss_fn=meddling, progress=False)


@dataclass(frozen=True)
class Sleeping(Allocation):
    """A schedule that never fires."""

    def allocator(self, run):
        return Sleeper(run)


class Sleeper(Allocator):
    def decide(self, step):
        return None


def test_a_schedule_that_never_fired_is_said(monkeypatch):
    model = lorafamily.apply(tiny(), "lora", rank=2)
    placement = placement_of(model)
    placement.method = placement.method.but(allocation=Sleeping())
    with pytest.raises(
        lorafamily.AllocationError, match="Sleeper decided nothing in 3 steps: its schedule never fired"
    ):
        lorafamily.train(model, data(1), steps=3, progress=False)


class Keyworded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, scale=1.0):
        return SimpleNamespace(loss=scale * self.layer(x).square().mean())


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": torch.ones(2, 4), "labels": 1}, "keys x, labels; Keyworded does not take labels. It takes x, scale"),
        ({"scale": 2.0}, "has the keys scale; Keyworded needs x. It takes x, scale"),
    ],
)
def test_a_batch_with_wrong_keys_says_both_lists(batch, message):
    with pytest.raises(lorafamily.DataError, match=message):
        lorafamily.train(lorafamily.apply(Keyworded(), "lora", rank=1), [batch], steps=1, progress=False)


def test_float16_scales_the_loss_and_learns():
    model = lorafamily.apply(tiny(), "lora2", rank=3, seed=0)

    def small(model, batch):  # gradients that float16 would lose
        return model(batch["bytes"]).loss * 1e-6

    ends = {}
    for precision in ("float32", "float16"):
        model = lorafamily.apply(tiny(), "lora", rank=3, seed=0)
        history = lorafamily.train(
            model,
            data(1),
            steps=40,
            lr=2e-2,
            loss_fn=small,
            precision=precision,
            max_grad_norm=math.inf,
            progress=False,
        )
        ends[precision] = history.steps[-1].loss
        assert ends[precision] < 0.9 * history.steps[0].loss
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert ends["float16"] == pytest.approx(ends["float32"], rel=0.05)  # another rounding in 40 steps


def test_float16_finds_its_scale_by_skipping():
    model = lorafamily.apply(tiny(), "lora", rank=3, seed=0)
    large = lambda model, batch: model(batch["bytes"]).loss * 1e4  # noqa: E731 - too large for the first scale of 2¹⁶
    history = lorafamily.train(model, data(1), steps=30, loss_fn=large, precision="float16", progress=False)
    assert 0 < history.skipped < 25
    assert not math.isfinite(history.steps[0].gradient)
    assert math.isfinite(history.steps[-1].gradient)


@pytest.mark.parametrize("method", ["lora", "alora"])
def test_recomputed_activations_change_nothing(method):
    losses = []
    for recompute in (False, True):
        model = lorafamily.apply(tiny(), method, rank=3, targets="mlp", seed=0, dropout=0.2, **few_rounds(method))
        forward = model.blocks[0].forward
        history = lorafamily.train(
            model, data(), steps=20, validation=data(1), checkpoint_activations=recompute, progress=False
        )
        losses.append([step.loss for step in history.steps])
        assert model.blocks[0].forward == forward
    assert losses[0] == losses[1]
    with pytest.raises(lorafamily.TrainingError, match="works on blocks"):
        lorafamily.train(lorafamily.apply(Bypassing(), "lora", rank=1), [1], steps=1, checkpoint_activations=True)


class Counting(nn.Linear):
    calls = 0

    def forward(self, x):
        Counting.calls += 1
        return super().forward(x)


class Lists(nn.Module):
    """Two blocks, each a list of two layers, as some write them."""

    def __init__(self, as_modules: bool):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.ModuleList(Counting(4, 4) for _ in range(2)) for _ in range(2))
        self.as_modules = as_modules

    def forward(self, x):
        for layer in (layer for block in self.blocks for layer in block):
            x = layer(x) if self.as_modules else nn.functional.linear(x, layer.weight, layer.bias)
        return x.square().mean()


def test_blocks_that_are_lists_are_recomputed_and_blocks_that_nobody_calls_are_refused():
    settings = {"steps": 1, "loss_fn": lambda model, x: model(x), "checkpoint_activations": True, "progress": False}
    model = lorafamily.apply(Lists(as_modules=True), "lora", rank=1)
    Counting.calls = 0
    lorafamily.train(model, [torch.ones(2, 4)], **settings)
    assert Counting.calls == 8  # four layers in the forward, and again in the backward
    model = Lists(as_modules=False)
    with pytest.raises(lorafamily.TrainingError, match="has no effect: Lists calls none of its 4 blocks"):
        lorafamily.train(model, [torch.ones(2, 4)], **settings)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_users_own_checkpointing_stays_on():
    model = lorafamily.apply(llama(), "lora", rank=1)
    name = "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"
    getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
    ids = torch.arange(6)[None]
    lorafamily.train(model, [{"input_ids": ids, "labels": ids}], steps=1, checkpoint_activations=True, progress=False)
    assert getattr(model, f"is_{name}")


def test_an_optimizer_that_trains_twice_has_its_rates_twice():
    model = lorafamily.apply(tiny(), "lora", rank=2, seed=0)
    optimizer = torch.optim.AdamW(lorafamily.parameter_groups(model, lr=1e-2))
    peaks = []
    for _ in range(2):
        history = lorafamily.train(model, data(), steps=6, warmup=0, optimizer=optimizer, progress=False)
        peaks.append(max(step.lr for step in history.steps))
    assert peaks == [1e-2, 1e-2]
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_a_model_that_is_one_layer_trains():
    model = lorafamily.apply(nn.Linear(4, 3), "lora", rank=1, seed=0)
    loss_fn = lambda model, x: model(x).square().mean()  # noqa: E731
    history = lorafamily.train(model, [torch.ones(2, 4)], steps=3, loss_fn=loss_fn, progress=False)
    assert history.steps[-1].loss < history.steps[0].loss


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, lorafamily.DataError, "give one of them"),
        ({"steps": 5, "epochs": 1}, lorafamily.DataError, "give one of them"),
        ({"steps": 0}, lorafamily.DataError, "steps=0"),
        ({"steps": 5, "accumulate": 0}, lorafamily.DataError, "accumulate=0"),
        ({"steps": 5, "precision": "int8"}, lorafamily.TrainingError, "precision='int8'"),
        ({"steps": 50, "schedule": "steps"}, lorafamily.TrainingError, "schedule='steps'"),
        ({"steps": 5, "data": []}, lorafamily.DataError, "the data gave no batch"),
        ({"epochs": 1, "data": []}, lorafamily.DataError, "is the data empty"),
        ({"epochs": 1, "data": iter(data())}, lorafamily.DataError, "needs data with a length"),
        ({"steps": 5, "data": iter(data(2))}, lorafamily.DataError, "iterator that is used up"),
        ({"steps": 5, "validation": []}, lorafamily.DataError, "validation gave no batch"),
        ({"steps": 5, "data": [(torch.ones(1),)], "loss_fn": None}, lorafamily.DataError, "without a loss"),
        (
            {"steps": 5, "evaluate": lambda m: {"accuracy": 1.0}, "patience": 1, "evaluate_every": 1},
            lorafamily.TrainingError,
            'patience watches "loss"',
        ),
        ({"steps": 5, "loss_over": "words"}, lorafamily.DataError, "loss_over='words'"),
    ],
)
def test_what_the_loop_refuses(arguments, error, message):
    arguments = {"data": data(), "progress": False, **arguments}
    model = lorafamily.apply(tiny(), "lora", rank=2)
    if "loss_fn" in arguments:
        model = lorafamily.apply(nn.Sequential(nn.Linear(1, 1)), "lora", rank=1)
    with pytest.raises(error, match=message):
        lorafamily.train(model, **arguments)


def test_a_model_with_nothing_to_train_or_merged_is_refused():
    model = tiny().requires_grad_(False)
    with pytest.raises(lorafamily.TrainingError, match="no parameter has requires_grad"):
        lorafamily.train(model, data(), steps=1)
    lorafamily.merge(lorafamily.apply(model, "lora", rank=1))
    with pytest.raises(lorafamily.StateError, match="is merged"):
        lorafamily.train(model, data(), steps=1)


COMPILED = """
import torch
import lorafamily
from torch import nn
torch._dynamo.config.recompile_limit = 1  # 8, but compiling takes seconds: every change of ranks would be too many

class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.c(nn.functional.gelu(self.b(nn.functional.gelu(self.a(x))))).sub(1).square().mean()

batches = [{"x": torch.randn(5, 6, generator=torch.Generator().manual_seed(1))}]
loss_fn = lambda model, batch: model(batch["x"])
for compiled in (False, True):
    model = lorafamily.apply(Layers(), "alora", rank=2, seed=0, rounds=2, scorer="random")
    history = lorafamily.train(
        model, batches, steps=20, lr=5e-3, compile=compiled, validation=batches, loss_fn=loss_fn, progress=False
    )
    assert len({tuple(d.after.values()) for d in history.decisions}) == 2
    print(*(step.loss for step in history.steps))
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
assert torch._dynamo.config.recompile_limit == 1
"""


def test_compiled_model_trains_to_the_same_losses_through_every_resizing():
    """In a process of its own: the shape checks of these tests wrap functions in what torch.compile cannot trace."""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent / 'experiments'}"}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plain, compiled = ([float(loss) for loss in line.split()] for line in done.stdout.splitlines())
    assert plain == pytest.approx(compiled, rel=1e-4)  # float32, kernels fused in another order
