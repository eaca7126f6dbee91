"""Checks of our adapters on the models of peft's tests; `CHECKS` has each with its claim."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import lorafamily
from checks.peft_cases import Case, said

MERGED = {torch.float32: 1e-4, torch.float64: 1e-10}
"""How much merging may change outputs, relative to the largest: the weight is rounded once, and sums of up to some
hundred products are added in another order."""
HALVES = {torch.bfloat16: 0.1, torch.float16: 0.02}
"""The same in half precision: some units of the last place, 2⁻⁸ and 2⁻¹¹, through several layers."""


class BaseError(Exception):
    """The model fails without adapters, too."""


class Trial:
    """A fresh model of a case, and a record of its state before adapters."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32):
        self.case = case
        self.x = case.x.to(dtype) if case.x.is_floating_point() else case.x
        self.model = case.make(dtype).eval()
        self.tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        self.ids = {id(tensor) for tensor in self.tensors.values()}
        self.values = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        self.state = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.modules = {name: (type(module), set(vars(module))) for name, module in self.model.named_modules()}
        self.flags = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        # F.linear may add in another order for frozen weights; `apply` freezes, so the base is compared frozen, too.
        self.frozen = copy.deepcopy(self.model).requires_grad_(False)
        try:
            self.base = output(self.frozen, self.x)
        except Exception as error:
            raise BaseError(f"without adapters: {said(error)}") from error

    def adapted(self) -> Trial:
        """Put new adapters on the model."""
        self.case.apply(self.model)
        return self

    def moved(self, size: float = 0.3) -> Trial:
        """Put adapters on the model and move them and extra trained parameters, since at first every update is zero."""
        perturb(self.adapted().model, 1, size=size)
        return self

    def output(self) -> Tensor:
        return output(self.model, self.x)

    def of_adapters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if id(parameter) not in self.ids]

    def is_extra_trained(self, name: str) -> bool:
        return any(name.startswith(f"{module}.") for module in self.case.trained)

    def check_base_tensors(self) -> None:
        """Weights and buffers of the base, except extra trained parameters, have not changed a bit."""
        for name, tensor in self.tensors.items():
            if not self.is_extra_trained(name):
                require(torch.equal(tensor, self.values[name]), f"{name} of the base has changed")

    def check_unmerged(self, before: Tensor) -> None:
        """After `unmerge` the base has its bits again, and the output is the one before merging."""
        lorafamily.unmerge(self.model)
        self.check_base_tensors()
        same(self.output(), before, "output after unmerge")

    def check_given_back(self) -> None:
        """Nothing of the adapters is left in classes, names, attributes, bits, flags and outputs."""
        for name, module in self.model.named_modules():
            require(name in self.modules, f"a module is left: {name}")
            cls, attributes = self.modules[name]
            require(type(module) is cls, f"{name or 'model'} is a {type(module).__name__}, not a {cls.__name__}")
            more = set(vars(module)) ^ attributes
            require(not more, f"{name or 'model'} gained or lost attributes: {', '.join(sorted(more))}")
        self.check_state()
        flags = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        require(flags == self.flags, "requires_grad is not what it was")
        same(output(copy.deepcopy(self.model).requires_grad_(False), self.x), self.base, "output after remove")

    def check_state(self) -> None:
        state = self.model.state_dict()
        require(list(state) == list(self.state), f"state_dict has {', '.join(state)}")
        for name, value in state.items():
            require(torch.equal(value, self.state[name]), f"{name} in state_dict has changed")


Check = Callable[[Case], None]
CHECKS: dict[str, tuple[str, Check]] = {}
"""By short name, the claim and the function that checks it, which raises what is wrong."""


def checks(name: str, claim: str) -> Callable[[Check], Check]:
    def note(check: Check) -> Check:
        CHECKS[name] = claim, check
        return check

    return note


@checks("targets", "the layers that get an adapter are those that peft's case names")
def _targets(case: Case) -> None:
    trial = Trial(case).adapted()
    found = {row.module for row in lorafamily.summary(trial.model).rows}
    asked = set(case.targets(trial.model)) or found
    require(found == asked, f"adapted: {', '.join(sorted(found))}; asked: {', '.join(sorted(asked))}")


@checks("identity", "right after `apply` outputs are those of the base, bit for bit")
def _identity(case: Case) -> None:
    trial = Trial(case).adapted()
    same(trial.output(), trial.base, "output after apply")


@checks("trains", "four steps of SGD change all adapters and extra trained parameters, and no bit of anything else")
def _trains(case: Case) -> None:
    trial = Trial(case).adapted()
    adapters, extra_trained = trial.of_adapters(), [name for name in trial.tensors if trial.is_extra_trained(name)]
    before = [parameter.detach().clone() for parameter in adapters]
    trainable = [parameter for parameter in trial.model.parameters() if parameter.requires_grad]
    expected = {id(parameter) for parameter in adapters} | {id(trial.tensors[name]) for name in extra_trained}
    require({id(parameter) for parameter in trainable} == expected, "requires_grad names other tensors")
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    trial.model.train()
    torch.manual_seed(0)  # for the dropout in models
    for _ in range(4):
        trial.model(trial.x).pow(2).mean().backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)  # inputs are up to 57,599 in some models
        optimizer.step()
        optimizer.zero_grad()
    trial.check_base_tensors()
    unmoved = sum(torch.equal(now, then) for now, then in zip(adapters, before, strict=True))
    require(not unmoved, f"{unmoved} of {len(adapters)} tensors of adapters have not moved")
    still = [name for name in extra_trained if torch.equal(trial.tensors[name], trial.values[name])]
    require(not still, f"{', '.join(still)} should train and has not moved")


@checks("effect", "moved factors change the output, for each adapted layer alone")
def _effect(case: Case) -> None:
    trial = Trial(case).moved()
    different(trial.output(), trial.base, "output with adapters")
    for row in lorafamily.summary(trial.model).rows:
        alone = Trial(case)
        case.apply(alone.model, [row.module])
        perturb(alone.model, 1, alone.of_adapters())
        different(alone.output(), trial.base, f"output with an adapter on {row.module} alone")


def _merged_in(case: Case, dtype: torch.dtype) -> None:
    trial = Trial(case, dtype).moved()
    before = trial.output()
    lorafamily.merge(trial.model)
    close(trial.output(), before, MERGED[dtype], "merged output")
    names = list(trial.model.state_dict())
    require(names == list(trial.state), f"state_dict of the merged model has {', '.join(names)}")
    trial.check_unmerged(before)


@checks("merge", "merged outputs are the unmerged ones within 1e-4, and `unmerge` gives back every bit")
def _merge(case: Case) -> None:
    _merged_in(case, torch.float32)


@checks("float64", "the same in float64, within 1e-10")
def _merge_in_double(case: Case) -> None:
    _merged_in(case, torch.float64)


@checks("disabled", "inside `disabled` outputs are the base's, bit for bit, and afterwards what they were")
def _disabled(case: Case) -> None:
    trial = Trial(case).moved()
    before = trial.output()
    with lorafamily.disabled(trial.model):
        same(trial.output(), trial.base, "output inside disabled")
    same(trial.output(), before, "output after disabled")


def _in_half(case: Case, dtype: torch.dtype) -> None:
    trial = Trial(case, dtype)
    try:
        copy.deepcopy(trial.model)(trial.x).float().pow(2).mean().backward()
    except Exception as error:
        raise BaseError(f"backward without adapters: {said(error)}") from error
    trial.moved(0.03)  # inputs reach 57,599 in a model, and float16 ends at 65,504
    before = trial.output()
    require(before.dtype == trial.base.dtype, f"output is {named(before.dtype)}")
    trial.model(trial.x).float().pow(2).mean().backward()
    missing = sum(parameter.grad is None for parameter in trial.of_adapters())
    require(not missing, f"{missing} tensors of adapters have no gradient")
    lorafamily.merge(trial.model)
    merged = trial.output()
    if trial.base.isfinite().all():
        require(bool(before.isfinite().all() and merged.isfinite().all()), "output is not finite, the base's is")
        close(merged, before, HALVES[dtype], "merged output")
    trial.check_unmerged(before)


@checks("bfloat16", "a bfloat16 model: forward, backward, merge, unmerge; finite wherever the base is")
def _bfloat16(case: Case) -> None:
    _in_half(case, torch.bfloat16)


@checks("float16", "the same in float16")
def _float16(case: Case) -> None:
    _in_half(case, torch.float16)


@checks("several", "two sets of adapters in one model: switched between, and taken out one after the other")
def _several(case: Case) -> None:
    trial = Trial(case)
    outputs: dict[str, Tensor] = {}
    for seed, name in enumerate(("first", "second"), start=1):
        case.apply(trial.model, name=name, seed=seed)
        same(trial.output(), trial.base, f"output with the {name} at its start")
        outputs[name] = output(perturb(trial.model, seed), trial.x)
    different(outputs["first"], outputs["second"], "output of the first set")
    for active in ("first", "second", None, "second", "first"):
        lorafamily.switch(trial.model, active)
        same(trial.output(), trial.base if active is None else outputs[active], f"output switched to {active}")
    lorafamily.remove(trial.model, "second")
    same(trial.output(), outputs["first"], "output without the second")
    lorafamily.remove(trial.model, "first")
    trial.check_given_back()


@checks("saved", "saved, and loaded onto a fresh model, tensors have the same bits, and outputs too")
def _saved(case: Case) -> None:
    trial, fresh = Trial(case).moved(), Trial(case)
    with tempfile.TemporaryDirectory() as folder:
        lorafamily.save(trial.model, folder)
        lorafamily.load(fresh.model, folder)
    before, after = trial.model.state_dict(), fresh.model.state_dict()
    require(list(before) == list(after), f"state_dict of the loaded model has {', '.join(after)}")
    wrong = [name for name, value in after.items() if not torch.equal(value, before[name])]
    require(not wrong, f"{', '.join(wrong)} was not read as it was written")
    same(fresh.output(), trial.output(), "output of the loaded model, with tensors of the same bits,")


@checks("copied", "a deepcopy of the adapted model computes the same, and shares nothing with it")
def _copied(case: Case) -> None:
    trial = Trial(case).moved()
    before, other = trial.output(), copy.deepcopy(trial.model)
    same(output(other, trial.x), before, "output of the copy")
    different(output(perturb(other, 2), trial.x), before, "output of the copy, moved,")
    lorafamily.remove(other)
    same(output(other, trial.x), trial.base, "output of the copy without adapters")
    same(trial.output(), before, "output of the original")


@checks("removed", "`remove` gives everything back: classes, names, attributes, bits, flags")
def _removed(case: Case) -> None:
    trial = Trial(case).moved()
    trial.output()
    lorafamily.remove(trial.model)
    trial.check_given_back()


@checks("peft's file", "exported, the adapters compute the same in peft, and here when read again")
def _exported(case: Case) -> None:
    import peft

    trial, again = Trial(case).moved(), Trial(case)
    before, tolerance = trial.output(), MERGED[torch.float32]
    with tempfile.TemporaryDirectory() as folder:
        lorafamily.export_peft(trial.model, folder, card=False)
        theirs = peft.PeftModel.from_pretrained(case.make(torch.float32), folder).eval()
        lorafamily.import_peft(again.model, folder)
    close(output(theirs, trial.x), before, tolerance, "output in peft")
    close(again.output(), before, tolerance, "output when read again")


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(x)
    return result


@torch.no_grad()
def perturb(model: nn.Module, seed: int, parameters: Sequence[nn.Parameter] = (), size: float = 0.3) -> nn.Module:
    """Add noise to the trainable parameters, or to some of them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters or [parameter for parameter in model.parameters() if parameter.requires_grad]:
        parameter.add_((size * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    return model


def require(true: bool, otherwise: str) -> None:
    # Not `assert`, since pytest would rewrite its failure to several lines.
    if not true:
        raise AssertionError(otherwise)


def same(found: Tensor, expected: Tensor, what: str) -> None:
    """Require the same bits; NaN, which some models give in float16, equals NaN."""
    equal = found.dtype == expected.dtype and torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True)
    require(equal, f"{what} differs by {distance(found, expected):.1e}")


def close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Require a tolerance, relative to the largest number, since small ones are differences of large terms."""
    off = distance(found, expected)
    require(off <= tolerance, f"{what} differs by {off:.1e} of the largest number")


def different(found: Tensor, other: Tensor, what: str) -> None:
    require(distance(found, other) > 1e-3, f"{what} is the same as without")


def distance(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    scale = float(expected.double().abs().max())
    return float((found.double() - expected.double()).abs().max()) / (scale or 1.0)


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
