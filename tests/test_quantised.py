"""Quantised bases: nf4, fp4 and int8 of bitsandbytes, int8 and 4-bit integers of torchao; others are refused."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lorafamily
from conftest import pairwise, perturb_
from lorafamily.allocation.replay import PeakActivations
from lorafamily.cli import main
from lorafamily.layers.placement import placement_of
from lorafamily.layers.quantised import quantised_layers, shapes_of, tensors_of

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
# Rows are whole blocks of 64 entries, as in every real model: on CPUs with AVX-512, bitsandbytes 0.50 dequantises other
# ones wrongly, without a word.
SIZES = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 128}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.randint(99, (3, 8), generator=torch.Generator().manual_seed(0))
LABELS = {"bert": torch.tensor([0, 1, 1]), "llama": IDS, "gpt2": IDS}
# Kernels and references sum the same numbers in another order; int8's kernel, moreover, scales by SCB · (1/127) where
# the reference divides. Both are some float32 roundings of the largest entry, in every layer.
ROUNDING = 2e-5
GRADIENTS = {"lora2": 4e-4}
"""LoRA²'s factors get small differences of larger numbers: in float32 the gradients on ordinary layers are up to 9e-5
from those in float64, and the ones on quantised layers up to 2.5e-4 (the most on torchao's int8)."""


def plain(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    none = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if architecture == "bert":
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return transformers.BertForSequenceClassification(
            transformers.BertConfig(**SIZES, **still, initializer_range=0.1)
        )
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
        four = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": scheme[:3],
            "bnb_4bit_use_double_quant": "double" in scheme,
        }
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

        return functional.int8_vectorwise_dequant(
            weight.data, weight.SCB if layer.state.SCB is None else layer.state.SCB
        )
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
every_combination = pairwise(
    "architecture,scheme,method",
    list(LABELS),
    FOUR,
    METHODS,
    and_also=[("bert", "nf4-double", "olora"), ("llama", "torchao-int4", "olora")],
)
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
        for (name, parameter), other in zip(
            own[at].update.named_parameters(), theirs[at].update.parameters(), strict=True
        ):
            assert_near(parameter.detach(), other.detach(), 1e-6)
            assert parameter.grad.abs().max() > 0, (at, name)
            assert_near(parameter.grad, other.grad, GRADIENTS.get(method, ROUNDING))
    assert_near(outputs(model), outputs(twin))


@every_combination
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

    with pytest.raises(lorafamily.StateError, match=r"is quantised.*dequantise=torch\.bfloat16.*requantise=True"):
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


def test_int8_in_eval_mode_is_as_exact_as_its_rounded_inputs(base):
    """There bitsandbytes rounds inputs to 255 steps a row, in float16. Each moves by half a step, 1/254 of the row's
    largest, and half a float16 rounding; and their product with a row of W by at most that times ‖row‖₁."""
    layer = base("llama", "int8").eval().model.layers[0].mlp.up_proj
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    W = reference(layer)
    bound = x.abs().amax(1, keepdim=True) * (1 / 254 + 2**-11) * W.abs().sum(1) * 1.01
    with torch.no_grad():
        error = (layer(x) - x @ W.T).abs()
    assert (error <= bound).all()
    assert error.max() > 1e-3  # so the bound is not that of another kernel


@every_base
@pytest.mark.parametrize("keep", ["device", "cpu", "none"])
def test_quantising_again_says_what_it_loses(base, scheme, keep):
    model = base("llama", scheme)
    stored = bits(model)
    lorafamily.apply(model, "lora", rank=4, seed=0, targets="attention")
    perturb_(model, size=0.05)
    adapted, deltas = outputs(model), {at: a.delta() for at, a in placement_of(model).adapters.items()}
    wanted = {at: reference(model.get_submodule(at)) + delta for at, delta in deltas.items()}
    rows = lorafamily.summary(model).rows
    assert all(row.lost is None and 0 < row.step < 5 for row in rows)
    assert "step" in str(lorafamily.summary(model))
    with pytest.warns(UserWarning, match=r"left an error of \d+% to \d+% of ‖ΔW‖ .*layers.*dequantise") as warned:
        lorafamily.merge(model, requantise=True, keep=keep)
    assert len(list(quantised_layers(model))) == 14
    for row in lorafamily.summary(model).rows:
        found = reference(model.get_submodule(row.module))
        torch.testing.assert_close(row.lost, float((found - wanted[row.module]).norm()), rtol=1e-3, atol=1e-6)
        assert 0.3 * row.step < row.lost < 3 * row.step if keep != "none" else row.step is None
    shares = {row.module: row.lost / float(deltas[row.module].norm()) for row in lorafamily.summary(model).rows}
    said = re.search(r"error of (\d+)% to (\d+)% of ‖ΔW‖ \(the most in (.*?)\)", str(warned[0].message))
    percent = [100 * min(shares.values()), 100 * max(shares.values())]
    assert [int(said[1]), int(said[2])] == pytest.approx(percent, abs=0.6)
    assert said[3] == max(shares, key=shares.get)
    assert (outputs(model) - adapted).norm() < 0.3 * adapted.norm()
    if keep == "none":
        with pytest.raises(lorafamily.StateError, match="the original weights are gone"):
            lorafamily.unmerge(model)
    else:
        lorafamily.unmerge(model)
        assert torch.equal(outputs(model), adapted)
        assert same(bits(model), stored)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@every_architecture
def test_a_dequantised_model_is_an_ordinary_one(base, architecture, scheme, tmp_path):
    model = base(architecture, scheme)
    lorafamily.apply(model, "lora", rank=4, seed=0, targets=r"query|q_proj|attn\.c_proj")
    perturb_(model, size=0.1)
    adapted, kind = outputs(model), type(model)
    hooked = next(layer for _, layer, _ in quantised_layers(model))
    calls = []
    hooked.register_forward_pre_hook(lambda module, args, kwargs: calls.append("before"), with_kwargs=True)
    hooked.register_forward_hook(lambda module, args, output: calls.append("after"), always_call=True)
    outputs(model)
    lorafamily.merge(model, dequantise=torch.float32, keep="cpu")
    merged = outputs(model)
    assert calls == ["before", "after"] * 2  # also of the layer that takes its place
    assert_near(merged, adapted)
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path).train()
    assert {type(module) for module in again.modules()} == {type(module) for module in plain(architecture).modules()}
    assert_near(outputs(again), merged, 1e-6)
    lorafamily.unmerge(model)
    assert model.is_quantized
    assert model.config.quantization_config.quant_method == "bitsandbytes"
    assert torch.equal(outputs(model), adapted)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_its_file_fits_the_base_it_was_quantised_from(base, checkpoints, architecture, scheme, tmp_path):
    model = base(architecture, scheme)
    lorafamily.apply(model, "olora", rank=4, seed=0)
    perturb_(model, size=0.1)
    lorafamily.save(model, tmp_path / "adapter")
    ordinary = lorafamily.load(plain(architecture), tmp_path / "adapter")  # without a warning
    deltas = {at: adapter.delta() for at, adapter in placement_of(ordinary).adapters.items()}
    for at, adapter in placement_of(model).adapters.items():
        assert torch.equal(adapter.delta(), deltas[at])
    lorafamily.merge(ordinary)
    command = ["merge", "--base", str(checkpoints[architecture]), "--adapter", str(tmp_path / "adapter"), "--json"]
    assert main([*command, "--out", str(tmp_path / "merged")]) == 0
    on_disk = type(ordinary).from_pretrained(tmp_path / "merged")
    for name, value in on_disk.state_dict().items():
        assert torch.equal(value, ordinary.state_dict()[name]), name
    model.save_pretrained(tmp_path / "quantised")


def test_a_quantised_checkpoint_on_disk_becomes_an_ordinary_one_where_that_is_asked_for(base, tmp_path, capsys):
    model = base("llama", "nf4")
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    lorafamily.apply(model, "alora", rank=4, seed=0)
    perturb_(model)
    lorafamily.save(model, tmp_path / "adapter")
    command = ["merge", "--base", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"), "--json"]
    command += ["--out", str(tmp_path / "merged")]
    assert main(command) == 2
    assert "quantised from" in (said := capsys.readouterr().err)
    assert "--dequantise bfloat16" in said
    assert not (tmp_path / "merged").exists()
    assert main([*command, "--dequantise", "bfloat16"]) == 0
    merged = lorafamily.merge(model, dequantise=torch.bfloat16)
    on_disk = type(model).from_pretrained(tmp_path / "merged")
    assert {type(module) for module in on_disk.modules()} == {type(module) for module in plain("llama").modules()}
    held = merged.state_dict()
    for name, value in on_disk.state_dict().items():
        assert torch.equal(value, held[name]), name
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert "tokenizer.json" in names
    assert "model.safetensors.index.json" not in names  # the base's, of shards that are not here
    assert main([*command, "--dequantise", "bfloat16"]) == 2
    assert "is there and not empty" in capsys.readouterr().err


def test_what_cannot_be_merged_is_refused(base):
    model = base("llama", "nf4")
    lorafamily.apply(model, "lora", rank=4, seed=0)
    perturb_(model)
    for wrong, said in [
        ({"dequantise": torch.float32, "requantise": True}, "exclude each other"),
        ({"dequantise": torch.int8}, "must be a floating-point"),
    ]:
        with pytest.raises(lorafamily.StateError, match=said):
            lorafamily.merge(model, **wrong)
    ordinary = lorafamily.apply(plain("llama"), "lora", rank=4)
    for given in ({"dequantise": torch.float32}, {"requantise": True}):
        (name,) = given
        with pytest.raises(lorafamily.StateError, match=f"^{name} is given, but no adapted layer is quantised"):
            lorafamily.merge(ordinary, **given)
    layer = model.model.layers[1].mlp.up_proj
    lorafamily.remove(model)
    layer.forward = partial(type(layer).forward, layer)
    lorafamily.apply(model, "lora", rank=4, seed=0)
    before = outputs(model)
    with pytest.raises(lorafamily.StateError, match=r"up_proj .* a forward of its own"):
        lorafamily.merge(model, dequantise=torch.float32)
    assert torch.equal(outputs(model), before)
    with pytest.raises(lorafamily.StateError, match="is quantised"):
        lorafamily.merge_difference(model, {"input_ids": IDS})


@pytest.mark.filterwarnings("ignore:.*register_constant")
def test_what_was_quantised_after_merging_is_not_unmerged(checkpoints):
    """A quantised tensor keeps its values whatever it is given: the update would act twice."""
    pytest.importorskip("torchao", reason="torchao is a test extra", exc_type=ImportError)
    model = perturb_(lorafamily.apply(plain("llama").eval(), "lora", rank=2, seed=0, targets="_proj$"))
    in_torchao(lorafamily.merge(model), "torchao-int8")
    merged = outputs(model)
    for undo in (lorafamily.unmerge, lorafamily.remove):
        with pytest.raises(
            lorafamily.StateError, match=r"layers\.0\.self_attn\.q_proj is of class Int8Tensor; .* and 9 more"
        ):
            undo(model)
    assert torch.equal(outputs(model), merged)


def test_difference_of_merging_is_measured_either_way(base):
    model = base("llama", "nf4")
    lorafamily.apply(model, "lora", rank=4, seed=0)
    perturb_(model, size=0.1)
    before, given = outputs(model), {"input_ids": IDS}
    exact = lorafamily.merge_difference(model, given, dequantise=torch.float32)
    with pytest.warns(UserWarning, match="quantising W"):
        again = lorafamily.merge_difference(model, given, requantise=True)
    assert exact < 1e-4 < 1e-2 < again
    assert torch.equal(outputs(model), before)


FOREIGN = {
    "HQQ": ("hqq.core.quantize", "HQQLinear", nn.Module),
    "quanto": ("optimum.quanto.nn.qlinear", "QLinear", nn.Linear),
    "GPTQ": ("gptqmodel.nn_modules.qlinear.torch", "TorchQuantLinear", nn.Module),
    "AWQ": ("awq.modules.linear.gemm", "WQLinear_GEMM", nn.Module),
    "transformers' finegrained_fp8": ("transformers.integrations.finegrained_fp8", "FP8Linear", nn.Linear),
}


@pytest.mark.parametrize("of", list(FOREIGN))
def test_what_quantises_otherwise_is_refused_by_name(of):
    module, name, base = FOREIGN[of]
    cls = type(name, (base,), {"__module__": module, "forward": lambda self, x: x})
    other = cls(4, 4) if base is nn.Linear else cls()
    if base is nn.Module:
        other.register_buffer("packed", torch.zeros(8, dtype=torch.int32))
    model = nn.ModuleDict({"q_proj": other, "v_proj": nn.Linear(4, 4)})
    for targets in (None, "proj", "q_proj"):
        with pytest.raises(lorafamily.TargetError, match=f"q_proj.*quantised by {of}.*nf4.*exclude"):
            lorafamily.apply(model, "lora", rank=1, targets=targets)
    lorafamily.apply(model, "lora", rank=1, exclude="q_proj")
    assert list(placement_of(model).adapters) == ["v_proj"]


def test_torchao_with_rounded_inputs_is_refused():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is a test extra", exc_type=ImportError)
    model = nn.Sequential(nn.Linear(32, 32))
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(lorafamily.TargetError, match="quantises its inputs too"):
        lorafamily.apply(model, "lora", rank=1)


def test_eight_bits_that_are_sixteen_are_refused():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is a test extra", exc_type=ImportError)
    model = nn.Sequential(bitsandbytes.nn.Linear8bitLt(32, 32))
    with pytest.raises(lorafamily.TargetError, match="has_fp16_weights=False"):
        lorafamily.apply(model, "lora", rank=1)


def test_quantised_weights_cannot_train_beside(base):
    with pytest.raises(lorafamily.TargetError, match=r"classifier\.weight, which is quantised"):
        lorafamily.apply(base("bert", "nf4"), "lora", rank=4, also_train="classifier")


@every_base
def test_counts_and_bytes(base, scheme):
    model = base("llama", scheme, torch.bfloat16)
    ordinary = plain("llama")
    parameters = sum(parameter.numel() for parameter in ordinary.parameters())
    planned = lorafamily.plan(model, "lora", rank=4, batch=batch("llama"))
    lorafamily.apply(model, "lora", rank=4, seed=0)
    found = lorafamily.summary(model)
    assert found.base_parameters == planned.base_parameters == parameters
    inside = [p for name, p in ordinary.named_parameters() if ".layers." in name and "norm" not in name]
    assert found.reached == sum(parameter.numel() for parameter in inside)
    stored = sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(model).values())
    adapters = sum(p.nbytes for adapter in placement_of(model).adapters.values() for p in adapter.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert planned.use.memory.weights == stored + adapters + buffers
    in_layers = sum(t.nbytes for name, t in tensors_of(model).items() if "proj.weight" in name)
    bits_each = 8 * in_layers / sum(p.numel() for p in inside)
    assert bits_each < (6.5 if "4" in scheme and scheme not in TORCHAO else 9.5)  # tiny layers: tables count


@pytest.mark.parametrize("scheme", FOUR)
def test_activations_are_planned_as_they_are(base, scheme):
    model = base("llama", scheme)
    planned = lorafamily.plan(model, "lora", rank=4, batch=batch("llama"))
    lorafamily.apply(model, "lora", rank=4, seed=0)
    model(**batch("llama")).loss.backward()
    with PeakActivations() as real:
        model(**batch("llama")).loss.backward()
    assert 0.8 < planned.use.memory.activations / real.peak < 1.25


def test_changed_scales_are_noticed(base, tmp_path):
    model = base("llama", "nf4")
    lorafamily.apply(model, "lora", rank=4, seed=0)
    lorafamily.save(model, tmp_path / "adapter", hash_base=True)

    def spoil(step):
        model.model.layers[0].mlp.up_proj.weight.quant_state.absmax[3] *= 2

    with pytest.raises(lorafamily.TrainingError, match=r"mlp\.up_proj\.weight\.absmax"):
        lorafamily.train(model, [batch("llama")], steps=2, lr=1e-3, progress=False, on_step=spoil)
    lorafamily.remove(model)
    with pytest.raises(lorafamily.FileError, match="up_proj"):
        lorafamily.load(model, tmp_path / "adapter")


@pytest.mark.parametrize("scheme", FOUR)
def test_parts_of_a_quantised_layer(base, scheme):
    model = base("gpt2", scheme)
    parts = {"fused": {"c_attn$": ["q", "k", "v"]}, "targets": [r"c_attn\.q", r"c_attn\.v"]}
    lorafamily.apply(model, "olora", rank=4, seed=0, **parts)
    perturb_(model, size=0.1)
    layer = model.transformer.h[0].attn.c_attn
    whole = reference(layer)
    adapters = placement_of(model).adapters
    q, v = (adapters[f"transformer.h.0.attn.c_attn.{part}"].delta() for part in "qv")
    adapted = outputs(model)
    lorafamily.merge(model, dequantise=torch.float32)
    merged = model.transformer.h[0].attn.c_attn.weight
    merged = merged.T if scheme in BITSANDBYTES else merged
    assert_near(merged.detach(), torch.cat([whole[:64] + q, whole[64:128], whole[128:] + v]), 1e-6)
    assert_near(outputs(model), adapted)
    lorafamily.unmerge(model)
    assert torch.equal(outputs(model), adapted)


@pytest.mark.parametrize("scores", list(lorafamily.scorers()))
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_every_scorer_ranks_slices_on_it(base, scheme, scores):
    model, data = base("llama", scheme), [batch("llama")]
    lorafamily.apply(model, "alora", rank=4, seed=0, rounds=1, scorer=scores)
    history = lorafamily.train(model, data, steps=8, lr=1e-2, validation=data, progress=False, seed=0)
    assert any(any(values) for decision in history.decisions for values in decision.scores.values())
    assert len({row.rank for row in lorafamily.summary(model).rows}) > 1


def test_samples_are_routed_and_copies_compute_the_same(base):
    model = base("llama", "nf4")
    for seed, name in enumerate("ab"):
        lorafamily.apply(model, "lora", rank=4, seed=seed, name=name)
        perturb_(model, seed, 0.1)
    wanted = [outputs(lorafamily.switch(model, name))[i] for i, name in enumerate(("a", "b", None))]
    with lorafamily.routing(model, ["a", "b", None]):
        assert_near(outputs(model), torch.stack(wanted))
    lorafamily.switch(model, "b")
    assert torch.equal(outputs(copy.deepcopy(model)), outputs(model))


@pytest.mark.filterwarnings("ignore")  # Trainer's own, of many kinds
def test_a_trainer_trains_it_once_told(base, tmp_path):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    from lorafamily.integrations import LoraFamilyCallback

    model = base("llama", "nf4")
    lorafamily.apply(model, "adalora", rank=4, seed=0, interval=0.1)
    stored, before = bits(model), lorafamily.summary(model).rank
    settings = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "max_steps": 12, "save_strategy": "no"}
    args = transformers.TrainingArguments(output_dir=str(tmp_path), **settings)
    samples = [{"input_ids": row, "labels": row} for row in IDS]
    given = {"args": args, "train_dataset": samples, "callbacks": [LoraFamilyCallback(model)]}
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model, **given)
    model.is_quantized = False
    transformers.Trainer(model, **given).train()
    assert lorafamily.summary(model).rank < before
    assert same(bits(model), stored)


def test_the_page_runs(base, checkpoints, tmp_path, monkeypatch):
    """docs/quantised.md, on a small model and for few steps."""
    base("llama", "nf4")  # or skip
    page = (Path(__file__).parents[1] / "docs" / "quantised.md").read_text()
    code = "".join(re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE))
    monkeypatch.chdir(tmp_path)
    scope = {"folder": checkpoints["llama"], "batches": [batch("llama")]}
    with pytest.warns(UserWarning, match="quantising W"):
        exec(code.replace("1e6", "8e3").replace("steps=1000", "steps=4"), scope)
    assert "lost" in str(lorafamily.summary(scope["model"]))
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "merged"}
