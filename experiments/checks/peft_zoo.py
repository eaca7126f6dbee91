"""The models of peft's own test suite with our adapters: every model class, every set of targets, every promise.

    python experiments/checks/peft_zoo.py --peft PATH                          # PATH: a checkout of huggingface/peft
    python experiments/checks/peft_zoo.py --peft PATH --page docs/peft-zoo.md  # writes the page as well

Models, targets and options are read from the checkout, `TEST_CASES` in tests/test_custom_models.py; the checks are
ours. Nothing of that repository is kept here. Ends with exit code 1 if a check fails.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that rooms find each other

import waiting  # noqa: F401 - before torch

# isort: split
import copy
import importlib
import importlib.util
import inspect
import json
import re
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from io import StringIO
from types import ModuleType
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

import lorafamily
from pages import page
from pages.page import Heading, Part, Table, Text

RANK, ALPHA = 8, 8.0
"""peft's defaults, for cases of methods that are not LoRA."""
STUBS = ("datasets", "diffusers", "parameterized")
"""What peft's test files import besides what they need for these models; replaced where it is not installed."""
CARRIED_OVER = {"r", "lora_alpha", "lora_dropout", "use_rslora", "modules_to_save", "target_modules"}
"""Options of a LoraConfig that `apply` has too."""
MERGED = {torch.float32: 1e-4, torch.float64: 1e-10}
"""How far merging may move outputs, relative to the largest: the weight is rounded once, and sums of up to some hundred
products are added in another order."""
HALVES = {torch.bfloat16: 0.1, torch.float16: 0.02}
"""The same in half precision, whose last place is 2⁻⁸ and 2⁻¹¹: some units of it through several layers."""


@dataclass(frozen=True)
class Settings:
    """Run the models of peft's test suite with our adapters."""

    peft: Path
    """checkout of github.com/huggingface/peft, the folder that has tests/"""
    out: Path = Path("runs/peft-zoo")
    """folder for zoo.json"""
    page: Path | None = None
    """Markdown page to write as well"""


@dataclass(frozen=True)
class Case:
    """One model with one set of targets. `make`: the model in a dtype, always with the same weights; `layers`: full
    names of what is to be adapted, empty for everything that can carry an adapter; `trained`: full names of modules
    that train beside the adapters; `sources`: names of the cases of peft that it stands for."""

    model: str
    make: Callable[[torch.dtype], nn.Module]
    x: Tensor
    layers: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    rank: int = RANK
    alpha: float = ALPHA
    dropout: float = 0.0
    method: str = "lora"
    sources: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        options = [f"{', '.join(self.trained)} trains too"] if self.trained else []
        options += [f"rank {self.rank}"] if self.rank != RANK else []
        options += [f"alpha {self.alpha:g}"] if self.alpha != ALPHA else []
        options += [f"dropout {self.dropout:g}"] if self.dropout else []
        options += [self.method] if self.method != "lora" else []
        return "; ".join([f"{self.model}: {', '.join(self.layers) or 'every layer that can'}", *options])

    def apply(self, model: nn.Module, layers: Sequence[str] = (), name: str = "default", seed: int = 0) -> nn.Module:
        """Our arguments for what peft's say. `layers`: these only, by full name."""
        patterns = [f"^{re.escape(layer)}$" for layer in layers or self.targets(model)]
        return lorafamily.apply(
            model,
            self.method,
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            targets=patterns or every_layer,
            also_train=[rf"^{re.escape(module)}\." for module in self.trained] or None,
            name=name,
            seed=seed,
        )

    def targets(self, model: nn.Module) -> list[str]:
        """Full names of layers as we call them: nn.MultiheadAttention is adapted by its projections."""
        modules = dict(model.named_modules())
        found: list[str] = []
        for layer in self.layers:
            parts = isinstance(modules.get(layer), nn.MultiheadAttention)
            found += [f"{layer}.{part}" for part in ("q", "k", "v", "out")] if parts else [layer]
        return found


def every_layer(name: str, module: nn.Module) -> bool:
    return True


class BaseError(Exception):
    """The model cannot do it without adapters either."""


class Trial:
    """A fresh model of a case, and what it was before adapters."""

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
        # F.linear may add in another order for a weight that requires no gradient; apply freezes, so compare with that.
        self.frozen = copy.deepcopy(self.model).requires_grad_(False)
        try:
            self.base = output(self.frozen, self.x)
        except Exception as error:
            raise BaseError(f"without adapters: {said(error)}") from error

    def adapted(self) -> Trial:
        """With adapters at their start."""
        self.case.apply(self.model)
        return self

    def moved(self, size: float = 0.3) -> Trial:
        """With adapters, and what trains beside them, away from their start, where every update is zero."""
        perturb(self.adapted().model, 1, size=size)
        return self

    def output(self) -> Tensor:
        return output(self.model, self.x)

    def of_adapters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if id(parameter) not in self.ids]

    def trains_beside(self, name: str) -> bool:
        return any(name.startswith(f"{module}.") for module in self.case.trained)

    def check_base_tensors(self) -> None:
        """Weights and buffers of the base, but for what trains beside the adapters, have the bits they had."""
        for name, tensor in self.tensors.items():
            if not self.trains_beside(name):
                require(torch.equal(tensor, self.values[name]), f"{name} of the base has changed")

    def check_given_back(self) -> None:
        """Nothing of adapters is left: classes, names, attributes, bits, flags, outputs."""
        for name, module in self.model.named_modules():
            require(name in self.modules, f"a module is left: {name}")
            own, attributes = self.modules[name]
            require(type(module) is own, f"{name or 'model'} is a {type(module).__name__}, not a {own.__name__}")
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
"""Short name → what it says, and what finds out; it raises what is wrong."""


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


@checks("trains", "four steps of SGD change all adapters and what trains beside them, and no bit of anything else")
def _trains(case: Case) -> None:
    trial = Trial(case).adapted()
    adapters, beside = trial.of_adapters(), [name for name in trial.tensors if trial.trains_beside(name)]
    before = [parameter.detach().clone() for parameter in adapters]
    trainable = [parameter for parameter in trial.model.parameters() if parameter.requires_grad]
    expected = {id(parameter) for parameter in adapters} | {id(trial.tensors[name]) for name in beside}
    require({id(parameter) for parameter in trainable} == expected, "requires_grad names other tensors")
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    trial.model.train()
    torch.manual_seed(0)  # of the dropout in models
    for _ in range(4):
        trial.model(trial.x).pow(2).mean().backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)  # inputs are up to 57,599 in some models
        optimizer.step()
        optimizer.zero_grad()
    trial.check_base_tensors()
    unmoved = sum(torch.equal(now, then) for now, then in zip(adapters, before, strict=True))
    require(not unmoved, f"{unmoved} of {len(adapters)} tensors of adapters have not moved")
    still = [name for name in beside if torch.equal(trial.tensors[name], trial.values[name])]
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
    lorafamily.unmerge(trial.model)
    trial.check_base_tensors()
    same(trial.output(), before, "output after unmerge")


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
    trial.moved(0.03)  # a model has inputs of up to 57,599, and float16 ends at 65,504
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
    lorafamily.unmerge(trial.model)
    trial.check_base_tensors()
    same(trial.output(), before, "output after unmerge")


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
    """Add noise to what trains, or to some of it."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters or [parameter for parameter in model.parameters() if parameter.requires_grad]:
        parameter.add_((size * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    return model


def require(true: bool, otherwise: str) -> None:
    # No `assert`, whose failure pytest would rewrite to several lines.
    if not true:
        raise AssertionError(otherwise)


def same(found: Tensor, expected: Tensor, what: str) -> None:
    """The same bits; NaN, which some models give in float16, is the same as NaN."""
    alike = found.dtype == expected.dtype and torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True)
    require(alike, f"{what} differs by {distance(found, expected):.1e}")


def close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Within a tolerance, relative to the largest number: small ones are differences of large terms."""
    off = distance(found, expected)
    require(off <= tolerance, f"{what} differs by {off:.1e} of the largest number")


def different(found: Tensor, other: Tensor, what: str) -> None:
    require(distance(found, other) > 1e-3, f"{what} is the same as without")


def distance(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    scale = float(expected.double().abs().max())
    return float((found.double() - expected.double()).abs().max()) / (scale or 1.0)


def said(error: BaseException) -> str:
    """An exception as its type and first line."""
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first}"


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Outcome:
    """What a check came to. refused: by an error of ours that says why; base: the model cannot do it by itself."""

    status: Literal["holds", "refused", "fails", "base"]
    reason: str = ""


def run_check(check: Check, case: Case) -> Outcome:
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            check(case)
    except BaseError as error:
        return Outcome("base", str(error))
    except lorafamily.LoraFamilyError as error:
        return Outcome("refused", said(error))
    except Exception as error:
        return Outcome("fails", said(error))
    return Outcome("holds")


def run(case: Case) -> dict[str, Outcome]:
    """All checks on one case."""
    return {name: run_check(check, case) for name, (_, check) in CHECKS.items()}


@dataclass
class Zoo:
    """What was read from a checkout. `left`: option of LoRA or method → in how many cases it was left away;
    `not_made`: model class → why it takes no part."""

    cases: list[Case] = field(default_factory=list)
    total: int = 0
    of_lora: int = 0
    whole: int = 0
    options: Counter[str] = field(default_factory=Counter)
    methods: Counter[str] = field(default_factory=Counter)
    not_made: dict[str, str] = field(default_factory=dict)


def read(checkout: Path) -> Zoo:
    """The cases of a checkout: each of LoRA's, without options that have no equivalent, and what models and targets
    other methods add; equal ones are one case. Then the model classes that are in no case."""
    tests = imported(checkout)
    zoo = Zoo()
    seen: dict[tuple[Any, ...], Case] = {}
    made: set[str] = set()
    for source, model_id, config_class, options in tests.TEST_CASES:
        model = tests.MockTransformerWrapper.from_pretrained(model_id)
        made |= {type(module).__name__ for module in model.modules()}
        zoo.total += 1
        more: dict[str, Any] = {}
        if config_class.__name__ == "LoraConfig":
            zoo.of_lora += 1
            left = without_equivalent(options)
            zoo.options.update(left)
            zoo.whole += not left
            config = config_class(**options)
            more = {"rank": config.r, "alpha": float(config.lora_alpha), "dropout": config.lora_dropout}
            more |= {"method": "rslora"} if config.use_rslora else {}
        else:
            zoo.methods[config_class.__name__] += 1
        trained = tuple(options.get("modules_to_save") or ())
        layers = tuple(layer for layer in targeted(model, config_class, options) if layer not in trained)
        case = Case(type(model).__name__, maker(tests, model_id), input_for(model), layers, trained, **more)
        key = (model_id, layers, trained, *more.values()) if more else (model_id, layers, trained, RANK, ALPHA, 0.0)
        known = seen.get(key, case)
        seen[key] = Case(**{**vars(known), "sources": (*known.sources, source)})
    zoo.cases = sorted(seen.values(), key=lambda case: (case.model, case.layers, case.label))
    zoo.cases += list(others(tests, made, zoo.not_made))
    return zoo


def others(tests: ModuleType, made: set[str], not_made: dict[str, str]) -> Iterator[Case]:
    """Model classes that peft uses in other tests, adapted wherever they can be."""
    for name, of_tests in sorted(vars(tests).items()):
        if not inspect.isclass(of_tests) or not issubclass(of_tests, nn.Module) or name in made:
            continue
        if of_tests.__module__ != tests.__name__:
            continue
        try:
            model = of_tests()
        except TypeError as error:
            not_made[name] = said(error)
            continue
        yield Case(name, built(of_tests), input_for(model))


def without_equivalent(options: Mapping[str, Any]) -> list[str]:
    """Options of a LoraConfig that nothing here corresponds to."""
    left = []
    for option, value in options.items():
        if option == "init_lora_weights" and isinstance(value, bool):
            continue  # a start, and all checks move the factors
        if option not in CARRIED_OVER:
            left.append(f"{option}={value!r}" if isinstance(value, str) else option)
    return left


def targeted(model: nn.Module, config_class: Any, options: Mapping[str, Any]) -> list[str]:
    """Full names of the modules that peft adapts: a string must match the name, of a list an entry ends it."""
    names = [name for name, _ in model.named_modules()]
    modules, parameters = options.get("target_modules"), options.get("target_parameters", ())
    found: list[str] = []
    if isinstance(modules, str):
        found = [name for name in names if re.fullmatch(modules, name)]
    elif modules is not None:
        found = [name for name in names if any(name == key or name.endswith(f".{key}") for key in modules)]
    elif not parameters:  # the method's own choice
        import peft

        with redirect_stderr(StringIO()):
            adapted = peft.get_peft_model(copy.deepcopy(model), config_class(**options))
        found = list(adapted.targeted_module_names)
    if not found:  # nothing but parameters is named: the layers that have them
        found = [parameter.rpartition(".")[0] for parameter in parameters]
    return found


def maker(tests: ModuleType, model_id: str) -> Callable[[torch.dtype], nn.Module]:
    def make(dtype: torch.dtype) -> nn.Module:
        return in_dtype(tests.MockTransformerWrapper.from_pretrained(model_id), dtype)  # it seeds

    return make


def built(of_tests: Callable[[], nn.Module]) -> Callable[[torch.dtype], nn.Module]:
    def make(dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(0)
        return in_dtype(of_tests(), dtype)

    return make


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    if isinstance(getattr(model, "dtype", None), torch.dtype):
        vars(model)["dtype"] = dtype  # what such a model casts its input to
    return model.to(dtype)


def input_for(model: nn.Module) -> Tensor:
    """Of the shape of peft's input: its numbers where they are entries of a table, else some of both signs and of a
    size that LayerNorm with an epsilon of 20 lets through; peft's, 0 to 89, keep some models behind a dead ReLU."""
    if any(isinstance(module, nn.Embedding) for module in model.modules()):
        return torch.arange(90).view(9, 10)
    return 10 * torch.randn(9, 10, generator=torch.Generator().manual_seed(0))


def imported(checkout: Path) -> ModuleType:
    """tests/test_custom_models.py of a checkout, against the installed peft."""
    file = checkout / "tests" / "test_custom_models.py"
    if not file.exists():
        raise SystemExit(f"{file} is not there; --peft takes a checkout of github.com/huggingface/peft")
    importlib.import_module("peft")  # it and transformers ask which packages are installed: before any is replaced
    with warnings.catch_warnings(), replaced(), searched_first(checkout):
        warnings.simplefilter("ignore")
        return importlib.import_module("tests.test_custom_models")


@contextmanager
def searched_first(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))


class _Anything(ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return object()


@contextmanager
def replaced() -> Iterator[None]:
    """While peft's tests are imported, let packages that are not installed have every name."""
    absent = [name for name in STUBS if importlib.util.find_spec(name) is None]
    for name in absent:
        sys.modules[name] = _Anything(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def commit_of(checkout: Path) -> str:
    """What was checked out, "unknown" where it is no repository of git."""
    if not (checkout / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(checkout), "log", "-1", "--format=%H of %cs"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


Results = Sequence[tuple[Case, Mapping[str, Outcome]]]


def totals(results: Results) -> Counter[str]:
    return Counter(outcome.status for _, outcomes in results for outcome in outcomes.values())


WORDS = {"holds": "✓", "refused": "refused", "fails": "**fails**", "base": "–"}
WHOLE = {"refused": "refused", "fails": "**fails**", "base": "cannot run without adapters"}


def as_page(zoo: Zoo, results: Results, facts: Mapping[str, str]) -> list[Part]:
    notes: dict[str, int] = {}

    def cell(outcome: Outcome) -> str:
        word = WORDS[outcome.status]
        return word if outcome.status == "holds" else f"{word}[^{notes.setdefault(outcome.reason, len(notes) + 1)}]"

    lines = [["model: layers; options", "cases", *CHECKS]]
    alike = [["model: layers; options", "cases", "what", "reason"]]
    for case, outcomes in results:
        head, (first, *rest) = [case.label, str(len(case.sources))], outcomes.values()
        if first.status != "holds" and all(outcome == first for outcome in rest):
            alike.append([*head, WHOLE[first.status], first.reason])
        else:
            lines.append([*head, *(cell(outcomes[name]) for name in CHECKS)])
    together: list[Part] = [Text("The same in every check:"), Table(alike)] if len(alike) > 1 else []
    count = totals(results)
    in_cases = sum(bool(case.sources) for case, _ in results)
    parts: list[Part] = [
        Text("Written by `experiments/checks/peft_zoo.py`; do not edit."),
        Text(
            "The models, targets and options of `TEST_CASES` in `tests/test_custom_models.py` of "
            "[peft](https://github.com/huggingface/peft), with our adapters on them and our checks. A case of peft's "
            "LoRA is run with its rank, alpha, dropout and targets; cases of other methods add their models and "
            f"targets, at rank {RANK} and alpha {ALPHA:g}. Equal ones are one line, *cases* says how many it stands "
            "for. Lines with 0 cases are model classes that peft has for other tests, adapted wherever they can be. "
            "Models with tied weights are in neither; ours are in `tests/test_peft_zoo.py`."
        ),
        Table([["what", "value"], *([name, value] for name, value in facts.items())]),
        Heading("Totals"),
        Text(
            f"{zoo.total} cases of peft, {zoo.of_lora} of them LoRA's, come to {in_cases} lines; "
            f"{len(results) - in_cases} lines are further models. Of {sum(count.values())} checks, {count['holds']} "
            f"hold, {count['refused']} are refused with a reason, {count['fails']} fail, and in {count['base']} the "
            "model cannot do without adapters what is asked of it with them."
        ),
        Heading("Checks"),
        Text("\n".join(f"- **{name}**: {claim}." for name, (claim, _) in CHECKS.items())),
        Heading("Results"),
        Text("✓ holds; refused: with an error of ours, see the note; –: the model cannot do it by itself."),
        Table(lines),
        *together,
        Text("\n".join(f"[^{number}]: {reason}" for reason, number in notes.items()) or "Nothing to note."),
        Heading("No equivalent"),
        Text(
            f"{zoo.whole} of the {zoo.of_lora} cases of LoRA were run as they are. In the others, these options were "
            "left away, since there is nothing of the kind here:"
        ),
        Table([["option of LoRA", "cases"], *([f"`{name}`", str(n)] for name, n in sorted(zoo.options.items()))]),
        Text("Of cases of these methods, only models, targets and `modules_to_save` were taken:"),
        Table([["method", "cases"], *([f"`{name}`", str(n)] for name, n in sorted(zoo.methods.items()))]),
    ]
    if zoo.not_made:
        reasons = "\n".join(f"- `{name}`: {reason}" for name, reason in zoo.not_made.items())
        parts.append(Text(f"Model classes that could not be made without arguments:\n\n{reasons}"))
    return parts


def main(settings: Settings) -> None:
    torch.use_deterministic_algorithms(True)
    zoo = read(settings.peft)
    results: list[tuple[Case, dict[str, Outcome]]] = []
    for case in zoo.cases:
        results.append((case, run(case)))
        count = totals(results[-1:])
        print(f"{case.label}: {', '.join(f'{n} {status}' for status, n in count.items())}", flush=True)
    command = "python experiments/checks/peft_zoo.py --peft PATH --page docs/peft-zoo.md"
    facts = {"command": f"`{command}`", "date": str(date.today()), "peft's tests": commit_of(settings.peft)}
    facts |= {name: version(name) for name in ("peft", "torch", "transformers", "lorafamily")}
    write_json(settings.out, zoo, results, facts)
    if settings.page is not None:
        settings.page.parent.mkdir(parents=True, exist_ok=True)
        parts = as_page(zoo, results, facts)
        settings.page.write_text(page.markdown("The models of peft's tests", parts, settings.page.parent))
    for case, outcomes in results:
        for name, outcome in outcomes.items():
            if outcome.status == "fails":
                print(f"fails: {case.label}, {name}: {outcome.reason}")
    print(", ".join(f"{n} {status}" for status, n in totals(results).items()))
    sys.exit(1 if totals(results)["fails"] else 0)


def write_json(folder: Path, zoo: Zoo, results: Results, facts: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"case": case.label, "sources": case.sources, "checks": {name: asdict(o) for name, o in outcomes.items()}}
        for case, outcomes in results
    ]
    left = {"options": zoo.options, "methods": zoo.methods, "classes": zoo.not_made}
    whole = {"facts": facts, "totals": totals(results), "no equivalent": left, "cases": lines}
    (folder / "zoo.json").write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings))
