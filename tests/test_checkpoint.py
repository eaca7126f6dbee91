"""Merging into checkpoints on disk gives the bytes that merging in memory gives; and the command that does it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import lorafamily
from conftest import assert_merged, every_method, perturb_
from lorafamily import cli
from lorafamily.deploy.checkpoint import merge_checkpoint
from lorafamily.deploy.saved import read, write

transformers = pytest.importorskip("transformers", reason="transformers is an extra; nothing to test without it")

from test_transformers import families, ids, model_of  # noqa: E402 - needs transformers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(ids()).logits


def saved_pair(folder, family: str, method: str = "lora", dtype: torch.dtype = torch.float32, shard: str = "20KB"):
    """A checkpoint in shards, an adapter for it, and the model merged in memory, as it is saved."""
    model = model_of(family).to(dtype)
    model.save_pretrained(folder / "base", max_shard_size=shard)
    lorafamily.apply(model, method, rank=3, seed=0)
    lorafamily.save(perturb_(model, size=0.2), folder / "adapter")
    lorafamily.merge(model)
    model.save_pretrained(folder / "expected", max_shard_size=shard)
    return model


@families
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_merged_checkpoint_has_the_bytes_of_merging_in_memory(family, dtype, tmp_path):
    model = saved_pair(tmp_path, family, dtype=dtype)
    merge_checkpoint(tmp_path / "base", read(tmp_path / "adapter"), tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "expected").iterdir())
    assert len([name for name in files if name.endswith(".safetensors")]) > 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes(), name
    assert any(
        (tmp_path / "out" / name).read_bytes() != (tmp_path / "base" / name).read_bytes()
        for name in files
        if name.endswith(".safetensors")
    )
    # Loaded both: LLaMA's rotary buffer, no part of a checkpoint, is rounded by .to(dtype) and not by loading.
    out, expected = (type(model).from_pretrained(tmp_path / name, dtype=dtype) for name in ("out", "expected"))
    assert torch.equal(logits(out), logits(expected))


@every_method
def test_every_method_merges_on_disk(method, tmp_path):
    saved_pair(tmp_path, "llama", method, shard="1GB")
    merge_checkpoint(tmp_path / "base", read(tmp_path / "adapter"), tmp_path / "out")
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def test_a_trunk_s_checkpoint_takes_the_adapter_of_a_model_with_a_head(tmp_path):
    """The model calls its trunk "model."; a checkpoint of the trunk alone does not."""
    model = saved_pair(tmp_path, "llama")
    transformers.LlamaModel.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "trunk")
    merge_checkpoint(tmp_path / "trunk", read(tmp_path / "adapter"), tmp_path / "out")
    merged = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    state = model.state_dict()
    assert merged
    assert all(torch.equal(value, state[f"model.{name}"]) for name, value in merged.items())


def test_what_trained_beside_replaces_its_tensor(tmp_path):
    model = model_of("bert")
    model.save_pretrained(tmp_path / "base")
    lorafamily.apply(model, "lora", rank=2, also_train="classifier", seed=0)
    torch.nn.init.normal_(model.classifier.weight)
    expected = logits(perturb_(model, size=0.1))
    lorafamily.save(model, tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", read(tmp_path / "adapter"), tmp_path / "out")
    assert_merged(logits(type(model).from_pretrained(tmp_path / "out")), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noted_weights_are_those_of_the_checkpoint(dtype, tmp_path, capsys):
    """The model that trained may have been in another dtype than the checkpoint; other weights are refused."""
    model = model_of("llama")
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    expected = perturb_(lorafamily.apply(model.to(dtype), "lora", rank=2, seed=0))
    lorafamily.save(expected, tmp_path / "adapter", hash_base=True)
    arguments = ["--adapter", f"{tmp_path}/adapter", "--out", f"{tmp_path}/out"]
    assert cli.main(["merge", "--base", f"{tmp_path}/base", *arguments, "--json"]) == 0
    shutil.rmtree(tmp_path / "out")
    other = model_of("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other", max_shard_size="20KB")
    capsys.readouterr()
    assert cli.main(["merge", "--base", f"{tmp_path}/other", *arguments, "--json"]) == 2
    refused = capsys.readouterr().err
    assert "was made for: model.layers.1.mlp.up_proj has other weights" in refused
    assert refused.count("has other weights") == 1
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_differs_elsewhere_is_said(tmp_path):
    saved_pair(tmp_path, "llama")
    config = transformers.LlamaConfig.from_pretrained(tmp_path / "base", num_hidden_layers=4)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "deep")
    saved = read(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="every adapted layer fits, but .*deep has other parameters besides them than"):
        merge_checkpoint(tmp_path / "deep", saved, tmp_path / "out")


def harm_index(folder, change) -> None:
    path = folder / "base" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def shards(folder):
    return sorted((folder / "base").glob("*.safetensors"))


def truncate(path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


HARM = {
    "no checkpoint": (lambda f: [p.unlink() for p in (f / "base").iterdir()], "no model.safetensors there"),
    "a shard is missing": (lambda f: shards(f)[0].unlink(), r"no model-00001-.* there; a checkpoint is a folder with"),
    "a shard is truncated": (lambda f: truncate(shards(f)[1], 5000), "damaged, not a safetensors file"),
    "a shard is empty": (lambda f: truncate(shards(f)[1], 0), "damaged, not a safetensors file"),
    "a shard is a pickle": (lambda f: torch.save({"a": 1}, shards(f)[0]), "damaged, not a safetensors file"),
    "the index leaves the folder": (
        lambda f: harm_index(f, lambda i: i["weight_map"].update(x="../secret.safetensors")),
        r"'\.\./secret\.safetensors' is no file of this folder",
    ),
    "the index names no file": (
        lambda f: harm_index(f, lambda i: i["weight_map"].update(x=["model.safetensors"])),
        r"\['model\.safetensors'\] is no file of this folder",
    ),
    "the index has no map": (lambda f: harm_index(f, lambda i: i.pop("weight_map")), "it needs a weight_map"),
    "the index is no JSON": (
        lambda f: (f / "base" / "model.safetensors.index.json").write_text("{"),
        "damaged, not JSON",
    ),
    "a tensor twice": (
        lambda f: shards(f)[1].write_bytes(shards(f)[0].read_bytes()),
        r"is in model-0000\d-of.* and in model-0000\d-of",
    ),
    "a single file beside shards": (
        lambda f: (f / "base" / "model.safetensors").write_bytes(shards(f)[0].read_bytes()),
        "are both there; remove the one that is not to be read",
    ),
    "another model": (
        lambda f: model_of("gpt2").save_pretrained(f / "base", max_shard_size="20KB"),
        "of model_type 'gpt2', which LlamaForCausalLM, the model that the adapter was made for, is not",
    ),
    "whole numbers": (
        lambda f: [
            safetensors.torch.save_file({k: v.int() for k, v in safetensors.torch.load_file(p).items()}, p)
            for p in shards(f)
        ],
        "is stored as I32; merging needs plain floating-point weights",
    ),
    "something is there": (lambda f: (f / "out" / "x").mkdir(parents=True), "is there and not empty"),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_merge_that_cannot_be_is_one_clear_line_and_writes_nothing(harm, tmp_path, capsys):
    saved_pair(tmp_path, "llama")
    change, message = HARM[harm]
    change(tmp_path)
    had = sorted(path.name for path in (tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else None
    with pytest.raises(lorafamily.FileError, match=message):
        merge_checkpoint(tmp_path / "base", read(tmp_path / "adapter"), tmp_path / "out")
    code = cli.main(
        ["merge", "--base", f"{tmp_path}/base", "--adapter", f"{tmp_path}/adapter", "--out", f"{tmp_path}/out"]
    )
    errors = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert errors[-1].startswith("lorafamily merge: ")
    assert not any("Traceback" in line for line in errors)
    assert (sorted(path.name for path in (tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else None) == had
    assert not (tmp_path / "out.partial").exists()


def test_the_command_merges_and_inspects(tmp_path, capsys):
    saved_pair(tmp_path, "llama", "alora")
    arguments = ["--base", f"{tmp_path}/base", "--adapter", f"{tmp_path}/adapter", "--out", f"{tmp_path}/out"]
    assert cli.main(["merge", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["merged"] == 14
    assert (tmp_path / "out" / "config.json").exists()

    assert cli.main(["inspect", f"{tmp_path}/adapter", "--png", f"{tmp_path}/ranks.png"]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.0.self_attn.q_proj" in shown
    assert "alora for LlamaForCausalLM" in shown
    assert "self_attn.q_proj  ██" in shown
    assert (tmp_path / "ranks.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.main(["inspect", f"{tmp_path}/adapter", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["slices"] == 42
    assert described["modules"]["model.layers.0.self_attn.q_proj"]["shape"] == [32, 32]


def test_the_command_compresses(tmp_path, capsys):
    model = saved_pair(tmp_path, "llama", "adalora")
    lorafamily.unmerge(model)
    assert cli.main(["compress", "--adapter", f"{tmp_path}/adapter", "--out", f"{tmp_path}/small", "--rank", "1"]) == 0
    assert "42 slices → total rank 14; largest error" in capsys.readouterr().out
    lorafamily.compress(model, rank=1)
    assert torch.equal(logits(lorafamily.load(model_of("llama"), tmp_path / "small")), logits(model))
    size = [(tmp_path / name / "adapter.safetensors").stat().st_size for name in ("small", "adapter")]
    assert size[0] < 0.5 * size[1]
    assert cli.main(["compress", "--adapter", f"{tmp_path}/adapter", "--out", f"{tmp_path}/x", "--energy", "2"]) == 2
    assert "energy=2.0: must be a share" in capsys.readouterr().err


def test_the_command_exports(tmp_path, capsys):
    saved_pair(tmp_path, "llama", "olora")
    arguments = ["--base", f"{tmp_path}/base", "--adapter", f"{tmp_path}/adapter", "--out", f"{tmp_path}/peft"]
    assert cli.main(["export", *arguments, "--layout", "serving"]) == 0
    assert "layout serving" in capsys.readouterr().out
    again = lorafamily.import_peft(model_of("llama"), tmp_path / "peft")
    loaded = lorafamily.load(model_of("llama"), tmp_path / "adapter")
    # In float64, and not against merged weights: what is left is that the factors of the file were rounded once, which
    # makes a tenth of the bound; merging rounds sums that are larger, by how a processor sums.
    assert_merged(logits(again.double()), logits(loaded.double()))
    arguments[1] = f"{tmp_path}/nowhere"
    assert cli.main(["export", *arguments]) == 2
    assert "nowhere: no config.json there; a checkpoint is a folder with" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ["ByteDecoder", "pipeline", "AutoModel"])
def test_a_base_that_is_no_model_of_transformers_is_not_exported(architecture, tmp_path, capsys):
    saved_pair(tmp_path, "llama")
    saved = read(tmp_path / "adapter")
    saved.record["base"]["architecture"] = architecture
    write(saved, tmp_path / "adapter")
    arguments = ["--base", f"{tmp_path}/base", "--adapter", f"{tmp_path}/adapter", "--out", f"{tmp_path}/peft"]
    assert cli.main(["export", *arguments]) == 2
    assert f"{architecture} is no model of transformers" in capsys.readouterr().err
    assert not (tmp_path / "peft").exists()


def test_the_command_is_installed_and_refuses_in_one_line(tmp_path):
    command = [sys.executable, "-m", "lorafamily.cli", "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "no adapter.json there; a saved adapter is a folder with" in done.stderr
