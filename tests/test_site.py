"""A layer with adapters stays what it is, whatever its class, its forward, and whatever else stands on it."""

from __future__ import annotations

import abc
import copy
import inspect
import os
import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import lorafamily
from conftest import pairwise, perturb_
from lorafamily.layers.site import NAME


def everywhere(name: str, module: nn.Module) -> bool:
    return True


def adapted(model: nn.Module, method: str = "lora", **options) -> nn.Module:
    """With adapters on all that can carry one, away from their start."""
    options = {"rank": 2, "targets": everywhere, "seed": 0} | options
    return perturb_(lorafamily.apply(model, method, **options))


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() > 1e-2)


# Any tree of modules


class Applied(nn.Module):
    """Linear layers called by keyword, one of them twice, an embedding, convolutions, and a hook of the user's."""

    def __init__(self, draw: random.Random):
        super().__init__()
        bias, groups = draw.random() < 0.5, draw.choice([1, 2])
        self.table = nn.Embedding(7, 8)
        self.inner = nn.Sequential(nn.Linear(8, 8, bias=bias), nn.Sequential(nn.Tanh(), nn.Linear(8, 8)))
        self.inner[1][1].register_forward_hook(lambda layer, args, y: 2 * y)
        self.inner[0].register_forward_pre_hook(lambda layer, args: (args[0] + 1,))
        self.several = nn.ModuleList(self.block(draw) for _ in range(draw.randint(1, 3)))
        self.shared = draw.choice(list(self.several))
        self.signal = nn.Conv1d(8, 8, 3, padding=1, groups=groups, bias=bias)
        self.image = nn.Conv2d(8, 8, 1, groups=8 // groups)

    def block(self, draw: random.Random) -> nn.Module:
        whole = draw.choice([nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), Attends(), nn.Linear(8, 8)])
        return whole if draw.random() < 0.7 else nn.Sequential(whole, nn.Linear(8, 8))

    def forward(self, ids):
        h = self.inner(self.table(input=ids))
        for block in [*self.several, self.shared]:
            h = block(h)
        h = self.signal(h.transpose(1, 2))
        return self.image(input=h[..., None]).flatten(1)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(query=x, key=x, value=x, need_weights=False)[0]


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")


def looks(model: nn.Module) -> dict[str, tuple]:
    """What the model's own modules show: class, attributes, signature, hooks."""
    return {
        name: (
            type(module),
            {own for own in dir(module) if own != NAME},
            inspect.signature(module.forward),
            [list(vars(module)[hooks].values()) for hooks in HOOKS],
            {own: value for own, value in vars(module).items() if isinstance(value, int | float | str | tuple)},
        )
        for name, module in model.named_modules()
        if NAME not in name.split(".")
    }


def contents(model: nn.Module) -> tuple:
    """What `remove` gives back."""
    return (
        [set(vars(module)) for module in model.modules()],
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: value.numpy().tobytes() for name, value in model.state_dict().items()},
        [list(module.state_dict()) for module in model.modules()],
        [list(module._modules) for module in model.modules()],
    )


@pytest.mark.parametrize("seed", range(8))
def test_any_model_stays_itself_and_comes_back(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = Applied(draw).train(draw.random() < 0.5)
    for parameter in model.parameters():
        parameter.requires_grad_(draw.random() < 0.6)
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.MultiheadAttention | nn.TransformerEncoderLayer):
            module.eval()
    ids = torch.randint(7, (2, 3))
    own, before = looks(model), contents(model)

    def output() -> torch.Tensor:
        # Products for a weight that requires no gradient may be summed in another order, and so may a fused kernel's.
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        model.requires_grad_(False)
        y = model(ids)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        return y

    fused = any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules())
    same = {"rtol": 1e-5, "atol": 1e-5} if fused else {"rtol": 0, "atol": 0}
    base = output()
    lorafamily.apply(model, rank=2, targets=everywhere)
    assert looks(model) == own
    assert all(
        NAME in dir(module)
        for module in model.modules()
        if isinstance(module, nn.Linear) and "Dyn" not in type(module).__name__
    )
    assert_close(output(), base, **same)
    perturb_(model)
    first = output()
    assert differ(first, base)
    lorafamily.apply(model, "olora", rank=2, targets=everywhere, name="second")
    assert looks(model) == own
    assert_close(output(), base, **same)
    assert torch.equal((lorafamily.switch(model, "default"), output())[1], first)
    lorafamily.merge(model)
    assert looks(model) == own
    lorafamily.unmerge(model)
    assert looks(model) == own
    assert torch.equal(output(), first)
    lorafamily.remove(model, "second")
    assert torch.equal(output(), first)
    lorafamily.remove(model)
    assert looks(model) == own
    assert contents(model) == before
    assert_close(output(), base, rtol=0, atol=0)


def test_remove_leaves_what_came_later_and_what_was_frozen():
    model = adapted(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)))
    model.append(nn.Linear(4, 2))
    model.append(nn.Linear(2, 2).requires_grad_(False))
    lorafamily.remove(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, False, False] * 2


# Names of the user's


OWN = ["kind", "kinds", "active", "adapters", "route", "own", "together", "site", "front", "state", "layer", "base"]


class Named(nn.Linear):
    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        for name in OWN:
            setattr(self, name, f"my {name}")
        self.adapters = nn.Linear(2, 2)


def test_attributes_of_any_name_and_keyword_calls():
    model = nn.ModuleDict({"a": Named(4, 4), "b": nn.Linear(4, 3, bias=False), "c": nn.Embedding(5, 4)})
    model.forward = lambda ids: model["b"](input=model["a"](input=model["c"](input=ids)))
    ids = torch.tensor([[0, 4]])
    base = model(ids)
    adapted(model, targets=["^a$", "^b$", "^c$"])
    assert differ(model(ids), base)
    lorafamily.remove(lorafamily.unmerge(lorafamily.merge(model)))
    assert torch.equal(model(ids), base)
    assert all(getattr(model["a"], name) == f"my {name}" for name in OWN if name != "adapters")


@pytest.mark.parametrize("place", ["an attribute", "a submodule", "the class"])
def test_an_attribute_called_lorafamily_is_refused_with_nothing_changed(place):
    own = type("Own", (nn.Linear,), {NAME: "mine"}) if place == "the class" else nn.Linear
    model = nn.Sequential(nn.Linear(4, 4), own(4, 4))
    if place != "the class":
        setattr(model[1], NAME, nn.Tanh() if place == "a submodule" else "mine")
    before = contents(model)
    with pytest.raises(lorafamily.TargetError, match=r'1 \(\w+\) has an attribute "lorafamily" of its own'):
        lorafamily.apply(model, rank=2)
    assert contents(model) == before


# Subclasses


class Inherits(nn.Linear, abc.ABC):
    pass


class Product(nn.Linear):
    """As transformers' FalconLinear; it notes its calls."""

    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input):
        self.calls += 1
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class Looks(nn.Embedding):
    def forward(self, ids):
        return self.weight[ids]


class Convolves(nn.Conv1d):
    def forward(self, x):
        return F.conv1d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Activated(nn.Linear):
    def forward(self, x):
        return F.gelu(super().forward(x))


class WithKeyword(nn.Linear):
    def forward(self, x, *, scale=1.0):
        return super().forward(x) * scale


class Router(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y, y.argmax(-1)


class Drops(nn.Linear):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class ScaledTable(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 3


class Pads(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.pad(x, (1, 1)))


class Standardises(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / weight.std((1, 2), keepdim=True), bias)


INPUTS = {nn.Linear: numbers(3, 4), nn.Embedding: torch.tensor([[0, 3]]), nn.Conv1d: numbers(2, 4, 7)}


def layer_and_input(cls: type[nn.Module]) -> tuple[nn.Module, torch.Tensor]:
    of = next(of for of in INPUTS if issubclass(cls, of))
    return cls(4, 4, *[3] * (of is nn.Conv1d)).double(), INPUTS[of]


@pytest.mark.parametrize("cls", [Inherits, Product, Looks, Convolves])
def test_a_forward_that_is_the_same_product_carries_adapters(cls):
    layer, x = layer_and_input(cls)
    state = torch.random.get_rng_state()
    model = lorafamily.apply(nn.Sequential(layer), rank=2, targets="0", seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(model[0]) is cls
    assert float(getattr(layer, "calls", 0)) == 0
    base = model(x)
    out = perturb_(model)(x)
    assert differ(out, base)
    weight = dict(model.named_parameters())["0.weight"].detach().clone()
    assert_close(lorafamily.merge(model)(x), out)
    assert differ(model[0].weight, weight)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "cls", [Doubled, Activated, WithKeyword, Router, Drops, ScaledTable, Pads, Standardises], ids=lambda c: c.__name__
)
def test_a_forward_that_is_another_is_left_out_and_refused_by_name(cls, training):
    layer, _ = layer_and_input(cls)
    model = nn.Sequential(nn.Linear(4, 4), layer).train(training)
    with pytest.raises(lorafamily.TargetError, match=f'target "1": 1 cannot carry an adapter.*{cls.__name__}'):
        lorafamily.apply(model, rank=1, targets="1")
    lorafamily.apply(model, rank=1, targets=everywhere)
    assert NAME in model[0]._modules
    assert NAME not in dir(model[1])


# A forward on the instance


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def expected() -> tuple[torch.Tensor, torch.Tensor]:
    """What the base and the adapted model give where nothing else is on them."""
    model = two_layers()
    return model(INPUTS[nn.Linear]), adapted(model)(INPUTS[nn.Linear])


def aligned(model: nn.Module) -> None:
    pytest.importorskip("accelerate.hooks").attach_align_device_hook(model, execution_device="cpu")


def hooked(model: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    for layer in (model[0], model[2]):
        hooks.add_hook_to_module(layer, hooks.ModelHook(), append=True)


def offloaded(model: nn.Module) -> None:
    pytest.importorskip("accelerate").cpu_offload(model, torch.device("cpu"))


def dispatched(model: nn.Module) -> None:
    places = {"0": "cpu", "1": "cpu", "2": "cpu"}
    pytest.importorskip("accelerate").dispatch_model(model, places, main_device="cpu", force_hooks=True)


def patched(model: nn.Module) -> None:
    for layer in (model[0], model[2]):
        layer.forward = (lambda old: lambda *args, **kwargs: old(*args, **kwargs))(layer.forward)


STANDS = [aligned, hooked, offloaded, dispatched, patched]
by_name = {"ids": lambda put: put.__name__}


@pytest.mark.parametrize("put", STANDS, **by_name)
def test_adapters_after_a_forward_on_the_instance(put):
    base, out = expected()
    model, x = two_layers(), INPUTS[nn.Linear]
    put(model)
    before = [dict(vars(module)) for module in (model[0], model[2])]
    assert_close(adapted(model)(x), out)
    lorafamily.remove(model)
    assert_close(model(x), base)
    for module, own in zip((model[0], model[2]), before, strict=True):
        assert vars(module).keys() == own.keys()
        assert vars(module)["forward"] is own["forward"]
        assert own.get("_old_forward") == vars(module).get("_old_forward")


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("put", STANDS, **by_name)
def test_a_forward_put_on_the_instance_after_adapters(put, again):
    base, out = expected()
    model, x = adapted(two_layers()), INPUTS[nn.Linear]
    put(model)
    assert_close(model(x), out)
    if again:
        if put is not offloaded:
            assert_close(lorafamily.merge(model)(x), out)
            assert_close(lorafamily.unmerge(model)(x), out)
        lorafamily.remove(model)
        assert_close(model(x), base)
        assert_close(adapted(model)(x), out)
    lorafamily.remove(model)
    assert_close(model(x), base)
    assert not [name for name, _ in model.named_modules() if NAME in name]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("put", [aligned, hooked], **by_name)
def test_hooks_of_accelerate_that_are_exchanged_and_taken_off(put, before):
    hooks = pytest.importorskip("accelerate.hooks")
    base, out = expected()
    model, x = two_layers(), INPUTS[nn.Linear]
    for step in (put, adapted) if before else (adapted, put):
        step(model)
    hooked(model)
    assert_close(model(x), out)
    lorafamily.unmerge(lorafamily.merge(model))
    hooks.remove_hook_from_module(model, recurse=True)
    assert_close(model(x), out)
    lorafamily.remove(model)
    assert_close(model(x), base)
    assert [vars(module).get("forward", module.forward) for module in model] == [module.forward for module in model]


@pytest.mark.parametrize("undo", ["put back", "deleted"])
def test_a_patch_that_comes_and_goes_around_a_merge(undo):
    base, out = expected()
    model, x = adapted(two_layers()), INPUTS[nn.Linear]
    inner = [model[0].forward, model[2].forward]
    for _ in range(2):
        patched(model)
        assert_close(lorafamily.merge(model)(x), out)
        for layer, old in zip((model[0], model[2]), inner, strict=True):
            if undo == "deleted":
                del layer.forward
            else:
                layer.forward = old
        assert_close(model(x), out)
        assert_close(lorafamily.unmerge(model)(x), out)
    assert torch.equal(lorafamily.remove(model)(x), base)
    assert not any("forward" in vars(layer) for layer in model)


def test_a_patch_stays_and_is_called_once():
    model, x, calls = two_layers(), INPUTS[nn.Linear], []
    adapted(model)
    inner = model[0].forward

    def louder(x):
        calls.append(1)
        return 3 * inner(x)

    model[0].forward = louder
    lorafamily.remove(model)
    assert_close(
        model(x), F.linear(torch.tanh(3 * F.linear(x, model[0].weight, model[0].bias)), model[2].weight, model[2].bias)
    )
    assert model[0].forward is louder
    adapted(model, targets="0")
    calls.clear()
    model(x)
    assert len(calls) == 1
    expected_first = 3 * F.linear(x, model[0].weight, model[0].bias) + model[0].lorafamily.adapters["weight"][
        "default"
    ](x)
    assert_close(model[0](x), expected_first)
    lorafamily.remove(model)
    assert model[0].forward is louder


@pytest.mark.parametrize("before", [True, False])
def test_offloaded_weights_are_not_merged(before):
    model = two_layers()
    for step in (offloaded, adapted) if before else (adapted, offloaded):
        step(model)
    with pytest.raises(lorafamily.StateError, match="the weight of 0 is not here"):
        lorafamily.merge(model)
    assert_close(model(INPUTS[nn.Linear]), expected()[1])


# Weights that are computed


COMPUTED = [
    nn.utils.weight_norm,
    nn.utils.spectral_norm,
    nn.utils.parametrizations.weight_norm,
    nn.utils.parametrizations.spectral_norm,
    nn.utils.parametrizations.orthogonal,
]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("computed", COMPUTED, ids=lambda f: f"{f.__module__.rsplit('.', 1)[-1]}.{f.__name__}")
def test_a_weight_that_is_computed_carries_adapters_and_is_not_merged(computed, before, tmp_path):
    model, x = two_layers().eval(), INPUTS[nn.Linear]
    for step in (lambda: computed(model[0]), lambda: adapted(model))[:: 1 if before else -1]:
        step()
    for name, parameter in model.named_parameters():  # torch's older weight_norm makes parameters that train
        parameter.requires_grad_(NAME in name)
    out, cls = model(x), type(model[0])
    with lorafamily.disabled(model):
        base = model(x)
    assert differ(out, base)
    assert "0" in str(lorafamily.summary(model))
    lorafamily.save(model, tmp_path)
    with pytest.raises(lorafamily.StateError, match="the weight of 0 is no parameter but computed from others"):
        lorafamily.merge(model)
    assert torch.equal(model(x), out)
    lorafamily.remove(model)
    assert torch.equal(model(x), base)
    assert type(model[0]) is cls
    assert torch.equal(lorafamily.load(model, tmp_path)(x), out)


def test_a_weight_of_attention_that_is_computed_is_left_out():
    torch.manual_seed(0)
    model, x = nn.Sequential(Attends()).double(), numbers(2, 3, 8)
    nn.utils.parametrizations.weight_norm(model[0].attention, "in_proj_weight")
    base = model(x)
    assert [row.module for row in lorafamily.summary(adapted(model)).rows] == ["0.attention.out"]
    assert differ(model(x), base)
    with pytest.raises(lorafamily.TargetError, match="matches no layer"):
        lorafamily.apply(model, rank=1, targets=r"\.q$", name="b")
    assert torch.equal(lorafamily.remove(model)(x), base)


def test_on_the_meta_device_there_are_shapes():
    for make in (two_layers, encoder, convolves):
        model = make() if make is encoder else adapted(two_layers()) if make is two_layers else make()
        x = MODELS[convolves] if make is convolves else INPUTS[nn.Linear]
        assert model.to("meta")(x.to("meta")).is_meta


# What autograd can do


class Twice(nn.Module):
    """One layer called twice in one forward."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.same, self.last = nn.Linear(5, 5, bias=bias), nn.Linear(5, 1)

    def forward(self, x):
        return self.last(torch.tanh(self.same(torch.tanh(self.same(x)))))


def twice() -> nn.Module:
    torch.manual_seed(0)
    return adapted(Twice().double())


def attends() -> nn.Module:
    torch.manual_seed(0)
    return adapted(nn.Sequential(Attends(), nn.Linear(8, 1)).double())


def convolves() -> nn.Module:
    torch.manual_seed(0)
    return adapted(nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.Tanh(), nn.Conv1d(6, 2, 1)).double())


MODELS = {twice: numbers(3, 5), attends: numbers(2, 3, 8), convolves: numbers(2, 4, 7)}
every_model = pytest.mark.parametrize("make", MODELS, **by_name)


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *trained(model).values()])]


@every_model
def test_gradients_are_those_of_the_plain_formulation(make):
    model = make()
    found = gradients(model, MODELS[make])
    with lorafamily.fast_path(False):
        assert_close(found, gradients(model, MODELS[make]))


@every_model
def test_no_rows(make):
    if make is attends:
        pytest.skip("PyTorch's attention has no backward for no rows")
    model = make()
    found = gradients(model, MODELS[make][:0])
    assert found[0].numel() == 0
    assert all(not gradient.any() for gradient in found[2:])
    with torch.inference_mode():
        assert model(MODELS[make][:0]).shape == found[0].shape


@every_model
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # attention has no batching rule
def test_torch_func(make):
    model, x = make(), MODELS[make]
    values = {name: value.detach() for name, value in model.named_parameters()}

    def loss(given, x):
        return torch.func.functional_call(model, given, (x,)).square().sum()

    found = torch.func.grad(loss)(values, x)
    for name, parameter in trained(model).items():
        (one,) = torch.autograd.grad(model(x).square().sum(), parameter)
        assert_close(found[name], one)
    one_by_one = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(None, 0))(values, x[:, None])
    x = x.clone().requires_grad_()
    assert_close(one_by_one[:, 0], torch.autograd.grad(loss(values, x), x)[0])
    jacobian = torch.func.jacrev(model)(x.detach()[:1])
    expected = torch.autograd.functional.jacobian(model, x.detach()[:1])
    assert_close(jacobian, expected)


@every_model
def test_forward_mode(make):
    model, x = make(), MODELS[make]
    along = torch.ones_like(x)
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        expected = torch.autograd.functional.jvp(model, x, along)[1]
        found = torch.func.jvp(model, (x,), (along,))[1]
        with torch.autograd.forward_ad.dual_level():
            dual = model(torch.autograd.forward_ad.make_dual(x, along))
            other = torch.autograd.forward_ad.unpack_dual(dual).tangent
    assert_close(found, expected)
    assert_close(other, expected)


@every_model
def test_a_gradient_penalty(make):
    model = make()

    def penalised() -> list[torch.Tensor]:
        x = MODELS[make].clone().requires_grad_()
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            return list(torch.autograd.grad(slope.square().sum(), [x, *trained(model).values()]))

    found = penalised()
    with lorafamily.fast_path(False):
        assert_close(found, penalised())


@every_model
def test_without_gradients(make):
    model, x = make(), MODELS[make]
    out = model(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_close(model(x), out.detach())
    model(x.clone().requires_grad_()).sum().backward()  # nothing of inference mode was kept


# Compiled, exported, traced


COMPILED = """
import torch, lorafamily
from torch.testing import assert_close
from test_site import adapted, encoder, gradients, numbers, two_layers

x, eager = numbers(3, 4), two_layers()(numbers(3, 4))
for method in ("lora", "olora", "alora", "lora2", "adalora"):
    torch._dynamo.reset()
    model = adapted(two_layers()[:2], method)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(compiled, x), gradients(model, x), strict=True):
        assert_close(one, other)
torch._dynamo.reset()
compiled = torch.compile(two_layers(), fullgraph=True, backend="aot_eager")
assert_close(compiled(x), eager)
out = adapted(two_layers())(x)
for change, wanted in (
    (adapted, out),
    (lambda m: lorafamily.switch(m, None), eager),
    (lambda m: lorafamily.switch(m, "default"), out),
    (lorafamily.merge, out),
    (lorafamily.unmerge, out),
    (lorafamily.remove, eager),
):
    change(compiled)
    assert_close(compiled(x), wanted)
assert not [name for name, _ in compiled.named_modules() if "lorafamily" in name]
model, x = encoder(), numbers(2, 3, 4)
mask = torch.tensor([[False] * 3, [False, True, True]])
for grad in (False, True):
    with torch.set_grad_enabled(grad):
        whole = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(whole(x, src_key_padding_mask=mask), model(x, src_key_padding_mask=mask))
"""


def test_compiled_whole_every_method_gives_the_same_and_a_model_that_ran_before_gets_adapters():
    """In a process of its own: the shape checks of these tests wrap functions in what torch.compile cannot trace."""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent / 'experiments'}"}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def bare_layer() -> nn.Module:
    return adapted(nn.Linear(4, 4).double())


def sequence() -> nn.Module:
    return adapted(two_layers())


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    return adapted(nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).double().eval())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("make", [bare_layer, sequence, encoder], **by_name)
def test_exported_and_traced(make):
    model, x = make(), INPUTS[nn.Linear]
    x = x[None] if make is encoder else x
    with torch.no_grad():
        y = model(x)
        assert_close(torch.export.export(model, (x,)).module()(x), y)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            assert_close(torch.jit.trace(model, (x,))(x), y)


# What the model writes into


def relu(h):
    return nn.ReLU(inplace=True)(h)


def plus_one(h):
    h += 1
    return h


def masked(h):
    h[h > 0.3] = torch.tensor(0.1, dtype=h.dtype)
    return h


def first_entries(h):
    h[..., :2] = 0
    return h.mul_(2)


@pairwise(
    "write,shape,kind",
    [relu, plus_one, masked, first_entries],
    [(4,), (3, 4), (2, 3, 4), (2, 1, 3, 4)],
    ["linear", "no bias", "conv1d of transformers", "convolution", "embedding"],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_model_may_write_into_an_output(kind, shape, write):
    torch.manual_seed(0)
    x = numbers(*shape)
    if kind == "conv1d of transformers":
        layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 4)
    elif kind == "convolution":
        if len(shape) == 1:
            pytest.skip("a convolution takes no vector")
        layer = (nn.Conv2d if len(shape) > 3 else nn.Conv1d)(shape[0 if len(shape) == 2 else 1], 6, 1)
    elif kind == "embedding":
        layer, x = nn.Embedding(9, 6), torch.randint(9, shape)
    else:
        layer = nn.Linear(4, 6, bias=kind == "linear")
    model = adapted(nn.ModuleDict({"layer": layer}).double().train())

    def run() -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_() if x.is_floating_point() else x
        y = write(model["layer"](leaf))
        return [y, *torch.autograd.grad(y.square().sum(), [*[leaf] * leaf.requires_grad, *trained(model).values()])]

    found = run()
    with lorafamily.fast_path(False):
        assert_close(found, run())


# Copies


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("merged", [False, True])
def test_copies_of_a_model_are_models_of_their_own(copied, merged, tmp_path):
    model, x = encoder(), numbers(2, 3, 4)
    with torch.no_grad():
        if merged:
            lorafamily.merge(model)
        out = model(x)
        if copied == "torch.save":
            torch.save(model, tmp_path / "model.pt")
            other = torch.load(tmp_path / "model.pt", weights_only=False)
        else:
            other = copy.deepcopy(model) if copied == "deepcopy" else pickle.loads(pickle.dumps(model))
        assert torch.equal(other(x), out)
        if not merged:
            perturb_(other)
            assert differ(other(x), out)
        lorafamily.remove(other)
        assert differ(other(x), out)
        assert torch.equal(model(x), out)
        assert_close(lorafamily.unmerge(model)(x), out)
        base = lorafamily.remove(model)(x)
    assert_close(other(x), base)
    assert not any("forward" in vars(module) for tree in (model, other) for module in tree.modules())


def test_an_adapted_layer_that_an_encoder_copies():
    layer = adapted(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).double().eval())
    whole, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), numbers(2, 3, 8)
    assert_close(whole(x), layer(layer(x)))
    with pytest.raises(
        lorafamily.StateError, match=r"layers\.0\.\S+ and layers\.1\.\S+ carry adapters that were placed"
    ):
        lorafamily.merge(whole)
    for own in whole.layers:
        lorafamily.remove(own)
    lorafamily.remove(layer)
    assert_close(whole(x), layer(layer(x)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("grad", [True, False])
def test_an_encoder_in_eval_keeps_padding(grad):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).double().eval()
    x, mask = numbers(2, 4, 8), torch.tensor([[False] * 4, [False, False, True, True]])
    nested = model.use_nested_tensor
    adapted(model, rank=1)
    with torch.set_grad_enabled(grad):
        out = model(x, src_key_padding_mask=mask)
        assert_close(out[1, :2], model(x[1:, :2])[0])
        assert_close(out[0], model(x[:1])[0])
        merged = lorafamily.merge(model)(x, src_key_padding_mask=mask)
        assert_close(merged[~mask], out[~mask])
        assert "forward" not in vars(model)
        lorafamily.unmerge(model)
    assert model.use_nested_tensor == nested
    lorafamily.remove(model)
    assert "forward" not in vars(model)


def test_data_parallel_is_refused(monkeypatch):
    model = sequence()
    module = sys.modules["torch.nn.parallel.replicate"]  # as if there were two GPUs
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", lambda tensors, devices, detach=False: [tensors] * 2)
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)
    with pytest.raises(lorafamily.StateError, match="use DistributedDataParallel"):
        nn.parallel.replicate(model, [0, 1])
    with pytest.raises(lorafamily.StateError, match="DataParallel knows only the parameters it was made with"):
        lorafamily.apply(nn.DataParallel(two_layers()), rank=2)


def test_quantising_that_would_replace_adapted_layers_is_refused():
    from torch.ao import quantization
    from torch.ao.quantization import quantize_fx

    x, refused = numbers(5, 4, dtype=torch.float32), "would put a layer without the adapter in its place; merge"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all of it is deprecated
        with pytest.raises(lorafamily.StateError, match=refused):
            quantize_fx.prepare_fx(sequence().float(), quantization.get_default_qconfig_mapping("x86"), (x,))
        model = sequence().float().eval()
        with pytest.raises(lorafamily.StateError, match=refused):
            quantization.quantize_dynamic(model, {nn.Linear})
        y = model(x)
        assert torch.equal(quantization.quantize_dynamic(model, {nn.LSTM})(x), y), "nothing adapted is replaced"
        lorafamily.merge(model)
        quantised = quantization.quantize_dynamic(model, {nn.Linear})
    assert_close(quantised(x), y, atol=0.02 * y.abs().max().item(), rtol=0)  # 8 bits


# Wrapped models


class WithHead(nn.Module):
    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(3, 3).double()

    def forward(self, x):
        return self.head(self.trunk(x))


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def distributed(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def compiled_with_head(model: nn.Module) -> nn.Module:
    return compiled(WithHead(WithHead(model)))


@pytest.mark.parametrize("wrap", [compiled, distributed, WithHead, compiled_with_head], **by_name)
def test_everything_works_through_what_wraps_the_model(wrap, tmp_path, group):
    torch.compiler.set_stance("force_eager")  # the shape checks of these tests are not for torch.compile
    inner, x = two_layers(), INPUTS[nn.Linear]
    base = inner(x)
    perturb_(adapted(inner), seed=2)
    outer = wrap(inner)
    for head in (module for module in outer.modules() if isinstance(module, WithHead)):
        head.head.requires_grad_(False)
    assert {row.module for row in lorafamily.summary(outer).rows} == {"0", "2"}
    out = inner(x)
    for write in (lorafamily.save, lorafamily.export_peft):
        write(outer, tmp_path / "outer")
        write(inner, tmp_path / "inner")
        for file in (tmp_path / "inner").iterdir():
            assert (tmp_path / "outer" / file.name).read_bytes() == file.read_bytes()
    assert torch.equal(lorafamily.load(two_layers(), tmp_path / "outer")(x), out)
    assert [norm.module for norm in lorafamily.analysis.norms(outer)] == ["0", "2"]
    assert list(lorafamily.analysis.layers_of(outer)) == ["0", "2"]
    assert lorafamily.merge_difference(outer, x) < 1e-6
    assert_close((lorafamily.merge(outer), inner(x))[1], out)
    assert torch.equal((lorafamily.unmerge(outer), inner(x))[1], out)
    assert torch.equal((lorafamily.switch(outer, None), inner(x))[1], base)
    assert torch.equal((lorafamily.switch(outer, "default"), inner(x))[1], out)
    with lorafamily.disabled(outer):
        assert torch.equal(inner(x), base)
    with lorafamily.routing(outer, ["default", None, "default"]):
        assert_close(inner(x), torch.stack([out[0], base[1], out[2]]))
    if wrap is compiled:
        lorafamily.combine(outer, {"default": 1.0}, "other")
        assert_close(inner(x), out)
        lorafamily.remove(outer, "other")
        lorafamily.switch(outer, "default")
    assert [row.module for row in lorafamily.compress(outer, rank=1)] == ["0", "2"]
    assert differ(inner(x), out)
    lorafamily.remove(outer)
    assert torch.equal(inner(x), base)
    assert not [name for name, _ in outer.named_modules() if NAME in name]


def loss_of(model, batch):
    return model(batch).square().mean()


@pytest.mark.parametrize("wrap", [compiled, WithHead], **by_name)
def test_training_through_a_wrapper(wrap, tmp_path):
    inner = adapted(two_layers())
    outer = wrap(inner)
    if wrap is WithHead:
        outer.head.requires_grad_(False)
    before = [parameter.detach().clone() for parameter in trained(inner).values()]
    lorafamily.train(outer, [INPUTS[nn.Linear]] * 2, steps=2, loss_fn=loss_of, progress=False, lr=1e-2)
    assert all(differ(new, old) or not old.numel() for new, old in zip(trained(inner).values(), before, strict=True))


def test_parts_that_were_given_apart_and_parts_of_what_was_given():
    one, two = adapted(two_layers()), adapted(two_layers())
    both = nn.ModuleDict({"one": one, "two": two})
    whole = adapted(nn.ModuleDict({"one": two_layers(), "two": two_layers()}))
    sliced = one[:1]
    calls = [
        *(lorafamily.summary, lorafamily.merge, lorafamily.unmerge, lorafamily.remove, lorafamily.analysis.norms),
        *(lambda m: lorafamily.switch(m, None), lambda m: lorafamily.save(m, "nowhere")),
        *(lambda m: lorafamily.apply(m, rank=1, name="b"), lambda m: lorafamily.compress(m, rank=1)),
        *(lambda m: lorafamily.disabled(m).__enter__(), lambda m: lorafamily.routing(m, [None]).__enter__()),
        *(lambda m: lorafamily.combine(m, {"default": 1.0}, "c"), lambda m: lorafamily.merge_difference(m, None)),
        *(lambda m: lorafamily.export_peft(m, "nowhere"), lambda m: lorafamily.train(m, [1], steps=1)),
    ]
    for call in calls:
        with pytest.raises(lorafamily.StateError, match=r"one\.\d and two\.\d carry adapters that were placed apart"):
            call(both)
        for part in (whole["two"], sliced, whole["one"][0]):
            with pytest.raises(lorafamily.StateError, match="call lorafamily on"):
                call(part)
