"""What holds after every decision of every allocator, whatever the model, method, schedule and seed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import lorafamily
from conftest import METHODS
from lorafamily.allocation.allocator import Allocation, Allocator
from lorafamily.allocation.run import Run
from lorafamily.history import Decision
from lorafamily.layers.placement import placement_of
from lorafamily.layers.state import Placement
from lorafamily.registry import find


class Stack(nn.Module):
    """Blocks of two linear layers of any widths."""

    def __init__(self, widths: list[int], inner: list[int], seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(a, h, dtype=torch.float64), "down": nn.Linear(h, b, dtype=torch.float64)})
            for a, h, b in zip(widths, inner, widths[1:], strict=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["down"](torch.tanh(block["up"](x)))
        return x


@dataclass(frozen=True)
class Watched(Allocation):
    """An allocation that is watched at every change and every decision."""

    inner: Allocation
    model: nn.Module
    x: Tensor
    decisions: list[Decision] = field(default_factory=list)

    def allocator(self, run: Run) -> Allocator:
        allocator = self.inner.begin(run)
        step, resize = allocator.step, allocator.resize

        def watched_resize(name: str, keep: Tensor, add: int = 0) -> None:
            update = run.adapters[name].update
            before = {key: moments_of(run, update.get_parameter(key)) for key in update.slice_axes}
            output, only_grows = self.output(), len(keep) == update.slices
            resize(name, keep, add)
            for key, axis in update.slice_axes.items():
                after = moments_of(run, update.get_parameter(key))
                for name_of_state, old in before[key].items():
                    survivors = after[name_of_state].narrow(axis, 0, len(keep))
                    assert torch.equal(survivors, old.index_select(axis, keep))
                    assert not after[name_of_state].narrow(axis, len(keep), add).any()
            if only_grows and add:
                # The new terms are exactly zero; the sum over slices may run in another order.
                assert_close(self.output(), output, rtol=1e-12, atol=1e-12)

        def watched_step(number: int, **how: bool) -> Any:
            decision = step(number, **how)
            if decision is not None:
                self.decisions.append(decision)
                check_decision(self.model, run, allocator, decision)
                unmerged = self.output()
                # float64: W + ΔW is rounded once per weight, and sums run in another order.
                lorafamily.merge(self.model)
                assert_close(self.output(), unmerged, rtol=1e-9, atol=1e-9)
                lorafamily.unmerge(self.model)
                assert torch.equal(self.output(), unmerged)
            return decision

        allocator.step, allocator.resize = watched_step, watched_resize
        return allocator

    @torch.no_grad()
    def output(self) -> Tensor:
        return self.model(self.x)


def moments_of(run: Run, parameter: nn.Parameter) -> dict[str, Tensor]:
    state = run.optimizer.state[parameter]
    return {key: value.clone() for key, value in state.items() if value.shape == parameter.shape}


def check_decision(model: nn.Module, run: Run, allocator: Allocator, decision: Decision) -> None:
    placement = placement_of(model)
    assert decision.after == allocator.slices
    assert all(rank >= 0 for rank in decision.after.values())
    if allocator.settled:
        assert decision.after == {name: adapter.slices for name, adapter in run.adapters.items()}
    if placement.sizing.budget_at == "peak" or allocator.settled:
        check_budget(placement)


def check_budget(placement: Placement) -> None:
    slices = sum(adapter.slices for adapter in placement.adapters.values())
    assert placement.sizing.budget is None or placement.trainable() <= placement.sizing.budget
    assert placement.sizing.rank_budget is None or slices <= placement.sizing.rank_budget


STEPS = 12


@st.composite
def schedules(draw, method: str) -> dict[str, Any]:
    """Options of a method's allocation with which it fires within the run."""
    options = find(method).options()
    if "rounds" in options:
        rounds, interval = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        chosen = {"rounds": rounds, "interval": interval, "warmup": draw(st.integers(1, STEPS - 3 * interval))}
        return chosen | {"drop": draw(st.integers(1, 5)), "scorer": draw(st.sampled_from(sorted(lorafamily.scorers())))}
    if "moved" in options:
        chosen = {
            "warmup": draw(st.integers(0, 4)),
            "final": draw(st.integers(0, 3)),
            "interval": draw(st.integers(1, 3)),
        }
        return chosen | {
            "moved": draw(st.integers(1, 5)),
            "scorer": draw(st.sampled_from(sorted(lorafamily.scorers()))),
        }
    if "target" in options:
        chosen = {
            "warmup": draw(st.integers(0, 4)),
            "final": draw(st.integers(1, 5)),
            "interval": draw(st.integers(1, 3)),
        }
        chosen |= {"target": draw(st.one_of(st.floats(0, 1), st.just(0)))}
        return chosen | {"scorer": draw(st.sampled_from(sorted(lorafamily.scorers())))}
    return {}


@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
@given(st.data())
def test_after_every_decision(tmp_path_factory, data):
    method = data.draw(st.sampled_from([*METHODS, "elalora", "flexlora"]))
    depth = data.draw(st.integers(1, 3))
    width = st.integers(2, 9)
    widths, inner = (data.draw(st.lists(width, min_size=n, max_size=n)) for n in (depth + 1, depth))
    seed = data.draw(st.integers(0, 2**20))
    options = data.draw(schedules(method))
    model = Stack(widths, inner, seed).eval()
    shapes = {n: (m.in_features, m.out_features) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    at = data.draw(st.sampled_from(["peak", "end"] if options.get("target") else ["peak"]))
    if data.draw(st.booleans()):
        one = sum(find(method).count(*shape, 1) for shape in shapes.values())
        asked = {"budget": int(one * data.draw(st.floats(1, 4)))}
    else:
        asked = {"rank_budget": len(shapes) * data.draw(st.integers(1, 4)) + data.draw(st.integers(0, 2))}
    lorafamily.apply(model, method, budget_at=at, seed=seed, **asked, **options)

    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(6, w, dtype=torch.float64, generator=generator) for w in (widths[0], widths[-1]))
    placement = placement_of(model)
    watched = Watched(placement.method.allocation, model, x)
    own, placement.method = placement.method, placement.method.but(allocation=watched)
    history = lorafamily.train(
        model,
        [(x, y)],
        steps=STEPS,
        lr=0.05,
        loss_fn=lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
        validation=[(x, y)],
        seed=seed,
        progress=False,
    )
    placement.method = own
    check_budget(placement)
    if at == "peak":
        assert all(step.trainable <= (placement.sizing.budget or step.trainable) for step in history.steps)
    assert watched.decisions == history.decisions
    assert bool(options) == bool(history.decisions)
    assert history.slices_end == {name: adapter.slices for name, adapter in placement.adapters.items()}

    folder = lorafamily.save(model, tmp_path_factory.mktemp("adapter"))
    file = (folder / "adapter.safetensors").read_bytes()
    header = int.from_bytes(file[:8], "little")
    assert len(file) == 8 + header + lorafamily.summary(model).tensor_bytes
    assert json.loads((folder / "adapter.json").read_text())["modules"].keys() == shapes.keys()
