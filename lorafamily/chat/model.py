"""The base model with its tokenizer and chat template, from a folder or the hub."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorafamily.chat.loss import vocabulary_of
from lorafamily.chat.settings import Inference, ModelOptions
from lorafamily.chat.templates import Template, plain_for
from lorafamily.errors import DataError, FileError
from lorafamily.names import join
from lorafamily.terminal import nearest
from lorafamily.training.execution import chosen_precision

TEMPLATE = "chat_template.jinja"
"""File in an adapter's folder: the template it was trained with, so that `generate` renders prompts the same way."""


def quiet() -> None:
    """Silence progress bars and warnings of libraries; our own warnings stay."""
    for logger in ("torch.utils.flop_counter", "torch.utils._pytree", "torchao"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for module in ("torch", "transformers", "bitsandbytes", "huggingface_hub"):
        warnings.filterwarnings("ignore", module=module)


def device_of(asked: str) -> torch.device:
    """The device; auto: the GPU, if there is one. Each of torchrun's processes takes another GPU.

    Raises:
        DataError: this machine has no such device.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked)
        if device.type == "cuda" and device.index is None and (local := os.environ.get("LOCAL_RANK")):
            device = torch.device("cuda", int(local))
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DataError(f"--device {asked}: not on this machine ({str(error).splitlines()[0]})") from None
    return device


def read_template(name: str, template: str | None, adapter: Path | None = None) -> Template:
    """The tokenizer of a model, with a template: a file, "plain", that of an adapter's folder, or the tokenizer's own.

    Raises:
        FileError: there is no tokenizer that can be used, or no such file.
    """
    import transformers

    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileError(f"--model {name}: the folder has no config.json; it must be a transformers checkpoint")
    if not folder.exists() and (folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        around = [file.name for file in folder.parent.glob("*")]
        raise FileError(f"--model {name}: no such folder{nearest(folder.name, around)}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a folder without files, no network, a name that is not on the hub, a damaged file
        raise FileError(f"--model {name}: no tokenizer can be read ({_first_line(error)})") from None
    if not getattr(tokenizer, "is_fast", False):
        raise FileError(f"--model {name}: its tokenizer has no tokenizer.json, which tells where tokens are in a text")
    if tokenizer.eos_token is None:
        raise FileError(f"--model {name}: its tokenizer has no end-of-text token (eos_token), so no answer would end")
    native = tokenizer.chat_template
    native = native.get("default") if isinstance(native, dict) else native
    if template is None and adapter is not None and (adapter / TEMPLATE).is_file():
        template = str(adapter / TEMPLATE)
    if template is None or template == "plain":
        return Template(tokenizer, plain_for(tokenizer) if template == "plain" or not native else native)
    try:
        return Template(tokenizer, Path(template).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        hint = f'give a Jinja file, or "plain"{nearest(template, ["plain"])}'
        raise FileError(f"--template {template}: cannot be read ({error}); {hint}") from None


def read_base(name: str, given: ModelOptions | Inference, template: Template) -> Any:
    """The model in eval mode on its device. `template` is read earlier: most mistakes show there and in the data.

    Raises:
        FileError: it cannot be read, is no causal language model, or has fewer embeddings than the tokenizer tokens.
        DataError: there is no such device, or no bitsandbytes for quantisation.
    """
    import transformers

    place = device_of(given.device)
    weights: torch.dtype = getattr(torch, chosen_precision(given.dtype, place))
    options: dict[str, Any] = {"dtype": weights, "device_map": {"": place}}
    if given.quantise == "nf4":
        try:
            import bitsandbytes  # noqa: F401  only to see whether it is there
        except ImportError:
            raise DataError("--quantise nf4 needs bitsandbytes: pip install bitsandbytes") from None
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=weights
        )
    elif place.type == "cpu":
        del options["device_map"]  # would need accelerate
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            model = transformers.AutoModelForCausalLM.from_pretrained(name, **options)
    except Exception as error:  # as for the tokenizer, and every model's own errors
        raise FileError(f"--model {name}: cannot be read as a causal language model ({_first_line(error)})") from None
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On such CPUs bitsandbytes repacks a layer in its first evaluation: scales are rounded for good, and rows
            # whose length is no multiple of 64 fail or come out wrong.
            module.support_avx512bf16_for_cpu = False
    tokens, embeddings = len(template.tokenizer), vocabulary_of(model)
    if tokens > embeddings:
        raise FileError(
            f"--model {name}: the tokenizer has {tokens} tokens and the model {embeddings} embeddings; they do not "
            "belong together"
        )
    return model.eval()


def beside_text(model: Any) -> list[str]:
    """Names of the modules with linear layers that no text passes through: towers for images or sound, and what joins
    them to the decoder."""
    if model.config.get_text_config() is model.config:
        return []
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    around = [name for name, module in model.named_modules() if decoder in module.modules()]
    apart = {join(at, name): module for at in around[:-1] for name, module in model.get_submodule(at).named_children()}
    apart = {name: module for name, module in apart.items() if name not in around and module is not head}
    return [name for name, module in apart.items() if any(isinstance(layer, nn.Linear) for layer in module.modules())]


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
