"""Other people's models, their state and their numbers: precision, buffers, heads, ties, dtypes, targets, weights read.

Every claim was a fault once, or is one that somebody would not notice.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import shutil
import subprocess
import sys
import warnings
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import lorafamily
from conftest import METHODS, data, few_rounds, in_turn, pairwise, perturb_, tiny
from lorafamily.deploy.checkpoint import merge_checkpoint
from lorafamily.deploy.saved import read
from lorafamily.layers.placement import placement_of
from lorafamily.layers.site import base_parameters, sites_in
from lorafamily.targets import match

transformers = pytest.importorskip("transformers", reason="transformers is an extra; nothing to test without it")

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 64}
EARLY = {"warmup": 2, "final": 2, "interval": 2}  # a schedule that fits into some twenty steps


def everything(name: str, module: nn.Module) -> bool:
    return True


def some(model: nn.Module):
    """Adapters of a model, the first of them."""
    return next(iter(placement_of(model).adapters.values()))


def scheduled(method: str) -> dict[str, int]:
    return EARLY if {"adalora", "lora2", "pruning"} & set(method.split("+")) else few_rounds(method)


def of_class(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(1)[:, :3], labels)


def loss(model: nn.Module, batch) -> torch.Tensor:
    return of_class(model(batch[0]), batch[1])


def rows(*shape: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One batch of inputs, not centred, with labels of three classes."""
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(*shape, generator=draw) * 2 + 1, torch.randint(3, (shape[0],), generator=draw))]


def train(model: nn.Module, batches, steps: int = 10, **options):
    options = {"lr": 1e-2, "progress": False, "loss_fn": loss} | options
    return lorafamily.train(model, batches, steps=steps, **options)


def bert(**changes):
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL | changes)
    return transformers.BertForSequenceClassification(config).eval()


def causal(tie: bool = True, **changes):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=2, vocab_size=99, n_positions=32, bos_token_id=1, eos_token_id=2, **changes
    )
    config.tie_word_embeddings = tie
    return transformers.GPT2LMHeadModel(config).eval()


IDS = torch.randint(1, 99, (2, 7), generator=torch.Generator().manual_seed(0))


# 1. Half precision

HALVES = (torch.bfloat16, torch.float16)
STARTS = sorted({*METHODS, "alora+olora", "rslora+olora"})


def layer_and_input(kind: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Linear(64, 48, bias=False), torch.randn(3, 11, 64)
    if kind == "convolution":
        return nn.Conv2d(8, 12, 3, padding=1, bias=False), torch.randn(3, 8, 5, 5)
    return nn.Embedding(30, 48), torch.arange(30)[None]


def applied(kind: str, delta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if kind == "linear":
        return x.double() @ delta.T
    if kind == "convolution":
        return F.conv2d(x.double(), delta.view(12, 8, 3, 3), padding=1)
    return F.embedding(x, delta.T)


ON_HALVES = [*product(["linear", "convolution"], ["autocast", "half base"]), ("embedding", "half base")]
"""Autocast leaves embeddings alone."""


@pairwise("layer_in,dtype,fast", ON_HALVES, HALVES, [True, False], ids=str)
def test_small_updates_are_kept_in_half_precision(layer_in, dtype, fast):
    kind, half_base = layer_in[0], layer_in[1] == "half base"
    for method in STARTS:
        for size in (1e-5, 1e-4, 1e-3):
            layer, x = layer_and_input(kind)
            if half_base:
                layer = layer.to(dtype)
            x = x if kind == "embedding" else x.to(dtype).to(layer.weight.dtype)
            model = lorafamily.apply(nn.Sequential(layer), method, rank=4, seed=0, targets=everything)
            adapter = perturb_(model, size=size) and some(model)
            with torch.no_grad():
                layer.weight.zero_()  # so that only the update is seen
            high = copy.deepcopy(adapter).double()
            U, V = high.factors()
            wanted = applied(kind, high.scale * U @ V, x)
            towards = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
            with (
                contextlib.nullcontext() if half_base else torch.autocast("cpu", dtype),
                lorafamily.fast_path(fast),
            ):
                found = model(x)
            case = f"{method}, moved by {size}"
            # Each output is a number of the dtype, and float16 has none between 0 and 6e-8.
            least = 2**-24 * wanted.numel() ** 0.5 if dtype == torch.float16 else 0.0
            assert (found - wanted).norm() < 0.01 * wanted.norm() + least, case
            found.backward(towards.to(found.dtype))
            wanted.backward(towards.double())
            for (name, parameter), exact in zip(
                adapter.update.named_parameters(), high.update.parameters(), strict=True
            ):
                assert (parameter.grad - exact.grad).norm() <= 0.035 * exact.grad.norm(), f"{case}: {name}"


def test_float64_inputs_stay_float64_under_autocast():
    model = lorafamily.apply(nn.Sequential(nn.Linear(6, 4)).double(), "lora", rank=2, targets=everything)
    perturb_(model)
    x = torch.randn(3, 6, dtype=torch.float64)
    for fast in (True, False):
        with lorafamily.fast_path(fast), torch.autocast("cpu", torch.bfloat16):
            assert_close(model(x), F.linear(x, model[0].weight + some(model).delta(), model[0].bias))


# 2. What is frozen stays frozen


class Counting(nn.Module):
    """Keeps, in train mode, a running level, a count, and a buffer that no file holds."""

    def __init__(self):
        super().__init__()
        self.register_buffer("level", torch.zeros(6))
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("loose", torch.zeros(1), persistent=False)

    def forward(self, x):
        if self.training:
            self.level += x.detach().mean(0)
            self.seen += 1
            self.loose += 1
        return x + self.level


class OnChannels(nn.Module):
    """A norm over (batch, channels, length) for inputs of (batch, channels)."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(torch.stack([x, x.flip(1), x * x], 2)).mean(2)


NORMS = {
    "batch": lambda: nn.BatchNorm1d(6),
    "batch, averaged, without weights": lambda: nn.BatchNorm1d(6, momentum=None, affine=False),
    "synchronised": lambda: nn.SyncBatchNorm(6),
    "batch of maps": lambda: OnChannels(nn.BatchNorm1d(6)),
    "instance": lambda: OnChannels(nn.InstanceNorm1d(6, track_running_stats=True)),
    "of one's own": Counting,
}


def normed(norm) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), norm(), nn.Dropout(0.1), nn.ReLU(), nn.Linear(6, 3)).eval()


def images() -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(8, 3)).eval()


NORMED = {name: (lambda norm=norm: normed(norm), (16, 5)) for name, norm in NORMS.items()}
NORMED["images"] = (images, (16, 3, 8, 8))


@pytest.mark.parametrize("name", NORMED)
def test_training_moves_no_buffer_of_the_base(name, tmp_path):
    make, shape = NORMED[name]
    model, batches = make(), rows(*shape)
    x, before = batches[0][0], copy.deepcopy(model.state_dict())
    base = model(x)
    lorafamily.apply(model, "lora", rank=2, seed=0, targets=everything)
    says = pytest.warns(UserWarning, match=r"training moved 2 buffers.*1\.level")
    with says if name == "of one's own" else contextlib.nullcontext():
        train(model, batches)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert not any(module.training for module in model.modules())
    trained = model(x)
    assert (trained - base).abs().max() > 1e-3
    loaded = lorafamily.load(make(), lorafamily.save(model, tmp_path))
    assert torch.equal(loaded(x), trained)
    with lorafamily.disabled(model):
        assert torch.equal(model(x), base)
    assert torch.equal(lorafamily.remove(model)(x), base)


def test_modules_are_in_the_mode_that_they_were_in():
    model, seen = normed(lambda: nn.BatchNorm1d(6)), {}
    lorafamily.apply(model, "lora", rank=2, seed=0, targets=everything)
    model.train()
    model[3].eval()
    model[2].eval()
    before = {name: module.training for name, module in model.named_modules()}

    def watching(model, batch):
        seen.update({name: module.training for name, module in model.named_modules()})
        return loss(model, batch)

    # Who samples between steps ends with model.train().
    train(model, rows(16, 5), steps=3, loss_fn=watching, on_step=lambda step: model.eval() and model.train())
    assert seen == before | {"1": False}  # the frozen norm
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.parametrize("name", NORMED)
def test_statistics_that_a_loop_of_ones_own_moved_belong_to_the_adapter(name, tmp_path):
    make, shape = NORMED[name]
    model, (batch,) = make(), rows(*shape)
    x, before = batch[0], copy.deepcopy(model.state_dict())
    base = model(x)
    perturb_(lorafamily.apply(model, "lora", rank=2, seed=0, targets=everything))
    model.train()
    for _ in range(3):
        loss(model, batch)
    model.eval()
    moved = [key for key, value in before.items() if not torch.equal(model.state_dict()[key], value)]
    assert moved
    ours = model(x)
    loaded = lorafamily.load(make(), lorafamily.save(model, tmp_path))
    assert torch.equal(loaded(x), ours)
    for one in (model, loaded):
        with lorafamily.disabled(one):
            assert torch.equal(one(x), base)
        assert torch.equal(one(x), ours)
        assert torch.equal(lorafamily.switch(one, None)(x), base)
        assert torch.equal(lorafamily.switch(one, "default")(x), ours)
        lorafamily.remove(one)
        assert torch.equal(one(x), base)
        assert all(torch.equal(one.state_dict()[key], value) for key, value in before.items())


def test_a_head_with_a_norm_trains_and_goes_where_the_adapter_goes(tmp_path):
    def make():
        torch.manual_seed(0)
        head = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
        return nn.ModuleDict({"body": nn.Linear(5, 6), "head": head}).eval()

    def out(model):
        return model["head"](torch.relu(model["body"](x)))

    (batch,) = rows(16, 5)
    x, model = batch[0], make()
    base = out(model)
    lorafamily.apply(model, "lora", rank=2, seed=0, targets="body", also_train=r"^head\.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, [batch], loss_fn=lambda model, batch: of_class(out(model), batch[1]))
    assert model["head"][1].num_batches_tracked == 10
    ours = out(model)
    lorafamily.save(model, tmp_path / "own")
    lorafamily.export_peft(model, tmp_path / "peft")
    for other in (lorafamily.load(make(), tmp_path / "own"), lorafamily.import_peft(make(), tmp_path / "peft")):
        assert_close(out(other), ours)
        assert torch.equal(other["head"][1].running_var, model["head"][1].running_var)
        with lorafamily.disabled(other):
            assert torch.equal(out(other), base)
        assert torch.equal(out(lorafamily.remove(other)), base)
    lorafamily.switch(model, None)
    assert torch.equal(out(model), base)
    lorafamily.switch(model, "default")
    assert torch.equal(out(model), ours)


# 3. Extra trained parameters


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def conv1d():
    home = pytest.importorskip("transformers.pytorch_utils")
    return nn.Sequential(home.Conv1D(6, 5), nn.Tanh(), home.Conv1D(3, 6))


BIASED = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), (8, 5), {}),
    "fused": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)),
        (8, 5),
        {"fused": {"0": ["q", "k"]}},
    ),
    "Conv1D": (conv1d, (8, 5), {}),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Conv1d(4, 2, 2)), (8, 2, 6), {}),
    "attention": (SelfAttention, (8, 3, 4), {}),
}


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("name", BIASED)
def test_a_bias_trains_beside_the_adapter_of_its_layer(name, fast):
    make, shape, options = BIASED[name]
    model = make()
    before = {at: p.clone() for at, p in model.named_parameters() if at.endswith("bias")}
    lorafamily.apply(model, "olora", rank=2, seed=0, targets=everything, also_train="bias$", **options)
    with lorafamily.fast_path(fast):
        train(model, rows(*shape), steps=2)
    assert before
    assert not [at for at, value in before.items() if torch.equal(model.get_parameter(at), value)]


class WithHead(nn.Module):
    """An encoder, a head, and a layer that nothing uses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6)]
        self.encoder, self.head, self.unused = nn.Sequential(*layers), nn.Linear(6, 3), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.encoder(x))


def test_a_parameter_without_gradient_is_named():
    model = lorafamily.apply(WithHead(), "lora", rank=2, targets="encoder", also_train=["head", "unused"])
    with pytest.raises(
        lorafamily.TrainingError, match=r"2 of 4 extra trained parameters.*: unused\.bias; unused\.weight\."
    ):
        train(model, rows(8, 5))


def test_what_was_unfrozen_by_hand_is_refused_by_whatever_would_lose_it(tmp_path):
    for make in (lambda: lorafamily.apply(WithHead(), "lora", rank=2, targets="encoder"), bert):
        model = make()
        head = model.classifier if hasattr(model, "classifier") else model.head
        if not any(sites_in(model)):
            lorafamily.apply(model, "lora", rank=2)
        head.requires_grad_(True)
        for act in (
            lambda model=model: lorafamily.train(model, rows(8, 5), steps=1),
            lambda model=model: lorafamily.save(model, tmp_path),
            lambda model=model: lorafamily.export_peft(model, tmp_path),
        ):
            with pytest.raises(lorafamily.StateError, match=r'also_train="(head|classifier)\.weight"'):
                act()


def test_an_outer_head_trains_and_is_not_saved_in_silence(tmp_path):
    model = WithHead()
    lorafamily.apply(model.encoder, "lora", rank=2, seed=0)
    before, (batch,) = model.head.weight.clone(), rows(8, 5)
    train(model, [batch])
    assert not torch.equal(model.head.weight, before)
    for write in (lorafamily.save, lorafamily.export_peft):
        with pytest.raises(lorafamily.StateError, match=r"head\.weight, head\.bias.*would train, but not be saved"):
            write(model, tmp_path / "outer")
    lorafamily.save(model.encoder, tmp_path / "encoder")
    again = lorafamily.load(WithHead().encoder, tmp_path / "encoder")
    assert torch.equal(again(batch[0]), model.encoder(batch[0]))


# 4. Tied weights


def llama(tie: bool = True):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=tie)).eval()


def t5(tie: bool = True):
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=tie)
    return transformers.T5ForConditionalGeneration(config).eval()


def scores(model: nn.Module) -> torch.Tensor:
    given = {"labels": IDS} if "T5" in type(model).__name__ else {}
    with torch.no_grad():
        return model(input_ids=IDS, **given).logits


@pytest.mark.parametrize(
    ("make", "targets", "tied"),
    [
        (causal, ["wte", "c_attn"], True),
        (causal, "lm_head", True),
        (causal, ["wte", "lm_head", "c_attn"], False),
        (llama, ["embed_tokens", "q_proj"], True),
        (llama, ["embed_tokens", "q_proj"], False),
        (t5, ["shared", r"\.q$"], True),
        (t5, r"\.(q|wi)$", True),
    ],
)
def test_one_rule_for_tied_weights_in_memory_and_on_disk(make, targets, tied, tmp_path):
    model = make(tied)
    model.save_pretrained(tmp_path / "base")
    base = scores(model)
    perturb_(lorafamily.apply(model, "lora", rank=2, targets=targets, seed=0))
    ours = scores(model)
    assert (ours - base).abs().max() > 0.05
    saved = read(lorafamily.save(model, tmp_path / "adapter"))
    noted = {at: entry["tied"] for at, entry in saved.modules.items() if "tied" in entry}
    if not noted:
        assert not tied or make is t5
        merge_checkpoint(tmp_path / "base", saved, tmp_path / "merged")
        size = float(ours.abs().max())
        for merged in (type(model).from_pretrained(tmp_path / "merged").eval(), lorafamily.merge(model)):
            assert_close(scores(merged), ours, rtol=0, atol=1e-5 * size)  # float32, sums in another order
        return
    assert tied
    said = []
    for act in (
        lambda: lorafamily.merge(model),
        lambda: merge_checkpoint(tmp_path / "base", saved, tmp_path / "merged"),
    ):
        with pytest.raises(lorafamily.StateError, match="one tied tensor") as refused:
            act()
        said.append(str(refused.value).replace(" in the model:", ":"))
    assert said[0] == said[1]
    assert all(name in said[0] for names in noted.values() for name in names)
    assert not (tmp_path / "merged").exists()


# 5. A model that moves to another dtype


def normed_head():
    return normed(lambda: nn.BatchNorm1d(6))


MOVED = {
    "bert": (bert, {"also_train": "classifier"}, lambda model: model(IDS).logits),
    "norm": (
        normed_head,
        {"targets": r"^0$", "also_train": r"^[14]\."},
        lambda model: model(torch.ones(2, 5, dtype=model[0].weight.dtype)),
    ),
}
MOVES = {
    torch.float16: lambda model: model.half(),
    torch.bfloat16: lambda model: model.to(torch.bfloat16),
    torch.float64: lambda model: model.double(),
}


def dtypes(model: nn.Module) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """Those of the base, and those of the adapters' factors."""
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    base = {tensor.dtype for tensor in [*base_parameters(model).values(), *buffers]}
    adapters = placement_of(model, "default").adapters.values()
    return base, {parameter.dtype for adapter in adapters for parameter in adapter.parameters()}


@torch.no_grad()
@pytest.mark.parametrize("dtype", MOVES, ids=str)
@pytest.mark.parametrize("name", MOVED)
def test_everything_follows_the_models_dtype(name, dtype, tmp_path):
    make, options, out = MOVED[name]

    def adapted():
        model = perturb_(lorafamily.apply(make(), "olora", rank=2, seed=0, **options))
        for at in placement_of(model).inactive_values:
            model.get_parameter(at).add_(0.1)
        return model

    expected = {dtype}, {torch.promote_types(dtype, torch.float32)}
    base, model = MOVES[dtype](make()), MOVES[dtype](adapted())
    assert dtypes(model) == expected
    ours = out(model)
    assert ours.dtype == dtype
    with lorafamily.disabled(model):
        assert dtypes(model) == expected
        assert torch.equal(out(model), out(base))
    assert torch.equal(out(model), ours)
    loaded = lorafamily.load(MOVES[dtype](make()), lorafamily.save(model, tmp_path / "a"))
    assert dtypes(loaded) == expected
    assert torch.equal(out(loaded), ours)
    assert torch.equal(out(lorafamily.switch(model, None)), out(base))

    merged = MOVES[dtype](lorafamily.merge(adapted()))
    lorafamily.save(merged, tmp_path / "b")
    lorafamily.unmerge(merged)
    assert dtypes(merged) == expected
    assert_close(out(merged), ours)
    assert torch.equal(out(lorafamily.remove(merged)), out(base))


def test_a_model_on_the_meta_device_keeps_its_adapters_but_cannot_be_written(tmp_path):
    model = lorafamily.apply(bert(), "olora", rank=2, also_train="classifier").to("meta")
    with lorafamily.disabled(model):
        assert all(parameter.is_meta for parameter in model.parameters())
    lorafamily.switch(lorafamily.switch(model, None), "default")
    assert all(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(lorafamily.FileError, match="is on the meta device"):
        lorafamily.save(model, tmp_path)
    with pytest.raises(lorafamily.StateError, match="is not here"):
        lorafamily.merge(model)
    merged = lorafamily.merge(lorafamily.apply(bert(), "lora", rank=2)).to("meta")
    assert all(parameter.is_meta for parameter in lorafamily.unmerge(merged).parameters())


# 6. A part is adapted, the whole is trained


@pytest.mark.parametrize("method", ["adalora", "lora2", "alora"])
def test_penalty_and_allocation_happen_from_outside(method):
    model, batches = WithHead(), rows(8, 5)
    lorafamily.apply(model.encoder, method, rank=4, seed=0, **scheduled(method))
    if method == "alora":
        with pytest.raises(lorafamily.AllocationError, match="validation"):
            train(model, batches, steps=30)
    history = train(model, batches, steps=30, validation=batches)
    assert history.decisions[-1].after != history.decisions[0].before
    assert (history.steps[-1].penalty > 0) == (method != "alora")
    assert history.slices_end == {at: a.slices for at, a in placement_of(model.encoder).adapters.items()}


# 7. Targets


class Odd(nn.Module):
    """Words that name a head at the top of a model and something else inside."""

    def __init__(self):
        super().__init__()

        def linear():
            return nn.Linear(4, 4)

        self.attention = nn.ModuleDict({"heads": linear(), "q": linear()})
        self.tower = nn.ModuleDict({"head": linear()})
        self.mlp = nn.ModuleDict({"fc_out": linear()})
        experts = nn.ModuleList([nn.ModuleDict({"gate_proj": linear(), "down": linear()})])
        self.moe = nn.ModuleDict({"gate": linear(), "shared_expert_gate": linear(), "experts": experts})
        self.switch = nn.ModuleDict({"router": nn.ModuleDict({"classifier": linear()})})
        self.gate = linear()  # of nothing
        self.head, self.pooler = linear(), nn.Sequential(linear())


INSIDE = ["attention.heads", "attention.q", "tower.head", "mlp.fc_out"]
INSIDE += ["moe.experts.0.gate_proj", "moe.experts.0.down", "gate"]


def test_heads_poolers_and_routers_are_left_out_and_can_be_named():
    assert list(match(Odd())) == INSIDE
    assert list(match(Odd(), ["gate$", "router"])) == [
        *("moe.gate", "moe.shared_expert_gate", "switch.router.classifier", "gate")
    ]
    assert "head" in match(Odd(), "head$")


@pytest.mark.parametrize(
    ("exclude", "left_out"),
    [
        ("fc_out", {"mlp.fc_out"}),
        (["fc_out", r"\.q$"], {"mlp.fc_out", "attention.q"}),
        (lambda name, module: name.startswith("moe"), {"moe.experts.0.gate_proj", "moe.experts.0.down"}),
        ("attention", {"attention.heads", "attention.q"}),
    ],
)
def test_what_is_left_out_is_named_like_targets(exclude, left_out):
    assert list(match(Odd(), exclude=exclude)) == [name for name in INSIDE if name not in left_out]


def on_meta(cls: str, **config) -> nn.Module:
    with torch.device("meta"):
        return getattr(transformers, cls)(getattr(transformers, config.pop("config"))(**config))


EXPERTS = SMALL | {"num_key_value_heads": 2}
ARCHITECTURES = {
    "BertForPreTraining": ({"config": "BertConfig"} | SMALL, {"pooler.dense", "cls"}, set()),
    "EncoderDecoderModel": (
        {"config": "EncoderDecoderConfig", "encoder": SMALL | {"model_type": "bert"}}
        | {"decoder": SMALL | {"model_type": "bert", "is_decoder": True, "add_cross_attention": True}},
        {"encoder.pooler", "decoder.cls"},
        {"crossattention.self.query"},
    ),
    "RobertaForSequenceClassification": ({"config": "RobertaConfig"} | SMALL, {"classifier"}, set()),
    "GPTJForCausalLM": (
        {"config": "GPTJConfig", "vocab_size": 99, "n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8},
        {"lm_head"},
        {"mlp.fc_out"},
    ),
    "LlamaForSequenceClassification": ({"config": "LlamaConfig"} | SMALL, {"score"}, {"gate_proj"}),
    "SiglipModel": (
        {
            "config": "SiglipConfig",
            "text_config": SMALL | {"max_position_embeddings": 8},
            "vision_config": SMALL | {"image_size": 16, "patch_size": 8},
        },
        set(),
        {"text_model.head", "vision_model.head.mlp.fc1"},
    ),
    "MixtralForCausalLM": ({"config": "MixtralConfig", "num_local_experts": 2} | EXPERTS, {"lm_head", "gate"}, set()),
    "Qwen2MoeForCausalLM": (
        {"config": "Qwen2MoeConfig", "num_experts": 2, "moe_intermediate_size": 16} | EXPERTS,
        {"lm_head", "shared_expert_gate"},
        {"shared_expert.gate_proj"},
    ),
    "SwitchTransformersForConditionalGeneration": (
        {"config": "SwitchTransformersConfig", "vocab_size": 99, "d_model": 32, "d_ff": 64, "d_kv": 16}
        | {"num_layers": 2, "num_heads": 2, "num_experts": 2},
        {"lm_head", "router.classifier"},
        {"wi"},
    ),
    "DeepseekV32ForCausalLM": (
        {"config": "DeepseekV32Config", "n_routed_experts": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
        | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
        | {"index_n_heads": 2, "index_head_dim": 8, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}
        | EXPERTS,
        {"lm_head", "indexer", "gate"},
        {"q_b_proj", "o_proj"},
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_default_targets_of_real_architectures(name):
    config, left_out, taken = ARCHITECTURES[name]
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    model = on_meta(name, **config)
    chosen = match(model)
    for word in left_out:
        assert not [at for at in chosen if f".{word}." in f".{at}."], word
    for word in taken:
        assert [at for at in chosen if at.endswith(word)], word


def test_layers_without_numbers_are_left_out():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of tensors without elements
        model = nn.ModuleDict({"none": nn.Linear(16, 0), "from_none": nn.Linear(0, 4), "some": nn.Linear(4, 4)})
    for targets in (None, everything):
        assert list(match(model, targets)) == ["some"]
    with pytest.raises(lorafamily.TargetError, match=r"none cannot carry an adapter: .*\(0, 16\)"):
        match(model, "^none")


def test_weights_of_bytes_are_refused_and_can_be_passed_by():
    model = nn.ModuleDict({"bytes": nn.Linear(4, 4), "plain": nn.Linear(4, 4)})
    model["bytes"].weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(lorafamily.TargetError, match=r"bytes .*quantised by .*uint8.*exclude=.bytes"):
        match(model)
    for targets in ("plain", everything):
        assert list(match(model, targets)) == ["plain"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # peft asks transformers by its old name
def test_adapters_of_peft_are_no_targets():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(bert().bert, peft.LoraConfig(target_modules=["query"], r=2))
    for targets in (None, everything):
        chosen = list(match(model, targets))
        assert any(at.endswith("query.base_layer") for at in chosen)
        assert not [at for at in chosen if "lora_" in at]
    x = IDS
    before = model(x).last_hidden_state
    lorafamily.apply(model, "lora", rank=2, seed=0)
    assert torch.equal(model(x).last_hidden_state, before)


# 8. What a summary counts


@pytest.mark.parametrize(
    ("make", "options", "kinds"),
    [
        (bert, {}, {"embeddings", "norms", "output heads"}),
        (
            lambda: on_meta(
                "Qwen3MoeForCausalLM", config="Qwen3MoeConfig", num_experts=2, moe_intermediate_size=16, **EXPERTS
            ),
            {},
            {"routers", "embeddings", "norms", "output heads"},
        ),
        (causal, {"targets": ["wte", "c_attn"]}, {"embeddings", "norms", "other layers that can be adapted (Conv1D)"}),
        (causal, {"fused": {"c_attn": ["q", "k", "v"]}}, {"embeddings", "norms"}),
        (lambda: causal(tie=False), {}, {"embeddings", "norms", "output heads"}),
        (lambda: nn.TransformerEncoderLayer(16, 2, 32), {}, {"norms", "scales and biases elsewhere"}),
        (
            lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.LSTM(4, 4)),
            {"targets": everything},
            {"what no layer kind covers (LSTM, 2-D)", "scales and biases elsewhere"},
        ),
    ],
)
def test_a_summary_shares_out_every_parameter_of_the_base(make, options, kinds):
    model = make()
    total = sum(parameter.numel() for parameter in model.parameters())
    summary = lorafamily.summary(lorafamily.apply(model, "lora", rank=1, **options))
    assert set(summary.not_reached) == kinds
    assert summary.reached + sum(summary.not_reached.values()) == summary.base_parameters == total
    (line,) = [line for line in str(summary).splitlines() if line.startswith("in adapted layers: ")]
    assert f"{summary.reached:,} of the base's parameters" in line
    assert all(f"{count:,} in {kind}" in line for kind, count in summary.not_reached.items())


# 9. Weights that are read, not called


class Reader(nn.Module):
    """Reads the weight of `proj` and calls it not, or (`benign`) calls it and asks what it is."""

    def __init__(self, benign: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.proj, self.last, self.benign = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3), benign

    def forward(self, x):
        weight = self.proj.weight
        h = self.first(x.to(weight.dtype))
        if self.benign:
            assert weight.shape == (len(weight), weight.size(1))
            assert weight.is_floating_point()
            assert weight.device == h.device
            assert weight.numel() == 64
            assert weight.grad is None
            return self.last(torch.tanh(self.proj(h)))
        return self.last(torch.tanh(F.linear(h, weight, self.proj.bias)))


READS = r"reads the weight of proj and never calls the layer"


def test_an_example_shows_what_is_read():
    (batch,) = rows(8, 5)
    with pytest.warns(UserWarning, match=READS + r".*is left out"):
        model = lorafamily.apply(Reader(), "lora", rank=2, example=batch[:1])
    assert list(placement_of(model).adapters) == ["first", "last"]
    for targets in (["first", "proj"], everything):
        model = Reader()
        with pytest.raises(lorafamily.TargetError, match=READS + r".*exclude="):
            lorafamily.apply(model, "lora", rank=2, targets=targets, example=batch[:1])
        assert not any(sites_in(model))
    model = lorafamily.apply(Reader(benign=True), "lora", rank=2, example=batch[:1])
    assert list(placement_of(model).adapters) == ["first", "proj", "last"]


class WithoutHooks(Reader):
    """Calls a layer's forward, where an adapter acts, and no hooks run."""

    def forward(self, x):
        return self.last(torch.tanh(self.proj.forward(self.first(x))))


def test_a_forward_that_is_called_directly_is_a_call():
    batches = rows(8, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_example = lorafamily.apply(WithoutHooks(), "lora", rank=2, targets="proj", example=batches[0][:1])
        trained = lorafamily.apply(WithoutHooks(), "lora", rank=2, targets="proj", seed=0)
        train(trained, batches, 5)
    assert list(placement_of(by_example).adapters) == ["proj"]
    assert placement_of(trained).adapters["proj"].norm() > 0


COMPILED = """
import warnings
import torch, lorafamily
from torch import nn

warnings.filterwarnings("error", ".* reads the weight")
x = torch.randn(3, 8)
for how in ("whole", "in place", "a block", "a block in place", "around"):
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    if how == "a block":
        model[1] = torch.compile(model[1], backend="eager")
    elif how != "around" and "in place" in how:
        (model if how == "in place" else model[1]).compile(backend="eager")
    given = torch.compile(model, backend="eager") if how == "whole" else model
    lorafamily.apply(given, "lora", rank=2, seed=0, targets="0", example=x)
    lorafamily.remove(given)
    lorafamily.apply(given, "lora", rank=2, seed=0, targets="0")
    optimizer = torch.optim.AdamW(lorafamily.parameter_groups(given, lr=1e-2))
    session = lorafamily.session(given, optimizer, steps=2)
    called = torch.compile(model, backend="eager") if how == "around" else given
    for _ in range(2):
        session.backward(called(x).square().mean())
        optimizer.step()
        session.step()
        optimizer.zero_grad()
    assert len(session.adapters) == 2 and all(a.norm() > 0 for a in session.adapters.values()), how
"""


def test_calls_in_compiled_code_are_calls():
    """In a process of its own: the shape checks of these tests wrap functions in what torch.compile cannot trace."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class TiedCoder(nn.Module):
    """An autoencoder that decodes with the encoder's weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encode = nn.Linear(5, 3)

    def forward(self, x):
        return F.linear(self.encode(x), self.encode.weight.T)


def test_a_weight_that_is_called_and_read_is_warned_of_where_merging_would_change_both():
    (batch,) = rows(1, 5)
    says = pytest.warns(
        UserWarning, match="TiedCoder calls encode and reads the weight besides: the adapter acts in the"
    )
    with says:
        lorafamily.apply(TiedCoder(), "lora", rank=2, example=batch[:1])
    model = lorafamily.apply(TiedCoder(), "lora", rank=2, seed=0)
    with says:
        lorafamily.train(model, [batch[0]], steps=3, lr=0.1, loss_fn=lambda m, x: m(x).square().mean(), progress=False)
    adapted = model(batch[0])
    with says:
        lorafamily.merge(model)
    assert (model(batch[0]) - adapted).abs().max() > 1e-3  # what the warning is about


@pytest.mark.parametrize("method", ["lora", "adalora", "alora", "lora2+olora"])
def test_a_first_batch_shows_what_is_read(method, tmp_path):
    batches = rows(8, 5)
    options = {"validation": batches, "log_dir": tmp_path, "pictures": method == "adalora", "save_every": 10, "keep": 9}

    def fresh(**targets):
        return lorafamily.apply(Reader(), method, budget=600, seed=0, **targets, **scheduled(method))

    model = fresh()
    with pytest.warns(UserWarning, match=READS + r".*is left out"):
        history = train(model, batches, 20, **options)
    adapters = placement_of(model).adapters
    assert list(adapters) == list(history.slices_start) == list(history.slices_end) == ["first", "last"]
    assert max(step.trainable for step in history.steps) <= 600
    # Its class and its names are what they were, and merging is what training was.
    assert not [name for name, _ in model.named_modules() if "proj.lorafamily" in name]
    ours = model(batches[0][0])
    assert_close(lorafamily.merge(model)(batches[0][0]), ours)

    shutil.rmtree(tmp_path / "checkpoints" / "step-00000020")
    again = fresh()
    with pytest.warns(UserWarning, match=READS):
        resumed = train(again, batches, 20, resume="auto", **options)
    assert [step.loss for step in resumed.steps] == [step.loss for step in history.steps]
    assert torch.equal(again(batches[0][0]), ours)

    with pytest.raises(lorafamily.TargetError, match=READS):
        train(fresh(targets=["first", "proj"]), batches, 20, validation=batches)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        benign = lorafamily.apply(Reader(benign=True), method, rank=2, **scheduled(method))
        assert list(train(benign, batches, 20, validation=batches).slices_end) == ["first", "proj", "last"]


class InParts(nn.Module):
    """A trunk, whose output the loop's own loss is on, and a head that this loss does not call."""

    def __init__(self):
        super().__init__()
        self.trunk, self.head = Reader(), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.trunk(x))


def test_a_first_batch_through_a_part_of_the_model_shows_what_is_read():
    batches = rows(8, 5)
    model = lorafamily.apply(InParts(), "adalora", rank=2, seed=0, targets="trunk", **scheduled("adalora"))
    reads = pytest.raises(lorafamily.TargetError, match=r"reads the weight of trunk\.proj and never calls the layer")
    loss_fn = lambda model, batch: F.cross_entropy(model.trunk(batch[0]), batch[1])  # noqa: E731
    with reads:
        lorafamily.train(model, batches, steps=20, lr=1e-2, loss_fn=loss_fn, progress=False)
    model = lorafamily.apply(InParts(), "adalora", rank=2, seed=0, targets="trunk", **scheduled("adalora"))
    optimizer = torch.optim.AdamW(lorafamily.parameter_groups(model, lr=1e-2))
    session = lorafamily.session(model, optimizer, steps=20)
    session.backward(loss_fn(model, batches[0]))
    optimizer.step()
    with reads:
        session.step()
    model = lorafamily.apply(InParts(), "adalora", rank=2, seed=0, **scheduled("adalora"))
    with pytest.warns(UserWarning, match=r"reads the weight of trunk\.proj and never calls the layer.*left out"):
        history = lorafamily.train(model, batches, steps=20, lr=1e-2, loss_fn=loss_fn, progress=False)
    assert list(placement_of(model).adapters) == list(history.slices_end) == ["trunk.first", "trunk.last"]
    assert not any(module._forward_hooks for module in model.modules())


def wavlm():
    sizes = {"conv_dim": (8,), "conv_stride": (2,), "conv_kernel": (3,), "num_buckets": 16}
    sizes |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    torch.manual_seed(0)
    model = transformers.WavLMForSequenceClassification(transformers.WavLMConfig(**SMALL | sizes)).eval()
    return model, {"input_values": torch.randn(2, 64)}, r"\.(q|k|v|out)_proj$"


def mamba():
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, state_size=4)
    return transformers.MambaForCausalLM(config).eval(), {"input_ids": IDS}, "dt_proj"


@pytest.mark.parametrize("make", [wavlm, mamba])
def test_real_models_that_read_weights(make):
    model, example, read_ones = make()
    with pytest.raises(lorafamily.TargetError, match="reads the weight of"):
        lorafamily.apply(model, "lora", rank=2, targets=read_ones, example=example)
    named = match(model, read_ones)
    by_kernels = make is mamba  # known without an example: only the input projection is a target by default
    with contextlib.nullcontext() if by_kernels else pytest.warns(UserWarning, match="reads the weight of"):
        lorafamily.apply(model, "lora", rank=2, seed=0, example=example)
    adapters = placement_of(model).adapters
    assert adapters
    assert not adapters.keys() & named.keys()
    perturb_(model)
    ours = model(**example).logits
    assert_close(lorafamily.merge(model)(**example).logits, ours, rtol=1e-4, atol=1e-5)  # float32 sums


def test_the_packed_weights_of_attention_are_parts_and_no_reads():
    model, (x, _) = nn.Sequential(SelfAttention(), nn.Linear(4, 3)), rows(2, 3, 4)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lorafamily.apply(model, "lora", rank=2, seed=0, example=(x,))
    assert {at.rpartition(".")[2] for at in placement_of(model).adapters} == {"q", "k", "v", "out", "1"}
    with pytest.raises(lorafamily.TargetError, match="out_proj"):
        lorafamily.apply(model, "lora", name="second", targets="out_proj", example=(x,))


class Labelled(Reader):
    """As a Trainer wants it."""

    def forward(self, x, labels):
        logits = super().forward(x)
        return SimpleNamespace(loss=F.cross_entropy(logits, labels)).__dict__


@pytest.mark.filterwarnings("ignore")  # Trainer's own, of many kinds
@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_a_trainers_first_batch_shows_what_is_read(method, tmp_path):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    from lorafamily.integrations import LoraFamilyCallback

    x, labels = rows(8, 5)[0]
    samples = [{"x": row, "labels": label} for row, label in zip(x, labels, strict=True)]

    def trainer_of(**targets):
        model = lorafamily.apply(Labelled(), method, rank=2, seed=0, **targets, **scheduled(method))
        settings = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 0, "save_steps": 10}
        args = transformers.TrainingArguments(output_dir=str(tmp_path), max_steps=20, logging_steps=1, **settings)
        callback = LoraFamilyCallback(model)
        return model, callback, transformers.Trainer(model, args, train_dataset=samples, callbacks=[callback])

    model, callback, trainer = trainer_of()
    with pytest.warns(UserWarning, match=READS):
        trainer.train()
    adapters = placement_of(model).adapters
    assert list(adapters) == list(callback.session.start) == ["first", "last"]
    trained = {id(parameter) for group in callback.session.optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for a in adapters.values() for parameter in a.update.parameters()}
    if method == "adalora":
        assert list(callback.decisions[-1].after) == ["first", "last"]

    again, _, trainer = trainer_of()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))

    with pytest.raises(lorafamily.TargetError, match=READS):
        trainer_of(targets=["first", "proj"])[2].train()


# 10. A model that is saved with its adapters in


@pytest.mark.parametrize("make", [bert, causal, llama])
def test_no_reload_is_the_base_in_silence(make, tmp_path):
    model = perturb_(lorafamily.apply(make(), "lora", rank=2, seed=0))
    model.save_pretrained(tmp_path)
    said = io.StringIO()
    logger, handler = logging.getLogger("transformers"), logging.StreamHandler(said)
    before = logger.level
    logger.addHandler(handler)
    transformers.logging.set_verbosity_warning()  # as it is at first: commands of ours, which tests run, say less
    try:
        type(model).from_pretrained(tmp_path)
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
    assert "lorafamily.adapters" in said.getvalue()
    assert "UNEXPECTED" in said.getvalue().upper()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*\n?.*lorafamily"):
        make().load_state_dict(model.state_dict())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(scores(torch.load(file, weights_only=False)), scores(model))


# 11. Grouped convolutions

GROUPED = {
    "1": lambda: (nn.Conv1d(4, 6, 3, groups=2, padding=1), (2, 4, 7)),
    "1, no batch": lambda: (nn.Conv1d(4, 6, 3, groups=2), (4, 7)),
    "2, reflecting": lambda: (
        nn.Conv2d(6, 9, (3, 2), groups=3, stride=2, padding=1, padding_mode="reflect"),
        (2, 6, 6, 5),
    ),
    "2, one channel a group": lambda: (nn.Conv2d(4, 8, 3, groups=4, dilation=2, bias=False), (2, 4, 7, 7)),
    "3": lambda: (nn.Conv3d(4, 4, 2, groups=2), (2, 4, 3, 3, 3)),
}


@in_turn("name,method", list(GROUPED), METHODS, and_also=product(GROUPED, ["lora"]))
def test_grouped_convolutions_are_that_of_the_changed_kernel(method, name, tmp_path):
    torch.manual_seed(0)
    layer, shape = GROUPED[name]()
    base = nn.Sequential(layer).double().requires_grad_(False)
    model, x = copy.deepcopy(base), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    lorafamily.apply(model, method, rank=2, seed=0, targets="0")
    assert torch.equal(model(x), base(x))
    perturb_(model)
    adapter = some(model)
    U, V = adapter.factors()
    kernel = base[0].weight + (adapter.scale * U @ V).view_as(base[0].weight)
    found, wanted = model(x), torch.func.functional_call(base[0], {"weight": kernel}, (x,))
    assert (found - base(x)).abs().max() > 0.01
    assert_close(found, wanted)
    of, towards = [x, *adapter.update.parameters()], torch.randn_like(found)
    assert_close(torch.autograd.grad(found, of, towards), torch.autograd.grad(wanted, of, towards))
    loaded = lorafamily.load(copy.deepcopy(base), lorafamily.save(model, tmp_path))
    assert torch.equal(loaded(x), found)
    assert_close(lorafamily.merge(model)(x), found)
    assert torch.equal(lorafamily.remove(model)(x), base(x))


# 12. Whatever the default device


@pytest.mark.parametrize("method", ["lora", "olora", "adalora", "alora", "lora2+olora"])
def test_nothing_is_drawn_on_the_default_device(method, tmp_path):
    batches = data(1)
    files = []
    for device in ("cpu", "meta"):
        model = tiny()
        with torch.device(device):
            lorafamily.apply(model, method, rank=3, targets="blocks.0", seed=0, dropout=0.1, **scheduled(method))
            history = lorafamily.train(model, batches, steps=14, validation=batches, progress=False)
            files.append(lorafamily.save(model, tmp_path / device))
            lorafamily.summary(lorafamily.load(lorafamily.remove(model), files[-1]))
        assert not [name for name, parameter in model.named_parameters() if parameter.is_meta]
        assert bool(history.decisions) == bool(scheduled(method))
    one, other = ((folder / "adapter.safetensors").read_bytes() for folder in files)
    assert one == other


@pytest.mark.parametrize("scores", ["sensitivity", "first-order", "magnitude", "random"])
def test_no_scorer_asks_for_the_default_device(scores):
    decisions, batches = [], data(1)
    for device in ("cpu", "meta"):
        model = lorafamily.apply(tiny(), "alora", rank=3, targets="blocks.0", seed=0, scorer=scores, rounds=2)
        with torch.device(device):
            history = lorafamily.train(model, batches, steps=14, validation=batches, progress=False)
        decisions.append([vars(decision) for decision in history.decisions])
    assert decisions[0] == decisions[1]
