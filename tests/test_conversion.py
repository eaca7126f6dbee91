"""Checkpoints whose names and tensors are not the model's are merged on disk as in memory, bit by bit."""

from __future__ import annotations

import re

import pytest
import safetensors.torch
import torch

import lorafamily
from conftest import perturb_
from lorafamily.deploy.checkpoint import merge_checkpoint
from lorafamily.deploy.checkpoint_entries import entries_of
from lorafamily.deploy.saved import read
from lorafamily.layers.placement import placement_of

transformers = pytest.importorskip("transformers", reason="transformers is an extra; nothing to test without it")
loading = pytest.importorskip("transformers.core_model_loading", reason="transformers before 5 converts no checkpoints")

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **dict.fromkeys(["bos_token_id", "eos_token_id"], 1),
}
EYE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def llava():
    text = transformers.LlamaConfig(**TEXT)
    vision = transformers.CLIPVisionConfig(**EYE, image_size=28, patch_size=14)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=98)
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_vl():
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = transformers.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision)
    return transformers.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl():
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_heads": 4}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = transformers.Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def mixtral():
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**TEXT, num_local_experts=12))


def qwen3_moe():
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**TEXT, **sizes))


def gpt_oss():
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**TEXT, num_local_experts=4, head_dim=8))


MODELS = {make.__name__: make for make in (llava, qwen2_vl, qwen2_5_vl, mixtral, qwen3_moe, gpt_oss)}
every_model = pytest.mark.parametrize("family", MODELS)

EXPERTS = {
    "mixtral": r"block_sparse_moe\.experts\.11\.w[123]\.weight",
    "qwen3_moe": r"mlp\.experts\.3\.(gate|up|down)_proj\.weight",
    "gpt_oss": r"mlp\.experts\.(gate_up|down)_proj$",
}
"""Names on disk that each of the models must have; others are renamed."""


def ids():
    return torch.randint(2, 97, (3, 10), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=ids()).logits


def model_of(family: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    return MODELS[family]().to(dtype).eval()


def adapted(model, folder, **options):
    """The model with trained adapters, saved."""
    lorafamily.apply(model, "lora", rank=2, seed=0, **options)
    lorafamily.save(perturb_(model, size=0.2), folder / "adapter")
    return model


def same_files(folder, other) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors")
    assert names == sorted(path.name for path in other.iterdir() if path.suffix == ".safetensors")
    return [name for name in names if (folder / name).read_bytes() == (other / name).read_bytes()]


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_on_disk_gives_the_bytes_of_merging_in_memory(family, dtype, tmp_path):
    """Every layer is adapted, those of towers and all experts, and shards are so small that what is one tensor in the
    model lies in several."""
    fresh = model_of(family, dtype)
    fresh.save_pretrained(tmp_path / "fresh")
    model = type(fresh).from_pretrained(tmp_path / "fresh", dtype=dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size="12KB")  # in the order that a loaded model has
    base = logits(model)
    placed = placement_of(adapted(model, tmp_path)).adapters
    assert family in EXPERTS or any("visual" in at or "vision" in at for at in placed)
    merged = logits(lorafamily.merge(model))
    assert (merged - base).abs().max() > 0.1
    model.save_pretrained(tmp_path / "expected", max_shard_size="12KB")
    merge_checkpoint(tmp_path / "base", read(tmp_path / "adapter"), tmp_path / "out")

    same = same_files(tmp_path / "out", tmp_path / "expected")
    assert len(same) == len([*(tmp_path / "out").glob("*.safetensors")]) > 3
    on_disk = entries_of(tmp_path / "out")
    if family in EXPERTS:
        assert sum(bool(re.search(EXPERTS[family], name)) for name in on_disk) == 2 * (2 if family == "gpt_oss" else 3)
    again, found = type(model).from_pretrained(tmp_path / "out", dtype=dtype, output_loading_info=True)
    assert not any(found.values())
    assert torch.equal(logits(again), merged)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mixtral"])
def test_every_adapted_tensor_changed_and_no_other(family, tmp_path):
    model = model_of(family)
    model.save_pretrained(tmp_path / "base")
    changed = {name for name, _ in adapted(model, tmp_path).named_parameters() if "lorafamily" not in name}
    merge_checkpoint(tmp_path / "base", read(tmp_path / "adapter"), tmp_path / "out")
    before, after = (safetensors.torch.load_file(tmp_path / at / "model.safetensors") for at in ("base", "out"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    weights = {placement.stored_as(at) for at, placement in kinds_in(model).items()}
    assert weights <= changed
    merged = type(model).from_pretrained(tmp_path / "out").state_dict()
    base = type(model).from_pretrained(tmp_path / "base").state_dict()
    assert {name for name in base if not torch.equal(base[name], merged[name])} == weights
    assert len(moved) >= len(weights)


def kinds_in(model):
    from lorafamily.layers.placement import targets_of

    return {at: target.kind for at, target in targets_of(model).items()}


OLD_NAMES = {
    "llava": [  # as LLaVA 1.5 was published
        (r"^lm_head", "language_model.lm_head"),
        (r"^model\.language_model", "language_model.model"),
        (r"^model\.", ""),
    ],
    "qwen2_vl": [(r"^model\.language_model", "model"), (r"^model\.visual", "visual")],
}


@pytest.mark.parametrize("family", OLD_NAMES)
def test_a_checkpoint_of_older_names_is_merged_under_them(family, tmp_path):
    model = model_of(family)
    tensors = {}
    for name, value in model.state_dict().items():
        for pattern, new in OLD_NAMES[family]:
            if re.search(pattern, name):
                name = re.sub(pattern, new, name)
                break
        tensors[name] = value.clone()
    (tmp_path / "base").mkdir()
    model.config.save_pretrained(tmp_path / "base")
    safetensors.torch.save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    loaded = type(model).from_pretrained(tmp_path / "base")
    assert torch.equal(logits(loaded), logits(model))
    merged = logits(lorafamily.merge(adapted(model, tmp_path)))
    merge_checkpoint(tmp_path / "base", read(tmp_path / "adapter"), tmp_path / "out")
    assert entries_of(tmp_path / "out").keys() == tensors.keys()
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "out")), merged)


def test_a_trunk_of_experts_takes_the_adapter_of_the_whole_and_the_whole_that_of_a_trunk(tmp_path):
    """Names on disk then lack "model.", or have it where the adapter does not; experts are put together in both."""
    whole = model_of("mixtral")
    whole.save_pretrained(tmp_path / "whole")
    transformers.MixtralModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "trunk")
    trunk = transformers.MixtralModel.from_pretrained(tmp_path / "trunk")
    for model, base in ((whole, "trunk"), (trunk, "whole")):
        folder = tmp_path / f"into-{base}"
        expected = lorafamily.merge(adapted(model, folder)).state_dict()
        merge_checkpoint(tmp_path / base, read(folder / "adapter"), folder / "out")
        merged = (transformers.MixtralModel).from_pretrained(folder / "out").state_dict()
        own = {name.removeprefix("model."): value for name, value in expected.items()}
        assert all(torch.equal(value, own[name]) for name, value in merged.items())


def test_what_trained_of_experts_is_taken_apart_too(tmp_path):
    model = model_of("mixtral")
    model.save_pretrained(tmp_path / "base")
    lorafamily.apply(model, "lora", rank=2, targets="q_proj", also_train=r"0.*gate_up_proj", seed=0)
    torch.nn.init.normal_(model.model.layers[0].mlp.experts.gate_up_proj)
    lorafamily.save(perturb_(model, size=0.2), tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", read(tmp_path / "adapter"), tmp_path / "out")
    assert torch.equal(
        logits(type(model).from_pretrained(tmp_path / "out")),
        logits(lorafamily.merge(model)),
    )


def harmed(folder, change) -> None:
    path = folder / "base" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


MOE = "model.layers.0.block_sparse_moe.experts."
HARM = {
    "an expert is missing": (lambda t: t.pop(f"{MOE}3.w2.weight"), r"down_proj comes out as \[11, 32, 64\]"),
    "half of an expert is missing": (lambda t: t.pop(f"{MOE}3.w1.weight"), r"gate_up_proj (comes out as|cannot be)"),
    "experts of two dtypes": (
        lambda t: t.update({f"{MOE}3.w1.weight": t[f"{MOE}3.w1.weight"].half()}),
        "experts.3.w1.weight is F16 and .*F32, and both are in one tensor of the model",
    ),
    "a quantised expert": (
        lambda t: t.update({f"{MOE}3.w1.weight": t[f"{MOE}3.w1.weight"].to(torch.int8)}),
        "experts.3.w1.weight is stored as I8; merging needs plain",
    ),
    "the same twice": (
        lambda t: t.update({"layers.0.self_attn.q_proj.weight": t["model.layers.0.self_attn.q_proj.weight"].clone()}),
        "q_proj.weight is in the checkpoint more than once, as layers.0.*q_proj.weight and as model.layers.0.*q_proj",
    ),
}


@pytest.mark.parametrize("harm", HARM)
def test_what_cannot_be_put_together_is_one_line_and_writes_nothing(harm, tmp_path):
    model = model_of("mixtral")
    model.save_pretrained(tmp_path / "base")
    adapted(model, tmp_path)
    change, message = HARM[harm]
    harmed(tmp_path, change)
    with pytest.raises(lorafamily.FileError, match=message) as refused:
        merge_checkpoint(tmp_path / "base", read(tmp_path / "adapter"), tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


class Wrapped(torch.nn.Module):
    """Somebody's model around one of transformers', as for retrieval."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner


def test_noted_weights_of_experts_are_compared_as_they_are_put_together(tmp_path):
    model = model_of("mixtral")
    model.save_pretrained(tmp_path / "base")
    lorafamily.save(perturb_(lorafamily.apply(model, "lora", rank=2, seed=0)), tmp_path / "adapter", hash_base=True)
    merge_checkpoint(tmp_path / "base", read(tmp_path / "adapter"), tmp_path / "out")
    harmed(tmp_path, lambda tensors: tensors[f"{MOE}3.w1.weight"][0, 0].add_(1))
    with pytest.raises(lorafamily.FileError, match=r"experts\.0\.gate_up_proj has other weights; .* and \d+ more"):
        merge_checkpoint(tmp_path / "base", read(tmp_path / "adapter"), tmp_path / "second")


def test_the_checkpoint_of_a_wrapped_model_is_found_by_its_config(tmp_path):
    inner = model_of("mixtral").model
    inner.save_pretrained(tmp_path / "base")
    model = Wrapped(inner)
    adapted(model, tmp_path)
    merge_checkpoint(tmp_path / "base", read(tmp_path / "adapter"), tmp_path / "out")
    merged = transformers.MixtralModel.from_pretrained(tmp_path / "out").state_dict()
    lorafamily.merge(model)
    assert all(torch.equal(value, merged[name]) for name, value in inner.state_dict().items())


@pytest.mark.parametrize("part", ["", "model"])
def test_a_model_of_the_class_that_auto_classes_take_for_a_config_is_of_that_config(part, tmp_path):
    """InternLM3 has a config of its own, and Llama's models."""
    config = transformers.InternLM3Config(**TEXT)
    torch.manual_seed(0)
    whole = transformers.AutoModelForCausalLM.from_config(config)
    whole.save_pretrained(tmp_path / "base")
    model = whole.get_submodule(part)
    assert not isinstance(config, type(model).config_class)
    expected = lorafamily.merge(adapted(model, tmp_path)).state_dict()
    merge_checkpoint(tmp_path / "base", read(tmp_path / "adapter"), tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_submodule(part).state_dict()
    assert again.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in again.items())


def test_a_config_with_an_infinite_number_is_read(tmp_path):
    """Those of Mamba 2 and of what is built of it have one, which transformers writes in a way of its own."""
    torch.manual_seed(0)
    sizes = {"num_heads": 4, "head_dim": 16, "state_size": 4, "n_groups": 1, "chunk_size": 8, "num_hidden_layers": 2}
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(vocab_size=99, hidden_size=32, expand=2, **sizes))
    assert model.config.time_step_limit[1] == float("inf")
    model.save_pretrained(tmp_path / "base")
    adapted(model, tmp_path)
    lorafamily.merge(model)
    model.save_pretrained(tmp_path / "expected")
    merge_checkpoint(tmp_path / "base", read(tmp_path / "adapter"), tmp_path / "out")
    assert same_files(tmp_path / "out", tmp_path / "expected") == ["model.safetensors"]
