"""What `lorafamily train --export` writes besides the adapter."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from lorafamily.chat.generating import end_tokens
from lorafamily.chat.templates import Template
from lorafamily.deploy.checkpoint import merge_checkpoint
from lorafamily.deploy.peft import export_peft
from lorafamily.deploy.saved import read
from lorafamily.errors import FileError, StateError

CONVERTER = "convert_hf_to_gguf.py"


def converter() -> str | None:
    """llama.cpp's converter, on the path or in the folder LLAMA_CPP; None if it is in neither."""
    return shutil.which(CONVERTER) or shutil.which(CONVERTER, os.F_OK, os.environ.get("LLAMA_CPP", ""))


def check(exports: Sequence[str]) -> None:
    """Check that the exports are possible, before anything is trained.

    Raises:
        StateError: a GGUF file is asked for, and there is no converter.
    """
    if "gguf" in exports and converter() is None:
        raise StateError(
            f"--export gguf needs llama.cpp's {CONVERTER} on the path, or LLAMA_CPP=FOLDER with that file; or leave "
            "gguf out and convert the merged checkpoint later"
        )


def export(exports: Sequence[str], name: str, model: nn.Module, template: Template, out: Path) -> dict[str, Path]:
    """Export the adapter in `out` into that folder; returns the paths written. `name`: of the base.

    Raises:
        StateError: a layout cannot represent the adapter.
        FileError: a file cannot be written, or the converter fails.
    """
    path = Path(name).expanduser()
    base = str(path.resolve()) if path.is_dir() else name
    written: dict[str, Path] = {}
    for layout in ("peft", "serving"):
        if layout in exports:
            written[layout] = export_peft(model, _new(out / layout), layout=layout, base=base)
    if "merged" in exports or "gguf" in exports:
        written["merged"] = _new(out / "merged")
        merge_checkpoint(path if path.is_dir() else _downloaded(name), read(out), written["merged"])
        _end_answers(written["merged"], model, template)
    tokenizer = copy.deepcopy(template.tokenizer)
    tokenizer.chat_template = template.text  # so that servers render conversations as in training
    if (end := template.end_of_turn()) is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)  # and stop where an answer has learnt to end
    for folder in written.values():
        tokenizer.save_pretrained(folder)
    if "gguf" in exports:
        written["gguf"] = _gguf(written["merged"], out / "model.gguf")
    return written


def _downloaded(model: str) -> Path:
    """The folder that a checkpoint on the hub was downloaded to."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model))
    except Exception as error:  # whatever the hub or the network raises
        raise FileError(f"--model {model}: its files cannot be found for merging ({type(error).__name__})") from None


def _new(folder: Path) -> Path:
    """The path, after removing what an earlier export of the same run left there."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _end_answers(folder: Path, model: nn.Module, template: Template) -> None:
    """Let a merged checkpoint stop at what ends an answer; its base's settings may know other tokens only."""
    config = copy.deepcopy(getattr(model, "generation_config", None))
    if config is not None:
        # Settings that say they are made of config.json may be made of it once more.
        config.update(eos_token_id=end_tokens(model, template), _from_model_config=False)
        (folder / "generation_config.json").write_text(config.to_json_string(), encoding="utf-8")


def _gguf(merged: Path, out: Path) -> Path:
    command = [sys.executable, str(converter()), str(merged), "--outfile", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not out.is_file():
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise FileError(f"{out}: {CONVERTER} failed ({last}); the merged checkpoint is in {merged}")
    return out
