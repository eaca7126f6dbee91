"""Files that other programs read, against those programs: diffusers, peft's auto classes, what the Hub reads."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.testing import assert_close

import lorafamily
from checks import clients
from conftest import perturb_
from lorafamily import cli
from lorafamily.layers.placement import placement_of

peft = pytest.importorskip("peft", reason="peft is an extra; diffusers and transformers load adapters through it")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft uses what transformers is about to rename
    # diffusers asks for what its newest requirements renamed, at import
    pytest.mark.filterwarnings("ignore:.*_register_pytree_node.*"),
    pytest.mark.filterwarnings("ignore:.*is an Enum subclass.*"),
]

# float32 outputs of size one, from sums of some hundred terms.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def unet() -> nn.Module:
    pytest.importorskip("diffusers", reason="diffusers is an extra; nothing to compare with without it")
    return clients.unet(Path())


def flux() -> nn.Module:
    pytest.importorskip("diffusers", reason="diffusers is an extra; nothing to compare with without it")
    return clients.flux(Path())


MODELS = {"unet": unet, "transformer": flux}


@torch.no_grad()
def image_of(model: nn.Module) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    if type(model).__name__.startswith("UNet"):
        return model(
            torch.randn(2, 4, 8, 8, generator=g),
            torch.tensor([3, 5]),
            encoder_hidden_states=torch.randn(2, 5, 8, generator=g),
        ).sample
    return model(
        hidden_states=torch.randn(1, 16, 4, generator=g),
        encoder_hidden_states=torch.randn(1, 6, 16, generator=g),
        pooled_projections=torch.randn(1, 16, generator=g),
        timestep=torch.tensor([0.5]),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(6, 3),
    ).sample


def adapted(model: nn.Module, method: str, **options) -> nn.Module:
    """With moved factors, one module without rank and one of another rank."""
    size = 0.5 if method == "lora2" else 0.1  # LoRA²'s update is a product of four small numbers
    perturb_(lorafamily.apply(model, method, rank=3, seed=0, **options), size=size)
    none, fewer, *_ = placement_of(model).adapters.values()
    none.resize(torch.arange(0))
    fewer.resize(torch.tensor([1]))
    return model


def through_pipeline(model: nn.Module, folder, prefix: str) -> nn.Module:
    """As `pipeline.load_lora_weights(folder)` does it, without the other models of a pipeline."""
    from diffusers.loaders import FluxLoraLoaderMixin, StableDiffusionLoraLoaderMixin

    if prefix == "unet":
        tensors, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(folder, return_lora_metadata=True)
        StableDiffusionLoraLoaderMixin.load_lora_into_unet(tensors, alphas, model, metadata=metadata)
    else:
        tensors, alphas, metadata = FluxLoraLoaderMixin.lora_state_dict(
            folder, return_alphas=True, return_lora_metadata=True
        )
        FluxLoraLoaderMixin.load_lora_into_transformer(tensors, alphas, model, metadata=metadata)
    return model


@pytest.mark.parametrize(
    ("prefix", "method"), [("unet", "lora"), ("unet", "olora"), ("transformer", "alora"), ("transformer", "lora2")]
)
def test_diffusers_computes_the_same_from_our_file(prefix, method, tmp_path):
    model = MODELS[prefix]()
    base = copy.deepcopy(model)
    targets = ["to_q", "to_v", "to_out.0", "conv1", "conv_in"] if prefix == "unet" else None
    adapted(model, method, targets=targets)
    expected = image_of(model)
    assert (expected - image_of(base)).abs().max() > 0.1
    lorafamily.export_peft(model, tmp_path, layout="diffusers", card=False)
    theirs = copy.deepcopy(base)
    theirs.load_lora_adapter(tmp_path, prefix=prefix, use_safetensors=True)
    assert_close(image_of(theirs), expected, **CLOSE)
    assert_close(image_of(through_pipeline(copy.deepcopy(base), tmp_path, prefix)), expected, **CLOSE)
    ours = lorafamily.import_peft(copy.deepcopy(base), tmp_path)
    assert_close(image_of(ours), expected, **CLOSE)
    # And back: what diffusers saves is read here.
    theirs.save_lora_adapter(tmp_path / "again", adapter_name="default_0")
    assert_close(image_of(lorafamily.import_peft(copy.deepcopy(base), tmp_path / "again")), expected, **CLOSE)


def test_the_command_exports_for_diffusers(tmp_path, capsys):
    flux().save_pretrained(tmp_path / "base")
    model = adapted(type(flux()).from_pretrained(tmp_path / "base").eval(), "lora")
    lorafamily.save(model, tmp_path / "adapter")
    given = ["--base", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"), "--layout", "diffusers"]
    assert cli.main(["export", *given, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.endswith("layout diffusers\n")
    theirs = flux()
    theirs.load_lora_adapter(tmp_path / "out", prefix="transformer", use_safetensors=True)
    assert_close(image_of(theirs), image_of(model), **CLOSE)
    assert "library_name: diffusers" in (tmp_path / "out" / "README.md").read_text()


def kohya(model: nn.Module, alphas: tuple[float, ...]) -> dict[str, torch.Tensor]:
    """A file of kohya's trainers for every second linear layer of an attention, ranks 2 and 3, alphas in turn."""
    g = torch.Generator().manual_seed(0)
    names = [at for at, module in model.named_modules() if isinstance(module, nn.Linear) and ".attn" in at][::2]
    tensors = {}
    for number, at in enumerate(names):
        d_out, d_in = model.get_submodule(at).weight.shape
        rank, written = 2 + number % 2, f"lora_unet_{at.replace('.', '_')}"
        tensors[f"{written}.lora_down.weight"] = torch.randn(rank, d_in, generator=g)
        tensors[f"{written}.lora_up.weight"] = torch.randn(d_out, rank, generator=g)
        tensors[f"{written}.alpha"] = torch.tensor(alphas[number % len(alphas)])
    return tensors


def test_a_file_of_kohya_is_read_as_diffusers_reads_it(tmp_path):
    base = unet()
    tensors = kohya(base, (3.0,))
    safetensors.torch.save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    theirs = through_pipeline(copy.deepcopy(base), tmp_path, "unet")
    ours = lorafamily.import_peft(copy.deepcopy(base), tmp_path)
    assert (image_of(ours) - image_of(base)).abs().max() > 0.01
    assert_close(image_of(ours), image_of(theirs), **CLOSE)
    assert {adapter.slices for adapter in placement_of(ours).adapters.values()} == {2, 3}


def test_alphas_of_kohya_that_differ(tmp_path):
    """Against the weights: diffusers 0.42 gives every layer the alpha that most of them have."""
    base = unet()
    tensors = kohya(base, (1.0, 2.0, 3.0))
    safetensors.torch.save_file(tensors, tmp_path / "kohya.safetensors")
    ours = lorafamily.import_peft(copy.deepcopy(base), tmp_path / "kohya.safetensors")
    expected = copy.deepcopy(base)
    names = {f"lora_unet_{at.replace('.', '_')}": module for at, module in expected.named_modules()}
    with torch.no_grad():
        for key in [key for key in tensors if key.endswith(".alpha")]:
            at = key.removesuffix(".alpha")
            down, up = tensors[f"{at}.lora_down.weight"], tensors[f"{at}.lora_up.weight"]
            names[at].weight += tensors[key] / len(down) * up @ down
    assert_close(image_of(ours), image_of(expected), **CLOSE)
    # What is for the text encoder stays out of the UNet, and is not passed over in silence.
    both = tensors | {"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)}
    safetensors.torch.save_file(both, tmp_path / "both.safetensors")
    with pytest.warns(UserWarning, match=r"lora_te \(1 tensors\) are for other models of the pipeline"):
        again = lorafamily.import_peft(copy.deepcopy(base), tmp_path / "both.safetensors")
    assert torch.equal(image_of(again), image_of(ours))
    # Blocks by the names of the original code, which no layer here has.
    strange = {"lora_unet_input_blocks_1_1_proj_in.alpha": torch.tensor(1.0)}
    safetensors.torch.save_file(tensors | strange, tmp_path / "strange.safetensors")
    with pytest.raises(lorafamily.FileError, match="input_blocks_1_1_proj_in is no layer"):
        lorafamily.import_peft(copy.deepcopy(base), tmp_path / "strange.safetensors")


def test_names_of_early_diffusers(tmp_path):
    from diffusers.utils import convert_unet_state_dict_to_peft

    base = unet()
    at = "mid_block.attentions.0.transformer_blocks.0.attn1"
    g = torch.Generator().manual_seed(0)
    names = {f"{at}.to_q.lora": f"{at}.to_q", f"{at}.to_out.0.lora": f"{at}.to_out.0"}
    tensors = {f"unet.{name}.{way}.weight": torch.randn(*size, generator=g) for name in names
               for way, size in (("down", (2, 16)), ("up", (16, 2)))}  # fmt: skip
    safetensors.torch.save_file(tensors, tmp_path / "early.safetensors")
    ours = lorafamily.import_peft(copy.deepcopy(base), tmp_path / "early.safetensors")
    theirs = copy.deepcopy(base)
    theirs.load_lora_adapter(
        convert_unet_state_dict_to_peft({k.removeprefix("unet."): v for k, v in tensors.items()}), prefix=None
    )
    assert (image_of(ours) - image_of(base)).abs().max() > 0.01
    assert_close(image_of(ours), image_of(theirs), **CLOSE)
    assert set(placement_of(ours).adapters) == set(names.values())


def test_what_diffusers_cannot_hold_is_refused(tmp_path):
    plain = lorafamily.apply(nn.Sequential(nn.Linear(4, 4)), "lora", rank=1, targets=["0"])
    with pytest.raises(lorafamily.StateError, match="a Sequential is no model of diffusers"):
        lorafamily.export_peft(plain, tmp_path / "a", layout="diffusers")
    model = lorafamily.apply(flux(), "lora", rank=1, also_train="norm_out.linear.bias")
    with pytest.raises(lorafamily.StateError, match=r"diffusers loads no trained norm_out\.linear\.bias"):
        lorafamily.export_peft(model, tmp_path / "a", layout="diffusers")
    with pytest.raises(lorafamily.StateError, match='layout="diffusers" keeps the true ranks'):
        lorafamily.export_peft(model, tmp_path / "a", layout="diffusers", ranks=[8])
    assert not (tmp_path / "a").exists()


def test_a_pipeline_s_file_without_tensors_for_the_model(tmp_path):
    safetensors.torch.save_file({"text_encoder.a.lora_A.weight": torch.ones(1, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(
        lorafamily.FileError, match="keys begin with text_encoder; for a UNet2DConditionModel one of unet"
    ):
        lorafamily.import_peft(unet(), tmp_path / "x.safetensors")
    said = {"lora_adapter_metadata": json.dumps([1])}
    safetensors.torch.save_file({"unet.a.lora_A.weight": torch.ones(1, 2)}, tmp_path / "y.safetensors", said)
    with pytest.raises(lorafamily.FileError, match="metadata lora_adapter_metadata is not"):
        lorafamily.import_peft(unet(), tmp_path / "y.safetensors")


def saved_base(folder, **settings) -> nn.Module:
    """A tiny LLaMA whose checkpoint lies in the folder, as one loaded from there knows."""
    transformers = pytest.importorskip("transformers", reason="transformers is an extra")
    config = transformers.LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, **settings)  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return transformers.LlamaForCausalLM.from_pretrained(folder).eval()


IDS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("layout", ["peft", "serving"])
def test_auto_classes_of_peft_find_the_base(layout, tmp_path):
    model = saved_base(tmp_path / "base")
    adapted(model, "olora", targets=["q_proj", "v_proj", "up_proj"])
    lorafamily.export_peft(model, tmp_path / "adapter", layout=layout, card=False)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(theirs) is peft.PeftModelForCausalLM
    assert_close(logits(theirs), logits(model), **CLOSE)
    # Elsewhere the base has another name, which the caller knows.
    (tmp_path / "base").rename(tmp_path / "moved")
    lorafamily.export_peft(model, tmp_path / "adapter", layout=layout, base=str(tmp_path / "moved"), card=False)
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(theirs))


def test_a_class_of_no_task_is_named(tmp_path):
    """A classifier whose head did not train: peft would look for the head in the file, and warn that it is missing."""
    transformers = pytest.importorskip("transformers", reason="transformers is an extra")
    config = transformers.BertConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                     num_attention_heads=4, num_labels=3)  # fmt: skip
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    for head in (None, "classifier"):
        model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base").eval()
        lorafamily.apply(model, "lora", rank=2, targets=["query", "value"], also_train=head, seed=0)
        perturb_(model, size=0.1)
        if head:
            nn.init.normal_(model.classifier.weight)
        lorafamily.export_peft(model, tmp_path / "adapter", card=False)
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        if head:
            assert config["task_type"] == "SEQ_CLS"
            theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
        else:
            assert config["task_type"] is None
            assert config["auto_mapping"]["base_model_class"] == "BertForSequenceClassification"
            theirs = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter", num_labels=3)
        assert_close(logits(theirs), logits(model), **CLOSE)


@pytest.mark.parametrize(("family", "task"), [("Bert", "FEATURE_EXTRACTION"), ("CLIP", None), ("ViT", None)])
def test_the_task_of_a_model_without_a_head_is_one_with_which_peft_can_call_it(family, task, tmp_path):
    """For feature extraction peft calls the base with every argument of a text encoder."""
    transformers = pytest.importorskip("transformers", reason="transformers is an extra")
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = small | {"image_size": 16, "patch_size": 8}
    ends = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
    config = {
        "Bert": lambda: transformers.BertConfig(**small, vocab_size=50),
        "CLIP": lambda: transformers.CLIPConfig(text_config=small | ends, vision_config=vision),
        "ViT": lambda: transformers.ViTConfig(**vision),
    }[family]()
    pixels, inputs = torch.rand(2, 3, 16, 16), {}
    inputs |= {"input_ids": IDS} if family != "ViT" else {}
    inputs |= {"pixel_values": pixels} if family != "Bert" else {}
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}Model")(config).eval()
    model.save_pretrained(tmp_path / "base")
    perturb_(lorafamily.apply(model, "lora", rank=2, seed=0), size=0.1)
    lorafamily.export_peft(model, tmp_path / "adapter", base=str(tmp_path / "base"), card=False)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] == task
    auto = peft.AutoPeftModel if task is None else peft.AutoPeftModelForFeatureExtraction
    theirs = auto.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        found, expected = theirs(**inputs).to_tuple()[0], model(**inputs).to_tuple()[0]
    assert_close(found, expected, **CLOSE)


def test_the_model_card(tmp_path):
    hub = pytest.importorskip("huggingface_hub", reason="it comes with transformers; it reads cards as the Hub does")
    model = saved_base(tmp_path / "base")
    adapted(lorafamily.apply(model, "lora", rank=1, name="other"), "olora", targets=["q_proj", "v_proj", "up_proj"])
    lorafamily.export_peft(model, tmp_path / "adapter", base="someone/tiny-llama")
    card = hub.ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.base_model == "someone/tiny-llama"
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    placement = placement_of(model)
    for said in (
        "| method | olora |",
        f"| {placement.trainable():,} |",
        "rank 3 of every module",
        "0 to 3 in 6 modules",
    ):
        assert said in card.text
    assert "](ranks.png)" in card.text
    assert (tmp_path / "adapter" / "ranks.png").read_bytes().startswith(b"\x89PNG")
    # A folder is no name on the Hub, and would be refused there.
    lorafamily.export_peft(model, tmp_path / "adapter")
    assert hub.ModelCard.load(tmp_path / "adapter" / "README.md").data.base_model is None
    # What somebody else wrote stays.
    (tmp_path / "adapter" / "README.md").write_text("mine")
    lorafamily.export_peft(model, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "README.md").read_text() == "mine"


def made_by_peft(base: nn.Module, **settings) -> nn.Module:
    """peft's own adapter on a copy of the base, moved off its start."""
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for at, parameter in theirs.named_parameters():
            if "lora_" in at:
                parameter.normal_(std=0.2, generator=g)
    return theirs.eval()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:.*weight matrix.*")
def test_peft_s_default_file_of_adapted_embeddings_and_heads(tmp_path):
    """peft saves the base's own weight of both beside their adapters."""
    base = saved_base(tmp_path / "base", tie_word_embeddings=False)
    theirs = made_by_peft(base, r=3, lora_alpha=5, target_modules=["embed_tokens", "lm_head", "q_proj"])
    theirs.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    assert sum(key.endswith("base_layer.weight") for key in tensors) == 2
    ours = lorafamily.import_peft(copy.deepcopy(base), tmp_path / "adapter")
    assert (logits(theirs) - logits(base)).abs().max() > 0.01
    assert_close(logits(ours), logits(theirs), **CLOSE)
    assert not placement_of(ours).inactive_values
    # Rounded to half precision it is the same weight; moved, it is another.
    key = next(key for key in tensors if key.endswith("lm_head.base_layer.weight"))
    safetensors.torch.save_file(tensors | {key: tensors[key].to(torch.bfloat16)}, file)
    assert torch.equal(logits(lorafamily.import_peft(copy.deepcopy(base), tmp_path / "adapter")), logits(ours))
    for changed in (tensors[key] + 1, tensors[key][:-1]):
        safetensors.torch.save_file(tensors | {key: changed.contiguous()}, file)
        with pytest.raises(lorafamily.FileError, match=r"lm_head\.weight is not what this LlamaForCausalLM has"):
            lorafamily.import_peft(copy.deepcopy(base), tmp_path / "adapter")


def test_keys_with_the_adapter_s_name(tmp_path):
    """As in `peft_model.state_dict()`, which trainers save: names of adapters, the base's weights, heads of both."""
    transformers = pytest.importorskip("transformers", reason="transformers is an extra")
    config = transformers.BertConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                     num_attention_heads=4, num_labels=3)  # fmt: skip
    torch.manual_seed(0)
    base = transformers.BertForSequenceClassification(config).eval()
    theirs = made_by_peft(base, r=2, target_modules=["query", "word_embeddings"], modules_to_save=["classifier"])
    with torch.no_grad():
        theirs.base_model.model.classifier.modules_to_save["default"].weight.normal_()
    theirs.peft_config["default"].save_pretrained(tmp_path)
    wanted = ("lora_", "classifier", "query.base_layer")
    state = {key: value.contiguous() for key, value in theirs.state_dict().items() if any(one in key for one in wanted)}
    for said in ("lora_A.default.weight", "lora_embedding_A.default", "modules_to_save.default.weight",
                 "original_module.weight", "query.base_layer.weight"):  # fmt: skip
        assert any(key.endswith(said) for key in state)
    safetensors.torch.save_file(state, tmp_path / "adapter_model.safetensors")
    ours = lorafamily.import_peft(copy.deepcopy(base), tmp_path)
    assert (logits(theirs) - logits(base)).abs().max() > 0.1
    assert_close(logits(ours), logits(theirs), **CLOSE)
    assert set(placement_of(ours).inactive_values) == {"classifier.weight", "classifier.bias"}
    other = {
        key.replace(".default.", ".other."): value.clone() for key, value in state.items() if "query.lora_A" in key
    }
    safetensors.torch.save_file(state | other, tmp_path / "adapter_model.safetensors")
    with pytest.raises(lorafamily.FileError, match=r"adapters of several names \(default, other\)"):
        lorafamily.import_peft(copy.deepcopy(base), tmp_path)


# peft looks for what ranks are given for among layers, and says so of parameters, whose ranks it does set.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match any targeted module")
def test_target_parameters_of_ranks_and_alphas_that_differ(tmp_path):
    """Experts of other ranks by layer and by parameter, and a plain weight named as a parameter."""
    transformers = pytest.importorskip("transformers", reason="transformers is an extra")
    config = transformers.Qwen3MoeConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                         num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_experts=4,
                                         num_experts_per_tok=2, moe_intermediate_size=12)  # fmt: skip
    torch.manual_seed(0)
    base = transformers.Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim == 3:
                parameter.normal_(std=0.1)
    theirs = made_by_peft(
        base,
        r=2,
        lora_alpha=3,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "o_proj.weight"],
        rank_pattern={"experts.down_proj": 3, r"layers\.1\..*gate_up_proj": 1, "o_proj.weight": 4},
        alpha_pattern={r"layers\.0\..*gate_up_proj": 7, "o_proj.weight": 9},
    )
    theirs.save_pretrained(tmp_path)
    ours = lorafamily.import_peft(copy.deepcopy(base), tmp_path)
    assert (logits(theirs) - logits(base)).abs().max() > 0.01
    assert_close(logits(ours), logits(theirs), **CLOSE)
    assert {adapter.slices for adapter in placement_of(ours).adapters.values()} == {1, 2, 3, 4}


def test_layers_that_a_server_fuses_come_together(tmp_path):
    """SGLang 0.5 concatenates q, k and v of a layer that has q, whether the file has them or not: a KeyError."""
    model = saved_base(tmp_path / "base")
    base = copy.deepcopy(model)
    named = ["layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj", "layers.1.mlp.up_proj", "layers.0.mlp.down_proj"]
    adapted(model, "lora", targets=named)
    lorafamily.export_peft(model, tmp_path / "served", layout="serving", card=False)
    tensors = safetensors.torch.load_file(tmp_path / "served" / "adapter_model.safetensors")
    layers = {key.removeprefix("base_model.model.model.").rpartition(".lora_")[0] for key in tensors}
    fused = {f"layers.{n}.self_attn.{part}_proj" for n in (0, 1) for part in "qkv"}
    assert layers == fused | {"layers.1.mlp.up_proj", "layers.1.mlp.gate_proj", "layers.0.mlp.down_proj"}
    added = {key: value for key, value in tensors.items() if "k_proj" in key}
    assert added
    assert not any(value.any() for value in added.values())
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "served")
    assert_close(logits(theirs), logits(model), **CLOSE)


class Experts(nn.Module):
    """A list of experts as modules."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(4, 4), "w2": nn.Linear(4, 4)}) for _ in range(3))

    def forward(self, x):
        return sum(expert["w2"](expert["w1"](x)) for expert in self.experts)


def test_all_experts_of_a_list_come_together(tmp_path):
    """vLLM packs the experts of a layer into one, and asserts that each is there."""
    model = lorafamily.apply(Experts(), "lora", rank=1, targets=[r"experts.1.w1"], seed=0)
    perturb_(model)
    lorafamily.export_peft(model, tmp_path, layout="serving", card=False)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert {key for key, value in tensors.items() if "lora_B" in key and value.any()} == {
        "base_model.model.experts.1.w1.lora_B.weight"
    }
    assert len(tensors) == 2 * 6


def test_layers_that_peft_refuses_in_mamba(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is an extra")
    config = transformers.MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=1)
    model = transformers.MambaForCausalLM(config)
    lorafamily.apply(model, "lora", rank=1, targets=["in_proj", "x_proj"], seed=0)
    lorafamily.export_peft(model, tmp_path / "a", card=False)
    out = nn.ModuleDict({"out_proj": nn.Linear(4, 4)})
    out.config = model.config
    lorafamily.apply(out, "lora", rank=1, targets=["out_proj"], seed=0)
    with pytest.raises(lorafamily.StateError, match="peft refuses adapters on out_proj of a mamba"):
        lorafamily.export_peft(out, tmp_path / "b", card=False)
    assert not (tmp_path / "b").exists()
