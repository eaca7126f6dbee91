"""Bases that are not whole in this process: spread over two by FSDP2, or offloaded by accelerate."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import lorafamily
from conftest import perturb_, tiny, tokens
from lorafamily.layers.placement import placement_of
from lorafamily.layers.target import possible_targets
from lorafamily.layers.uncalled import WeightReads
from test_processes import start

SPREAD = """
import json, os, sys, types
import torch
from safetensors.torch import save_file
import lorafamily
from conftest import tiny, tokens
from lorafamily.layers.sharded import is_sharded, whole
from lorafamily.layers.placement import placement_of

folder = sys.argv[2]
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
told, tensors = {}, {}

def refused(name, step):
    try:
        step()
    except lorafamily.LoraFamilyError as error:
        told[name] = type(error).__name__ + ": " + str(error)

def trained(name, model, x, loss_fn, method="alora", steps=12, **options):
    lorafamily.apply(model, method, rank=3, seed=0, **options)
    for adapter in placement_of(model).adapters.values():
        adapter.double()
    if world > 1:
        lorafamily.shard(model)
    rows = [{"bytes": row} for row in x]
    loader = torch.utils.data.DataLoader(rows, batch_size=8)
    history = lorafamily.train(model, loader, steps=steps, lr=1e-3, loss_fn=loss_fn, seed=0, progress=False,
        validation=[{"bytes": x[:8]}])
    told[name] = {"losses": [s.loss for s in history.steps], "ranks": history.slices_end}
    if rank == 0:
        lorafamily.save(model, f"{folder}/{name}")
    return model

def values(model):
    return {n: whole(p).clone() for n, p in model.named_parameters() if "lorafamily" not in n}

def loss_of_bytes(model, batch):
    return model(batch["bytes"]).loss

x = tokens(rows=16)
for name, dtype in (("float64", torch.float64), ("bfloat16", torch.bfloat16)):
    model = trained(name, tiny(dtype=dtype), x, loss_of_bytes, steps=8, rounds=2, also_train="norm")
    model.eval()
    with torch.no_grad():
        base = values(model)
        lorafamily.apply(model, "olora", rank=2, name="second", seed=0)
        for at, adapter in placement_of(model, "second").adapters.items():
            U, V = adapter.factors()
            tensors |= {f"{name} olora {at} U": U.clone(), f"{name} olora {at} V": V.clone()}
        lorafamily.switch(model, "default")
        y = model(x[:4]).logits
        lorafamily.remove(model, "second")
        told[name]["difference"] = lorafamily.merge_difference(model, x[:4])
        merged = values(lorafamily.merge(model))
        told[name]["off"] = (model(x[:4]).logits - y).abs().max().item()
        tensors |= {f"{name} merged {at}": value for at, value in merged.items()}
        again = values(lorafamily.unmerge(model))
        told[name]["same bits"] = all(torch.equal(value, base[at]) for at, value in again.items())
        told[name]["moved"] = sum(not torch.equal(value, base[at]) for at, value in merged.items())
        tensors[f"{name} logits"] = y.clone()
        if world > 1:
            told[name]["sharded"] = sum(is_sharded(p) for p in model.parameters())
            refused(name + " hash", lambda: lorafamily.save(model, folder + "/hashed", hash_base=True))
            refused(name + " also", lambda: lorafamily.apply(model, "lora", name="n", also_train="tok|embed", seed=0))

model = tiny(dtype=torch.float64)
lorafamily.apply(model, "lora", rank=2, seed=0)
lorafamily.apply(model, "olora", rank=2, seed=0, name="second")
if world > 1:
    lorafamily.shard(model)
with torch.no_grad(), lorafamily.routing(model, ["default", None, "second", "second"]):
    tensors["routed"] = model(x[:4]).logits.clone()

try:
    import bitsandbytes, transformers
except ImportError:
    bitsandbytes = None
if bitsandbytes is not None:
    from test_elsewhere import four_bits
    def loss_of_ids(model, batch):
        ids = batch["bytes"] % 90
        return model(input_ids=ids, labels=ids).loss
    model = trained("nf4", four_bits(), x, loss_of_ids, steps=6, rounds=2, targets="q_proj|down_proj")
    refused("nf4 merge", lambda: lorafamily.merge(model, dequantise=torch.float32))
    with torch.no_grad():
        tensors["nf4 logits"] = model.eval()(input_ids=x[:4] % 90).logits.clone()
    eight = torch.nn.Sequential(bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False).to("cpu"))
    lorafamily.apply(eight, "lora", rank=2, seed=0)
    refused("int8", lambda: lorafamily.shard(eight))
if rank == 0:
    save_file({k: v.contiguous() for k, v in tensors.items()}, f"{folder}/tensors.safetensors")
    open(f"{folder}/told.json", "w").write(json.dumps(told))
"""


def four_bits():
    """A LLaMA whose layers bitsandbytes quantised."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is an extra; nothing to test without it")
    transformers = pytest.importorskip("transformers", reason="transformers is an extra; nothing to test without it")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=99, **sizes)).eval()
    layers = [(at, m) for at, m in model.named_modules() if isinstance(m, nn.Linear) and at != "lm_head"]
    for at, layer in layers:
        new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=new)
        parent, _, own = at.rpartition(".")
        setattr(model.get_submodule(parent), own, new.to("cpu"))
    return model


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """What one process, and two, found in the same program: what they say, tensors, and the folder."""
    found = []
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp("spread")
        start(processes, "alora", folder, program=SPREAD).done()
        told = json.loads((folder / "told.json").read_text())
        found.append((told, load_file(folder / "tensors.safetensors"), folder))
    return found


def test_a_sharded_base_trains_saves_and_merges_as_a_whole_one(spread):
    """float64, ALoRA: 1e-6 covers a batch's mean that is taken in two halves; ranks and decisions are the same."""
    (alone, expected, _), (both, tensors, _) = spread
    assert both["float64"]["sharded"] > 10
    assert both["float64"]["losses"] == pytest.approx(alone["float64"]["losses"], abs=1e-6)
    assert both["float64"]["ranks"] == alone["float64"]["ranks"]
    for name in expected:
        if name.startswith(("float64", "routed")):
            assert_close(tensors[name], expected[name], rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert both["float64"]["off"] < 1e-9  # W + ΔW is what the adapted model computes
    assert both["float64"]["difference"] < 1e-9
    assert both["float64"]["moved"] > 10
    assert both["float64"]["same bits"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gathered_merged_weights_have_the_bits_of_merging_in_one_process(dtype, spread):
    """Of the adapter that two processes trained and one of them saved."""
    name = str(dtype).removeprefix("torch.")
    told, tensors, folder = spread[1]
    assert told[name]["same bits"]
    record = json.loads((folder / name / "adapter.json").read_text())
    assert record["base"]["architecture"] == "ByteDecoder"  # by which checkpoints are found; FSDP2 puts its own class
    model = lorafamily.merge(lorafamily.load(tiny(dtype=dtype), folder / name))
    merged = {at: p for at, p in model.named_parameters() if "lorafamily" not in at}
    assert len(merged) > 10
    for at, value in merged.items():
        assert torch.equal(tensors[f"{name} merged {at}"], value), at


def test_a_4_bit_base_is_sharded_too(spread):
    """The base computes in float32, to whose rounding outputs agree; factors are float64."""
    (alone, expected, folder_of_one), (both, tensors, folder) = spread
    if "nf4" not in alone:
        pytest.skip("bitsandbytes is an extra; nothing to test without it")
    assert both["nf4"]["losses"] == pytest.approx(alone["nf4"]["losses"], abs=1e-6)
    assert both["nf4"]["ranks"] == alone["nf4"]["ranks"]
    assert_close(tensors["nf4 logits"], expected["nf4 logits"], rtol=0, atol=1e-5)
    whole = lorafamily.load(four_bits(), folder / "nf4")
    with torch.no_grad():
        assert_close(whole(input_ids=tokens(rows=16)[:4] % 90).logits, tensors["nf4 logits"], rtol=0, atol=1e-5)
    merged = [
        lorafamily.merge(lorafamily.load(four_bits(), at / "nf4"), dequantise=torch.float32).state_dict()
        for at in (folder_of_one, folder)
    ]
    for name, value in merged[0].items():
        assert_close(merged[1][name], value, rtol=0, atol=1e-6)
    assert "is quantised and spread over processes; save the adapter" in both["nf4 merge"]
    assert "only bitsandbytes' 4-bit ones can be sharded" in both["int8"]


def test_what_needs_more_than_a_part_says_what_to_do(spread):
    told = spread[1][0]
    assert told["float64 hash"].startswith("StateError: hash_base=True reads whole weights")
    assert "is sharded over processes; do this before shard(model)" in told["float64 also"]


# Offloaded


def llama():
    transformers = pytest.importorskip("transformers", reason="transformers is an extra; nothing to test without it")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=99, **sizes)).eval()


BATCH = {key: torch.randint(1, 99, (4, 8), generator=torch.Generator().manual_seed(0)) for key in ("input_ids",)}
BATCH |= {"labels": BATCH["input_ids"]}


@torch.no_grad()
def logits(model):
    return model(**BATCH).logits


def to_cpu(model, folder) -> None:
    pytest.importorskip("accelerate").cpu_offload(model, torch.device("cpu"))


def to_disk(model, folder) -> None:
    pytest.importorskip("accelerate").disk_offload(model, folder, torch.device("cpu"))


def by_map(model, folder) -> None:
    here = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys(here, "cpu") | {"model.layers.1": "disk"}
    accelerate = pytest.importorskip("accelerate")
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


def by_blocks(model, folder) -> None:
    blocks = ["LlamaDecoderLayer"]
    pytest.importorskip("accelerate").cpu_offload(model, torch.device("cpu"), preload_module_classes=blocks)


ways = pytest.mark.parametrize("offload", [to_cpu, to_disk, by_map], ids=lambda way: way.__name__)


def adapted(model):
    return perturb_(lorafamily.apply(model, "lora", rank=2, seed=0), size=0.2)


@ways
def test_an_offloaded_base_does_all_but_merge(offload, tmp_path):
    """Same operations on the same numbers: bit for bit what the model does whole."""
    outcomes = []
    for way in (lambda model, folder: None, offload):
        model = llama()
        way(model, tmp_path / "weights")
        lorafamily.apply(model, "lora", rank=2, seed=0)
        history = lorafamily.train(model, [BATCH], steps=5, lr=1e-2, seed=0, progress=False)
        lorafamily.apply(model.eval(), "olora", rank=2, seed=0, name="second")
        of_second = logits(model)
        lorafamily.switch(model, "default")
        with lorafamily.routing(model, ["default", None, "second", "default"]):
            routed = logits(model)
        folder = lorafamily.save(model, tmp_path / f"adapter-{len(outcomes)}", "default", hash_base=True)
        again = lorafamily.load(model, folder, "again")
        with lorafamily.disabled(model):
            base = logits(model)
        outcomes.append(([s.loss for s in history.steps], of_second, routed, logits(again), base))
    for found, expected in zip(*outcomes, strict=True):
        assert found == expected if isinstance(found, list) else torch.equal(found, expected)
    files = [(tmp_path / f"adapter-{i}" / "adapter.safetensors").read_bytes() for i in (0, 1)]
    assert files[0] == files[1]
    y = logits(model)
    for step in (lorafamily.merge, lambda model: lorafamily.merge_difference(model, BATCH)):
        with pytest.raises(lorafamily.StateError, match=r"is not here .*remove_hook_from_module"):
            step(model)
    assert torch.equal(logits(model), y)


def test_no_other_tensor_gets_the_id_of_a_weight_that_is_replaced_during_the_first_batch():
    """As accelerate replaces offloaded ones; a read of that tensor would pass for a read of the weight."""
    model = nn.Sequential(nn.Linear(3, 3))
    with WeightReads(possible_targets(model)):
        before = weakref.ref(model[0].weight)
        model[0].weight = nn.Parameter(torch.zeros(3, 3))
        assert before() is not None


def test_with_the_hooks_off_it_merges(tmp_path):
    hooks = pytest.importorskip("accelerate.hooks")
    model, whole = llama(), adapted(llama())
    to_cpu(model, tmp_path)
    adapted(model)
    hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(logits(lorafamily.merge(model)), logits(lorafamily.merge(whole)))


@ways
def test_adapters_that_were_offloaded_along_are_not_trained_or_written(offload, tmp_path):
    hooks = pytest.importorskip("accelerate.hooks")
    model = adapted(llama())
    y = logits(model)
    offload(model, tmp_path / "weights")
    assert torch.equal(logits(model), y)
    steps = [
        lambda: lorafamily.train(model, [BATCH], steps=2, lr=1e-2, seed=0, progress=False),
        lambda: lorafamily.save(model, tmp_path / "adapter"),
        lambda: lorafamily.routing(model, ["default"] * 4).__enter__(),
    ]
    for step in steps:
        with pytest.raises(lorafamily.StateError, match="was offloaded with its layer, and cannot be trained"):
            step()
    if offload is to_cpu:
        hooks.remove_hook_from_module(model, recurse=True)
        lorafamily.train(model, [BATCH], steps=2, lr=1e-2, seed=0, progress=False)
        assert not torch.equal(logits(model.eval()), y)


def test_blocks_that_are_offloaded_as_a_whole_are_refused(tmp_path):
    model = llama()
    by_blocks(model, tmp_path)
    with pytest.raises(
        lorafamily.StateError, match=r"model\.layers\.0 is offloaded as a whole .*preload_module_classes"
    ):
        lorafamily.apply(model, "lora", rank=2)


def test_what_trains_along_must_be_here(tmp_path):
    """Values for a tensor on the meta device would be lost without a word."""
    lorafamily.save(lorafamily.apply(llama(), "lora", rank=2, also_train="lm_head", seed=0), tmp_path / "adapter")
    model = llama()
    to_cpu(model, tmp_path)
    for step in (
        lambda: lorafamily.apply(model, "lora", rank=2, also_train="lm_head"),
        lambda: lorafamily.load(model, tmp_path / "adapter"),
    ):
        with pytest.raises(lorafamily.StateError, match=r"lm_head\.weight, which .*, is offloaded"):
            step()
    with pytest.raises(lorafamily.StateError, match="no adapters"):
        placement_of(model)
