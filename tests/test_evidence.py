"""Methods that look at data first: EVA against peft's, GoRA against its formulas, budgets, and what is left behind."""

from __future__ import annotations

import importlib
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lorafamily
from conftest import data, logits, perturb_, tiny
from launching import Launched
from lorafamily.gathering import masks_of
from lorafamily.layers.placement import placement_of
from lorafamily.principal import EXACT, Principal

WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}


def transformer(family: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if family == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**WIDE)).eval()
    config = transformers.LlamaConfig(**WIDE, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config).eval()


def padded(rows: int = 6, length: int = 12, seed: int = 0, words: int = 99) -> dict[str, torch.Tensor]:
    """A batch with padding, and labels that are masked there and at the first two positions. Some words are frequent,
    as in texts, so that inputs have leading directions."""
    generator = torch.Generator().manual_seed(seed)
    ids = (words * torch.rand(rows, length, generator=generator) ** 2).long()
    lengths = torch.randint(4, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    labels = torch.where((mask == 1) & (torch.arange(length) > 1), ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def ranks_of(model) -> dict[str, int]:
    return {at: adapter.slices for at, adapter in placement_of(model).adapters.items()}


@pytest.mark.filterwarnings("ignore")  # peft and transformers warn of each other
@pytest.mark.parametrize("tau", [None, 0.99], ids=["two batches", "until found"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_eva_has_the_directions_and_ranks_of_peft(family, tau, monkeypatch):
    peft = pytest.importorskip("peft")
    hook = importlib.import_module("peft.tuners.lora.eva").SVDHook
    theirs_seen = hook.__call__

    def seen(self, *arguments):
        """A direction of the other sign is the same one, and has not turned; theirs takes it for one that has."""
        before = self.svd.components_.clone() if hasattr(self.svd, "components_") else None
        theirs_seen(self, *arguments)
        if before is not None:
            self.converged = (self.svd.components_ * before).sum(1).abs() >= self.sim_thresh

    monkeypatch.setattr(hook, "__call__", seen)
    batches = [padded(seed=1), padded(seed=2)]
    names = ["query", "key", "value", "dense"] if family == "bert" else ["q_proj", "k_proj", "v_proj", "down_proj"]
    where = r"layer.*\.(query|key|value|dense)$" if family == "bert" else r"(q|k|v|down)_proj$"
    config = peft.LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=names if family == "llama" else where.replace("layer", ".*layer"),
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0),
    )
    config.eva_config.tau = -1.0 if tau is None else tau  # of -1 any similarity is enough: after just the two batches
    theirs = peft.get_peft_model(transformer(family), config, low_cpu_mem_usage=True)
    peft.initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    given = {"rank": 4, "data": batches if tau is None else 32 * batches, "targets": where}  # theirs goes round
    ours = lorafamily.apply(transformer(family), "eva", tau=tau, seed=0, **given)
    if tau is not None:
        assert 2 < lorafamily.gather(transformer(family), "eva", tau=tau, **given).batches < 64
    rows, scales = {}, {}
    for at, module in theirs.named_modules():
        if hasattr(module, "lora_A") and "default" in getattr(module, "lora_A", {}):
            at = at.removeprefix("base_model.model.")
            rows[at], scales[at] = module.lora_A["default"].weight.detach(), module.scaling["default"]
    adapters = placement_of(ours).adapters
    assert len({adapter.slices for adapter in adapters.values()}) > 1
    # Layers of one input have one set of shares: which of them gets the last slice is a tie, that each side breaks.
    groups: dict[tuple, list[str]] = {}
    for at in adapters:
        of_block, last = at.rpartition(".")[::2]
        alike = last in ("query", "key", "value", "q_proj", "k_proj", "v_proj")
        groups.setdefault((of_block, "qkv" if alike else last), []).append(at)
    for alike in groups.values():
        assert sorted(adapters[at].slices for at in alike) == sorted(len(rows.get(at, ())) for at in alike)
    compared = 0
    for at, adapter in adapters.items():
        n = min(adapter.slices, len(rows.get(at, ())))
        if n:
            cosine = nn.functional.cosine_similarity(adapter.factors()[1][:n], rows[at][:n]).abs()
            assert cosine.min() >= 0.999, at
            assert adapter.scale == pytest.approx(scales[at])
            compared += n
    assert compared > 0.9 * sum(adapter.slices for adapter in adapters.values())


def test_directions_are_those_of_all_inputs_that_count():
    """Where nothing is cut off, the incremental decomposition is that of all rows at once."""
    batches = [padded(seed=seed) for seed in range(4)]
    model = transformer("llama")
    found = lorafamily.gather(model, "eva", batches, rank=16, targets="q_proj", tau=None)
    at = "model.layers.1.self_attn.q_proj"
    seen = []
    handle = model.get_submodule(at).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    counts = [(b["attention_mask"] == 1) & (b["labels"] != -100) for b in batches]
    rows = torch.cat([x[count] for x, count in zip(seen, counts, strict=True)]).double()
    assert 0 < len(rows) < sum(count.numel() for count in counts) - 50
    _, S, V = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    layer = found.layers[at]
    assert layer.directions.shape == (32, 32)
    assert_close(layer.explained, S.square() / S.square().sum(), rtol=1e-4, atol=1e-6)  # in float32
    assert (layer.directions[:8].double() @ V[:8].T).diagonal().abs().min() > 0.9999
    assert_close(layer.directions @ layer.directions.T, torch.eye(32), rtol=0, atol=1e-5)


def test_the_randomised_decomposition_of_many_rows_finds_the_same():
    generator = torch.Generator().manual_seed(0)
    spread = 0.8 ** torch.arange(600.0)
    x = torch.randn(EXACT + 300, 600, generator=generator) * spread
    few = Principal(8)
    torch.manual_seed(0)
    few.add(x)
    V, explained = few.result()
    _, S, exact = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    assert (V @ exact[:8].T).diagonal().abs().min() > 0.999
    assert_close(explained, (S.double().square() / S.double().square().sum())[:8], rtol=1e-3, atol=0)


def test_an_encoder_s_positions_are_not_masked_by_the_decoder_s_labels():
    batch = padded()
    mask, labels = batch["attention_mask"].bool(), batch["labels"] != -100
    plain, seq2seq = nn.Linear(1, 1), nn.Linear(1, 1)
    seq2seq.config = SimpleNamespace(is_encoder_decoder=True)
    assert torch.equal(masks_of(batch, plain)[6, 12], mask & labels)
    assert torch.equal(masks_of(batch, seq2seq)[6, 12], mask)
    assert masks_of({"labels": torch.rand(3, 4)}, plain) == {}
    assert masks_of([mask], plain) == {}


def test_gradients_are_those_of_the_loss_over_all_labels_that_count():
    model = transformer("llama").double()
    batches = [padded(seed=1), padded(rows=3, seed=2)]
    targets = "q_proj|down_proj"
    gathered = lorafamily.gather(model, "gora", batches, targets=targets)
    assert gathered.batches == 2
    together = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    model(**together).loss.backward()
    for at, layer in gathered.layers.items():
        assert_close(layer.gradient, model.get_submodule(at).weight.grad)
    lone = lorafamily.gather(transformer("llama").double(), "gora", batches, targets=targets, evidence_batches=1)
    assert lone.batches == 1
    assert not torch.equal(lone.layers[at].gradient, layer.gradient)


def test_a_layer_is_looked_at_until_the_directions_that_its_rank_takes_are_found():
    batches = [padded(seed=seed) for seed in range(24)]
    model, seen = transformer("llama"), []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    loose, strict = (
        lorafamily.gather(model, "eva", batches, rank=2, targets="q_proj|down_proj", tau=tau) for tau in (0.6, 0.9999)
    )
    assert loose.batches < strict.batches == 24
    assert len(seen) == loose.batches + strict.batches
    # By hand: a direction is found when a batch turns it by no more; those that ranks take must be.
    at = "model.layers.0.self_attn.q_proj"
    one = lorafamily.gather(model, "eva", batches, rank={at: 3}, targets=at, tau=0.9).batches
    assert 2 <= one < 24
    by = [lorafamily.gather(model, "eva", batches[:n], rank=3, targets=at, tau=None).layers[at] for n in range(1, 25)]
    turned = [(a.directions[:3] * b.directions[:3]).sum(1).abs().min() for a, b in pairwise(by)]
    assert [bool(cosine >= 0.9) for cosine in turned[: one - 1]] == [False] * (one - 2) + [True]


@pytest.mark.parametrize("bound", [0.01, 0])
def test_what_memory_has_no_room_for_lies_in_a_file_and_has_the_same_bits(bound):
    given = {"rank": 2, "targets": "attention|mlp"}
    whole = lorafamily.gather(tiny(), "gora", data(2), **given).layers
    bounded = lorafamily.gather(tiny(), "gora", data(2), evidence_memory=bound, **given).layers
    assert all(torch.equal(bounded[at].gradient, layer.gradient) for at, layer in whole.items())
    sizes = {at: layer.gradient.nbytes for at, layer in whole.items()}
    in_memory = [at for at, layer in bounded.items() if layer.gradient.untyped_storage().nbytes() == sizes[at]]
    held = sum(sizes[at] for at in in_memory)
    assert held <= bound * 2**20
    assert held + min(sizes[at] for at in sizes if at not in in_memory) > bound * 2**20
    starts = [
        lorafamily.apply(tiny(), "gora", budget=3_000, data=data(2), seed=0, **own)
        for own in ({}, {"evidence_memory": 0})
    ]
    for a, b in zip(*(model.parameters() for model in starts), strict=True):
        assert torch.equal(a, b)


TOGETHER = """
import os, sys
import torch, torch.distributed as dist
import lorafamily
from conftest import data, tiny

folder, threads, rank = sys.argv[1], int(sys.argv[2]), int(os.environ["RANK"])
torch.set_num_threads(threads)
dist.init_process_group("gloo")
for method in ("eva", "gora"):
    lorafamily.gather(tiny(), method, data(3), rank=2).save(f"{folder}/{method}{rank}")
    model = lorafamily.apply(tiny(), method, budget=3_000, data=data(3), seed=0)
    torch.save({name: p for name, p in model.named_parameters() if p.requires_grad}, f"{folder}/{method}-start{rank}")
try:
    lorafamily.gather(tiny(), "gora", data(3)[rank:], rank=2)
except lorafamily.DataError as error:
    open(f"{folder}/refused{rank}", "w").write(str(error))
dist.destroy_process_group()
"""


def test_two_processes_find_what_one_does(tmp_path):
    Launched(TOGETHER, [str(tmp_path), str(torch.get_num_threads())], tmp_path, processes=2).done()
    for method in ("eva", "gora"):
        alone = lorafamily.gather(tiny(), method, data(3), rank=2)
        model = lorafamily.apply(tiny(), method, budget=3_000, data=data(3), seed=0)
        started = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for rank in (0, 1):
            found = lorafamily.Evidence.load(tmp_path / f"{method}{rank}")
            assert found.batches == alone.batches
            for at, layer in alone.layers.items():
                for one, two in zip(vars(layer).values(), vars(found.layers[at]).values(), strict=True):
                    assert (one is None and two is None) or torch.equal(one, two), at
            start = torch.load(tmp_path / f"{method}-start{rank}")
            assert start.keys() == started.keys()
            assert all(torch.equal(value, start[name]) for name, value in started.items())
    for rank in (0, 1):
        assert "different batches to look at" in (tmp_path / f"refused{rank}").read_text()


def test_the_gradient_of_a_transposed_weight_and_of_parts():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=99, n_positions=32)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    batch = padded(seed=3)
    given = {"targets": r"c_attn|mlp.c_fc", "fused": {"c_attn$": ["q", "k", "v"]}}
    found = lorafamily.gather(model, "gora", [batch], **given)
    model(**batch).loss.backward()
    block = model.transformer.h[0]
    assert_close(found.layers["transformer.h.0.mlp.c_fc"].gradient, block.mlp.c_fc.weight.grad.T)
    assert_close(found.layers["transformer.h.0.attn.c_attn.k"].gradient, block.attn.c_attn.weight.grad.T[16:32])
    shared = lorafamily.gather(model, "eva", [batch], rank=2, **given).layers
    assert torch.equal(
        shared["transformer.h.0.attn.c_attn.q"].directions, shared["transformer.h.0.attn.c_attn.v"].directions
    )


@pytest.mark.parametrize("keep_step", [True, False])
def test_gora_has_the_ranks_and_the_start_of_its_formulas(keep_step):
    model = tiny(dtype=torch.float64)
    base, weights = (
        logits(model),
        {at: m.weight.detach().clone() for at, m in model.named_modules() if hasattr(m, "weight")},
    )
    evidence = lorafamily.gather(model, "gora", data(3))
    lorafamily.apply(model, "gora", rank=4, data=data(3), seed=0, keep_step=keep_step)
    adapters = placement_of(model).adapters
    shapes = {at: tuple(weights[at].shape) for at in adapters}
    importance = {at: float((weights[at] * evidence.layers[at].gradient).abs().mean()) for at in adapters}
    b = sum(math.sqrt(m + n) * 4 for m, n in shapes.values())
    for at, adapter in adapters.items():
        m, n = shapes[at]
        share = b * importance[at] / sum(importance.values()) / math.sqrt(m + n)
        r = min(max(round(share), 2), 16)
        assert adapter.slices == r, at
        assert adapter.scale == 16 / math.sqrt(r)
        A, G = adapter.update.A.detach(), evidence.layers[at].gradient
        assert A.abs().max() <= 1 / math.sqrt(n)
        # The best B for −G ≈ B A, by least squares on the rows of A, times γ √d_in / alpha.
        best = torch.linalg.lstsq(A.T, -G.T, driver="gelsd").solution.T
        assert_close(adapter.update.B.detach(), 0.05 * math.sqrt(n) / 16 * best, rtol=1e-9, atol=1e-9)
        assert (adapter.delta().norm() > 0) == keep_step
    assert len(set(ranks_of(model).values())) > 2
    if keep_step:
        first = data(1)[0]
        ahead = model(**first).loss.item()
        with lorafamily.disabled(model):
            assert ahead < model(**first).loss.item()
            assert torch.equal(logits(model), base)
    else:
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("method", ["eva", "gora", "eva+adalora", "eva+lora2"])
def test_budgets_are_met(method):
    model = tiny()
    evidence = lorafamily.gather(model, method, data(2), rank=16)
    uneven = 0
    for budget in (1_000, 2_222, 4_000, 5_987):
        lorafamily.apply(model, method, budget=budget, evidence=evidence, seed=0)
        placement = placement_of(model)
        method_, sizing = placement.method, placement.sizing
        cheapest = min(
            method_.count(a.update.d_in, a.update.d_out, sizing.ranks[at] + 1)
            - method_.count(a.update.d_in, a.update.d_out, sizing.ranks[at])
            for at, a in placement.adapters.items()
            if sizing.ranks[at] < min(a.update.d_in, a.update.d_out)
        )
        assert budget - cheapest < placement.trainable() == sizing.initial_parameters <= budget
        uneven += len(set(sizing.ranks.values())) > 1
        lorafamily.remove(model)
    assert uneven >= 3
    if "lora2" not in method:
        lorafamily.apply(model, method, rank_budget=50, evidence=evidence, seed=0)
        assert lorafamily.summary(model).rank == 50
        lorafamily.remove(model)
    lorafamily.apply(model, method, budget=4_000, budget_at="end", evidence=evidence, seed=0)
    assert (placement_of(model).trainable() > 4_000) == ("ada" in method or "lora2" in method)


def test_a_cap_on_ranks_holds_and_one_ranks_are_equal():
    model = tiny()
    evidence = lorafamily.gather(model, "eva", data(2), rank=4)
    assert set(ranks_of(lorafamily.apply(tiny(), "eva", rank=4, rho=1, evidence=evidence)).values()) == {4}
    assert max(ranks_of(lorafamily.apply(tiny(), "eva", rank=4, evidence=evidence)).values()) > 5
    assert max(ranks_of(lorafamily.apply(tiny(), "eva", rank=4, rho=1.25, evidence=evidence)).values()) == 5
    given = {"query": 3, "mlp": 1}
    by_hand = lorafamily.apply(tiny(), "eva", rank=given, evidence=evidence)
    assert all(rank == (3 if "query" in at else 1 if "mlp" in at else 0) for at, rank in ranks_of(by_hand).items())
    first = placement_of(by_hand).adapters["blocks.0.attention.query"]
    assert_close(first.factors()[1], evidence.layers["blocks.0.attention.query"].directions[:3])
    bounded = lorafamily.apply(tiny(), "gora", rank=4, data=data(1), rank_min=3, rank_max=5)
    assert set(ranks_of(bounded).values()) == {3, 4, 5} or set(ranks_of(bounded).values()) == {3, 5}


@pytest.mark.parametrize("method", ["eva", "gora"])
def test_looking_leaves_nothing_behind_and_is_deterministic(method, tmp_path):
    model = tiny().train()
    parameter = model.get_parameter("blocks.0.attention.query.weight")
    parameter.grad = torch.ones_like(parameter)
    other = model.get_parameter("blocks.1.attention.query.weight").requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = lorafamily.gather(model, method, data(2), rank=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert parameter.requires_grad
    assert not other.requires_grad
    assert other.grad is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not [m for m in model.modules() if m._forward_pre_hooks]
    # Beside an adapter that is active the base is looked at.
    perturb_(lorafamily.apply(model, "lora", rank=2, name="other", seed=0))
    again = lorafamily.gather(model, method, data(2), rank=2, name="second")
    kept = lorafamily.Evidence.load(again.save(tmp_path / "evidence.safetensors"))
    assert kept.batches == 2
    for at in first.layers:
        for name in ("directions", "explained", "gradient"):
            values = [getattr(one.layers[at], name) for one in (first, again, kept)]
            assert all(value is None for value in values) or torch.equal(values[0], values[1]), name
            assert values[1] is None or torch.equal(values[1], values[2])
    ours = [
        lorafamily.apply(tiny(), method, rank=2, seed=3, **given)
        for given in ({"data": data(2)}, {"evidence": kept}, {"data": iter(data(9)), "evidence_batches": 2})
    ]
    for model in ours[1:]:
        for (at, a), b in zip(ours[0].named_parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b), at


@pytest.mark.parametrize(
    "method", ["eva", "eva+alora", "eva+adalora", "eva+lora2", "gora", "gora+alora", "gora+rslora"]
)
def test_what_starts_from_data_trains_saves_and_merges(method, tmp_path):
    options = {"rounds": 2} if "alora" in method.split("+") else {}
    model = lorafamily.apply(tiny(), method, budget=3_000, data=data(2), seed=0, **options)
    if "gora" not in method:
        assert torch.equal(logits(model), logits(tiny()))
    history = lorafamily.train(model, data(), steps=40, lr=1e-2, validation=data(1), progress=False)
    assert history.smoothed_loss()[-1] < history.steps[0].loss
    assert lorafamily.summary(model).parameters <= 3_000
    lorafamily.save(model, tmp_path)
    adapted = logits(model)
    assert torch.equal(logits(lorafamily.load(tiny(), tmp_path)), adapted)
    assert_close(logits(lorafamily.merge(model)), adapted, rtol=1e-5, atol=1e-5)


def test_a_plan_needs_no_data():
    plan = lorafamily.plan(tiny(), "eva", budget=3_000)
    assert plan.use.adapters <= 3_000
    with torch.device("meta"):
        model = tiny().to("meta")
    assert lorafamily.summary(lorafamily.apply(model, "gora", budget=3_000)).parameters <= 3_000


MASKED = {**padded(), "labels": torch.full((6, 12), -100)}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"method": "eva"}, lorafamily.MethodError, '"eva" looks at inputs before training: pass data=batches'),
        ({"method": "gora"}, lorafamily.MethodError, '"gora" looks at gradients before training'),
        ({"method": "lora", "data": data(1)}, lorafamily.MethodError, '"lora" looks at no data.*leave out data'),
        ({"method": "lora", "loss_fn": len}, lorafamily.MethodError, '"lora" looks at no data.*leave out loss_fn'),
        ({"method": "lora", "evidence": 1}, lorafamily.MethodError, '"lora" looks at no data.*leave out evidence'),
        ({"method": "eva", "data": 1, "evidence": 1}, lorafamily.MethodError, "both given"),
        ({"method": "eva", "loss_fn": len}, lorafamily.MethodError, "loss_fn is for data"),
        ({"method": "eva", "evidence": 1}, lorafamily.MethodError, "evidence is a int"),
        ({"method": "eva", "data": data(1)[0]}, lorafamily.DataError, "must be batches"),
        ({"method": "eva", "data": []}, lorafamily.DataError, "data gave no batch"),
        ({"method": "eva", "data": data(1), "rho": 0.5}, lorafamily.MethodError, "rho=0.5"),
        ({"method": "eva", "data": data(1), "tau": 1.5}, lorafamily.MethodError, "tau=1.5"),
        ({"method": "gora", "data": data(1), "evidence_memory": -1}, lorafamily.MethodError, "evidence_memory=-1"),
        ({"method": "eva", "data": data(1), "evidence_batches": 0}, lorafamily.MethodError, "evidence_batches=0"),
        ({"method": "gora", "data": data(1), "rank_min": -1}, lorafamily.MethodError, "rank_min=-1"),
        ({"method": "gora", "data": data(1), "step": 0}, lorafamily.MethodError, "step=0"),
        ({"method": "gora", "data": data(1), "rank_min": 9, "rank_max": 8}, lorafamily.MethodError, "rank_min=9 is"),
        (
            {"method": "gora", "data": data(1), "rank_min": 9, "budget": 3_000},
            lorafamily.BudgetError,
            "rank_min everywhere costs",
        ),
        ({"method": "eva", "data": data(1), "targets": "embed"}, lorafamily.MethodError, "does not multiply its input"),
        ({"method": "eva+gora", "data": data(1)}, lorafamily.MethodError, "both methods decide the initialisation"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_changed(given, error, message):
    model = tiny()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        lorafamily.apply(model, **given)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not [m for m in model.modules() if m._forward_pre_hooks]


def test_data_that_says_nothing_is_refused():
    with pytest.raises(lorafamily.DataError, match="no label counts in the 1 batches"):
        lorafamily.apply(transformer("llama"), "gora", data=[MASKED])
    with pytest.raises(lorafamily.DataError, match="called with nothing that counts"):
        lorafamily.apply(transformer("llama"), "eva", data=[MASKED])
    with pytest.raises(lorafamily.DataError, match=r"inputs that count, too few for 16 directions; give more data"):
        lorafamily.apply(transformer("llama"), "eva", rank=8, data=[padded(rows=1)])
    broken = transformer("llama")
    nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(lorafamily.DataError, match="batch 1 of data has a loss of nan"):
        lorafamily.apply(broken, "gora", data=[padded()])


def test_evidence_that_does_not_fit_is_refused(tmp_path):
    inputs = lorafamily.gather(tiny(), "eva", data(1), rank=2)
    with pytest.raises(lorafamily.MethodError, match=r"evidence has 4 directions .* and 8 of 16 are needed"):
        lorafamily.apply(tiny(), "eva", rank=4, evidence=inputs)
    with pytest.raises(lorafamily.MethodError, match="evidence has no gradient of blocks"):
        lorafamily.apply(tiny(), "gora", rank=4, evidence=inputs)
    some = lorafamily.gather(tiny(), "eva", data(1), rank=2, targets="query")
    with pytest.raises(lorafamily.MethodError, match=r"evidence has nothing of blocks\.0\.attention\.key"):
        lorafamily.apply(tiny(), "eva", rank=2, evidence=some)
    with pytest.raises(lorafamily.FileError, match=r"no file that Evidence\.save wrote"):
        lorafamily.Evidence.load(tmp_path / "nothing")
    lorafamily.save(lorafamily.apply(tiny(), "lora", rank=1), tmp_path)
    with pytest.raises(lorafamily.FileError, match="its format is None"):
        lorafamily.Evidence.load(tmp_path / "adapter.safetensors")
