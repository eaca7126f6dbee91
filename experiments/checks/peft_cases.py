"""Models, targets and options from the tests of a peft checkout, as cases for our adapters."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import lorafamily

RANK, ALPHA = 8, 8.0
"""peft's defaults, for cases of methods other than LoRA."""
STUBS = ("datasets", "diffusers", "parameterized")
"""Packages that peft's test files import but these models do not need; replaced if they are not installed."""
CARRIED_OVER = {"r", "lora_alpha", "lora_dropout", "use_rslora", "modules_to_save", "target_modules"}
"""Options of a LoraConfig that `apply` has too."""


@dataclass(frozen=True)
class Case:
    """One model with one set of targets. `make`: the model in a dtype, always with the same weights; `layers`: full
    names of the layers to adapt, empty for all that can have an adapter; `trained`: full names of modules whose
    parameters are extra trained parameters; `sources`: names of the peft cases that it covers."""

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
        """Put our adapters on a model as peft's case says. `layers`: only these, by full name."""
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
        """Full names of our targets: nn.MultiheadAttention is adapted by its projections."""
        modules = dict(model.named_modules())
        found: list[str] = []
        for layer in self.layers:
            parts = isinstance(modules.get(layer), nn.MultiheadAttention)
            found += [f"{layer}.{part}" for part in ("q", "k", "v", "out")] if parts else [layer]
        return found


def every_layer(name: str, module: nn.Module) -> bool:
    return True


@dataclass
class Zoo:
    """The contents of a checkout. `total`, `of_lora`, `whole`: numbers of peft's cases, of LoRA's among them, and of
    those that keep all their options; `options`, `methods`: in how many cases an option of LoRA was left out, and how
    many cases another method has; `not_made`: by model class, why it takes no part."""

    cases: list[Case] = field(default_factory=list)
    total: int = 0
    of_lora: int = 0
    whole: int = 0
    options: Counter[str] = field(default_factory=Counter)
    methods: Counter[str] = field(default_factory=Counter)
    not_made: dict[str, str] = field(default_factory=dict)


def read(checkout: Path) -> Zoo:
    """The cases of a checkout: those of LoRA, without options that have no equivalent here, and the models and targets
    of other methods. Equal ones become one case. Then come the model classes that are in no case."""
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
    """Model classes that peft uses in other tests, adapted wherever possible."""
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


def said(error: BaseException) -> str:
    """The type and first line of an exception."""
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first}"


def without_equivalent(options: Mapping[str, Any]) -> list[str]:
    """Options of a LoraConfig that have no equivalent here."""
    left = []
    for option, value in options.items():
        if option == "init_lora_weights" and isinstance(value, bool):
            continue  # an initialisation, which the checks overwrite when they move the factors
        if option not in CARRIED_OVER:
            left.append(f"{option}={value!r}" if isinstance(value, str) else option)
    return left


def targeted(model: nn.Module, config_class: Any, options: Mapping[str, Any]) -> list[str]:
    """Full names of the modules that peft adapts: a string must match the name, an entry of a list must be its end."""
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
    """An input of the shape of peft's, 0 to 89. For embeddings it is the same. For others, where it would leave some
    models behind a dead ReLU, it has both signs, and is large enough to pass a LayerNorm with an epsilon of 20."""
    if any(isinstance(module, nn.Embedding) for module in model.modules()):
        return torch.arange(90).view(9, 10)
    return 10 * torch.randn(9, 10, generator=torch.Generator().manual_seed(0))


def imported(checkout: Path) -> ModuleType:
    """The module tests/test_custom_models.py of a checkout, which uses the installed peft."""
    file = checkout / "tests" / "test_custom_models.py"
    if not file.exists():
        raise SystemExit(f"{file} is not there; --peft takes a checkout of github.com/huggingface/peft")
    importlib.import_module("peft")  # first, since it and transformers look up which packages are installed
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
    """While peft's tests are imported, replace missing packages by modules that have every name."""
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
    """The commit of a checkout; "unknown" if it is no git repository."""
    if not (checkout / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(checkout), "log", "-1", "--format=%H of %cs"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
