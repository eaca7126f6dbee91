"""Models by name or configuration, on the meta device: well-known shapes and any Hugging Face config.

`transformers` is imported where a model is asked for, not before.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafamily.errors import DataError, FileError, StateError
from lorafamily.layers.rows import Fused


@dataclass(frozen=True)
class Shape:
    """A published configuration, as far as it decides about shapes. `type`, `model`: what transformers calls them."""

    type: str
    model: str
    settings: Mapping[str, Any]


def _bert(width: int, layers: int, vocab_size: int, positions: int, types: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
        "vocab_size": vocab_size,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
    }


def _deberta(width: int, layers: int, **more: Any) -> dict[str, Any]:
    """Versions 2 and 3: positions are relative, and share the projections of the content."""
    relative = {
        "relative_attention": True,
        "position_biased_input": False,
        "position_buckets": 256,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
    }
    return _bert(width, layers, 128_100, 512, 0) | relative | more


def _gpt(width: int, layers: int, heads: int, positions: int) -> dict[str, Any]:
    return {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": positions, "vocab_size": 50_257}


_LLAMA_2_7B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11_008,
    "vocab_size": 32_000,
    "max_position_embeddings": 4096,
}
SHAPES = {
    "bert-base": Shape("bert", "BertForSequenceClassification", _bert(768, 12, 30_522, 512, 2)),
    "roberta-base": Shape("roberta", "RobertaForSequenceClassification", _bert(768, 12, 50_265, 514, 1)),
    "roberta-large": Shape("roberta", "RobertaForSequenceClassification", _bert(1024, 24, 50_265, 514, 1)),
    "deberta-v3-base": Shape("deberta-v2", "DebertaV2ForSequenceClassification", _deberta(768, 12)),
    "deberta-xxl": Shape(
        "deberta-v2",
        "DebertaV2ForSequenceClassification",
        _deberta(1536, 48, conv_kernel_size=3, conv_act="gelu"),  # version 2, of 1.5 billion
    ),
    "gpt2": Shape("gpt2", "GPT2LMHeadModel", _gpt(768, 12, 12, 1024)),
    "gpt2-medium": Shape("gpt2", "GPT2LMHeadModel", _gpt(1024, 24, 16, 1024)),
    "gpt2-large": Shape("gpt2", "GPT2LMHeadModel", _gpt(1280, 36, 20, 1024)),
    # Attention in every second layer of the original is sparse; its matrices are the same.
    "gpt3-175b": Shape("gpt2", "GPT2LMHeadModel", _gpt(12_288, 96, 96, 2048)),
    "llama-2-7b": Shape("llama", "LlamaForCausalLM", _LLAMA_2_7B),
}

_BERT_PARTS = {
    "q": r"attention\.self\.query$",
    "k": r"attention\.self\.key$",
    "v": r"attention\.self\.value$",
    "o": r"attention\.output\.dense$",
    "up": r"intermediate\.dense$",
    "down": r"\d\.output\.dense$",
}
_DEBERTA_PARTS = _BERT_PARTS | {
    name: rf"\.{long}_proj$" for name, long in (("q", "query"), ("k", "key"), ("v", "value"))
}
_GPT_PARTS = {
    **{name: rf"attn\.c_attn\.{name}$" for name in "qkv"},
    **{"o": r"attn\.c_proj$", "up": r"mlp\.c_fc$", "down": r"mlp\.c_proj$"},
}
_LLAMA_PARTS = {name: rf"\.{name}_proj$" for name in ("q", "k", "v", "o", "gate", "up", "down")}
PARTS: dict[str, dict[str, str]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "camembert"), _BERT_PARTS),
    **dict.fromkeys(("deberta-v2",), _DEBERTA_PARTS),
    **dict.fromkeys(("gpt2",), _GPT_PARTS),
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "olmo2"), _LLAMA_PARTS),
}
"""By model type: short names of the matrices of a layer -> regular expressions for `targets`."""
FUSED: dict[str, Fused] = {"gpt2": {r"attn\.c_attn$": ("q", "k", "v")}}


def model_of(given: str, architecture: str | None = None) -> nn.Module:
    """The model of a name in `SHAPES`, a config.json or a folder with one, on the meta device.

    `architecture`: a class of transformers, where another than the config names.

    Raises:
        StateError: transformers is not installed, or has no such architecture.
        FileError: neither a name known nor a config that can be read.
    """
    try:
        import transformers
    except ImportError:
        raise StateError(
            'a plan from a name or a config builds the model with transformers: pip install "lorafamily[tasks]"'
        ) from None
    if given in SHAPES:
        shape = SHAPES[given]
        config = transformers.AutoConfig.for_model(shape.type, **shape.settings)
        named: str | None = shape.model
    else:
        config = _config(Path(given), transformers)
        named = next(iter(getattr(config, "architectures", None) or []), None)
    wanted = architecture or named
    kind = getattr(transformers, wanted, None) if wanted else None
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise StateError(
            f"{given}: {wanted or 'no architecture'} in its config is no model of this transformers "
            f"{transformers.__version__}; name one that is, such as BertForSequenceClassification (--architecture)"
        )
    if "SequenceClassification" in kind.__name__ and config.problem_type is None:
        config.problem_type = "single_label_classification"  # some models find it out from the labels
    with torch.device("meta"):
        model: nn.Module = kind(config)
    return model


def example_batch(model: nn.Module, rows: int, tokens: int) -> dict[str, Tensor]:
    """Token ids and labels as the model's task wants them, on the meta device; no padding, so no attention mask.

    Raises:
        DataError: rows or tokens are no positive numbers, or more tokens than the model has positions.
    """
    for name, value in (("batch", rows), ("length", tokens)):
        if value < 1:
            raise DataError(f"{name}={value}: must be at least 1")
    config: Any = model.config
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise DataError(f"length={tokens}: this {type(model).__name__} has {positions} positions")

    def ids(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.long, device="meta")

    batch, task = {"input_ids": ids(rows, tokens)}, type(model).__name__
    if task.endswith("ForSequenceClassification"):
        return batch | {"labels": ids(rows)}
    if task.endswith("ForQuestionAnswering"):
        return batch | {"start_positions": ids(rows), "end_positions": ids(rows)}
    return batch | {"labels": ids(rows, tokens)}


def targets_of(model: nn.Module, given: Sequence[str] | None) -> tuple[str | list[str] | None, Fused | None]:
    """What `apply` takes for targets in which matrices may have short names, q k v o up down gate; with the fused
    projections that these are parts of."""
    kind = getattr(getattr(model, "config", None), "model_type", "")
    if given is None:
        return None, None
    if len(given) == 1 and given[0] in ("attention", "all-linear"):
        return given[0], None
    short = PARTS.get(kind, {})
    asks_for_parts = any(name in ("q", "k", "v") for name in given)
    return [short.get(name, name) for name in given], FUSED.get(kind) if asks_for_parts else None


def _config(path: Path, transformers: Any) -> Any:
    if not path.exists():
        near = difflib.get_close_matches(str(path), SHAPES, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise FileError(f"{path}: no such file or folder, and no shape of that name; {hint}known: {', '.join(SHAPES)}")
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileError(f"{path}: no config.json there")
    try:
        return transformers.AutoConfig.from_pretrained(str(file), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{file}: no config that transformers reads ({' '.join(str(error).split())[:200]})") from None
