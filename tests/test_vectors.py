"""Against numbers recorded from the authors' released code, float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import lorafamily
from conftest import shared
from lorafamily.adapter import Adapter
from lorafamily.allocation.pruning import ImportancePruning
from lorafamily.allocation.run import Run
from lorafamily.layers.placement import place
from lorafamily.layers.state import Placement
from lorafamily.layers.target import possible_targets
from lorafamily.parametrisation import Parametrisation
from lorafamily.penalty import Orthogonality

NAMES = {
    "lora2": {"A": "lora_A", "B": "lora_B", "E": "lora_E", "aa": "lora_aa", "bb": "lora_bb"},
    "adalora": {"P": "lora_B", "singular": "lora_E", "Q": "lora_A"},
}
methods = pytest.mark.parametrize("method", sorted(NAMES))


def vectors(method: str) -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in np.load(shared(f"vectors/{method}.npz")).items()}


def adapter_from(method: str, tensors: dict[str, Tensor], scale: float = 1.0) -> Adapter:
    """An adapter holding the recorded factors; `tensors` by the released names."""
    own = {name: tensors[released] for name, released in NAMES[method].items()}
    own = {name: value.squeeze(1) if released_is_column(value) else value for name, value in own.items()}
    P: type[Parametrisation] = lorafamily.methods()[method].parametrisation
    if method == "lora2":
        update = P(own["A"].shape[1], own["bb"].shape[0], width=len(own["A"]), slices=len(own["E"]))
    else:
        update = P(own["Q"].shape[1], own["P"].shape[0], rank=len(own["Q"]))
    update = update.double()
    update.load_state_dict(own)
    return Adapter(update, scale=scale)


def released_is_column(value: Tensor) -> bool:
    return value.shape[1] == 1  # singular values are stored as (r, 1) there, as (r) here


@methods
def test_forward_and_gradients_of_every_factor(method):
    v = vectors(method)
    factors = {name: v[f"fwd_{name}"] for name in NAMES[method].values()}
    # The released scale is alpha / (r + 1e-5); with it nothing is left but rounding.
    adapter = adapter_from(method, factors, scale=16 / (6 + 1e-5))
    layer = nn.Linear(24, 20).double()
    layer.load_state_dict({"weight": v["fwd_weight"], "bias": v["fwd_bias"]})
    layer.weight.requires_grad_(False)
    model = nn.Sequential(layer)
    place(model, Placement("default", method, None, None, {"0": adapter}, {}), possible_targets(model))
    x = v["fwd_x"].requires_grad_()
    y = layer(x)
    y.backward(v["fwd_gy"])
    # float64 on both sides; products in another order, and LoRA²'s has five factors: rounding.
    assert_close(y, v["fwd_y"], rtol=1e-9, atol=1e-12)
    assert_close(x.grad, v["fwd_gx"], rtol=1e-9, atol=1e-12)
    for name, released in NAMES[method].items():
        expected = v[f"fwd_grad_{released}"]
        got = adapter.update.get_parameter(name).grad
        assert_close(got, expected.reshape(got.shape), rtol=1e-9, atol=1e-12)


@methods
def test_our_scale_differs_from_the_released_one_by_two_millionths(method):
    v = vectors(method)
    factors = {name: v[f"fwd_{name}"] for name in NAMES[method].values()}
    ours = adapter_from(method, factors, scale=16 / 6)(v["fwd_x"])
    released = v["fwd_y"] - torch.nn.functional.linear(v["fwd_x"], v["fwd_weight"], v["fwd_bias"])
    # 1e-5 in 6 is 1.7e-6, all of the difference.
    assert_close(ours, released, rtol=2e-6, atol=1e-12)


@methods
def test_ranks_thresholds_and_survivors_of_forty_steps(method):
    v = vectors(method)
    layers = ("l0", "l1", "l2")
    adapters = {
        at: adapter_from(method, {name: v[f"alloc_init_{at}.{name}"] for name in NAMES[method].values()})
        for at in layers
    }
    settings = ImportancePruning(target=2, warmup=6, final=10, interval=3, beta1=0.85, beta2=0.85)
    allocator = settings.begin(Run(nn.Module(), adapters, steps=40))
    singular = "E" if method == "lora2" else "singular"
    survivors: dict[str, Tensor] = {}
    for t in range(1, 41):
        for at, adapter in adapters.items():
            for name, released in NAMES[method].items():
                parameter = adapter.update.get_parameter(name)
                gradient = v[f"alloc_grad_{t:02}_{at}.{released}"]
                gradient = gradient.squeeze(1) if released_is_column(gradient) else gradient
                axis = adapter.update.slice_axes.get(name)
                if survivors and axis is not None:  # the recorded run keeps pruned slices as zeros
                    gradient = gradient.index_select(axis, survivors[at])
                parameter.grad = gradient
                parameter.data -= 0.01 * gradient
        decision = allocator.step(t)
        threshold = v[f"alloc_threshold_{t:02}"]
        if decision is not None and not threshold.isnan():
            # float64: the same averages, their means summed in another order.
            assert decision.threshold == pytest.approx(float(threshold), rel=1e-9)
        if decision is not None:
            assert decision.total == int(v[f"alloc_rank_{t:02}"])
        for at, adapter in adapters.items():
            recorded = v[f"alloc_E_{t:02}_{at}.lora_E"].squeeze(1)
            if t > 30:
                if at not in survivors:
                    survivors[at] = recorded.nonzero().squeeze(1)
                recorded = recorded[recorded != 0]
            assert_close(adapter.update.get_parameter(singular).data, recorded, rtol=1e-9, atol=1e-15)
    assert sum(adapter.slices for adapter in adapters.values()) == 6


def test_adalora_penalty():
    """Recorded after the forty steps, over the frames of all three layers, masked slices included; γ = 0.1."""
    v = vectors("adalora")
    adapters = []
    for at in ("l0", "l1", "l2"):
        factors = {name: v[f"alloc_init_{at}.{name}"].clone() for name in NAMES["adalora"].values()}
        for t in range(1, 41):
            for name, factor in factors.items():
                factor -= 0.01 * v[f"alloc_grad_{t:02}_{at}.{name}"]
        adapters.append(adapter_from("adalora", factors))
    # float64: the same norms, summed in another order.
    assert_close(Orthogonality(gamma=0.1)(adapters).detach(), v["orth"], rtol=1e-12, atol=0)
