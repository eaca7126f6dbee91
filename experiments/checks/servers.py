"""The updates that inference servers read from a LoRA folder, by their own loading code, on the CPU.

vLLM and SGLang need a GPU and a hundred packages, but their code that reads an adapter is plain Python. It is taken
from the wheel (`pip download --no-deps vllm sglang`), run with empty modules in place of imports that it does not use,
and gives the update of every layer. llama.cpp's converter comes with the source of llama-cpp-python (`pip download
--no-deps --no-binary :all: llama-cpp-python`) and runs unchanged.
"""

from __future__ import annotations

import ast
import atexit
import functools
import json
import logging
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from torch import Tensor

Updates = dict[str, Tensor]
"""ΔW by the name of the layer."""
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Layers of a LLaMA that both servers fuse into one."""
GGUF = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj"}  # fmt: skip


def vllm(package: Path, folder: Path, config: Any, max_rank: int = 64) -> Updates:
    """Reads with vLLM's `PEFTHelper` and `LoRAModel`, and packs fused layers as vLLM does."""
    stubs: dict[str, dict[str, Any]] = {
        "vllm.config.lora": {"LoRAConfig": object},
        "vllm.logger": {"init_logger": _logger},
        "vllm.model_executor.models.utils": {"WeightsMapper": object},
        "vllm.utils.torch_utils": {"PIN_MEMORY": False},
    }
    helpers = ("parse_fine_tuned_lora_name", "get_lora_id", "is_base_embedding_weights")
    with _modules(package, stubs) as load:
        load("vllm.lora.utils", only=(*helpers, "_GLOBAL_LORA_ID"))
        helper = load("vllm.lora.peft_helper").PEFTHelper.from_local_dir(str(folder), None)
        weights = load("vllm.lora.lora_weights")
        helper.validate_legal(SimpleNamespace(max_lora_rank=max_rank))
        leaves = {leaf for parts in FUSED.values() for leaf in parts} | {"o_proj", "down_proj"}
        model = load("vllm.lora.lora_model").LoRAModel.from_local_checkpoint(
            str(folder), leaves, helper, lora_model_id=1, device="cpu", dtype=torch.float32
        )
        found: Updates = {}
        for parts in FUSED.values():
            for parent in sorted({at.rpartition(".")[0] for at in model.loras if at.rpartition(".")[2] in parts}):
                names = [f"{parent}.{part}" for part in parts]
                packed = weights.PackedLoRALayerWeights.pack([model.loras.pop(name, None) for name in names])
                for name, A, B in zip(names, packed.lora_a, packed.lora_b, strict=True):
                    if A is not None:
                        found[name] = B @ A
        return found | {at: lora.optimize().lora_b @ lora.lora_a for at, lora in model.loras.items()}


def sglang(package: Path, folder: Path, config: Any) -> Updates:
    """Reads with SGLang's `LoRAAdapter`; layers that it fuses are taken apart again, others have no place there."""
    stubs: dict[str, dict[str, Any]] = {
        "sglang.srt.configs.load_config": {"LoadConfig": object},
        "sglang.srt.layers.utils": {},
        "sglang.srt.lora.backend.base_backend": {"BaseLoRABackend": object},
        "sglang.srt.model_loader.loader": {"DefaultModelLoader": object},
        "sglang.srt.model_executor.forward_batch_info": {"ForwardBatch": object},
        "sglang.srt.utils.hf_transformers_utils": {"AutoConfig": object},
    }
    head = config.hidden_size // config.num_attention_heads
    key_value = head * config.num_key_value_heads
    sizes = {"qkv_proj": (config.hidden_size, key_value, key_value), "gate_up_proj": (config.intermediate_size,) * 2}
    with _modules(package, stubs) as load:
        common = load("sglang.srt.layers.utils.common", only=("get_layer_id",), also="import re")
        sys.modules["sglang.srt.layers.utils"].get_layer_id = common.get_layer_id  # type: ignore[attr-defined]
        settings = load("sglang.srt.lora.lora_config").LoRAConfig(str(folder))
        place_of = load("sglang.srt.lora.utils").get_target_module_name
        adapter = load("sglang.srt.lora.lora").LoRAAdapter("x", settings, config, None, None)
        adapter.initialize_weights_from_tensors(safetensors.torch.load_file(folder / "adapter_model.safetensors"))
    found: Updates = {}
    for layer in adapter.layers:
        for key, A in layer.weights.items():
            at, letter, _ = key.removeprefix("base_model.model.").partition(".lora_A.weight")
            if not letter:
                continue
            parent, _, _ = at.rpartition(".")
            fused = place_of(at, {*FUSED, "o_proj", "down_proj"})
            B = layer.weights[key.replace("lora_A", "lora_B")]
            names = FUSED.get(fused, (fused,))
            for name, a, b in zip(names, A.chunk(len(names)), B.split(sizes.get(fused, (len(B),))), strict=True):
                found[f"{parent}.{name}"] = adapter.scaling * b @ a
    return found


def llama_cpp(package: Path, folder: Path, base: Path) -> Updates:
    """Reads the GGUF file of llama.cpp's converter, scaled as llama.cpp does: alpha / rank of the tensor."""
    import gguf

    script = _converter(package) / "convert_lora_to_gguf.py"
    with tempfile.TemporaryDirectory() as at:
        out = Path(at) / "adapter.gguf"
        command = [sys.executable, str(script), "--base", str(base), "--outfile", str(out), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        reader = gguf.GGUFReader(out)
        alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
        tensors = {one.name: torch.from_numpy(one.data.copy()) for one in reader.tensors}
    heads = json.loads((base / "config.json").read_text())
    found: Updates = {}
    for name, A in tensors.items():
        if not name.endswith(".lora_a"):
            continue
        B = tensors[name.replace(".lora_a", ".lora_b")]
        _, block, what, *_ = name.split(".")
        update = alpha / len(A) * B @ A
        if what in ("attn_q", "attn_k"):  # llama.cpp reorders their rows for its rotary embedding
            count = heads["num_attention_heads" if what == "attn_q" else "num_key_value_heads"]
            update = update.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2)
        found[f"model.layers.{block}.{GGUF[what]}"] = update
    return found


@functools.cache
def _converter(package: Path) -> Path:
    """The folder of llama.cpp's source with the files that its converters need; unpacked once."""
    at = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, at)
    with tarfile.open(package) as archive:
        needed = [one for one in archive if re.search(r"/llama\.cpp/(conver[^/]*|gguf-py)(/|$)", one.name)]
        archive.extractall(at, needed, filter="data")
    (folder,) = Path(at).glob("*/vendor/llama.cpp")
    return folder


class _Quiet(logging.LoggerAdapter[logging.Logger]):
    """A logger with the methods of vLLM's that the loading code uses."""

    def info_once(self, message: str, *arguments: object) -> None:
        self.info(message, *arguments)


def _logger(name: str) -> _Quiet:
    return _Quiet(logging.getLogger(name), {})


@contextmanager
def _modules(package: Path, stubs: dict[str, dict[str, Any]]) -> Iterator[Callable[..., Any]]:
    """Inside the block, `load(name)` runs a module's source from a wheel. `stubs`: modules that are not run, and their
    attributes. `load`'s `only`: run just these top-level definitions of the module, after the code `also`."""
    made: dict[str, ModuleType] = {}

    def make(name: str) -> ModuleType:
        parent, _, leaf = name.rpartition(".")
        if name not in made:
            made[name] = sys.modules[name] = ModuleType(name)
            made[name].__path__ = []
            if parent:
                setattr(make(parent), leaf, made[name])
        return made[name]

    def load(name: str, only: tuple[str, ...] = (), also: str = "") -> ModuleType:
        with zipfile.ZipFile(package) as wheel:
            source = wheel.read(name.replace(".", "/") + ".py").decode()
        module = make(name)
        tree = ast.parse(source)
        if only:
            tree.body = [
                node
                for node in tree.body
                if getattr(node, "name", None) in only
                or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in only)
            ]
            tree.body = [*ast.parse(f"from __future__ import annotations\n{also}").body, *tree.body]
        exec(compile(tree, f"{package.name}/{name}", "exec"), module.__dict__)
        return module

    with mock.patch.dict(sys.modules):
        for name, attributes in stubs.items():
            make(name).__dict__.update(attributes)
        yield load
