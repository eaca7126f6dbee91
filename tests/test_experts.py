"""Experts in 3-D parameters: an adapter an expert, each with its own rank."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import lorafamily
from conftest import METHODS, in_turn, pairwise, perturb_
from lorafamily import TargetError
from lorafamily.adapter import Adapter
from lorafamily.functional import fast_path
from lorafamily.insight.grids import expert_grids
from lorafamily.insight.heatmaps import expert_heatmap
from lorafamily.layers.placement import placement_of

transformers = pytest.importorskip("transformers", reason="transformers is an extra; nothing to test without it")
pytest.importorskip(
    "transformers.integrations.moe", reason="this transformers has no registry of expert implementations"
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses what transformers is about to rename

EXPERTS = 8
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": EXPERTS}),
    "qwen3": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"num_experts": EXPERTS, "moe_intermediate_size": 24, "head_dim": 8},
    ),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {"num_local_experts": EXPERTS, "head_dim": 8}),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {"num_experts": EXPERTS}),
}
IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
families = pytest.mark.parametrize("family", FAMILIES)
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
# float32 logits of size one, from sums of some dozen terms.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def model_of(family: str, implementation: str = "grouped_mm", seed: int = 0) -> nn.Module:
    config, cls, settings = FAMILIES[family]
    config = getattr(transformers, config)(**COMMON, **settings)
    torch.manual_seed(seed)
    model = getattr(transformers, cls)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # gpt-oss begins with routers and experts of zeros or next to it
                parameter.normal_(std=0.1)
    model.set_experts_implementation(implementation)
    return model


def ids(rows: int = 2, length: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(seed))


def data(batches: int = 2) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids(seed=i), "labels": ids(seed=i)} for i in range(batches)]


def logits(model: nn.Module, x: Tensor | None = None) -> Tensor:
    return model(ids() if x is None else x).logits


def experts_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("Experts")]


def of_experts(model: nn.Module) -> dict[str, Adapter]:
    return {at: a for at, a in placement_of(model).adapters.items() if ".experts." in at}


def uneven(model: nn.Module) -> nn.Module:
    """Leave the start: factors moved, every expert with a rank of its own, some with none."""
    perturb_(model, size=0.2)
    for i, adapter in enumerate(of_experts(model).values()):
        adapter.resize(torch.arange(min(i % 4, adapter.slices)))
    assert {adapter.slices for adapter in of_experts(model).values()} == {0, 1, 2, 3}
    return model


def visits(model: nn.Module, x: Tensor) -> dict[str, set[int]]:
    """Experts that tokens go to, by the name of their layer."""
    found: dict[str, set[int]] = {}
    names = {id(module): name for name, module in model.named_modules()}

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        found[names[id(layer)]] = set(args[1].flatten().tolist())

    hooks = [layer.register_forward_pre_hook(note) for layer in experts_of(model)]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    assert len(found) == 2
    return found


@families
def test_default_targets_reach_the_experts_and_leave_routers_alone(family):
    model = model_of(family)
    weights = {name: p for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3}
    lorafamily.apply(model, rank=1)
    summary = lorafamily.summary(model)
    outside = {"embeddings", "output heads"}
    inside = summary.base_parameters - sum(n for kind, n in summary.not_reached.items() if kind in outside)
    assert summary.reached / inside >= 0.95
    assert set(summary.not_reached) <= outside | {"routers", "norms", "scales and biases elsewhere"}
    names = [at for at in placement_of(model).adapters if ".experts." in at]
    assert len(names) == EXPERTS * len(weights)
    assert not any("router" in at or at.endswith(".gate") for at in placement_of(model).adapters)
    for at, adapter in of_experts(model).items():
        layer, index, name = at.rsplit(".", 2)
        weight = model.get_submodule(layer).get_parameter(name)[int(index)]
        own = weight.T if family == "gpt_oss" else weight
        assert tuple(own.shape) == (adapter.update.d_out, adapter.update.d_in)


def test_experts_are_counted_one_by_one_where_some_are_left_out():
    model = lorafamily.apply(model_of("mixtral"), rank=1, targets=r"experts\.[01]\.down_proj")
    summary = lorafamily.summary(model)
    assert len(summary.rows) == 4
    assert summary.reached == 2 * 2 * 32 * 24
    assert summary.not_reached["experts"] == 2 * EXPERTS * 3 * 32 * 24 - summary.reached


@pairwise("family,implementation,method", list(FAMILIES), IMPLEMENTATIONS, ["lora", "lora2", "adalora"])
def test_the_start_is_the_base_to_the_last_bit(family, implementation, method):
    model = model_of(family, implementation)
    before = logits(model)
    lorafamily.apply(model, method, rank=2, seed=0)
    assert torch.equal(logits(model), before)
    lorafamily.remove(model)
    assert torch.equal(logits(model), before)


@in_turn("family,method", list(FAMILIES), METHODS, and_also=product(FAMILIES, ["lora2"]))
def test_every_method_starts_near_the_base_and_merges(family, method):
    model = model_of(family)
    before = logits(model)
    lorafamily.apply(model, method, rank=2, seed=0)
    assert_close(logits(model), before, **CLOSE)
    perturb_(model, size=0.1)
    adapted = logits(model)
    assert (adapted - before).abs().max() > 100 * CLOSE["atol"]
    assert_close(logits(lorafamily.merge(model)), adapted, **CLOSE)
    assert torch.equal(logits(lorafamily.unmerge(model)), adapted)


# Grouped products know no float64.
@pairwise("family,implementation,method", list(FAMILIES), ["batched_mm", "eager"], ["lora", "adalora+olora"])
def test_products_and_formed_weights_are_the_same_algebra(family, implementation, method):
    """One layer of experts alone: norms around it would round to float32."""
    model = model_of(family, implementation).double()
    uneven(lorafamily.apply(model, method, rank=3, seed=0))
    layer, x = experts_of(model)[0], torch.randn(12, 32, dtype=torch.float64, requires_grad=True)
    index = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(12)])
    share = torch.rand(12, 2, dtype=torch.float64)
    factors = [p for a in of_experts(model).values() for p in a.update.parameters() if p.numel()]
    found = []
    for on in (True, False):
        with fast_path(on):
            y = layer(x, index, share)
            found.append((y, torch.autograd.grad(y.square().sum(), [x, *factors], allow_unused=True)))
    (y, gradients), (formed, of_formed) = found
    assert_close(y, formed)
    for gradient, other in zip(gradients, of_formed, strict=True):
        nothing = torch.zeros((), dtype=torch.float64)  # None: of the other layer, or of an expert without a token
        if gradient is None:
            assert not (nothing if other is None else other).any()
        else:
            assert_close(gradient, other)
    merged = copy.deepcopy(model)
    lorafamily.merge(merged)
    assert_close(experts_of(merged)[0](x, index, share), y)


@families
@implementations
def test_only_visited_experts_get_gradients(family, implementation):
    model = model_of(family, implementation)
    perturb_(lorafamily.apply(model, rank=2, seed=0), size=0.1)
    x = ids(1, 3)
    visited = visits(model, x)
    assert all(0 < len(experts) < EXPERTS for experts in visited.values())
    logits(model, x).square().sum().backward()
    for at, adapter in of_experts(model).items():
        layer, index, _ = at.rsplit(".", 2)
        for parameter in adapter.update.parameters():
            if int(index) in visited[layer]:
                assert parameter.grad is not None
                assert parameter.grad.any()
            else:
                assert parameter.grad is None
    assert all(p.grad is None for name, p in model.named_parameters() if "lorafamily" not in name)


def test_an_optimizer_leaves_unvisited_experts_alone():
    model = lorafamily.apply(model_of("mixtral"), rank=2, seed=0)
    perturb_(model, size=0.1)
    before = {at: copy.deepcopy(a.state_dict()) for at, a in of_experts(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    x = ids(1, 3)
    visited = visits(model, x)
    logits(model, x).square().sum().backward()
    optimizer.step()
    for at, adapter in of_experts(model).items():
        layer, index, _ = at.rsplit(".", 2)
        same = all(torch.equal(value, before[at][key]) for key, value in adapter.state_dict().items())
        assert same != (int(index) in visited[layer])


@families
def test_experts_of_different_ranks_are_saved_and_merged(family, tmp_path):
    model = uneven(lorafamily.apply(model_of(family), "adalora", rank=3, seed=0))
    adapted = logits(model)
    lorafamily.save(model, tmp_path / "one")
    again = lorafamily.load(model_of(family), tmp_path / "one")
    assert torch.equal(logits(again), adapted)
    ranks = [{at: adapter.slices for at, adapter in of_experts(one).items()} for one in (again, model)]
    assert ranks[0] == ranks[1]
    lorafamily.save(again, tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    assert_close(logits(lorafamily.merge(again)), adapted, **CLOSE)
    other = model_of(family)
    layer = experts_of(other)[1]
    layer.down_proj = nn.Parameter(layer.down_proj[:4])
    with pytest.raises(lorafamily.FileError, match=r"experts\.4\.down_proj is missing"):
        lorafamily.load(other, tmp_path / "one")


@pytest.mark.parametrize(
    ("family", "targets"),
    [*product(FAMILIES, [None]), ("mixtral", r"experts\.\d+\.down_proj"), ("gpt_oss", r"experts")],
)
def test_peft_computes_the_same_from_target_parameters(family, targets, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is an extra; nothing to compare with without it")
    model = model_of(family)
    base = copy.deepcopy(model)
    perturb_(lorafamily.apply(model, rank=3, targets=targets, seed=0), size=0.1)
    expected = logits(model)
    assert (expected - logits(base)).abs().max() > 100 * CLOSE["atol"]
    lorafamily.export_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert_close(logits(theirs), expected, **CLOSE)
    theirs.save_pretrained(tmp_path / "again")
    ours = lorafamily.import_peft(copy.deepcopy(base), tmp_path / "again")
    assert_close(logits(ours), expected, **CLOSE)
    assert placement_of(ours).trainable() == placement_of(model).trainable()


def test_peft_finds_the_layers_of_an_architecture_with_experts_that_has_none(tmp_path, monkeypatch):
    """It would take the dense layers' names for those of experts."""
    peft = pytest.importorskip("peft", reason="peft is an extra; nothing to compare with without it")
    config, cls, settings = FAMILIES["qwen3"]
    monkeypatch.setitem(FAMILIES, "qwen3", (config, cls, settings | {"mlp_only_layers": [0, 1]}))
    model = model_of("qwen3")
    assert not any(parameter.ndim == 3 for parameter in model.parameters())
    base = copy.deepcopy(model)
    perturb_(lorafamily.apply(model, rank=3, seed=0), size=0.1)
    lorafamily.export_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert_close(logits(theirs), logits(model), **CLOSE)


# peft looks for what ranks are given for among layers, and says so of parameters, whose ranks it does set.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match any targeted module")
def test_uneven_experts_are_filled_up_for_peft_and_servers_refused(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is an extra; nothing to compare with without it")
    model = model_of("qwen3")
    base = copy.deepcopy(model)
    uneven(lorafamily.apply(model, rank=3, seed=0))
    next(iter(of_experts(model).values())).scale = 3.0
    lorafamily.export_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert_close(logits(theirs), logits(model), **CLOSE)
    with pytest.raises(lorafamily.StateError, match=r"experts in one parameter.*layout=\"peft\""):
        lorafamily.export_peft(model, tmp_path / "served", layout="serving")


def test_a_peft_file_for_other_experts_is_refused(tmp_path):
    pytest.importorskip("peft", reason="peft is an extra; nothing to compare with without it")
    model = perturb_(lorafamily.apply(model_of("olmoe"), rank=3, targets="experts", seed=0))
    lorafamily.export_peft(model, tmp_path)
    other = model_of("olmoe")
    for layer in experts_of(other):
        layer.down_proj = nn.Parameter(layer.down_proj[:4])
    with pytest.raises(lorafamily.FileError, match=r"for 4 experts of rank 3 they need 12 rows"):
        lorafamily.import_peft(other, tmp_path)


SCHEDULES = {
    "adalora": {"warmup": 1, "final": 2, "interval": 1, "target": 0.5},
    "lora2": {"warmup": 1, "final": 2, "interval": 1, "target": 0.5},
    "alora": {"rounds": 2, "warmup": 1, "interval": 2, "scorer": "first-order"},
}


@in_turn("family,method", list(FAMILIES), list(SCHEDULES), and_also=[("gpt_oss", "adalora")])
def test_ranks_of_experts_move_within_the_budget(family, method):
    model, budget = model_of(family), 40_000
    lorafamily.apply(model, method, budget=budget, seed=0, **SCHEDULES[method])
    start = {at: a.slices for at, a in of_experts(model).items()}
    assert placement_of(model).trainable() <= budget
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    session = lorafamily.session(model, optimizer, steps=6, validation=data())
    for batch in data(6):
        session.backward(model(**batch).loss)
        optimizer.step()
        session.step()
        optimizer.zero_grad()
        assert placement_of(model).trainable() <= budget
    now = {at: a.slices for at, a in of_experts(model).items()}
    assert now != start
    assert len(set(now.values())) > 1
    adapted = logits(model.eval())
    assert_close(logits(lorafamily.merge(model)), adapted, **CLOSE)


@pytest.mark.parametrize("scores", ["sensitivity", "first-order", "exact"])
def test_a_slice_of_an_expert_that_was_never_visited_scores_as_one_without_use(scores):
    """Zero: what no token used, the loss does not miss. Of an ablation that is the loss without change, as for the
    definition S(M) − S(M∖i) + S(M_i), in which every slice has −loss of the bare base in common."""
    model = model_of("mixtral")
    x = ids(1, 3)
    batch, visited = {"input_ids": x, "labels": x}, visits(model, x)
    pruning = {"scorer": scores, "warmup": 1, "final": 1, "interval": 1, "target": 0.5}
    lorafamily.apply(model, "lora+pruning", rank=1, targets=[r"q_proj", r"experts\.\d+\.down"], seed=0, **pruning)
    perturb_(model, size=0.01)
    # Adapters move what comes to the routers: unused are those that no token goes to with them and without.
    unused = {layer: set(range(EXPERTS)) - own - visited[layer] for layer, own in visits(model, x).items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    session = lorafamily.session(model, optimizer, steps=4, validation=[batch])
    session.backward(model(**batch).loss)
    optimizer.step()
    session.step()
    found = session.allocator.scores()
    of_unused = torch.cat([
        values for at, values in found.items()
        if ".experts." in at and int(at.rsplit(".", 2)[1]) in unused[at.rsplit(".", 2)[0]]
    ])  # fmt: skip
    assert len(of_unused) > 0
    if scores == "sensitivity":
        assert not of_unused.any()
        assert all(values.any() for at, values in found.items() if ".experts." not in at)
    else:  # the bare base's −loss, and nothing else
        with lorafamily.disabled(model), torch.no_grad():
            bare = -model(**batch).loss.double()
        assert_close(of_unused, bare.expand_as(of_unused), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_the_loss", [False, True])
@pytest.mark.parametrize("method", ["adalora", "lora2"])
def test_the_penalty_makes_no_use_of_an_expert_that_was_never_visited(method, in_the_loss):
    """These score on the total gradient, and the penalty has one for every adapter: it would count as importance."""
    model = model_of("mixtral")
    x = ids(1, 3)
    schedule = {"warmup": 1, "final": 2, "interval": 1, "target": 0.5}
    lorafamily.apply(model, method, rank=2, targets=r"experts\.\d+\.down", seed=0, **schedule)
    visited = visits(model, x[:, :-1])  # nothing is predicted from the last token
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    session = lorafamily.session(model, optimizer, steps=6)
    for _ in range(2):
        loss = model(input_ids=x, labels=x).loss
        if in_the_loss:
            (3 * loss + 3 * session.penalty()).backward()
        else:
            session.backward(loss)
        optimizer.step()
        if session.steps_done == 1:
            found = session.allocator.scores()
        session.step()
        optimizer.zero_grad()
    for at, values in found.items():
        layer, index, _ = at.rsplit(".", 2)
        assert bool(values.any()) == (int(index) in visited[layer]), at


def test_a_run_in_which_experts_stay_unvisited_is_not_refused():
    model = lorafamily.apply(model_of("mixtral"), rank=1, seed=0)
    batch = {"input_ids": ids(1, 3), "labels": ids(1, 3)}
    with pytest.warns(UserWarning, match=r"no batch of the run reached \d+ of \d+ adapters: .*experts"):
        lorafamily.train(model, [batch], steps=12, lr=1e-4, progress=False)


def test_the_picture_has_an_axis_for_experts():
    model = uneven(lorafamily.apply(model_of("qwen3"), rank=3, seed=0))
    ranks = {at: a.slices for at, a in placement_of(model).adapters.items()}
    grids = expert_grids(ranks)
    assert list(grids) == ["mlp.experts.*.gate_up_proj", "mlp.experts.*.down_proj"]
    for kind, (layers, experts, grid) in grids.items():
        assert layers == ["0", "1"]
        assert experts == [str(i) for i in range(EXPERTS)]
        for layer in range(2):
            for expert in range(EXPERTS):
                assert grid[layer, expert] == ranks[f"model.layers.{layer}." + kind.replace("*", str(expert))]
    figure = expert_heatmap(dict.fromkeys(ranks, 3), ranks, "ranks")
    assert len(figure.axes) == 5  # two kinds, start and now, and the colours
    plain = {"layers.0.query": 3, "layers.1.query": 3}
    assert expert_heatmap(plain, None, "ranks") is None


def test_a_table_has_one_line_for_all_experts_of_a_layer():
    model = uneven(lorafamily.apply(model_of("mixtral"), rank=3, seed=0))
    summary = lorafamily.summary(model)
    lines = [line for line in str(summary).splitlines() if "experts" in line and "down_proj" in line]
    assert len(lines) == 2
    assert "experts.0–7.down_proj" in lines[0]
    assert "3 → 1–3" in lines[0]
    rows = [
        row for row in summary.rows if row.module.startswith("model.layers.0.mlp.experts.") and "down" in row.module
    ]
    assert f"{sum(row.parameters for row in rows):,}" in lines[0]


def test_a_plan_counts_experts_and_names_them_once():
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**COMMON, num_local_experts=EXPERTS))
    plan = lorafamily.plan(model, rank=2)
    assert "mlp.experts.*.gate_up_proj" in str(plan)
    assert "experts.3" not in str(plan)
    ours = lorafamily.apply(model_of("mixtral"), rank=2)
    assert plan.use.adapters == placement_of(ours).trainable()


def test_experts_outside_the_registry_are_refused_by_name():
    class OwnExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(4, 8, 16))

    model = nn.ModuleDict({"experts": OwnExperts(), "proj": nn.Linear(8, 8)})
    with pytest.raises(TargetError, match=r"experts cannot carry an adapter: OwnExperts holds experts in gate_up_proj"):
        lorafamily.apply(model, rank=1, targets="gate_up_proj")
    lorafamily.apply(model, rank=1)
    assert [*placement_of(model).adapters] == ["proj"]


def test_experts_in_a_list_of_linear_layers_are_layers_like_others():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(8, 4)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            best = self.gate(x).argmax(-1)
            return torch.stack([self.experts[int(i)](row) for i, row in zip(best, x, strict=True)])

    torch.manual_seed(0)
    model = lorafamily.apply(nn.ModuleDict({"mlp": Mixture()}), rank=2, seed=0)
    assert [*placement_of(model).adapters] == [f"mlp.experts.{i}" for i in range(4)]
    perturb_(model)
    x = torch.randn(16, 8)
    adapted = model["mlp"](x)
    assert_close(lorafamily.merge(model)["mlp"](x), adapted, **CLOSE)


def test_a_router_trains_where_it_is_named():
    model = lorafamily.apply(model_of("mixtral"), rank=1, also_train=r"layers\.0\.mlp\.gate\.weight")
    logits(model).square().sum().backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None and "lorafamily" not in name]
    assert trained == ["model.layers.0.mlp.gate.weight"]


def test_half_precision_and_dropout_act_on_experts():
    model = model_of("qwen3").bfloat16()
    perturb_(lorafamily.apply(model, rank=2, dropout=0.5, seed=0), size=0.1)
    assert logits(model).dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
