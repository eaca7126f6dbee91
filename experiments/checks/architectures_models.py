"""A table of small random models, one for each architecture of `transformers`, and of batches for them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Batch = dict[str, Tensor]
"""Keywords of a model's forward."""


@dataclass(frozen=True)
class Architecture:
    """How to make a small model of one architecture, and a batch for it.

    `model`: its class in transformers; `sizes`: arguments of its configuration; `targets`: None, the default, unless
    the model has no linear layers but its head.
    """

    name: str
    family: str
    model: str
    batch: Callable[[], Batch]
    sizes: Mapping[str, Any]
    targets: str | None = None

    def build(self) -> nn.Module:
        """The model in eval mode, with the same weights at each call and without dropout."""
        cls = getattr(transformers, self.model)
        config = without_dropout(cls.config_class(**copy.deepcopy(dict(self.sizes))))
        torch.manual_seed(0)
        model: nn.Module = cls(config).eval()
        return model


def without_dropout(config: Any) -> Any:
    """The configuration, and those inside it, with every dropout probability at zero."""
    for key, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            without_dropout(value)
        elif "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def tokens(rows: int = 2, length: int = 12, padded: str | None = "right", start: int = 3, seed: int = 0) -> Batch:
    """Sentences, the last one shorter. `padded`: the side of the padding; None if the model takes no mask."""
    ids = torch.randint(start, 99, (rows, length), generator=torch.Generator().manual_seed(seed))
    if padded is None:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[-1, (slice(-3, None) if padded == "right" else slice(3))] = 0
    return {"input_ids": ids, "attention_mask": mask}


def sentence_pairs(**options: Any) -> Batch:
    """Sentences for an encoder and a decoder."""
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
    """A text and an image."""
    return {**tokens(**options), **image(size)}


def interleaved(patches: int, size: int = 32, **more: Tensor) -> Batch:
    """A text in which token 98 takes the place of each patch of its image."""
    ids = torch.cat([torch.full((2, patches), IMAGE_TOKEN), tokens()["input_ids"].clamp_max(95)], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image(size), **more}


def patches_of_qwen() -> Batch:
    """Two images of 4 × 4 patches; Qwen2-VL takes them as one row of patches and merges them by fours."""
    ids = torch.cat([torch.full((2, 4), IMAGE_TOKEN), tokens()["input_ids"].clamp_max(95)], 1)
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    token_types = (ids == IMAGE_TOKEN).long()
    return {
        **{"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": token_types},
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
RWKV = {"attention_hidden_size": 32, "use_cache": False}  # with a cache, a forward in eval mode has no backward
CONVNEXT = {"num_stages": 2, "layer_scale_init_value": 1.0}  # the default 1e-6 would hide what a block computes
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
