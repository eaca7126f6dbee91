"""Places: every module has one of its own, whatever stacks of blocks a model is made of."""

from __future__ import annotations

import pytest
import torch

import lorafamily
from lorafamily.layers.placement import placement_of
from lorafamily.names import OUTSIDE, Place, by_stack, matrix_labels, modules_per_block, place_of

transformers = pytest.importorskip("transformers", reason="transformers is an extra; nothing to test without it")

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
VISION = SIZES | {"num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
BART = {"vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32}
BART |= {"decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

MODELS = {
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=99, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(**BART, **IDS, forced_eos_token_id=2)
    ),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**BART, **IDS)),
    "clip": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=SIZES | {"vocab_size": 99, "num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2},
            vision_config=VISION,
        )
    ),
    "llava": lambda: transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(vocab_size=99, num_hidden_layers=1, **SIZES),
            vision_config=transformers.CLIPVisionConfig(**VISION),
        )
    ),
    "swin": lambda: transformers.SwinModel(
        transformers.SwinConfig(
            image_size=16, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=4
        )
    ),
}
STACKS = {
    "t5": {"encoder", "decoder"},
    "bart": {"encoder", "decoder"},
    "whisper": {"encoder", "decoder"},
    "clip": {"text_model", "vision_model"},
    "llava": {"language_model", "vision_tower"},
    "swin": {"layers", "layers.0", "layers.1"},  # the first are what lies between the stages
}
IN_A_BLOCK = {"t5": 10, "bart": 10, "whisper": 10, "clip": 6, "llava": 7, "swin": 6}


@pytest.mark.parametrize("family", MODELS)
def test_every_adapted_module_has_a_place_of_its_own(family):
    names = [*placement_of(lorafamily.apply(MODELS[family](), "lora", rank=1)).adapters]
    assert len({place_of(name) for name in names}) == len(names)
    assert modules_per_block(names) == IN_A_BLOCK[family]
    stacks = by_stack(names)
    assert stacks.keys() - {OUTSIDE} == STACKS[family]
    assert sorted(name for own in stacks.values() for name in own) == sorted(names)
    for stack, own in stacks.items():
        assert len({place_of(name).stack for name in own}) == 1
        assert all((place_of(name).layer is None) == (stack == OUTSIDE) for name in own)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("bert.encoder.layer.3.attention.self.query", ("bert.encoder.layer", 3, "attention.self.query")),
        ("transformer.h.11.attn.c_attn.q", ("transformer.h", 11, "attn.c_attn.q")),
        ("backbone.layers.0.mixer.in_proj", ("backbone.layers", 0, "mixer.in_proj")),
        ("layers.0.mlp.experts.3.w1", ("layers", 0, "mlp.experts.3.w1")),
        ("encoder.block.0.layer.1.DenseReluDense.wi", ("encoder.block", 0, "layer.1.DenseReluDense.wi")),
        ("swin.encoder.layers.0.blocks.1.mlp.fc1", ("swin.encoder.layers.0.blocks", 1, "mlp.fc1")),
        ("swin.encoder.layers.0.downsample.reduction", ("swin.encoder.layers", 0, "downsample.reduction")),
        ("encoder.stages.2.layers.0.pwconv1", ("encoder.stages.2.layers", 0, "pwconv1")),
        ("model.vision_tower.vision_model.encoder.layers.0.mlp.fc1",
         ("model.vision_tower.vision_model.encoder.layers", 0, "mlp.fc1")),
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
         ("down_blocks.0.attentions.1.transformer_blocks", 0, "attn1.to_q")),
        ("0.auto_model.encoder.layer.3.output.dense", ("0.auto_model.encoder.layer", 3, "output.dense")),
        ("0.q", ("", 0, "q")),
        ("2", ("", None, "2")),
        ("classifier.0", ("", None, "classifier.0")),
        ("lm_head", ("", None, "lm_head")),
    ],
)  # fmt: skip
def test_the_block_is_found_in_the_name(name, place):
    assert place_of(name) == Place(*place)


def test_modules_outside_blocks_are_a_block_only_where_there_is_no_other():
    heads = [f"head{i}" for i in range(5)]
    assert modules_per_block(["h.0.q", "h.0.k", "h.1.q", *heads]) == 2
    assert modules_per_block(heads) == 5
    assert modules_per_block(["0", "2"]) == 2


@pytest.mark.parametrize(
    ("stacks", "short"),
    [
        (["model.encoder.layers", "model.decoder.layers"], ["encoder", "decoder"]),
        (["encoder.encoder.layer", "decoder.bert.encoder.layer"], ["encoder", "decoder"]),
        (["transformer_blocks", "single_transformer_blocks"], ["transformer_blocks", "single_transformer_blocks"]),
        (["layers", "decoder.layers"], ["layers", "decoder"]),
        (["encoder.layers.0.blocks", "encoder.layers.1.blocks", "encoder.layers"], ["layers.0", "layers.1", "layers"]),
        (["", "0.auto_model.encoder.layer"], ["top level", "auto_model"]),
    ],
)
def test_stacks_have_short_names_that_tell_them_apart(stacks, short):
    assert [*by_stack(f"{stack}.0.q".lstrip(".") for stack in stacks)] == short


def test_one_stack_needs_no_name():
    assert by_stack(["h.0.q", "lm_head", "h.1.q"]) == {"": ["h.0.q", "lm_head", "h.1.q"]}
    assert matrix_labels(["h.0.q", "lm_head"]) == {"h.0.q": "q", "lm_head": "lm_head"}
    labels = matrix_labels(["encoder.h.0.q", "decoder.h.0.q", "lm_head"])
    assert [*labels.values()] == ["encoder, q", "decoder, q", "lm_head"]
    assert by_stack([]) == {}


def test_alora_drops_ten_ranks_a_round_of_t5():
    """A decoder block has 10 matrices, an encoder block 6."""
    torch.manual_seed(0)
    model = lorafamily.apply(MODELS["t5"](), "alora", rank=2, rounds=2, scorer="first-order", seed=0)
    ids = torch.randint(1, 99, (2, 6))
    batch = {"input_ids": ids, "labels": ids}
    history = lorafamily.train(model, [batch], steps=20, validation=[batch], progress=False)
    assert len(history.decisions) == 2
    for decision in history.decisions:
        # A module that lost a rank is given none in the same round.
        lost = [max(0, decision.before[name] - decision.after[name]) for name in decision.before]
        assert sum(lost) == 10
