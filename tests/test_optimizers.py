"""Optimisers under ranks that change: state follows or begins anew with a warning, and none sees an empty tensor."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import lorafamily
from conftest import perturb_
from lorafamily.adapter import Adapter
from lorafamily.allocation.run import Run
from lorafamily.allocation.surgery import exchange, follow_resize
from lorafamily.placement import placement_of
from lorafamily.training.around_steps import AroundSteps
from lorafamily.variants.lora import Plain

METHODS = {"adalora": {"rank": 4}, "alora": {"rank": 4}, "lora2": {"rank": 6, "inner_rank": 4}}
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, arXiv:2302.06675."""

    def __init__(self, parameters, lr=1e-3):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    p.sub_(m.lerp(p.grad, 0.1).sign(), alpha=group["lr"])
                    m.lerp_(p.grad, 0.01)


class SM3(torch.optim.Optimizer):
    """Anil et al. 2019, arXiv:1901.11150: one accumulator an axis, with names that do not tell which."""

    def __init__(self, parameters, lr=1e-2):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                for i in range(p.ndim) if not state else ():
                    shape = [n if axis == i else 1 for axis, n in enumerate(p.shape)]
                    state[f"accumulator_{i}"] = torch.zeros(shape)
                v = p.grad.square()
                for i in range(p.ndim):
                    v = torch.minimum(v, state[f"accumulator_{i}"] + p.grad.square())
                p.sub_(p.grad / (v.sqrt() + 1e-8), alpha=group["lr"])
                for i in range(p.ndim):
                    others = [axis for axis in range(p.ndim) if axis != i]
                    state[f"accumulator_{i}"] = v.amax(others, keepdim=True) if others else v


class Shampoo(torch.optim.Optimizer):
    """Gupta et al. 2018, arXiv:1802.09568: a matrix an axis, whose entries mix the slices."""

    def __init__(self, parameters, lr=1e-2):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state, g = self.state[p], p.grad.reshape(len(p), -1)
                    if not state:
                        state["preconditioner"] = 1e-3 * torch.eye(len(g))
                    state["preconditioner"] += g @ g.T
                    values, vectors = torch.linalg.eigh(state["preconditioner"])
                    root = vectors @ torch.diag(values.clamp_min(1e-8) ** -0.5) @ vectors.T
                    p.sub_((root @ g).view_as(p), alpha=group["lr"])


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
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and isinstance(other[key], Tensor)}
    return {key: tuple(value.shape) for key, value in tensors.items() if value.ndim and other[key].ndim}


def same_as_fresh(make: Make, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The state's shapes are those that an optimiser made now would have."""
    other = copy.deepcopy(model)
    fresh = make(trained(other))
    AroundSteps(fresh, placement_of(other).adapters)
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
        for name in adapter.update.slices
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
    AroundSteps(optimizer, adapters)
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
        assert len({id(p) for p in seen}) == len(trained(model)) - len(adapters["c"].update.slices)
        assert all(p.numel() for p in seen)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in trained(model)}
    run.resize("c", torch.arange(0), add=2)
    delta = adapters["c"].delta()
    for i in range(3):
        step(model, optimizer, i)
    assert (adapters["c"].delta() - delta).abs().max() > 0  # it learns again
    assert all(p.isfinite().all() for p in trained(model))
    same_as_fresh(make, model, optimizer)
