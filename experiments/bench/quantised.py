"""Memory and time of a training step on a 4-bit base, for lorafamily and for peft.

A LLaMA of random weights is quantised to nf4 and adapted by lorafamily or by peft, at one rank on all linear layers.
Every measurement is a process of its own, one after the other. Its peak is the most memory that it had during a step;
the step's share of it is the memory that it did not have before the step.

    OMP_NUM_THREADS=1 python experiments/bench/quantised.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that rooms find each other

import waiting  # noqa: F401 - before torch

# isort: split
import json
import os
import subprocess
import threading
import time
from typing import Any

import torch
from torch import nn

SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16}
RANK, ROUNDS, TOKENS = 8, 1, (1, 128)


def resident() -> int:
    """Resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The peak memory of the process inside a `with` block, read every two milliseconds."""

    def __enter__(self) -> Peak:
        self.most, self.over = resident(), False
        self.watching = threading.Thread(target=self.watch)
        self.watching.start()
        return self

    def watch(self) -> None:
        while not self.over:
            self.most = max(self.most, resident())
            time.sleep(0.002)

    def __exit__(self, *exception: object) -> None:
        self.over = True
        self.watching.join()


def base() -> nn.Module:
    """A LLaMA in nf4, made layer by layer, so that it is never whole in float32."""
    import transformers
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=8192, **SIZES, tie_word_embeddings=False, dtype=torch.float32)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            weight = torch.randn(layer.weight.shape) / layer.in_features**0.5
            with torch.device("meta"):
                new = Linear4bit(layer.in_features, layer.out_features, False, torch.float32)
            new.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new)
            new.to("cpu")  # this quantises
            model.set_submodule(name, new)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                value = torch.randn(parameter.shape) * 0.02
                module._parameters[name] = nn.Parameter(value.abs().sign() if value.ndim == 1 else value)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.train().requires_grad_(False)


def adapted(model: nn.Module, by: str) -> nn.Module:
    if by == "lorafamily":
        import lorafamily

        return lorafamily.apply(model, "lora", rank=RANK, seed=0)
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    return peft.get_peft_model(model, config)


def measured(by: str) -> dict[str, Any]:
    """One measurement in this process: sizes, bytes of the base and of a step at its peak, seconds of a step."""
    torch.set_num_threads(1)
    model = base()
    from lorafamily.layers.quantised import counts_of, tensors_of

    stored = {name: tensor.nbytes for name, tensor in tensors_of(model).items()}
    layers = {name: size for name, size in stored.items() if "proj" in name}
    counts = counts_of(model)
    in_layers = sum(count for name, count in counts.items() if "proj" in name)
    model = adapted(model, by)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(8192, TOKENS, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's state and other things that are made once
    before = resident()
    with Peak() as peak:
        began = time.perf_counter()
        step()
        seconds = time.perf_counter() - began
    return {
        "parameters": sum(counts.values()),
        "in quantised layers": in_layers,
        "bits each": 8 * sum(layers.values()) / in_layers,
        "base, bytes": sum(stored.values()),
        "trained": sum(parameter.numel() for parameter in trained),
        "process, bytes": before,
        "step, bytes": peak.most - before,
        "peak, bytes": peak.most,
        "seconds": seconds,
    }


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measured(sys.argv[1])))
        return
    rows: dict[str, list[dict[str, Any]]] = {"lorafamily": [], "peft": []}
    for _ in range(ROUNDS):
        for by, found in rows.items():
            # With these glibc gives freed tensors back, so that resident memory is memory in use.
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
            command = [sys.executable, __file__, by]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    first = rows["lorafamily"][0]
    print(
        f"{first['parameters']:,} parameters, {first['in quantised layers']:,} of them in nf4 at "
        f"{first['bits each']:.2f} bits each; the base takes {first['base, bytes'] / 2**20:,.0f} MiB"
    )
    for by, found in rows.items():
        peaks = ", ".join(f"{row['peak, bytes'] / 2**20:,.0f}" for row in found)
        steps = ", ".join(f"{row['step, bytes'] / 2**20:,.0f}" for row in found)
        seconds = ", ".join(f"{row['seconds']:.1f}" for row in found)
        print(f"{by:<10}  trains {found[0]['trained']:,}; peak {peaks} MiB; of it the step {steps} MiB; {seconds} s")


if __name__ == "__main__":
    main()
