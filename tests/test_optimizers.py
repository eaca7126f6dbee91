"""Optimisers under ranks that change: state follows or begins anew with a warning, and none sees an empty tensor."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import lorafamily
from conftest import perturb_
from lorafamily.adapter import Adapter
from lorafamily.allocation.run import Run
from lorafamily.allocation.surgery import follow_resize, forget
from lorafamily.layers.placement import placement_of
from lorafamily.training.step_hooks import StepHooks
from lorafamily.variants.lora import Plain

METHODS = {"adalora": {"rank": 4}, "alora": {"rank": 4}, "lora2": {"width": 6, "slices": 4}}
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class PerParameter(torch.optim.Optimizer):
    """An optimiser that treats one parameter after the other."""

    def __init__(self, parameters, lr=1e-2):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, self.state[p], group["lr"])

    def update(self, p, state, lr):
        raise NotImplementedError


class Lion(PerParameter):
    """Chen et al. 2023, arXiv:2302.06675."""

    def __init__(self, parameters, lr=1e-3):
        super().__init__(parameters, lr)

    def update(self, p, state, lr):
        m = state.setdefault("exp_avg", torch.zeros_like(p))
        p.sub_(m.lerp(p.grad, 0.1).sign(), alpha=lr)
        m.lerp_(p.grad, 0.01)


class SM3(PerParameter):
    """Anil et al. 2019, arXiv:1901.11150: one accumulator an axis, with names that do not tell which."""

    def update(self, p, state, lr):
        for i in range(p.ndim) if not state else ():
            state[f"accumulator_{i}"] = torch.zeros([n if axis == i else 1 for axis, n in enumerate(p.shape)])
        v = p.grad.square()
        for i in range(p.ndim):
            v = torch.minimum(v, state[f"accumulator_{i}"] + p.grad.square())
        p.sub_(p.grad / (v.sqrt() + 1e-8), alpha=lr)
        for i in range(p.ndim):
            others = [axis for axis in range(p.ndim) if axis != i]
            state[f"accumulator_{i}"] = v.amax(others, keepdim=True) if others else v


class Shampoo(PerParameter):
    """Gupta et al. 2018, arXiv:1802.09568: a matrix an axis, whose entries mix the slices."""

    def update(self, p, state, lr):
        g = p.grad.reshape(len(p), -1)
        if not state:
            state["preconditioner"] = 1e-3 * torch.eye(len(g))
        state["preconditioner"] += g @ g.T
        values, vectors = torch.linalg.eigh(state["preconditioner"])
        root = vectors @ torch.diag(values.clamp_min(1e-8) ** -0.5) @ vectors.T
        p.sub_((root @ g).view_as(p), alpha=lr)


class Both(torch.optim.Optimizer):
    """Two optimisers in one, as people write it who train matrices with Muon and the rest with AdamW."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self):
        return {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step()


class Sub(torch.optim.AdamW):
    """Calls its parent's step, so that hooks are called twice."""

    def step(self, closure=None):
        return super().step(closure)


def muon(parameters):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    rest = [p for p in parameters if p.ndim != 2]
    matrices = torch.optim.Muon([p for p in parameters if p.ndim == 2], lr=1e-2)
    return Both(matrices, torch.optim.AdamW(rest, lr=1e-2)) if rest else matrices


def lora_plus(parameters):
    """Two learning rates (Hayou et al. 2024, arXiv:2402.12354)."""
    half = len(parameters) // 2
    groups = [{"params": parameters[:half], "lr": 1e-2}, {"params": parameters[half:], "lr": 2e-3}]
    return torch.optim.AdamW(groups)


def of(package: str, name: str, **options) -> Make:
    def make(parameters):
        module = pytest.importorskip(package, reason=f"{package} is not installed", exc_type=ImportError)
        optimizer = getattr(module, name)(parameters, **{"lr": 1e-2, **options})
        if package == "schedulefree":
            optimizer.train()
        return optimizer

    return make


T = "torch.optim"
FOLLOW: dict[str, Make] = {
    "AdamW": of(T, "AdamW"),
    "AdamW foreach amsgrad": of(T, "AdamW", foreach=True, amsgrad=True),
    "AdamW fused": of(T, "AdamW", fused=True),
    "Adam": of(T, "Adam", weight_decay=0.1),
    "AdamW with super().step": Sub,
    "LoRA+": lora_plus,
    "SGD with momentum": of(T, "SGD", momentum=0.9, nesterov=True),
    "Adagrad": of(T, "Adagrad", initial_accumulator_value=0.1),
    "Adadelta": of(T, "Adadelta", lr=1.0),
    "Adamax": of(T, "Adamax"),
    "NAdam": of(T, "NAdam"),
    "RAdam": of(T, "RAdam"),
    "RMSprop": of(T, "RMSprop", momentum=0.9, centered=True),
    "Rprop": of(T, "Rprop"),
    "ASGD": of(T, "ASGD"),
    "Adafactor": of(T, "Adafactor"),
    "Adafactor of transformers": of("transformers.optimization", "Adafactor", relative_step=False),
    "Adafactor of transformers, first moment": of(
        "transformers.optimization", "Adafactor", relative_step=False, scale_parameter=False, beta1=0.9
    ),
    "Lion": Lion,
    "SM3": SM3,
    "Muon": muon,
    "Lion of lion_pytorch": of("lion_pytorch", "Lion"),
    "Prodigy": of("prodigyopt", "Prodigy", lr=1.0),
    "AdamW schedule-free": of("schedulefree", "AdamWScheduleFree"),
    "SGD schedule-free": of("schedulefree", "SGDScheduleFree", lr=0.1),
}
ANEW: dict[str, Make] = {"Shampoo": Shampoo}
ALL = FOLLOW | ANEW


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch):
    """torchao compiles its step, which takes most of the time here."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def beginning_anew(anew: bool):
    """Where a warning is due, it must come; elsewhere any is an error."""
    return pytest.warns(UserWarning, match="cannot follow a change of rank") if anew else contextlib.nullcontext()


def layers(d_in: int = 12, d_out: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(d_in, d_out) for name in ("a", "b", "c")})


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(seed))
    sum((model[name](x) - 1).square().mean() for name in "abc").backward()
    optimizer.step()
    model.zero_grad(set_to_none=True)


def state_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict:
    return dict(optimizer.state.get(parameter, {}))


def shapes(state: dict, other: dict) -> dict:
    """Those of tensors that are no single numbers in either."""
    tensors = {
        key: value for key, value in state.items() if isinstance(value, Tensor) and isinstance(other[key], Tensor)
    }
    return {key: tuple(value.shape) for key, value in tensors.items() if value.ndim and other[key].ndim}


def same_as_fresh(make: Make, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The state's shapes are those that an optimiser made now would have."""
    other = copy.deepcopy(model)
    fresh = make(trained(other))
    StepHooks(fresh, placement_of(other).adapters)
    step(other, fresh)
    for mine, its in zip(trained(model), trained(other), strict=True):
        if mine.numel():
            own, expected = state_of(optimizer, mine), state_of(fresh, its)
            assert own.keys() == expected.keys()
            assert shapes(own, expected) == shapes(expected, own)


def sliced(adapter: Adapter, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """All state tensors of parameters that have slices; Prodigy's flat ones in the parameter's shape."""
    return [
        (f"{name} {key}", value.view(p.shape) if key in ("s", "p0") and value.ndim else value)
        for name in adapter.update.slice_axes
        for p in [adapter.update.get_parameter(name)]
        for key, value in state_of(optimizer, p).items()
        if isinstance(value, Tensor)
    ]


def same_bits(before: list[tuple[str, Tensor]], after: list[tuple[str, Tensor]], keep: Tensor) -> None:
    """What changed its size did so along one axis, and keeps the survivors' entries there; the rest is as it was."""
    cut = 0
    for (name, old), (its, new) in zip(before, after, strict=True):
        assert name == its
        axes = [axis for axis in range(old.ndim) if old.shape[axis] != new.shape[axis]]
        assert len(axes) <= 1
        if axes:
            old, new = old.index_select(axes[0], keep), new.narrow(axes[0], 0, len(keep))
            cut += 1
        assert torch.equal(new, old)
    assert cut


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ALL)
def test_every_optimiser_follows_ranks_to_zero_and_back(name, method):
    make, anew = ALL[name], name in ANEW
    model = lorafamily.apply(layers(), method, seed=0, targets=lambda n, m: True, **METHODS[method])
    adapters = placement_of(model).adapters
    optimizer = make(trained(model))
    StepHooks(optimizer, adapters)
    for inner in getattr(optimizer, "optimizers", [optimizer]):
        inner.register_step_pre_hook(lambda o, *_: seen.extend(p for g in o.param_groups for p in g["params"]))
    run = Run(model, adapters, steps=1, optimizer=optimizer)
    for i in range(3):
        seen: list[Tensor] = []
        step(model, optimizer, i)

    changes = {"a": ([0, 2, 3], 2), "b": ([1], 0)}
    before = {at: sliced(adapters[at], optimizer) for at in changes}
    with beginning_anew(anew):
        for at, (keep, add) in changes.items():
            run.resize(at, torch.tensor(keep), add)
    for at, (keep, _) in changes.items():
        if not anew:
            same_bits(before[at], sliced(adapters[at], optimizer), torch.tensor(keep))
    step(model, optimizer, 3)
    same_as_fresh(make, model, optimizer)

    with beginning_anew(anew):
        run.resize("c", torch.arange(0))
    for i in range(2):
        seen = []
        step(model, optimizer, i)
        assert len({id(p) for p in seen}) == len(trained(model)) - len(adapters["c"].update.slice_axes)
        assert all(p.numel() for p in seen)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in trained(model)}
    run.resize("c", torch.arange(0), add=2)
    delta = adapters["c"].delta()
    for i in range(3):
        step(model, optimizer, i)
    assert (adapters["c"].delta() - delta).abs().max() > 0  # it learns again
    assert all(p.isfinite().all() for p in trained(model))
    same_as_fresh(make, model, optimizer)


@pytest.mark.parametrize("name", ALL)
def test_every_optimiser_trains_through_decisions(name):
    """ALoRA drops all that a module has: some come to rank 0 on the way, and get ranks again."""
    model, x = layers(), torch.randn(6, 12)
    lorafamily.apply(
        model,
        "alora",
        rank=1,
        seed=0,
        targets=lambda n, m: True,
        rounds=4,
        warmup=3,
        interval=2,
        drop=1,
        scorer="sensitivity",
    )
    made = []

    def make(parameters):
        made.append(ALL[name](parameters))
        return made[0]

    def loss_fn(model, batch):
        return sum((model[name](batch) - 1).square().mean() for name in "abc")

    with beginning_anew(name in ANEW):
        history = lorafamily.train(
            model, [x], steps=12, optimizer=make, validation=[x], loss_fn=loss_fn, progress=False, check_gradients=False
        )
    assert any(0 in decision.after.values() for decision in history.decisions)
    assert sum(len(group["params"]) for group in made[0].param_groups) == len(trained(model))


def resized(optimizer: torch.optim.Optimizer, update: Plain, keep: list[int], add: int = 0) -> None:
    for change in update.resize(torch.tensor(keep, dtype=torch.long), update.fresh(add, torch.Generator())):
        follow_resize(optimizer, change)


def stepped(make: Make, d_in: int, d_out: int, rank: int, steps: int = 3) -> tuple[Plain, torch.optim.Optimizer]:
    torch.manual_seed(0)
    update = Plain(d_in, d_out, rank)
    with torch.no_grad():
        update.reset(torch.Generator())
    optimizer = make(list(update.parameters()))
    for _ in range(steps):
        one_step(update, optimizer)
    return update, optimizer


def one_step(update: Plain, optimizer: torch.optim.Optimizer) -> None:
    for parameter in update.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


@pytest.mark.parametrize(
    ("make", "row", "column"),
    [
        (FOLLOW["Adafactor"], "row_var", "col_var"),
        (FOLLOW["Adafactor of transformers"], "exp_avg_sq_row", "exp_avg_sq_col"),
        (SM3, "accumulator_0", "accumulator_1"),
    ],
)
@pytest.mark.parametrize("rank", [1, 5, 6])
def test_means_over_rows_and_columns_go_with_their_axis_whatever_the_shapes_coincide_in(make, row, column, rank):
    """At rank 6 A is square, at rank 1 a mean over its rows has its shape."""
    update, optimizer = stepped(make, 6, 9, rank)
    before = {name: dict(optimizer.state[p]) for name, p in update.named_parameters()}
    resized(optimizer, update, [rank - 1], add=2)
    for name, cut, whole in (("A", row, column), ("B", column, row)):
        after = optimizer.state[update.get_parameter(name)]
        assert torch.equal(after[whole], before[name][whole])
        assert torch.equal(after[cut].flatten(), torch.cat([before[name][cut].flatten()[-1:], torch.zeros(2)]))
    one_step(update, optimizer)


def test_what_does_not_begin_at_zero_begins_as_it_does():
    for name, key, expected in (
        ("AdamW schedule-free", "z", lambda p: p),
        ("ASGD", "ax", lambda p: p),
        ("Prodigy", "p0", lambda p: p.flatten()),
        ("Rprop", "step_size", lambda p: torch.full_like(p, 1e-2)),
        ("Adagrad", "sum", lambda p: torch.full_like(p, 0.1)),
    ):
        try:
            update, optimizer = stepped(FOLLOW[name], 6, 9, 4)
        except pytest.skip.Exception:
            continue
        resized(optimizer, update, [0, 1], add=2)
        new = optimizer.state[update.A][key].view(4, 6)[2:]
        assert new.any()
        assert torch.equal(new, expected(update.A.detach()).view(4, 6)[2:]), name


@pytest.mark.parametrize(("kind", "rounding"), [("AdamW8bit", 1 / 128), ("AdamW4bit", 1 / 8), ("AdamWFp8", 1 / 16)])
def test_quantised_moments_of_torchao_are_cut(kind, rounding):
    module = pytest.importorskip("torchao.optim", reason="torchao is not installed", exc_type=ImportError)
    make = getattr(module, kind)
    update, optimizer = stepped(lambda p: make(p, lr=1e-2), 512, 512, 16)
    before = optimizer.state[update.A]["exp_avg"]
    assert type(before).__name__.startswith("OptimState")
    resized(optimizer, update, list(range(0, 16, 2)), add=2)  # 10 × 512: a whole number of blocks
    after = optimizer.state[update.A]["exp_avg"]
    assert type(after) is type(before)
    assert after.shape == update.A.shape
    kept = before.dequantize()[::2]
    # Blocks are other ones now, so values are rounded again, by at most half the widest gap between two codes: as a
    # share of a block's largest value 1/128 in 8 bits and 1/8 in 4; of a value 1/16 in float8 with 3 bits of mantissa.
    assert_close(after.dequantize()[:8], kept, rtol=0, atol=rounding * kept.abs().max().item())
    assert (after.dequantize()[:8] * kept).sum() > 0.9 * kept.square().sum()
    one_step(update, optimizer)
    resized(optimizer, update, [0, 1, 2])  # too small for blocks
    assert type(optimizer.state[update.A]["exp_avg"]) is Tensor
    one_step(update, optimizer)
    resized(optimizer, update, [])
    resized(optimizer, update, [], add=16)
    one_step(update, optimizer)
    assert update.A.isfinite().all()


def test_blocks_of_bitsandbytes_begin_anew_and_small_tensors_follow():
    make = of("bitsandbytes.optim", "AdamW8bit")
    update, optimizer = stepped(make, 512, 512, 16)
    with pytest.warns(UserWarning, match=r'AdamW8bit keeps "state1" in a form that cannot follow a change of rank'):
        resized(optimizer, update, list(range(0, 16, 2)))
    assert not optimizer.state.get(update.A)
    one_step(update, optimizer)
    update, optimizer = stepped(make, 16, 16, 4)
    before = optimizer.state[update.A]["state1"]
    resized(optimizer, update, [1, 2])
    assert torch.equal(optimizer.state[update.A]["state1"], before[1:3])
    one_step(update, optimizer)


def test_codes_in_blocks_of_any_package_are_not_taken_for_moments():
    """Codes have the parameter's shape, and the scales of as many blocks as there are slices that of a row."""

    class Blocks(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            for p in self.param_groups[0]["params"]:
                if "scales" not in self.state[p]:
                    self.state[p] = {"codes": torch.zeros_like(p, dtype=torch.uint8), "scales": torch.ones(len(p))}

    update, optimizer = stepped(lambda p: Blocks(p, lr=1e-2), 6, 9, 4)
    with pytest.warns(UserWarning, match='Blocks keeps "codes"'):
        resized(optimizer, update, [1, 3])
    assert not optimizer.state[update.A]


def test_what_cannot_train_adapters_is_refused_before_training():
    model = lorafamily.apply(layers(), "lora", rank=2, seed=0, targets=lambda n, m: True)
    before = copy.deepcopy(model.state_dict())
    for make, message in (
        (torch.optim.LBFGS, "LBFGS needs a closure"),
        (torch.optim.SparseAdam, "SparseAdam takes sparse gradients"),
        (lambda parameters: Both(torch.optim.LBFGS(parameters)), "LBFGS needs a closure"),
        (lambda parameters: nn.Linear(1, 1), "optimizer is a Linear; it must be"),
    ):
        with pytest.raises(lorafamily.TrainingError, match=message):
            StepHooks(make(trained(model)), placement_of(model).adapters)
    with pytest.raises(lorafamily.TrainingError, match="LBFGS needs a closure"):
        lorafamily.train(model, [torch.randn(2, 12)], steps=1, optimizer=torch.optim.LBFGS, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_adapters_that_are_left_out_leave_no_state():
    """Adagrad has state from the start; what no group trains would be in no state dict."""
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.Adagrad(parameters)
    forget(optimizer, {id(parameters[0])})
    assert list(optimizer.state) == optimizer.param_groups[0]["params"] == parameters[1:]
    assert len(optimizer.state_dict()["state"]) == 1


def frozen(method: str = "olora", rank: int = 3, **options) -> tuple[nn.Module, dict[str, Adapter]]:
    model = lorafamily.apply(layers().double(), method, rank=rank, seed=0, targets=lambda n, m: True, **options)
    return model, placement_of(model).adapters


def test_decay_is_that_of_adamw_counted_from_the_frozen_start():
    """Against AdamW on p − p0 with the same gradients, through a learning rate that changes."""
    model, adapters = frozen()
    own = [p for a in adapters.values() for p in a.update.parameters()]
    starts = [p.detach().clone() for a in adapters.values() for p in a.initial.parameters()]
    perturb_(model)
    reference = [nn.Parameter((p - start).detach()) for p, start in zip(own, starts, strict=True)]
    optimizers = [torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.3) for parameters in (own, reference)]
    StepHooks(optimizers[0], adapters)
    for i in range(20):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + i)
        for p, r in zip(own, reference, strict=True):
            p.grad = torch.randn_like(p)
            r.grad = p.grad.clone()
        own[0].grad = reference[0].grad = None  # what has no gradient is not decayed either
        for optimizer in optimizers:
            optimizer.step()
    for p, r, start in zip(own, reference, starts, strict=True):
        assert_close(p - start, r, rtol=0, atol=1e-12)  # float64, twenty roundings at numbers near 1


@pytest.mark.parametrize(
    "make", [Sub, lora_plus, lambda p: Both(torch.optim.AdamW(p)), FOLLOW["Adafactor"], FOLLOW["Muon"]]
)
def test_decay_is_applied_once_whatever_wraps_the_optimiser(make):
    model, adapters = frozen()
    perturb_(model)
    optimizer = make([p for a in adapters.values() for p in a.update.parameters()])
    for group in optimizer.param_groups:
        group |= {"lr": 1e-3, "weight_decay": 50.0}
    StepHooks(optimizer, adapters)
    StepHooks(optimizer, adapters)  # a second run with the same optimiser
    away = [a.update.A.detach() - a.initial.A for a in adapters.values()]
    for p in trained(model):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for a, before in zip(adapters.values(), away, strict=True):
        assert_close(a.update.A - a.initial.A, 0.95 * before, rtol=1e-12, atol=1e-12)
    assert all(group["weight_decay"] == 50 for group in optimizer.param_groups)


@pytest.mark.parametrize(
    "make", [FOLLOW["Adam"], lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1)]
)
def test_what_has_no_frozen_start_keeps_the_optimiser_s_own_decay(make):
    """A bias in the same group; and the groups, their decay and the state dict are as if nobody were there."""
    model, adapters = frozen()
    bias = nn.Parameter(torch.ones(10).double())
    alone = nn.Parameter(bias.detach().clone())
    optimizer, reference = make([*trained(model), bias]), make([alone])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # it counts the groups
    StepHooks(optimizer, adapters)
    for i in range(5):
        bias.grad = alone.grad = torch.randn(10, generator=torch.Generator().manual_seed(i)).double()
        for p in trained(model):
            p.grad = torch.randn_like(p)
        optimizer.step()
        reference.step()
        schedule.step()
    assert torch.equal(bias, alone)
    (group,) = optimizer.param_groups
    assert group["params"] == [*trained(model), bias]
    assert group["weight_decay"] == reference.param_groups[0]["weight_decay"]
    assert len(optimizer.state_dict()["state"]) == len(group["params"])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("olora", {}),
        ("olora+alora", {"rounds": 3, "warmup": 5, "interval": 10, "scorer": "sensitivity"}),
        ("lora2+olora", {"warmup": 5, "final": 20, "interval": 5, "gamma": 0.0}),
    ],
)
def test_decay_pulls_to_the_base_in_train_through_all_resizing(method, options):
    """Without a gradient nothing is left of a trained update, and a fresh one stays nothing."""
    x = torch.randn(6, 12).double()

    def nothing(model, batch):
        return 0 * sum(model[name](batch).sum() for name in "abc")

    for away in (0.0, 0.5):
        model, adapters = frozen(method, **options)
        base = [model[name](x).detach() for name in "abc"]
        perturb_(model, size=away)
        norm = sum(a.norm() for a in adapters.values())
        history = lorafamily.train(
            model,
            [x],
            steps=40,
            lr=1e-2,
            weight_decay=30.0,
            schedule="constant",
            warmup=0.0,
            validation=[x],
            loss_fn=nothing,
            check_gradients=False,
            progress=False,
        )
        assert len(history.decisions) >= (method != "olora")
        left = sum(a.norm() for a in adapters.values())
        assert left <= 1e-4 * norm  # 0.7⁴⁰ = 6e-7, and a factor for the products
        if not away:
            for name, y in zip("abc", base, strict=True):
                assert_close(model[name](x), y, rtol=0, atol=1e-12)
    assert norm > 1


def test_a_learning_rate_that_the_optimiser_finds_itself_is_refused_with_decay():
    model, adapters = frozen()
    optimizer = of("transformers.optimization", "Adafactor", lr=None, weight_decay=0.1)(trained(model))
    with pytest.raises(lorafamily.TrainingError, match="finds its learning rate itself"):
        StepHooks(optimizer, adapters)
    StepHooks(of("transformers.optimization", "Adafactor", lr=None)(trained(model)), adapters)  # nothing to decay


def test_removing_leaves_the_optimiser_as_it_was():
    model, adapters = frozen()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=1.0)
    StepHooks(optimizer, adapters).remove()
    p = adapters["a"].update.A
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p, before * 0.99)
