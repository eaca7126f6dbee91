"""What is one tensor in the model stays one in files, or is refused: tied heads on disk, in peft's files and ours."""

from __future__ import annotations

import json
import warnings

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.testing import assert_close

import lorafamily
from conftest import perturb_
from lorafamily.deploy.checkpoint import merge_checkpoint
from lorafamily.deploy.saved import read

transformers = pytest.importorskip("transformers", reason="transformers is an extra; nothing to test without it")

ENDS = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 1}


def llama(tie: bool = True):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**ENDS, **sizes, tie_word_embeddings=tie)
    return made(transformers.LlamaForCausalLM, config)


def gpt2():
    return made(transformers.GPT2LMHeadModel, transformers.GPT2Config(**ENDS, n_embd=32, n_layer=2, n_head=2))


def t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return made(transformers.T5ForConditionalGeneration, transformers.T5Config(vocab_size=99, **sizes))


def made(cls, config):
    torch.manual_seed(0)
    return cls(config).double().eval()


TIED = {  # the model, what its tensor is called, its other names, layers to adapt
    "llama": (llama, "model.embed_tokens.weight", ["lm_head.weight"], "q_proj"),
    "gpt2": (gpt2, "transformer.wte.weight", ["lm_head.weight"], "c_attn"),
    "t5": (
        t5,
        "shared.weight",
        ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"],
        r"\.q$",
    ),
}
every_model = pytest.mark.parametrize("family", TIED)


@torch.no_grad()
def logits(model):
    ids = torch.randint(2, 99, (3, 7), generator=torch.Generator().manual_seed(0))
    both = {"decoder_input_ids": ids} if model.config.model_type == "t5" else {}
    return model.eval()(input_ids=ids, **both).logits


def assert_same_weights(model, other) -> None:
    """The same bits; the outputs to rounding, for tensors lie at other addresses."""
    weights = dict(other.named_parameters())
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())
    assert_close(logits(model), logits(other), rtol=1e-5, atol=1e-5)  # rotary frequencies are float32 in one of them


def trained(family: str):
    """A model whose tied tensor trained along with adapters."""
    make, name, _, targets = TIED[family]
    model = lorafamily.apply(make(), "lora", rank=2, targets=targets, also_train=name, seed=0)
    nn.init.normal_(model.get_parameter(name))
    return perturb_(model, size=0.2)


@every_model
def test_another_name_of_a_tied_tensor_says_which_to_take(family):
    make, name, others, targets = TIED[family]
    for other in others:
        with pytest.raises(lorafamily.TargetError, match=f"{other} is one tied tensor with {name}, and both train"):
            lorafamily.apply(make(), "lora", rank=2, targets=targets, also_train=f"^{other}$")


@every_model
def test_a_trained_tied_tensor_goes_to_peft_and_back(family, tmp_path):
    """float64: the same values, sums in another order."""
    peft = pytest.importorskip("peft", reason="peft is an extra; nothing to test without it")
    make, name, others, _ = TIED[family]
    model = trained(family)
    lorafamily.export_peft(model, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    for other in [name, *others]:
        assert torch.equal(tensors[f"base_model.model.{other}"], model.get_parameter(name))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config.get("ensure_weight_tying", False) == (family != "t5")  # peft makes a linear layer of an embedding
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path).double()
    assert_close(logits(theirs), logits(model))
    if family != "t5":
        base = theirs.get_base_model()
        assert base.get_output_embeddings().modules_to_save["default"].weight is (
            base.get_input_embeddings().modules_to_save["default"].weight
        )
    again = lorafamily.import_peft(make(), tmp_path)
    assert again.get_parameter(name) is again.get_parameter(others[-1])
    assert_close(logits(again), logits(model))


def theirs(folder, model, **settings):
    """What peft saves of a model, with values of its own in what it saves whole."""
    peft = pytest.importorskip("peft", reason="peft is an extra; nothing to test without it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"], **settings)
        model = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name:
                    parameter.normal_()
        model.save_pretrained(folder)
    return model


def test_peft_s_file_of_a_tied_model_is_read_as_peft_reads_it(tmp_path):
    both = {"modules_to_save": ["lm_head", "embed_tokens"], "ensure_weight_tying": True}
    tied = theirs(tmp_path / "tied", llama(), **both)
    assert_close(logits(lorafamily.import_peft(llama(), tmp_path / "tied")), logits(tied))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["embed_tokens"], "the file has model.embed_tokens.weight alone: peft would leave the rest as it is; untie"),
        (["lm_head"], "the file has lm_head.weight alone: peft would leave the rest as it is; untie"),
        (
            ["lm_head", "embed_tokens"],
            "the file has other values for lm_head.weight than for model.embed_tokens.weight",
        ),
    ],
)
def test_what_peft_untied_is_refused_on_a_tied_model_and_read_on_an_untied_one(names, message, tmp_path):
    untied = theirs(tmp_path, llama(), modules_to_save=names)
    with pytest.raises(lorafamily.FileError, match=message):
        lorafamily.import_peft(llama(), tmp_path)
    apart = llama(tie=False)
    apart.load_state_dict(llama().state_dict())
    assert apart.lm_head.weight is not apart.model.embed_tokens.weight
    assert_close(logits(lorafamily.import_peft(apart, tmp_path)), logits(untied))


@every_model
def test_our_file_fits_models_that_tie_the_same(family, tmp_path):
    make, name, others, _ = TIED[family]
    model = trained(family)
    lorafamily.save(model, tmp_path / "adapter")
    assert torch.equal(logits(lorafamily.load(make(), tmp_path / "adapter")), logits(model))
    apart = make()
    for other in others:
        at, _, own = other.rpartition(".")
        setattr(apart.get_submodule(at), own, nn.Parameter(apart.get_parameter(other).detach().clone()))
    with pytest.raises(lorafamily.FileError, match=f"{name} is no tied tensor with {others[0]}"):
        lorafamily.load(apart, tmp_path / "adapter")
    lorafamily.apply(apart, "lora", rank=2, targets="q_proj|c_attn|q$", also_train=name, seed=0)
    lorafamily.save(apart, tmp_path / "apart")
    with pytest.raises(lorafamily.FileError, match=f"{name} is one tied tensor with {others[0]}"):
        lorafamily.load(make(), tmp_path / "apart")


@every_model
@pytest.mark.parametrize("stored", ["once", "twice"])
def test_a_trained_tied_tensor_is_merged_on_disk_under_every_name(family, stored, tmp_path):
    """Where only one of two copies were written, transformers would find them different and untie them."""
    make, name, others, _ = TIED[family]
    base = make()
    base.save_pretrained(tmp_path / "base")
    if stored == "twice":
        file = tmp_path / "base" / "model.safetensors"
        copies = {other: base.get_parameter(name).detach().clone() for other in [name, *others]}
        safetensors.torch.save_file(safetensors.torch.load_file(file) | copies, file, {"format": "pt"})
    model = trained(family)
    lorafamily.save(model, tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", read(tmp_path / "adapter"), tmp_path / "out")
    again = type(base).from_pretrained(tmp_path / "out", dtype=torch.float64)
    assert again.get_parameter(name) is again.get_parameter(others[-1])
    assert_same_weights(again, lorafamily.merge(model))


def separate_heads(folder, tie: bool):
    """A checkpoint with a head of its own; `tie`: whether its config says that the head is the embedding."""
    base = llama(tie=False)
    base.config.tie_word_embeddings = tie
    base.save_pretrained(folder)
    file = folder / "model.safetensors"
    copies = {name: base.state_dict()[name].clone() for name in ("model.embed_tokens.weight", "lm_head.weight")}
    safetensors.torch.save_file(safetensors.torch.load_file(file) | copies, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("tie", "message"),
    [
        (False, r"the config of this checkpoint does not tie them: lm_head\.weight would be overwritten"),
        (True, r"another value for lm_head\.weight than for model\.embed_tokens\.weight"),
    ],
)
def test_a_trained_tied_tensor_overwrites_no_head_of_its_own(tie, message, tmp_path):
    separate_heads(tmp_path / "base", tie)
    lorafamily.save(trained("llama"), tmp_path / "adapter")
    apart = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    with pytest.raises(lorafamily.FileError, match=r"is no tied tensor with lm_head\.weight"):
        lorafamily.load(apart, tmp_path / "adapter")
    with pytest.raises(lorafamily.StateError, match=message):
        merge_checkpoint(tmp_path / "base", read(tmp_path / "adapter"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@every_model
def test_an_adapter_on_a_tied_weight_merges_neither_in_memory_nor_on_disk(family, tmp_path):
    make, name, _, targets = TIED[family]
    model = make()
    model.save_pretrained(tmp_path / "base")
    layer = name.removesuffix(".weight")
    lorafamily.apply(model, "lora", rank=2, targets=[f"^{layer}$", targets], seed=0)
    lorafamily.save(perturb_(model, size=0.2), tmp_path / "adapter")
    with pytest.raises(lorafamily.StateError, match="are one tied tensor"):
        lorafamily.merge(model)
    with pytest.raises(lorafamily.StateError, match="are one tied tensor in the model"):
        merge_checkpoint(tmp_path / "base", read(tmp_path / "adapter"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["adapted", "trained along"])
def test_what_was_apart_in_memory_is_not_merged_where_the_checkpoint_ties_it(how, tmp_path):
    """The checkpoint has the tensor once, and its config says that the head is it."""
    tied = llama()
    tied.save_pretrained(tmp_path / "base")
    apart = llama(tie=False)
    apart.load_state_dict(tied.state_dict())
    options = {"targets": ["embed_tokens", "q_proj"]} if how == "adapted" else {"also_train": "embed_tokens"}
    lorafamily.apply(apart, "lora", rank=2, seed=0, **options)
    nn.init.normal_(apart.model.embed_tokens.weight)
    lorafamily.save(perturb_(apart, size=0.2), tmp_path / "adapter")
    with pytest.raises(lorafamily.StateError, match=r"embed_tokens\.weight is lm_head\.weight too, by the"):
        merge_checkpoint(tmp_path / "base", read(tmp_path / "adapter"), tmp_path / "out")
    with torch.no_grad():
        apart.lm_head.weight.add_(1)  # really two tensors: then both are on disk
    lorafamily.remove(apart).save_pretrained(tmp_path / "both")
    merge_checkpoint(tmp_path / "both", read(tmp_path / "adapter"), tmp_path / "out")
    merged = type(tied).from_pretrained(tmp_path / "out", dtype=torch.float64)
    assert_same_weights(merged, lorafamily.merge(lorafamily.load(apart, tmp_path / "adapter")))
