"""docs/architectures.md: what holds for which architecture of `transformers` under which method.

    python experiments/architectures.py                                 # a line an architecture, and a JSON file
    python experiments/architectures.py --page docs/architectures.md    # writes the page, too
    python experiments/architectures.py --only wavlm mamba --methods lora

Every model is random, made from a small configuration, and adapted with the default targets. `CHECKS` names what is
checked; each check has a model to itself, so that one that fails spoils no other.
"""

from __future__ import annotations

import waiting  # noqa: F401 - before torch

# isort: split
import copy
import datetime
import json
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import tyro
from torch import Tensor, nn

import lorafamily
from lorafamily.layers.experts import Expert, expert_weights
from lorafamily.layers.placement import placement_of
from lorafamily.layers.target import possible_targets
from page import Heading, Part, Table, Text, markdown

METHODS = ("lora", "olora", "alora", "lora2", "adalora")
HOLDS, NOT_APPLICABLE = "holds", "–"
MERGED = 1e-4
"""Largest relative difference in float32 of two ways to add up the same: merged or not, peft's or ours."""
START = {"olora": 1e-5}
"""Likewise at the start, zero where it is not listed; OLoRA's may round, U V − U0 V0 having no zero factor."""
NOISE = {"lora2": 0.3, "adalora": 0.3}
"""Standard deviation of what is added to every trainable number before a check, 0.05 where it is not listed. The
updates of these two are products of three and five small numbers: 0.05 of each would be an update below rounding."""

Batch = dict[str, Tensor]
"""Keywords of a model's forward."""


@dataclass(frozen=True)
class Settings:
    """Check methods on architectures, and write docs/architectures.md."""

    only: tuple[str, ...] = ()
    """architectures to check; all if none is named"""
    methods: tuple[str, ...] = METHODS
    """methods to check"""
    page: Path | None = None
    """where to write the page; it needs all architectures and all methods"""
    out: Path = Path("runs/architectures")
    """folder for architectures.json"""


@dataclass(frozen=True)
class Architecture:
    """How to make a small model of one architecture, and a batch for it.

    `model`: its class in transformers; `sizes`: arguments of its configuration; `targets`: None, the default, wherever
    a model has linear layers besides its head.
    """

    name: str
    family: str
    model: str
    batch: Callable[[], Batch]
    sizes: Mapping[str, Any]
    targets: str | None = None

    def build(self) -> nn.Module:
        """The model in eval mode, the same at each call, with every dropout at zero."""
        cls = getattr(transformers, self.model)
        config = without_dropout(cls.config_class(**copy.deepcopy(dict(self.sizes))))
        torch.manual_seed(0)
        model: nn.Module = cls(config).eval()
        return model


def without_dropout(config: Any) -> Any:
    """The configuration, and those inside it, with every probability of dropping something at zero."""
    for key, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            without_dropout(value)
        elif "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def tokens(rows: int = 2, length: int = 12, padded: str | None = "right", start: int = 3, seed: int = 0) -> Batch:
    """Sentences of which the last is shorter; `padded`: on which side, None where the model takes no mask."""
    ids = torch.randint(start, 99, (rows, length), generator=torch.Generator().manual_seed(seed))
    if padded is None:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[-1, (slice(-3, None) if padded == "right" else slice(3))] = 0
    return {"input_ids": ids, "attention_mask": mask}


def sentence_pairs(**options: Any) -> Batch:
    """For an encoder and a decoder."""
    return {**tokens(**options), "decoder_input_ids": tokens(length=7, seed=1)["input_ids"]}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(size: int = 32) -> Batch:
    return {"pixel_values": noise(2, 3, size, size)}


def sound(samples: int = 800) -> Batch:
    return {"input_values": noise(2, samples)}


def spectrogram() -> Batch:
    return {"input_features": noise(2, 8, 32), "decoder_input_ids": tokens(length=7)["input_ids"]}


def captioned(size: int = 32, **options: Any) -> Batch:
    """A text beside its image."""
    return {**tokens(**options), **image(size)}


def interleaved(patches: int, size: int = 32, **more: Tensor) -> Batch:
    """A text in which token 98 stands for each patch of its image."""
    ids = torch.cat([torch.full((2, patches), IMAGE_TOKEN), tokens()["input_ids"].clamp_max(95)], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image(size), **more}


def patches_of_qwen() -> Batch:
    """Two images of 4 × 4 patches, which Qwen2-VL gets in one row of patches and merges by fours."""
    ids = torch.cat([torch.full((2, 4), IMAGE_TOKEN), tokens()["input_ids"].clamp_max(95)], 1)
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    kinds = (ids == IMAGE_TOKEN).long()
    return {
        **{"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds},
        **{"pixel_values": noise(32, 3 * 2 * 8 * 8), "image_grid_thw": grid},
    }


IMAGE_TOKEN = 98
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {
    **{"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 64, "max_position_embeddings": 64, **SPECIAL},
}
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = GROUPED | {"moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
BOTH_SIDES = {
    **{"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64},
    **{**SPECIAL, "decoder_start_token_id": 1, "forced_eos_token_id": None},
}
T5 = {
    **{"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2},
    **{"num_heads": 4, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0},
}
VISION = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    **{"image_size": 32, "patch_size": 8, "num_labels": 5},
}
STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 5}
SPEECH = {
    **{"vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 64, "conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 4)},
    **{"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
    **{"num_codevectors_per_group": 8, "codevector_dim": 16, "proj_codevector_dim": 16},
}
STATE = TEXT | {"state_size": 8, "time_step_rank": 4, "use_mambapy": False}
RWKV = {"attention_hidden_size": 32, "use_cache": False}  # with it, a forward in eval mode has no backward
CONVNEXT = {"num_stages": 2, "layer_scale_init_value": 1.0}  # 1e-6, its start, would hide what a block computes
RECURRENT_GEMMA = {"lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 16}
JOINT = {
    "text_config": TEXT | {"projection_dim": 16},
    "vision_config": VISION | {"projection_dim": 16},
    "projection_dim": 16,
}

left = partial(tokens, padded="left")
unmasked = partial(tokens, padded=None)
DENSE, FUSED, GQA, MOE = "decoder", "decoder, fused qkv", "decoder, GQA", "decoder, experts"
ENCODER, SEQ2SEQ, SEEING, HEARING = "encoder", "encoder-decoder", "vision", "speech"
RECURRENT, TWO = "state-space, linear", "vision-language"

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("llama", DENSE, "LlamaForCausalLM", left, TEXT),
    Architecture("gptj", DENSE, "GPTJForCausalLM", left, TEXT | {"rotary_dim": 4}),
    Architecture("gpt-neo", DENSE, "GPTNeoForCausalLM", left, TEXT | {"attention_types": [[["global", "local"], 1]]}),
    Architecture("phi", DENSE, "PhiForCausalLM", left, TEXT),
    Architecture("opt", DENSE, "OPTForCausalLM", left, TEXT | {"ffn_dim": 64, "word_embed_proj_dim": 16}),
    Architecture("stablelm", DENSE, "StableLmForCausalLM", left, TEXT | {"num_key_value_heads": 4}),
    Architecture("olmo2", DENSE, "Olmo2ForCausalLM", left, TEXT),
    Architecture("cohere", DENSE, "CohereForCausalLM", left, TEXT),
    Architecture("olmo", DENSE, "OlmoForCausalLM", left, TEXT),
    Architecture("gemma", DENSE, "GemmaForCausalLM", left, TEXT | {"head_dim": 8, "num_key_value_heads": 4}),
    Architecture("granite", DENSE, "GraniteForCausalLM", left, TEXT),
    Architecture("glm", DENSE, "GlmForCausalLM", left, GROUPED),
    Architecture("xglm", DENSE, "XGLMForCausalLM", left, TEXT | {"d_model": 32, "ffn_dim": 64, "attention_heads": 4}),
    Architecture("biogpt", DENSE, "BioGptForCausalLM", left, TEXT),
    Architecture("codegen", FUSED, "CodeGenForCausalLM", left, TEXT | {"rotary_dim": 4}),
    Architecture("persimmon", FUSED, "PersimmonForCausalLM", left, TEXT),
    Architecture("gpt2", FUSED, "GPT2LMHeadModel", left, TEXT),
    Architecture("gpt-neox", FUSED, "GPTNeoXForCausalLM", left, TEXT),
    Architecture("gpt-bigcode", FUSED, "GPTBigCodeForCausalLM", left, TEXT),
    Architecture("falcon", FUSED, "FalconForCausalLM", left, TEXT),
    Architecture("phi3", FUSED, "Phi3ForCausalLM", left, GROUPED),
    Architecture("bloom", FUSED, "BloomForCausalLM", left, TEXT),
    Architecture("mpt", FUSED, "MptForCausalLM", left, TEXT),
    Architecture("qwen2", GQA, "Qwen2ForCausalLM", left, GROUPED),
    Architecture("qwen3", GQA, "Qwen3ForCausalLM", left, GROUPED),
    Architecture("mistral", GQA, "MistralForCausalLM", left, GROUPED),
    Architecture("gemma2", GQA, "Gemma2ForCausalLM", left, GROUPED),
    Architecture("gemma3", GQA, "Gemma3ForCausalLM", left, GROUPED),
    Architecture("smollm3", GQA, "SmolLM3ForCausalLM", left, GROUPED),
    Architecture("nemotron", GQA, "NemotronForCausalLM", left, GROUPED),
    Architecture("cohere2", GQA, "Cohere2ForCausalLM", left, GROUPED),
    Architecture("starcoder2", GQA, "Starcoder2ForCausalLM", left, GROUPED),
    Architecture("mixtral", MOE, "MixtralForCausalLM", left, EXPERTS),
    Architecture("qwen2-moe", MOE, "Qwen2MoeForCausalLM", left, EXPERTS | {"shared_expert_intermediate_size": 32}),
    Architecture("qwen3-moe", MOE, "Qwen3MoeForCausalLM", left, EXPERTS),
    Architecture(
        *("deepseek-v3", MOE, "DeepseekV3ForCausalLM", left),
        EXPERTS
        | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16}
        | {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8}
        | {"num_key_value_heads": 4},
    ),
    Architecture("olmoe", MOE, "OlmoeForCausalLM", left, EXPERTS),
    Architecture("gpt-oss", MOE, "GptOssForCausalLM", left, EXPERTS),
    Architecture("granitemoe", MOE, "GraniteMoeForCausalLM", left, EXPERTS),
    Architecture("phimoe", MOE, "PhimoeForCausalLM", left, EXPERTS),
    Architecture("jetmoe", MOE, "JetMoeForCausalLM", left, EXPERTS | {"kv_channels": 8}),
    Architecture("bert", ENCODER, "BertForSequenceClassification", tokens, TEXT),
    Architecture("roberta", ENCODER, "RobertaForSequenceClassification", tokens, TEXT),
    Architecture(
        *("deberta", ENCODER, "DebertaForSequenceClassification", tokens),
        TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 32},
    ),
    Architecture(
        *("deberta-v2", ENCODER, "DebertaV2ForSequenceClassification", tokens),
        TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 32},
    ),
    Architecture("albert", ENCODER, "AlbertForMaskedLM", tokens, TEXT | {"embedding_size": 16}),
    Architecture("distilbert", ENCODER, "DistilBertForMaskedLM", tokens, TEXT | {"hidden_dim": 64}),
    Architecture("electra", ENCODER, "ElectraForMaskedLM", tokens, TEXT | {"embedding_size": 16}),
    Architecture("roformer", ENCODER, "RoFormerForMaskedLM", tokens, TEXT | {"embedding_size": 32}),
    Architecture("modernbert", ENCODER, "ModernBertForMaskedLM", tokens, TEXT),
    Architecture("mpnet", ENCODER, "MPNetForMaskedLM", tokens, TEXT),
    Architecture("convbert", ENCODER, "ConvBertForMaskedLM", tokens, TEXT | {"embedding_size": 16}),
    Architecture(
        *("xlnet", ENCODER, "XLNetForSequenceClassification", tokens),
        {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, **SPECIAL},
    ),
    Architecture("t5", SEQ2SEQ, "T5ForConditionalGeneration", sentence_pairs, T5),
    Architecture("bart", SEQ2SEQ, "BartForConditionalGeneration", sentence_pairs, BOTH_SIDES),
    Architecture("marian", SEQ2SEQ, "MarianMTModel", sentence_pairs, BOTH_SIDES),
    Architecture("mbart", SEQ2SEQ, "MBartForConditionalGeneration", sentence_pairs, BOTH_SIDES),
    Architecture("pegasus", SEQ2SEQ, "PegasusForConditionalGeneration", sentence_pairs, BOTH_SIDES),
    Architecture(
        *("switch-transformers", SEQ2SEQ + ", experts", "SwitchTransformersForConditionalGeneration", sentence_pairs),
        T5 | {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 32},
    ),
    Architecture("vit", SEEING, "ViTForImageClassification", image, VISION),
    Architecture("deit", SEEING, "DeiTForImageClassification", image, VISION),
    Architecture("beit", SEEING, "BeitForImageClassification", image, VISION),
    Architecture("vit-msn", SEEING, "ViTMSNForImageClassification", image, VISION),
    Architecture("dinov2", SEEING, "Dinov2ForImageClassification", image, VISION),
    Architecture(
        *("swin", SEEING, "SwinForImageClassification", image),
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4},
    ),
    Architecture("convnext", SEEING, "ConvNextForImageClassification", image, STAGES | CONVNEXT),
    Architecture(
        *("resnet", SEEING, "ResNetForImageClassification", image),
        *(STAGES | {"embedding_size": 16, "layer_type": "basic"}, "convolution$"),
    ),
    Architecture(
        *("segformer", SEEING, "SegformerForSemanticSegmentation", partial(image, 64)),
        STAGES
        | {"num_encoder_blocks": 2, "num_attention_heads": [2, 4], "sr_ratios": [2, 1], "patch_sizes": [7, 3]}
        | {"strides": [4, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16},
    ),
    Architecture("wav2vec2", HEARING, "Wav2Vec2ForCTC", sound, SPEECH),
    Architecture("wavlm", HEARING, "WavLMForCTC", sound, SPEECH),
    Architecture("data2vec-audio", HEARING, "Data2VecAudioForCTC", sound, SPEECH),
    Architecture("unispeech", HEARING, "UniSpeechForCTC", sound, SPEECH),
    Architecture("hubert", HEARING, "HubertForCTC", sound, SPEECH),
    Architecture(
        *("whisper", HEARING + ", " + SEQ2SEQ, "WhisperForConditionalGeneration", spectrogram),
        BOTH_SIDES | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32},
    ),
    Architecture("mamba", RECURRENT, "MambaForCausalLM", left, STATE),
    Architecture(
        *("mamba2", RECURRENT, "Mamba2ForCausalLM", left),
        STATE | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    ),
    Architecture("falcon-mamba", RECURRENT, "FalconMambaForCausalLM", left, STATE),
    Architecture("rwkv", RECURRENT, "RwkvForCausalLM", unmasked, TEXT | RWKV),
    Architecture("recurrent-gemma", RECURRENT, "RecurrentGemmaForCausalLM", left, GROUPED | RECURRENT_GEMMA),
    Architecture(
        *("jamba", RECURRENT + ", experts", "JambaForCausalLM", left),
        EXPERTS
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {"mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    ),
    Architecture(
        *("bamba", RECURRENT, "BambaForCausalLM", left),
        GROUPED | {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    ),
    Architecture(
        *("qwen3-next", RECURRENT + ", experts", "Qwen3NextForCausalLM", left),
        EXPERTS
        | {"shared_expert_intermediate_size": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
    ),
    Architecture("clip", TWO, "CLIPModel", captioned, JOINT),
    Architecture("siglip", TWO, "SiglipModel", captioned, JOINT),
    Architecture("blip", TWO, "BlipForConditionalGeneration", captioned, JOINT),
    Architecture(
        *("llava", TWO, "LlavaForConditionalGeneration", partial(interleaved, 16)),
        {"text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION | {"model_type": "clip_vision_model"}}
        | {"image_token_id": IMAGE_TOKEN, "image_token_index": IMAGE_TOKEN}
        | {"vision_feature_layer": -1},  # -2, the default, never uses the last layer of the vision tower
    ),
    Architecture(
        *("paligemma", TWO, "PaliGemmaForConditionalGeneration", partial(interleaved, 16)),
        {"text_config": GROUPED | {"model_type": "gemma"}}
        | {"vision_config": VISION | {"model_type": "siglip_vision_model", "projection_dim": 32}}
        | {"image_token_id": IMAGE_TOKEN, "image_token_index": IMAGE_TOKEN, "projection_dim": 32},
    ),
    Architecture(
        *("qwen2-vl", TWO, "Qwen2VLForConditionalGeneration", patches_of_qwen),
        {
            "text_config": GROUPED
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
            "vision_config": {"embed_dim": 32, "hidden_size": 32, "depth": 2, "num_heads": 4, "patch_size": 8},
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": 97,
            "vision_start_token_id": 96,
        },
    ),
)


@dataclass(frozen=True)
class Case:
    """One architecture under one method. `base`: the model without adapters, never changed; `frozen`: its outputs while
    no parameter of it trains, as `apply` leaves them. Then torch multiplies in another order here and there (WavLM,
    SigLIP), and the last bits differ from those of a model that trains."""

    architecture: Architecture
    method: str
    base: nn.Module
    batch: Batch
    frozen: Tensor
    folder: Path

    def fresh(self) -> nn.Module:
        """The base model, to change."""
        return copy.deepcopy(self.base)

    def applied(self) -> nn.Module:
        """With adapters at their start."""
        return lorafamily.apply(
            self.fresh(), self.method, rank=2, targets=self.architecture.targets, example=copied(self.batch), seed=0
        )

    def moved(self) -> nn.Module:
        """With adapters away from their start, where every update would be zero."""
        return self.moved_(self.applied())

    @torch.no_grad()
    def moved_(self, model: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(1)
        for parameter in trainable(model).values():
            parameter.add_(NOISE.get(self.method, 0.05) * torch.randn(parameter.shape, generator=generator))
        return model

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> Tensor:
        return first_output(model(**copied(self.batch)))


def copied(batch: Batch) -> Batch:
    """BLIP writes into the batch that it is given."""
    return {key: value.clone() for key, value in batch.items()}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def first_output(output: Any) -> Tensor:
    """Logits, or the last hidden state, or what comes first."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(output.get(name), Tensor):
            return output[name]
    return next(value for value in output.values() if isinstance(value, Tensor))


def relative(one: Tensor, other: Tensor) -> float:
    """The largest difference, of the largest entry."""
    return float((one - other).abs().max() / other.abs().max())


def start(case: Case) -> str:
    """Outputs at the start are the base's."""
    outputs = case.outputs(case.applied())
    allowed = START.get(case.method, 0.0)
    apart = relative(outputs, case.frozen)
    same = apart <= allowed if allowed else torch.equal(outputs, case.frozen)
    return HOLDS if same else f"{apart:.0e} from the base"


@dataclass
class Gradients:
    """What a backward left. `called`: adapted layers that saw an input that was not empty; `none`, `zero`: those with
    a trainable tensor without gradient, and those whose gradients are all zero."""

    layers: list[str]
    called: set[str] = field(default_factory=set)
    none: list[str] = field(default_factory=list)
    zero: list[str] = field(default_factory=list)

    def unvisited(self, layers: Sequence[str]) -> list[str]:
        """Those of the layers that belong to an expert which got no token, while another expert got some."""
        if not any(in_expert(layer) for layer in self.called):
            return []
        return [layer for layer in layers if in_expert(layer) and layer not in self.called]


def in_expert(layer: str) -> bool:
    return any(part.startswith("expert") for part in layer.split("."))


def gradients_of(case: Case, *, training: bool) -> Gradients:
    """Of one forward and backward away from the start, in train or in eval mode."""
    model = case.moved().train(training)
    # Modules are looked up now: what a layer's adapters are called in it is not for us to know.
    layers = {row.module: layer_of(model, row.module) for row in lorafamily.summary(model).rows}
    found = Gradients(list(layers))
    stacked = {name for name, layer in layers.items() if expert_weights(layer)}
    for name, layer in layers.items():
        if name not in stacked:
            layer.register_forward_pre_hook(partial(_note, found.called, name))
    backward(model, case.batch)
    adapters = placement_of(model).adapters
    for name, layer in layers.items():
        # The experts of a stack are one layer, so that of a single one only its gradients tell whether it was called.
        inside = adapters[name] if name in stacked else layer
        gradients = [parameter.grad for parameter in inside.parameters() if parameter.requires_grad]
        if name in stacked and any(gradient is not None for gradient in gradients):
            found.called.add(name)
        if any(gradient is None for gradient in gradients):
            found.none.append(name)
        elif not any(bool(gradient.count_nonzero()) for gradient in gradients if gradient is not None):
            found.zero.append(name)
    return found


def layer_of(model: nn.Module, name: str) -> nn.Module:
    """The layer of that name, or the one of which it is a part; an expert's name has two words."""
    modules = dict(model.named_modules())
    layer, stack = name.rpartition(".")[0], ".".join(name.split(".")[:-2])
    return modules.get(name) or modules.get(layer) or modules[stack]


def _note(called: set[str], name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    if inputs and isinstance(inputs[0], Tensor) and inputs[0].numel():
        called.add(name)


def backward(model: nn.Module, batch: Batch) -> None:
    """A backward from a random sum of the outputs; every random draw inside the model is seeded."""
    torch.manual_seed(0)
    np.random.seed(0)  # SpecAugment's
    outputs = first_output(model(**copied(batch)))
    (outputs * noise(*outputs.shape, seed=2)).sum().backward()


def gradients(case: Case) -> str:
    """Every adapter gets a gradient, but for experts that no token chose."""
    found = gradients_of(case, training=True)
    unvisited = found.unvisited(found.none + found.zero)
    missing = [name for name in found.none if name not in unvisited]
    if missing:
        silent = [name for name in missing if name not in found.called]
        what = "never called, no gradient" if silent == missing else "no gradient"
        return f"{what}: {listed(missing)}"
    return f"{HOLDS} ({len(unvisited)} unvisited)" if unvisited else HOLDS


def effect(case: Case) -> str:
    """Outputs differ from the base's by much more than merging may move them, and every adapter moves them."""
    apart = relative(case.outputs(case.moved()), case.frozen)
    if not apart > 10 * MERGED:
        return f"outputs differ from the base's by {apart:.0e} only"
    found = gradients_of(case, training=False)  # what fails in train mode must not hide what has no effect
    without = found.none + found.zero
    dead = [name for name in without if name not in found.unvisited(without)]
    return f"without effect: {listed(dead)}" if dead else HOLDS


def merge(case: Case) -> str:
    """Merged outputs are the adapted ones up to rounding, and unmerging gives back every bit."""
    model = case.moved()
    adapted = case.outputs(model)
    apart = relative(case.outputs(lorafamily.merge(model)), adapted)
    if not apart <= MERGED:
        return f"merged outputs are {apart:.0e} from adapted ones"
    return HOLDS if torch.equal(case.outputs(lorafamily.unmerge(model)), adapted) else "unmerged outputs differ"


def generate(case: Case) -> str:
    """Five greedy tokens with a cache are the same adapted and merged."""
    if not generates(case.base):
        return NOT_APPLICABLE
    model = case.moved()
    adapted = generated(model, case.batch)
    return HOLDS if torch.equal(generated(lorafamily.merge(model), case.batch), adapted) else "other tokens merged"


def generates(model: nn.Module) -> bool:
    can: Callable[[], bool] = getattr(model, "can_generate", lambda: False)
    return can() or "generate" in vars(type(model))


def generated(model: Any, batch: Batch) -> Tensor:
    prompt = {key: value for key, value in copied(batch).items() if key != "decoder_input_ids"}
    ids: Tensor = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=True)
    return ids


def file(case: Case) -> str:
    """Saved and loaded into another model, without a warning, the outputs are the same to the bit."""
    model = case.moved()
    lorafamily.save(model, case.folder / "file")
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        other = lorafamily.load(case.fresh(), case.folder / "file")
    if given:
        return f"warns: {shortened(str(given[0].message))}"
    return HOLDS if torch.equal(case.outputs(other), case.outputs(model)) else "loaded outputs differ"


def exported(case: Case) -> str:
    """What is exported and read by peft has the same outputs up to rounding."""
    import peft

    model = case.moved()
    lorafamily.export_peft(model, case.folder / "peft", card=False)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(case.fresh(), str(case.folder / "peft")).eval()
    apart = relative(case.outputs(theirs), case.outputs(model))
    if apart <= MERGED:
        return HOLDS
    warned = next((str(warning.message) for warning in given if "adapter keys" in str(warning.message)), None)
    return f"peft's outputs are {apart:.0e} from ours" + (f"; it warns: {shortened(warned, 40)}" if warned else "")


def remove(case: Case) -> str:
    """After remove nothing tells the model from the base: bits, flags, names and classes of modules, outputs."""
    model = case.moved()
    case.outputs(model)
    lorafamily.remove(model)
    state, before = model.state_dict(), case.base.state_dict()
    if list(state) != list(before):
        return f"other tensors: {listed(sorted(state.keys() ^ before.keys()))}"
    if changed := [name for name in before if not torch.equal(state[name], before[name])]:
        return f"changed: {listed(changed)}"
    if tree(model) != tree(case.base):
        return f"other modules: {listed(sorted(str(entry) for entry in set(tree(model)) ^ set(tree(case.base))))}"
    if list(trainable(model)) != list(trainable(case.base)):
        return "other parameters train"
    return HOLDS if torch.equal(case.outputs(model), case.outputs(case.base)) else "outputs differ from the base's"


def tree(model: nn.Module) -> list[tuple[str, type[nn.Module]]]:
    return [(name, type(module)) for name, module in model.named_modules()]


CHECKS: dict[str, Callable[[Case], str]] = {
    **{"start": start, "gradients": gradients, "effect": effect, "merge": merge, "generate": generate},
    **{"file": file, "peft": exported, "remove": remove},
}


def stands(result: str) -> bool:
    """Whether a check holds, or has nothing to hold for."""
    return result.startswith(HOLDS) or result == NOT_APPLICABLE


def listed(names: Sequence[str]) -> str:
    """The first name, and how many more."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def shortened(text: str, length: int = 100) -> str:
    line = next(iter(text.strip().splitlines()), "")
    return line if len(line) <= length else line[: length - 1] + "…"


def judged(check: Callable[[Case], str], case: Case) -> str:
    """What a check says, or the error that it ended with."""
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transformers and peft; `file` asks for ours
            return check(case)
    except Exception as error:
        return f"{type(error).__name__}: {shortened(str(error))}"


@dataclass(frozen=True)
class Row:
    """What was found for one architecture. `left_out`: its matrices without adapter, in words; `reached`: the share of
    its parameters that are in adapted matrices; `results`: by method and check."""

    name: str
    family: str
    model: str
    targets: str | None
    parameters: int
    layers: int
    reached: float
    left_out: str
    generates: bool
    results: dict[str, dict[str, str]]

    def failed(self, method: str) -> dict[str, str]:
        """Checks that do not hold, with their reasons."""
        return {check: result for check, result in self.results[method].items() if not stands(result)}


def examined(architecture: Architecture, methods: Sequence[str] = METHODS) -> Row:
    """Every check of one architecture under every method."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base, batch = architecture.build(), architecture.batch()
        frozen = controlled(base, batch)
    parameters = sum(parameter.numel() for parameter in base.parameters())
    reached, layers, left_out = placed(base, architecture.targets)
    results: dict[str, dict[str, str]] = {}
    for method in methods:
        with tempfile.TemporaryDirectory() as folder:
            case = Case(architecture, method, base, batch, frozen, Path(folder))
            results[method] = {name: judged(check, case) for name, check in CHECKS.items()}
    return Row(
        *(architecture.name, architecture.family, architecture.model, architecture.targets, parameters, layers),
        *(reached / parameters, left_out, generates(base), results),
    )


def controlled(base: nn.Module, batch: Batch) -> Tensor:
    """Outputs of the base model, frozen. A model that has other ones at the second call, or cannot train, would make
    the checks fail or pass for reasons of its own."""
    frozen = copy.deepcopy(base).requires_grad_(False)
    with torch.no_grad():
        outputs = [first_output(frozen(**copied(batch))) for _ in range(2)]
    assert torch.equal(*outputs)
    assert outputs[0].isfinite().all()
    assert outputs[0].abs().max() > 0
    for training in (True, False):
        backward(copy.deepcopy(base).train(training), batch)
    if generates(base):
        generated(base, batch)
    return outputs[0]


def placed(base: nn.Module, targets: str | None) -> tuple[int, int, str]:
    """Parameters in adapted matrices, how many layers are adapted, and what is left out. The method plays no part."""
    model = lorafamily.apply(copy.deepcopy(base), "lora", rank=1, targets=targets, seed=0)
    rows = lorafamily.summary(model).rows
    adapted = {row.module for row in rows}
    weights = {id(base.get_submodule(name).get_parameter("weight")) for name in adapted if has_weight(base, name)}
    possible = possible_targets(base)
    weights |= {id(possible[name].parameter) for name in adapted if isinstance(possible[name].kind, Expert)}
    left: Counter[str] = Counter()
    for name, parameter in base.named_parameters():
        if parameter.ndim > 1 and id(parameter) not in weights:
            left[described(base, name, parameter)] += 1
    words = [kind if count == 1 else f"{count} {kind}" for kind, count in left.items()]
    return sum(row.d_in * row.d_out for row in rows), len(adapted), ", ".join(words) or "nothing"


def has_weight(model: nn.Module, name: str) -> bool:
    """Whether that is a layer with a weight, not a part of one, which only the adapted model has."""
    return name in dict(model.named_modules())


def described(model: nn.Module, name: str, parameter: nn.Parameter) -> str:
    """What a matrix without adapter is: a linear layer by its name, anything else by its kind."""
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or "parametrizations" in name:
        return "convolution"
    if parameter.ndim == 3 and in_expert(owner):
        return "expert stack"
    parts = owner.split(".") if last == "weight" else [last]
    return f"`{next((part for part in reversed(parts) if not part.isdigit()), name)}`"


def main(settings: Settings) -> list[Row]:
    chosen = [architecture for architecture in ARCHITECTURES if architecture.name in (settings.only or names())]
    if unknown := set(settings.only) - set(names()):
        raise SystemExit(f"no architecture {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    if settings.page and (len(chosen) < len(ARCHITECTURES) or set(settings.methods) != set(METHODS)):
        raise SystemExit("the page tells of all architectures and methods: leave --only and --methods away")
    transformers.logging.set_verbosity_error()
    rows = []
    for architecture in chosen:
        began = time.monotonic()
        rows.append(examined(architecture, settings.methods))
        print(f"{line_of(rows[-1])}  [{time.monotonic() - began:.0f} s]", flush=True)
    about = facts()
    told = {"facts": about, "checks": list(CHECKS), "rows": [asdict(row) for row in rows]}
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "architectures.json").write_text(json.dumps(told, indent=1, ensure_ascii=False))
    print("\n" + "\n".join(totals(rows, settings.methods)))
    if settings.page:
        settings.page.write_text(markdown("Architectures", page_of(rows, about), settings.page.parent))
        print(f"\n{settings.page}")
    return rows


def names() -> tuple[str, ...]:
    return tuple(architecture.name for architecture in ARCHITECTURES)


def facts() -> dict[str, str]:
    packages = ("lorafamily", "torch", "transformers", "peft")
    return {"date": datetime.date.today().isoformat(), "python": sys.version.split()[0]} | {
        name: version(name) for name in packages
    }


def line_of(row: Row) -> str:
    """An architecture on a terminal."""
    failed = {method: row.failed(method) for method in row.results}
    head = f"{row.name:<20} {row.parameters:>7,} parameters, {row.layers:>2} layers"
    if not any(failed.values()):
        return f"{head}: all hold"
    each = (f"\n    {m} {check}: {why}" for m, found in failed.items() for check, why in found.items())
    return f"{head}:{''.join(each)}"


def totals(rows: Sequence[Row], methods: Sequence[str]) -> list[str]:
    """How much holds, in all, by method and by check."""
    whole = sum(not any(row.failed(method) for method in methods) for row in rows)
    lines = [f"{whole} of {len(rows)} architectures hold under all of {', '.join(methods)}."]
    per_method = (f"{m} {sum(not row.failed(m) for row in rows)}" for m in methods)
    lines.append(f"By method, of {len(rows)}: {', '.join(per_method)}.")
    counted = Counter(check for row in rows for method in methods for check in row.failed(method))
    cells = len(rows) * len(methods)
    lines.append(f"By check, of {cells}: {', '.join(f'{check} {cells - counted[check]}' for check in CHECKS)}.")
    return lines


@dataclass
class Notes:
    """Reasons, numbered as they come. Those that differ in a measured difference only are one note, with the largest
    of them."""

    found: dict[str, list[float]] = field(default_factory=dict)

    def cell(self, failed: Mapping[str, str]) -> str:
        """The checks that do not hold, with the numbers of their reasons."""
        checks: dict[int, list[str]] = {}
        for check, why in failed.items():
            checks.setdefault(self._number(why), []).append(check)
        return "; ".join(f"{', '.join(same)} ({number})" for number, same in checks.items()) or "all"

    def _number(self, why: str) -> int:
        reason = DIFFERENCE.sub(PLACE, why)
        self.found.setdefault(reason, []).extend(float(number) for number in DIFFERENCE.findall(why))
        return list(self.found).index(reason) + 1

    def lines(self) -> list[str]:
        return [
            f"{i}. {reason.replace(PLACE, f'up to {max(numbers):.0e}' if numbers else '')}"
            for i, (reason, numbers) in enumerate(self.found.items(), 1)
        ]


DIFFERENCE, PLACE = re.compile(r"\b\de[+-]\d\d\b"), "\0"


def page_of(rows: Sequence[Row], about: Mapping[str, str]) -> list[Part]:
    notes = Notes()
    lines = [["architecture", "family", "parameters", "adapted layers", "left out", *METHODS]]
    for row in rows:
        cells = [notes.cell(row.failed(method)) for method in METHODS]
        share = f"{row.layers} ({row.reached:.0%})"
        lines.append([row.name, row.family, f"{row.parameters:,}", share, row.left_out, *cells])
    versions = ", ".join(f"{name} {about[name]}" for name in about if name != "date")
    speaking = sum(row.generates for row in rows)
    unvisited = [row.name for row in rows if "unvisited" in str(row.results)]
    stacked = any("expert stack" in row.left_out for row in rows)
    named = ", ".join(f"{row.name} (`targets={row.targets!r}`)" for row in rows if row.targets)
    parts: list[Part] = [
        Text(
            f"What holds for {len(rows)} architectures of `transformers` under {len(METHODS)} methods. Written by "
            f"`python experiments/architectures.py --page docs/architectures.md` on {about['date']} with {versions}; "
            "do not edit."
        ),
        Text(
            "Each model is random, from a small configuration, on the CPU in float32, adapted with rank 2 and the "
            f"default targets{f', but for {named}' if named else ''}. Checks, each on a model of its own; all but "
            "*start* with random numbers added to every trainable tensor:"
        ),
        Text("\n".join(f"- *{name}*: {what}" for name, what in explained(speaking, len(rows)).items())),
        Text(
            "**all**: every check holds. Otherwise the checks that do not are named, with the numbers of their reasons "
            "below the table. *Adapted layers*: how many, and the share of the model's parameters that is in their "
            "weights. *Left out*: matrices that get no adapter."
            + (" An expert stack holds the weights of all experts in one tensor of three axes." if stacked else "")
            + (f" Experts that no token of the batch chose: {', '.join(unvisited)}." if unvisited else "")
        ),
        Table(lines),
    ]
    if notes.found:
        parts += [Heading("What does not hold"), Text("\n".join(notes.lines()))]
    return [*parts, Heading("Totals"), Text("\n".join(f"- {line}" for line in totals(rows, METHODS)))]


def explained(speaking: int, total: int) -> dict[str, str]:
    """The checks in words, with the bounds that they are held to."""
    return {
        "start": "in eval mode outputs are those of the base with frozen parameters, bit for bit; "
        + ", ".join(f"within {bound:.0e} relative for {method}" for method, bound in START.items()),
        "gradients": "after a forward and backward in train mode every adapter has a gradient, but those of experts "
        "that no token chose",
        "effect": f"outputs differ from the base's by more than {10 * MERGED:.0e} relative, and in eval mode no "
        "adapter's gradient is missing or all zero, but for the same experts",
        "merge": f"merged outputs are within {MERGED:.0e} relative of the adapted ones, and unmerging gives these back "
        "bit for bit",
        "generate": f"five greedy tokens with a cache are the same adapted and merged; {speaking} of the {total} can "
        "generate",
        "file": "saved, and loaded without a warning into another copy of the base, the outputs are the same bits",
        "peft": f"exported, and loaded by `peft`, the outputs are within {MERGED:.0e} relative",
        "remove": "every parameter and persistent buffer has the base's bits, modules have the base's names and "
        "classes, and outputs are the base's, bit for bit",
    }


if __name__ == "__main__":
    main(tyro.cli(Settings))
