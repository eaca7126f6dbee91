"""Adapters on parts of a projection, in real models: scored, trained, shared and merged like any other."""

from __future__ import annotations

import copy
import json

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import lorafamily
from conftest import every_method, few_rounds, perturb_
from lorafamily.deploy.checkpoint import merge_checkpoint
from lorafamily.deploy.saved import read
from lorafamily.layers.placement import placement_of, targets_of
from lorafamily.layers.site import site_on, sites_in
from test_ablation import brute_force, scored

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses what transformers is about to rename

QV = {"fused": {"c_attn$": ["q", "k", "v"]}, "targets": ["c_attn.q", "c_attn.v"]}


def gpt2(**config) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is an extra")
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16} | config
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


def ids() -> Tensor:
    return torch.randint(99, (3, 10), generator=torch.Generator().manual_seed(0))


class Encoder(nn.Module):
    """PyTorch's own transformer, with padding."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(50, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True), 2)
        self.classifier = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.encoder(self.tokens(x), src_key_padding_mask=x == 0)[:, 0])


def encoder() -> tuple[Encoder, Tensor]:
    torch.manual_seed(0)
    x = torch.randint(1, 50, (5, 7))
    x[1:3, 4:] = 0
    model = Encoder().double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
    return model, x


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(ids()).logits


def everything_as_before(model: nn.Module, before: nn.Module) -> bool:
    names = [(name, type(module)) for name, module in model.named_modules()]
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    return same and names == [(name, type(module)) for name, module in before.named_modules()]


@every_method
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # which the untouched model uses
def test_pytorch_s_own_transformer_trains_with_every_method_and_merges(method):
    model, x = encoder()
    untouched = copy.deepcopy(model)
    lorafamily.apply(model, method, rank=2, seed=0, **few_rounds(method))
    parts = {f"encoder.layers.{i}.self_attn.{part}" for i in range(2) for part in ("q", "k", "v", "out")}
    assert set(placement_of(model).adapters) == parts | {
        f"encoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)
    }
    batches = [(x, torch.tensor([0, 1, 2, 0, 1]))]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    options = {"validation": batches, "loss_fn": loss, "progress": False, "evaluate": lambda model: {}}
    history = lorafamily.train(model, batches, steps=30, lr=1e-2, **options)
    assert history.steps[-1].loss < history.steps[0].loss
    perturb_(model, size=0.1)
    with torch.no_grad():
        adapted, trained = model(x), model.train()(x)
        model.eval()
        assert (adapted - untouched(x)).abs().max() > 0.01
        # float64. In eval mode PyTorch's fused kernels compute, in training the plain formulation.
        assert_close(trained, adapted, rtol=1e-9, atol=1e-9)
        assert_close(lorafamily.merge(model)(x), adapted, rtol=1e-9, atol=1e-9)
    assert not any("forward" in vars(module) for module in model.modules())
    assert everything_as_before(lorafamily.remove(model), untouched)


@pytest.mark.parametrize("memory", [None, 64.0], ids=["one by one", "in batches"])
@pytest.mark.filterwarnings("ignore:.*one by one:UserWarning")  # masks of nn.TransformerEncoder depend on values
def test_parts_are_scored_by_ablation_as_defined(memory):
    torch.manual_seed(0)
    model = gpt2().double()
    perturb_(lorafamily.apply(model, "alora", rank=3, seed=0, **QV), size=0.3)

    def loss() -> Tensor:
        return F.cross_entropy(model(ids()).logits.flatten(0, 1), ids().flatten())

    own, x = encoder()
    perturb_(lorafamily.apply(own, "alora", rank=2, seed=0, targets="self_attn"), size=0.3)

    def own_loss() -> Tensor:
        return F.cross_entropy(own(x), torch.tensor([0, 1, 2, 0, 1]))

    for scored_model, of in ((model, loss), (own, own_loss)):
        expected = brute_force(scored_model, of)
        found = scored(scored_model, of, memory)
        assert len(expected) == (4 if scored_model is model else 8)
        for name, value in expected.items():
            assert value.abs().max() > 1e-4
            assert_close(found[name], value, rtol=1e-9, atol=1e-12)  # float64: differences of losses near 4


@every_method
def test_q_and_v_of_a_fused_projection_are_shared_as_one_layer(method, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is an extra; nothing to compare with without it")
    model = gpt2()
    base = copy.deepcopy(model)
    before = logits(model)
    lorafamily.apply(model, method, rank=3, seed=0, **QV)
    assert torch.equal(logits(model), before)
    placed = placement_of(model).adapters
    assert list(placed) == [f"transformer.h.{i}.attn.c_attn.{part}" for i in (0, 1) for part in "qv"]
    perturb_(model, size=0.2)
    first, second, *_ = placed.values()
    first.resize(torch.arange(0))
    second.resize(torch.arange(second.slices), add=1, generator=torch.Generator().manual_seed(0))
    perturb_(model, seed=2, size=0.1)
    adapted = logits(model)
    assert (adapted - before).abs().max() > 0.05
    # The keys' rows are the base's: ΔW of a fused layer is zero there.
    merged = lorafamily.merge(copy.deepcopy(model)).transformer.h[1].attn.c_attn.weight
    assert torch.equal(merged[:, 32:64], base.transformer.h[1].attn.c_attn.weight[:, 32:64])
    for layout in ("peft", "serving"):
        lorafamily.export_peft(model, tmp_path / layout, layout=layout)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / layout)
        # float32 logits of size one: a rounding of 1e-7 for each of the sums of some hundred terms they come from.
        assert_close(logits(theirs), adapted, rtol=1e-5, atol=1e-5)
    tensors = safetensors.torch.load_file(tmp_path / "serving" / "adapter_model.safetensors")
    r = json.loads((tmp_path / "serving" / "adapter_config.json").read_text())["r"]
    shapes = {key.rpartition("lora_")[2]: tuple(value.shape) for key, value in tensors.items()}
    assert shapes == {"A.weight": (r, 32), "B.weight": (96, r)}
    assert len(tensors) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_on_disk_takes_adapters_on_parts(dtype, tmp_path):
    model = gpt2().to(dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    perturb_(lorafamily.apply(model, "olora", rank=3, seed=0, **QV), size=0.2)
    adapted = logits(model)
    lorafamily.save(model, tmp_path / "adapter")
    lorafamily.merge(model).save_pretrained(tmp_path / "expected", max_shard_size="20KB")
    merge_checkpoint(tmp_path / "base", read(tmp_path / "adapter"), tmp_path / "out")
    for path in (tmp_path / "expected").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    lorafamily.unmerge(model)
    assert torch.equal(logits(model), adapted)


def test_whole_and_part_live_side_by_side_and_add_up():
    model = gpt2().double()
    before, untouched = logits(model), copy.deepcopy(model)
    perturb_(lorafamily.apply(model, "lora", rank=2, targets="c_attn", name="whole", seed=0), size=0.2)
    whole = logits(model)
    perturb_(lorafamily.apply(model, "lora2", rank=2, name="part", seed=1, **QV), size=0.3)
    part = logits(model)
    assert torch.equal(logits(lorafamily.switch(model, "whole")), whole)
    with torch.no_grad(), lorafamily.routing(model, ["whole", None, "part"]):
        expected = torch.stack([whole[0], before[1], part[2]])
        # float64: the same sums in another order.
        assert_close(model(ids()).logits, expected, rtol=1e-9, atol=1e-9)
    lorafamily.combine(model, {"whole": 0.5, "part": 2.0}, name="both")
    both = logits(model)
    assert (both - whole).abs().max() > 0.1
    assert_close(logits(lorafamily.merge(model)), both, rtol=1e-9, atol=1e-9)
    lorafamily.unmerge(model)
    lorafamily.compress(model, rank=3)
    lorafamily.remove(model, "whole")
    assert any(sites_in(model))
    assert torch.equal(logits(lorafamily.switch(model, "part")), part)
    assert everything_as_before(lorafamily.remove(model), untouched)


def test_a_second_adapter_finds_the_parts_of_the_first():
    model = gpt2()
    lorafamily.apply(model, "lora", rank=1, name="first", **QV)
    lorafamily.apply(model, "lora", rank=1, name="second")
    assert "transformer.h.0.attn.c_attn.k" in placement_of(model).adapters
    assert "transformer.h.0.attn.c_attn" not in placement_of(model).adapters


def test_feature_wise_dropout_of_a_weight_that_is_read():
    """Dropout acts on columns of ΔW, the same for the batch: on average ΔW, entries scaled by 1 / (1 − p) or gone."""
    model, _ = encoder()
    perturb_(lorafamily.apply(model, "lora", rank=2, dropout=0.25, targets="self_attn.q", seed=0))
    name, adapter = next(iter(placement_of(model).adapters.items()))
    site = site_on(targets_of(model)[name].layer)
    nn.init.zeros_(site.layer.in_proj_weight)
    site.wrapper.inner = lambda: site.layer.in_proj_weight[:16].clone()  # what the layer's forward reads
    model.train()
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = torch.stack([site.kind.output(site.wrapper, site.acting(), (), {}) for _ in range(2000)])
    share = (drawn / adapter.delta()).round(decimals=9)
    assert (share == share[:, :1]).all()  # whole columns
    assert set(share.unique().tolist()) == {0.0, round(4 / 3, 9)}
    # 2000 draws of a column: the standard error of the mean is 4/3·√(0.25·0.75/2000) = 0.013; five of them.
    assert (share[:, 0].mean(0) - 1).abs().max() < 0.065


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fused": {"nothing": ["q"]}}, "fused='nothing' matches no linear layer of this GPT2LMHeadModel"),
        ({"fused": {"wte": ["q"]}}, "matches no linear layer"),
        (
            {"fused": {"c_attn": ["q", "k", "v", "x", "y"]}},
            "does not fit transformer.h.0.attn.c_attn, which has 96 rows",
        ),
        ({"fused": {"c_attn": {"q": 32, "k": 32}}}, "does not fit .* 96 rows"),
        ({"fused": {"c_attn": {"q": 0, "k": 96}}}, "does not fit .* 96 rows"),
        ({"fused": {"c_attn": "qkv"}}, "does not fit .* give the names of its parts"),
        ({"fused": {"c_attn": ["q", "weight", "v"]}}, 'has an attribute "weight"'),
        ({"fused": {"c_attn": ["q", "k", "v"]}, "targets": "c_attn$"}, 'target "c_attn\\$" matches no layer'),
        ({"fused": {"c_attn": ["q", "k", "v"]}, "also_train": "c_attn.weight"}, "the weight of a layer that gets an"),
    ],
)
def test_refused_with_the_model_as_it_was(options, message):
    model = gpt2()
    untouched = copy.deepcopy(model)
    with pytest.raises(lorafamily.TargetError, match=message):
        lorafamily.apply(model, "lora", rank=1, **options)
    assert everything_as_before(model, untouched)


def test_parts_that_do_not_fit_are_refused(tmp_path):
    model = gpt2()
    lorafamily.apply(model, "lora", rank=1, name="qkv", **QV)
    with pytest.raises(lorafamily.TargetError, match=r"is divided into \{'q': 32, 'k': 32, 'v': 32\} already"):
        lorafamily.apply(model, "lora", rank=1, fused={"c_attn": ["a", "b"]})
    lorafamily.save(model, tmp_path)
    other = gpt2(n_embd=16)
    with pytest.raises(lorafamily.FileError, match=r"c_attn\.q is missing"):
        lorafamily.load(other, tmp_path)
    assert not any(sites_in(other))
    by_heads = lorafamily.apply(gpt2(), "lora", rank=1, fused={"c_attn": {"q": 16, "k": 16, "v": 16}}, name="heads")
    with pytest.raises(lorafamily.FileError, match=r"c_attn\.q is missing"):
        lorafamily.load(by_heads, tmp_path)
    attention, _ = encoder()
    lorafamily.apply(attention, "lora", rank=1)
    with pytest.raises(lorafamily.StateError, match=r"self_attn\.out of an nn.MultiheadAttention: peft"):
        lorafamily.export_peft(attention, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
    refused = pytest.raises(lorafamily.StateError, match=r"self_attn.q \(read rows\); only layers called with samples")
    with refused, lorafamily.routing(attention, ["default"]):
        pass


def test_half_of_an_attention_s_update_in_a_file_of_peft_is_refused(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is an extra; nothing to test without it")
    config = peft.LoraConfig(target_modules=["attention"], r=2)
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    peft.get_peft_model(copy.deepcopy(attention), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    assert len(placement_of(lorafamily.import_peft(copy.deepcopy(attention), tmp_path)).adapters) == 3
    for half in ("A", "B"):
        left_out = f"base_model.model.attention.lora_{half}.weight"
        safetensors.torch.save_file({key: value for key, value in tensors.items() if key != left_out}, file)
        with pytest.raises(lorafamily.FileError, match="attention needs lora_A and a lora_B of 24 rows"):
            lorafamily.import_peft(copy.deepcopy(attention), tmp_path)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # which the untouched model uses
def test_a_second_adapter_leaves_padded_batches_padded():
    model, x = encoder()
    lorafamily.apply(model, "lora", rank=2, seed=0)
    perturb_(lorafamily.apply(model, "lora", rank=2, seed=1, name="second"), size=0.3)
    with torch.no_grad():
        together, alone = model(x), model(x[1:2, :4])
    # float64: rows of another batch, without the padding; only the order of sums differs.
    assert_close(together[1:2], alone, rtol=1e-9, atol=1e-9)
