"""Files for `peft` and from it, against the real library."""

from __future__ import annotations

import copy
import json
import math

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.testing import assert_close

import lorafamily
from conftest import METHODS, perturb_
from lorafamily.layers.placement import placement_of

transformers = pytest.importorskip("transformers", reason="transformers is an extra; nothing to test without it")
peft = pytest.importorskip("peft", reason="peft is an extra; nothing to compare with without it")

from test_transformers import families, ids, methods_on_families, model_of  # noqa: E402 - needs transformers

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses what transformers is about to rename

# float32 logits of size one: a rounding of 1e-7 for each of the sums of some hundred terms they come from.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(ids()).logits


def uneven(model: nn.Module) -> nn.Module:
    """Leave the start: factors moved, one module without ranks, one with fewer, one that grew."""
    perturb_(model, size=0.1)
    none, fewer, more, *_ = placement_of(model).adapters.values()
    none.resize(torch.arange(0))
    fewer.resize(torch.tensor([1]))
    more.resize(torch.arange(more.slices), add=2, generator=torch.Generator().manual_seed(0))
    return perturb_(model, seed=2, size=0.05)


def loaded_by_peft(base: nn.Module, folder) -> nn.Module:
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)


@methods_on_families
def test_peft_computes_the_same_from_our_file(family, method, tmp_path):
    model = model_of(family)
    base = copy.deepcopy(model)
    head = "classifier" if family == "bert" else None
    uneven(lorafamily.apply(model, method, rank=3, also_train=head, seed=0))
    if head:
        nn.init.normal_(model.classifier.weight)
    expected = logits(model)
    assert (expected - logits(base)).abs().max() > 100 * CLOSE["atol"]
    lorafamily.export_peft(model, tmp_path, card=False)
    theirs = loaded_by_peft(base, tmp_path)
    assert_close(logits(theirs), expected, **CLOSE)
    # And back: what peft saves again is read here.
    theirs.save_pretrained(tmp_path / "again")
    ours = lorafamily.import_peft(copy.deepcopy(base), tmp_path / "again")
    assert_close(logits(ours), expected, **CLOSE)
    assert_close(logits(lorafamily.merge(ours)), expected, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_a_served_file_needs_nothing_but_r_alpha_and_tensors(method, tmp_path):
    model = model_of("llama")
    base = copy.deepcopy(model)
    uneven(lorafamily.apply(model, method, rank=3, seed=0))
    lorafamily.export_peft(model, tmp_path, layout="serving", card=False)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert not config["use_rslora"]
    assert config["r"] in (8, 16)  # 5 are needed where a module grew, 10 where a frozen start goes along
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    served = copy.deepcopy(base)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    layers = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors}
    assert layers == set(placement_of(model).adapters)
    with torch.no_grad():
        for layer in layers:
            A, B = (tensors[f"base_model.model.{layer}.lora_{letter}.weight"] for letter in "AB")
            assert len(A) == B.shape[1] == config["r"]
            served.get_submodule(layer).weight += config["lora_alpha"] / config["r"] * B @ A
    assert_close(logits(served), logits(model), **CLOSE)
    assert_close(logits(loaded_by_peft(base, tmp_path)), logits(model), **CLOSE)


@families
@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 12},
        {"r": 4, "lora_alpha": 12, "use_rslora": True, "lora_dropout": 0.1},
        {"r": 3, "lora_alpha": 8, "rank_pattern": {r".*\.1\..*": 5}, "alpha_pattern": {r".*\.0\..*": 3}},
    ],
    ids=["lora", "rslora", "patterns"],
)
def test_we_compute_the_same_from_peft_s_file(family, options, tmp_path):
    model = model_of(family)
    base = copy.deepcopy(model)
    if family == "bert":
        options = options | {"modules_to_save": ["classifier"]}
    config = peft.LoraConfig(target_modules="all-linear", fan_in_fan_out=family == "gpt2", **options)
    theirs = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    theirs.save_pretrained(tmp_path)
    ours = lorafamily.import_peft(copy.deepcopy(base), tmp_path)
    assert (logits(ours) - logits(base)).abs().max() > 0.01
    assert_close(logits(ours), logits(theirs), **CLOSE)
    ranks = {adapter.slices for adapter in placement_of(ours).adapters.values()}
    assert ranks == ({3, 5} if "rank_pattern" in options else {4})
    ours.train()
    assert {n for n, p in ours.named_parameters() if p.requires_grad and "adapters" not in n} == (
        {"classifier.weight", "classifier.bias"} if family == "bert" else set()
    )
    assert torch.equal(logits(lorafamily.remove(ours)), logits(base))


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(9, 6)
        self.patches = nn.Conv2d(1, 6, 3, padding=1)
        self.mix = nn.Linear(6, 4)

    def forward(self, ids, image):
        return self.mix(self.words(ids).mean(1) + self.patches(image).mean((2, 3)))


def test_embeddings_and_convolutions_both_ways(tmp_path):
    inputs = torch.randint(9, (5, 3)), torch.randn(5, 1, 6, 6)
    model = lorafamily.apply(Vision(), "lora", rank=3, targets=["words", "patches", "mix"], seed=0)
    perturb_(model, size=0.3)
    lorafamily.export_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Vision(), tmp_path)
    assert (model(*inputs) - Vision()(*inputs)).abs().max() > 0.1
    assert_close(theirs(*inputs), model(*inputs), **CLOSE)
    theirs.save_pretrained(tmp_path / "again")
    ours = lorafamily.import_peft(Vision(), tmp_path / "again")
    assert_close(ours(*inputs), model(*inputs), **CLOSE)
    assert len(placement_of(ours).adapters) == 3
    with pytest.raises(lorafamily.StateError, match=r"words is a .*Embedding: servers load adapters of linear layers"):
        lorafamily.export_peft(model, tmp_path, layout="serving")


def test_a_trained_olora_goes_onto_the_pristine_base(tmp_path):
    model = model_of("llama")
    base = copy.deepcopy(model)
    lorafamily.apply(model, "olora", rank=4, seed=0)
    lorafamily.train(model, [{"input_ids": ids(), "labels": ids()}], steps=20, lr=1e-2, progress=False)
    lorafamily.export_peft(model, tmp_path)
    assert (logits(model) - logits(base)).abs().max() > 0.1
    assert_close(logits(loaded_by_peft(base, tmp_path)), logits(model), **CLOSE)


def test_a_loralib_checkpoint():
    model = model_of("llama")
    generator = torch.Generator().manual_seed(0)
    weight = model.model.layers[0].self_attn.q_proj.weight
    A, B = (torch.randn(*shape, generator=generator) for shape in ((2, 32), (32, 2)))
    name = "model.layers.0.self_attn.q_proj"
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.get_submodule(name).weight += 6 / 2 * B @ A  # loralib: alpha / r
    state = {**model.state_dict(), f"{name}.lora_A": A, f"{name}.lora_B": B}
    lorafamily.import_loralib(model, state, alpha=6)
    assert weight is model.get_submodule(name).weight
    assert_close(logits(model), logits(expected), **CLOSE)
    with pytest.raises(lorafamily.FileError, match="no loralib checkpoint"):
        lorafamily.import_loralib(model_of("llama"), model_of("llama").state_dict(), alpha=6)
    with pytest.raises(lorafamily.FileError, match=r"q_proj.lora_A is \(4, 32\), not \(4, 16\)|lora_B is \(32, 2\)"):
        lorafamily.import_loralib(model_of("llama"), state | {f"{name}.lora_A": torch.randn(4, 32)}, alpha=6)


def test_what_a_file_of_peft_cannot_hold_is_refused(tmp_path):
    model = lorafamily.apply(model_of("bert"), "lora", rank=2, also_train=["classifier", "query.bias"])
    with pytest.raises(
        lorafamily.StateError, match=r"query\.bias.*trained along with the adapters; peft's modules_to_save"
    ):
        lorafamily.export_peft(model, tmp_path / "a")
    with pytest.raises(lorafamily.StateError, match=r"servers load no trained .*classifier\.weight"):
        lorafamily.export_peft(model, tmp_path / "a", layout="serving")
    model = lorafamily.apply(model_of("llama"), "lora", rank=20)
    with pytest.raises(lorafamily.StateError, match="largest rank is 20, and the server accepts 8, 16"):
        lorafamily.export_peft(model, tmp_path / "a", layout="serving", ranks=[16, 8])
    for adapter in placement_of(model).adapters.values():
        adapter.resize(torch.arange(0))
    with pytest.raises(lorafamily.StateError, match="no rank left"):
        lorafamily.export_peft(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def broken(change):
    """A folder that peft saved, with one thing wrong."""

    def make(folder):
        theirs = peft.get_peft_model(model_of("llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        theirs.save_pretrained(folder)
        config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        settings, values = json.loads(config.read_text()), safetensors.torch.load_file(tensors)
        change(settings, values)
        config.write_text(json.dumps(settings))
        safetensors.torch.save_file(values, tensors)

    return make


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c.update(peft_type="ADALORA"), "peft_type ADALORA; only LORA"),
        (lambda c, t: c.update(use_dora=True), "use_dora=True; that is more than the low-rank update"),
        (lambda c, t: c.update(bias="all"), "bias='all'"),
        (lambda c, t: c.update(alora_invocation_tokens=[1, 2]), r"alora_invocation_tokens=\[1, 2\]"),
        (lambda c, t: c.update(some_new_thing=3), "some_new_thing=3"),
        (lambda c, t: c.update(init_lora_weights="olora"), "'olora' changed the base weights"),
        (lambda c, t: c.update(r=0), "r and its pattern must be positive numbers"),
        (lambda c, t: c.update(lora_alpha=math.inf), "lora_alpha and its pattern"),
        (lambda c, t: c.pop("r"), "no configuration of a LoRA"),
        (lambda c, t: c.update(r=4), r"lora_A is \(2, 32\), not \(4, 32\)"),
        (lambda c, t: t.pop(f"{Q}.lora_A.weight"), r"layers\.0\.self_attn\.q_proj\.lora_A is missing"),
        (lambda c, t: t.update({f"{Q}.lora_B.weight": torch.zeros(3, 2)}), r"lora_B is \(3, 2\), not \(32, 2\)"),
        (lambda c, t: t[f"{Q}.lora_B.weight"].fill_(math.nan), "not all finite"),
        (lambda c, t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(32)}), "lora_magnitude_vector is neither"),
        (lambda c, t: t.update({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}), "x is no layer of this Llama"),
        (lambda c, t: [t.pop(key) for key in list(t)], "holds no pair"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_nothing_changes(change, message, tmp_path):
    broken(change)(tmp_path)
    model = model_of("llama")
    before, keys = logits(model), list(model.state_dict())
    with pytest.raises(lorafamily.FileError, match=message):
        lorafamily.import_peft(model, tmp_path)
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), before)
    lorafamily.apply(model, "lora")  # no trace of the attempt


class CalledTwice(nn.Module):
    """One layer under two names, as a list of equal blocks is written by hand."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.layers = nn.ModuleList([self.first, nn.Linear(6, 6)])

    def forward(self, x):
        for layer in (self.first, *self.layers):
            x = torch.tanh(layer(x))
        return x


def test_a_layer_under_two_names_is_neither_written_for_peft_nor_read_from_it(tmp_path):
    """peft wraps the first name alone, so that the other calls would go without adapter, or with one too many."""
    one = r"first and layers\.0 are one layer: peft puts an adapter on first alone"
    model = lorafamily.apply(CalledTwice(), "lora", rank=2)
    with pytest.raises(lorafamily.StateError, match=one):
        lorafamily.export_peft(model, tmp_path / "ours", card=False)
    config = peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)
    peft.get_peft_model(CalledTwice(), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(lorafamily.StateError, match=one):
        lorafamily.import_peft(CalledTwice(), tmp_path / "theirs")
    other = lorafamily.apply(CalledTwice(), "lora", rank=2, targets=r"layers\.1")
    lorafamily.export_peft(other, tmp_path / "other", card=False)


class SameEnds(nn.Module):
    """peft's rule for a list of names takes `fc` for `inner.fc`, which it cannot adapt, and `inner.out.fc`, too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"fc": nn.ReLU(), "out": nn.ModuleDict({"fc": nn.Linear(6, 3)})})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner["out"]["fc"](self.inner["fc"](self.fc(x)))


def test_a_file_is_for_its_layers_alone_where_others_end_like_them(tmp_path):
    x = torch.randn(4, 6)
    model = perturb_(lorafamily.apply(SameEnds(), "lora", rank=2, seed=0, targets="^fc$"))
    lorafamily.export_peft(model, tmp_path, card=False)
    theirs = peft.PeftModel.from_pretrained(SameEnds(), tmp_path)
    adapted = [at for at, module in theirs.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert adapted == ["base_model.model.fc"]
    # float32, sums of six terms.
    assert_close(theirs(x), model(x), rtol=1e-6, atol=1e-6)
    assert_close(lorafamily.import_peft(SameEnds(), tmp_path)(x), model(x), rtol=1e-6, atol=1e-6)
