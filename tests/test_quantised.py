"""Quantised bases: bitsandbytes nf4, fp4 and int8, torchao int8 and 4-bit integers; what quantises otherwise is refused."""

from __future__ import annotations

import copy
import json
import types
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorafamily
from conftest import perturb_
from lorafamily.layers import kind_of
from lorafamily.placement import placement_of
from lorafamily.quantised import Quantised, counts_of, quantised_layers, shapes_of, tensors_of

transformers = pytest.importorskip("transformers", reason="transformers is an extra")

pytestmark = [
    # of the other packages: peft's old name for is_gradient_checkpointing, torchao's enums, non-leaf .grad
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*register_constant"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without"),
]

BITSANDBYTES, TORCHAO = ["nf4", "nf4-double", "fp4", "int8"], ["torchao-int8", "torchao-int4"]
SCHEMES = [*BITSANDBYTES, *TORCHAO]
METHODS = ["lora", "olora", "alora", "lora2", "adalora"]
SIZES = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.randint(99, (3, 8), generator=torch.Generator().manual_seed(0))
LABELS = {"bert": torch.tensor([0, 1, 1]), "llama": IDS, "gpt2": IDS}
# Kernels and references sum the same numbers in another order; int8's kernel, moreover, scales by SCB · (1/127) where
# the reference divides. Both are some float32 roundings of the largest entry, in every layer.
ROUNDING = 2e-5
GRADIENTS = 1e-4
"""LayerNorm's backward takes means away, so that fewer digits are left: in float32 the ordinary layers' own gradients
are up to 4e-5 from what they are in float64, and these as far, on BERT with LoRA²."""


def plain(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    none = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if architecture == "bert":
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **still, initializer_range=0.1))
    if architecture == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **none))
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **still, **none))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder with an ordinary checkpoint, by architecture."""
    folders = {name: tmp_path_factory.mktemp(name) for name in LABELS}
    for name, folder in folders.items():
        plain(name).save_pretrained(folder)
    return folders


@pytest.fixture
def base(checkpoints):
    return partial(quantised, checkpoints)


def quantised(checkpoints, architecture: str, scheme: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """As transformers loads a checkpoint in fewer bits. torchao leaves GPT-2's Conv1D as they are; made nn.Linear, it
    quantises them."""
    package = "bitsandbytes" if scheme in BITSANDBYTES else "torchao"
    pytest.importorskip(package, reason=f"{package} is a test extra", exc_type=ImportError)
    kind = type(plain(architecture))
    if package == "bitsandbytes":
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": scheme[:3], "bnb_4bit_use_double_quant": "double" in scheme}
        config = transformers.BitsAndBytesConfig(**({"load_in_8bit": True} if scheme == "int8" else four))
        return kind.from_pretrained(
            checkpoints[architecture], quantization_config=config, dtype=dtype, device_map="cpu"
        ).train()
    model = kind.from_pretrained(checkpoints[architecture], dtype=dtype).train()
    for name, layer in list(model.named_modules()):
        if type(layer).__name__ == "Conv1D":
            new = nn.Linear(*layer.weight.shape)
            new.weight, new.bias = nn.Parameter(layer.weight.detach().T.contiguous()), layer.bias
            model.set_submodule(name, new)
    in_torchao(model, scheme)
    return model


def in_torchao(model: nn.Module, scheme: str) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    four = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    config = Int8WeightOnlyConfig() if scheme == "torchao-int8" else four
    heads = ("lm_head", "classifier", "pooler.dense")
    quantize_(model, config, lambda layer, name: isinstance(layer, nn.Linear) and not name.endswith(heads))


def dequantised(model: nn.Module) -> nn.Module:
    """The same model with ordinary layers of the dequantised weights, made without what is tested here."""
    twin = copy.deepcopy(model)
    for name, layer in list(twin.named_modules()):
        if (W := reference(layer)) is not None:
            new = nn.Linear(W.shape[1], W.shape[0], layer.bias is not None)
            new.weight, new.bias = nn.Parameter(W.clone()), layer.bias
            twin.set_submodule(name, new)
    return twin


def reference(layer: nn.Module) -> Tensor | None:
    """The weight that the libraries themselves say a quantised layer has, in float32."""
    weight = layer._parameters.get("weight")
    of = type(weight).__name__
    if of == "Params4bit":
        import bitsandbytes.functional as functional

        return functional.dequantize_4bit(weight.data, weight.quant_state).float()
    if of == "Int8Params":
        import bitsandbytes.functional as functional

        return functional.int8_vectorwise_dequant(weight.data, weight.SCB if layer.state.SCB is None else layer.state.SCB)
    return weight.detach().dequantize().float() if of in ("Int8Tensor", "IntxUnpackedToInt8Tensor") else None


def batch(architecture: str) -> dict[str, Tensor]:
    return {"input_ids": IDS, "labels": LABELS[architecture]}


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def moved(method: str) -> float:
    """How far off their start factors show in the outputs: LoRA²'s update is a product of four."""
    return 0.5 if method == "lora2" else 0.1


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Every stored number of the base."""
    return {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_near(found: Tensor, wanted: Tensor, rounding: float = ROUNDING) -> None:
    """Within a rounding of the largest entry: of sums, the small ones are no more exact than the large ones."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=rounding * float(wanted.abs().max()))


FOUR = ["nf4", "fp4", "int8", "torchao-int8"]
"""The others, which differ in how scales are stored, go through the long tests with one method."""
COMBINED = [(scheme, method) for scheme in FOUR for method in METHODS]
COMBINED += [(scheme, "olora") for scheme in SCHEMES if scheme not in FOUR]
every_combination = pytest.mark.parametrize(("scheme", "method"), COMBINED)
every_base = pytest.mark.parametrize("scheme", SCHEMES)
every_architecture = pytest.mark.parametrize("architecture", list(LABELS))


@every_base
@every_architecture
def test_a_kind_knows_the_layer(base, architecture, scheme):
    model, unquantised = base(architecture, scheme), plain(architecture)
    layers = list(quantised_layers(model))
    assert len(layers) >= 8
    assert [name for name, _, _ in layers] == [n for n, m in model.named_modules() if reference(m) is not None]
    for name, layer, kind in layers:
        W = kind.weight(layer)
        assert_near(W, reference(layer), 1e-6)
        before = unquantised.get_submodule(name).weight
        assert kind.shape(layer) == tuple(W.shape) == tuple(before.T.shape if architecture == "gpt2" else before.shape)
        error = (W - (before.T if architecture == "gpt2" else before).detach()).norm()
        expected = float(kind.rounding(layer).sum().sqrt())
        assert 0.8 < expected / error < 1.25, (name, expected, error)  # the very error of this rounding
    if architecture != "gpt2" or scheme in BITSANDBYTES:
        assert shapes_of(model) == {name: tuple(p.shape) for name, p in unquantised.named_parameters()}


@every_combination
@every_architecture
def test_gradients_are_those_on_the_dequantised_base(base, architecture, scheme, method):
    model = base(architecture, scheme)
    twin = dequantised(model)
    start = outputs(model)
    for either in (model, twin):
        lorafamily.apply(either, method, rank=4, seed=0)
    assert_near(outputs(model), start, 1e-5)  # the start is the base
    for either in (model, twin):
        perturb_(either, size=moved(method))
        loss = either(**batch(architecture)).loss
        loss.backward()
    assert (outputs(model) - start).abs().max() > 1e-2
    own, theirs = (placement_of(either).adapters for either in (model, twin))
    assert own.keys() == theirs.keys()
    for at in own:
        for (name, parameter), other in zip(own[at].update.named_parameters(), theirs[at].update.parameters(), strict=True):
            assert_near(parameter.detach(), other.detach(), 1e-6)
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, (at, name)
            assert_near(parameter.grad, other.grad, GRADIENTS)
    assert_near(outputs(model), outputs(twin))


@every_combination
@every_architecture
def test_trained_saved_merged_and_exported(base, architecture, scheme, method, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is an extra")
    model, fresh = base(architecture, scheme), base(architecture, scheme)
    stored = bits(model)
    lorafamily.apply(model, method, rank=4, seed=0, **({"rounds": 2} if method == "alora" else {}))
    data = [batch(architecture)]
    lorafamily.train(model, data, steps=12, lr=1e-2, validation=data, progress=False, seed=0)
    ranks = {row.rank for row in lorafamily.summary(model).rows}
    assert len(ranks) > 1 or method in ("lora", "olora")  # the allocation moved them
    perturb_(model, size=moved(method))
    model.train()
    adapted = outputs(model)
    assert (adapted - outputs(fresh.train())).abs().max() > 1e-2
    assert same(bits(model), stored)

    lorafamily.save(model, tmp_path / "one", hash_base=True)
    lorafamily.load(fresh, tmp_path / "one")
    lorafamily.save(fresh, tmp_path / "two", hash_base=True)
    for file in ("adapter.json", "adapter.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert torch.equal(outputs(fresh.train()), adapted)

    with pytest.raises(lorafamily.StateError, match="is quantised.*dequantise=torch.bfloat16.*requantise=True"):
        lorafamily.merge(model)
    lorafamily.merge(model, dequantise=torch.float32)
    assert not list(quantised_layers(model))
    assert not [module for module in model.modules() if "lorafamily" in type(module).__module__]
    assert_near(outputs(model), adapted)
    lorafamily.unmerge(model)
    assert torch.equal(outputs(model), adapted)
    assert same(bits(model), stored)

    lorafamily.export_peft(model, tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(base(architecture, scheme), tmp_path / "peft").train()
    assert_near(outputs(theirs), adapted, 1e-5)
    lorafamily.remove(model)
    assert same(bits(model), stored)
