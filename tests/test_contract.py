"""What is checked in a method of one's own finds what is wrong with it."""

from __future__ import annotations

import pytest
import torch

import lorafamily
from conftest import data, tiny
from lorafamily.dropout import Dropout
from lorafamily.parametrisation import Parametrisation
from lorafamily.variants.lora import Plain, lora

FEW = {
    "alora": {"rounds": 3, "interval": 2, "warmup": 2, "drop": 2},
    "adalora": {"warmup": 2, "final": 5, "interval": 2},
    "elalora": {"warmup": 2, "final": 5, "interval": 2, "moved": 2},
}


@pytest.mark.parametrize("method", lorafamily.methods())
def test_every_method_passes(method):
    lorafamily.check_method(method)


def test_one_slice_is_too_few_to_check():
    with pytest.raises(lorafamily.MethodError, match="rank=1: must be at least 2"):
        lorafamily.check_method("lora", rank=1)


class CountsTooFew(Plain):
    @staticmethod
    def count(d_in, d_out, rank):
        return rank * d_in


class ForgetsASize(Plain):
    def sizes(self):
        return {"rank": 1}


class DrawsElsewhere(Plain):
    def reset(self, generator):
        self.A.normal_()
        self.B.zero_()


class BeginsMoved(Plain):
    def reset(self, generator):
        super().reset(generator)
        self.B.fill_(0.1)


class BeginsDead(Plain):
    def reset(self, generator):
        self.A.zero_()
        self.B.zero_()


class RepresentsTwice(Plain):
    def represent(self, U, V):
        super().represent(2 * U, V)


class RepresentsInFloat32(Plain):
    def represent(self, U, V):
        super().represent(U.float(), V)


class RepresentsADeadZero(Plain):
    def represent(self, U, V):
        super().represent(U, V if U.any() else 0 * V)


class IgnoresTheGate(Plain):
    def factors(self, gate=None):
        return self.B, self.A


class GatesTwice(Plain):
    def factors(self, gate=None):
        return super().factors(None if gate is None else gate**2)


class CutsTheGate(Plain):
    def factors(self, gate=None):
        return super().factors(None if gate is None else gate.detach())


class AddsSomething(Plain):
    def fresh(self, n, generator):
        return {name: torch.ones_like(value) for name, value in super().fresh(n, generator).items()}


class AddsTooLittle(Plain):
    def fresh(self, n, generator):
        return {"B": torch.zeros(self.d_out, n)}


class AddsAnotherShape(Plain):
    def fresh(self, n, generator):
        return {name: value.T for name, value in super().fresh(n, generator).items()}


class LeavesOutASlicedTensor(Plain):
    slice_axes = {"B": 1}

    def factors(self, gate=None):  # without the types of Plain's
        return self.B if gate is None else self.B * gate, self.A

    def fresh(self, n, generator):
        return {"B": torch.zeros(self.d_out, n)}


class SquaresWhatIsZeroed(Plain):
    """B enters as its square, whose gradient is zero at zero."""

    def factors(self, gate=None):
        U, V = super().factors(gate)
        return U**2 if gate is None else self.B**2 * gate, V


class ZeroesAnotherTensor(Plain):
    zeroed = "C"


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (CountsTooFew, r"count gives 36 for the sizes {'rank': 4}, and 64 entries train \(9 × 7\)"),
        (ForgetsASize, "made anew with sizes.. {'rank': 1} its tensors have the shapes {'A': .1, 9., 'B': .7, 1."),
        (DrawsElsewhere, "reset gives other values for the same generator"),
        (BeginsMoved, "U V is not zero after reset"),
        (BeginsDead, "nothing gets a gradient after reset"),
        (RepresentsTwice, r"represent of rank 3, of at most 4, is off by 1.0e\+00"),
        (RepresentsInFloat32, "represent of rank 4, of at most 4, is off by .*e-08"),
        (RepresentsADeadZero, "nothing gets a gradient after represent with U = 0"),
        (IgnoresTheGate, r"factors\(gate\) does not multiply slice i by gate\[i\]"),
        (GatesTwice, r"factors\(gate\) does not multiply slice i by gate\[i\]"),
        (CutsTheGate, "is not differentiable in the gate"),
        (AddsSomething, "slices from fresh change U V"),
        (AddsTooLittle, r"fresh\(2\) must give tensors of .*'A': \[2, 9\].*, and gave {'B': \[7, 2\]}"),
        (AddsAnotherShape, r"fresh\(2\) must give tensors of .*'A': \[2, 9\].*'A': \[9, 2\]"),
        (LeavesOutASlicedTensor, "is a tensor missing from slice_axes?"),
        (SquaresWhatIsZeroed, "gets no gradient there, so that it cannot come back"),
        (ZeroesAnotherTensor, "zeroed = 'C' must be one of slice_axes: B, A"),
    ],
)
def test_what_is_wrong_is_named(cls, message):
    with pytest.raises(lorafamily.MethodError, match=message):
        lorafamily.check_method(lora.but(parametrisation=cls))


class Fills(lorafamily.Initialisation):
    def __call__(self, update, weight, generator):
        update.represent(torch.ones(update.d_out, 1), torch.ones(1, update.d_in))


class Scales(lorafamily.Initialisation):
    frozen_initial = True

    def __call__(self, update, weight, generator):
        weight.mul_(2)


@pytest.mark.parametrize(
    ("initialisation", "message"),
    [(Fills(), "ΔW is not zero at first; set frozen_initial = True"), (Scales(), "changes the base weight")],
)
def test_an_initialisation_that_moves_the_model_is_named(initialisation, message):
    with pytest.raises(lorafamily.MethodError, match=message):
        lorafamily.check_method(lora.but(initialisation=initialisation))


class SomeRows(lorafamily.Initialisation):
    """Sets one direction and no more."""

    frozen_initial = True

    def __call__(self, update, weight, generator):
        update.represent(weight[:, :1].float(), torch.ones(1, update.d_in))


@pytest.mark.parametrize("method", ["lora", "adalora", "lora2"])
def test_what_an_initialisation_does_not_set_is_the_parametrisation_s_own(method):
    """Tensors are made without values: what nobody sets would be whatever was in memory."""
    found = lorafamily.methods()[method].but(initialisation=SomeRows())
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    made = []
    for garbage in (float("nan"), 3.0):
        parametrisation = full_of(garbage, found.parametrisation)
        generator = torch.Generator().manual_seed(0)
        adapter = found.but(parametrisation=parametrisation).build(weight, 4, dropout=Dropout(), generator=generator)
        made.append(adapter.state_dict())
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())


def full_of(value: float, parametrisation: type[Parametrisation]) -> type[Parametrisation]:
    class Full(parametrisation):
        def __init__(self, *sizes, **named):
            super().__init__(*sizes, **named)
            for parameter in self.parameters():
                parameter.data.fill_(value)

    return Full


class Mean(lorafamily.Scorer):
    """The mean of the steps so far, in the ways in which a scorer can be wrong."""

    def __init__(self, run):
        super().__init__(run)
        self.sums = {at: torch.zeros(adapter.slices).double() for at, adapter in run.adapters.items()}

    def observe(self):
        for at, adapter in self.run.adapters.items():
            self.sums[at] = self.sums[at] + torch.arange(len(self.sums[at])) * len(at) + adapter.slices


class DoesNotFollow(Mean):
    def scores(self):
        return {at: sums.clone() for at, sums in self.sums.items()}


class OneTooFew(Mean):
    def scores(self):
        return {at: torch.zeros(adapter.slices - 1).double() for at, adapter in self.run.adapters.items()}


class Nothing(Mean):
    def scores(self):
        return {}


class Lists(Mean):
    def scores(self):
        return {at: [0.0] * adapter.slices for at, adapter in self.run.adapters.items()}


WRONG = [
    (OneTooFew, r"a tensor of 3 scores for blocks.1.attention.query, one for each slice, and gives \(2,\) after"),
    (Nothing, "Nothing scores 0 modules; it must score all 6"),
    (Lists, "a tensor of 3 scores for .*, and gives list"),
]
# AdaLoRA masks until its last decision, so that its scores never have to follow a change of size.
FOLLOWS = (DoesNotFollow, r"DoesNotFollow must give a tensor of \d scores for .*its follow\(\) must go along")


@pytest.mark.parametrize(
    ("method", "scorer", "message"),
    [(method, *of) for method in FEW for of in [*WRONG, FOLLOWS] if (method, of) != ("adalora", FOLLOWS)],
)
def test_scores_that_are_not_one_a_slice_are_refused(method, scorer, message, monkeypatch):
    """Without this a scorer that did not follow moved slices that were not there, and ranks fell below zero."""
    monkeypatch.setattr("lorafamily.registry.scorers", lambda: {"own": scorer})
    model = lorafamily.apply(tiny(), method, rank=3, targets="blocks.1", seed=0, scorer="own", **FEW[method])
    with pytest.raises(lorafamily.AllocationError, match=message):
        lorafamily.train(model, data(), steps=20, progress=False)
