"""docs/architectures.md: which checks hold for which architecture of `transformers` under which method.

    python experiments/checks/architectures.py                                 # prints lines, writes a JSON file
    python experiments/checks/architectures.py --page docs/architectures.md    # writes the page, too
    python experiments/checks/architectures.py --only wavlm mamba --methods lora

Every model is random, made from a small configuration, and adapted with the default targets. `CHECKS` lists the checks;
each has a model of its own, so that a failure affects no other check.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that rooms find each other

import waiting  # noqa: F401 - before torch

# isort: split
import copy
import datetime
import json
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version

import torch
import transformers
import tyro
from torch import Tensor, nn

import lorafamily
from checks.architectures_checks import (
    CHECKS,
    Case,
    backward,
    copied,
    first_output,
    generated,
    generates,
    in_expert,
    judged,
)
from checks.architectures_models import ARCHITECTURES, Architecture, Batch
from checks.architectures_page import METHODS, Row, line_of, page_of, totals
from lorafamily.layers.experts import Expert
from lorafamily.layers.target import possible_targets
from pages.page import markdown


@dataclass(frozen=True)
class Settings:
    """Check methods on architectures, and write docs/architectures.md."""

    only: tuple[str, ...] = ()
    """architectures to check; none: all"""
    methods: tuple[str, ...] = METHODS
    """methods to check"""
    page: Path | None = None
    """file of the page to write; the page needs all architectures and all methods"""
    out: Path = Path("runs/architectures")
    """folder for architectures.json"""


def examined(architecture: Architecture, methods: Sequence[str] = METHODS) -> Row:
    """Every check of one architecture under every method."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base, batch = architecture.build(), architecture.batch()
        frozen = controlled(base, batch)
    parameters = sum(parameter.numel() for parameter in base.parameters())
    reached, layers, left_out = placed(base, architecture.targets)
    results: dict[str, dict[str, str]] = {}
    for method in methods:
        with tempfile.TemporaryDirectory() as folder:
            case = Case(architecture, method, base, batch, frozen, Path(folder))
            results[method] = {name: judged(check, case) for name, check in CHECKS.items()}
    return Row(
        *(architecture.name, architecture.family, architecture.model, architecture.targets, parameters, layers),
        *(reached / parameters, left_out, generates(base), results),
    )


def controlled(base: nn.Module, batch: Batch) -> Tensor:
    """Outputs of the frozen base model. It also asserts that a second call gives the same outputs and that the model
    can train, since otherwise checks would fail or pass for reasons that are not ours."""
    frozen = copy.deepcopy(base).requires_grad_(False)
    with torch.no_grad():
        outputs = [first_output(frozen(**copied(batch))) for _ in range(2)]
    assert torch.equal(*outputs)
    assert outputs[0].isfinite().all()
    assert outputs[0].abs().max() > 0
    for training in (True, False):
        backward(copy.deepcopy(base).train(training), batch)
    if generates(base):
        generated(base, batch)
    return outputs[0]


def placed(base: nn.Module, targets: str | None) -> tuple[int, int, str]:
    """Parameters in adapted matrices, the number of adapted layers, and what is left out; the same for all methods."""
    model = lorafamily.apply(copy.deepcopy(base), "lora", rank=1, targets=targets, seed=0)
    rows = lorafamily.summary(model).rows
    adapted = {row.module for row in rows}
    weights = {id(base.get_submodule(name).get_parameter("weight")) for name in adapted if has_weight(base, name)}
    possible = possible_targets(base)
    weights |= {id(possible[name].parameter) for name in adapted if isinstance(possible[name].kind, Expert)}
    left: Counter[str] = Counter()
    for name, parameter in base.named_parameters():
        if parameter.ndim > 1 and id(parameter) not in weights:
            left[described(base, name, parameter)] += 1
    words = [matrix if count == 1 else f"{count} {matrix}" for matrix, count in left.items()]
    return sum(row.d_in * row.d_out for row in rows), len(adapted), ", ".join(words) or "nothing"


def has_weight(model: nn.Module, name: str) -> bool:
    """Whether a layer of that name is in the base; a part of a layer has a name only in the adapted model."""
    return name in dict(model.named_modules())


def described(model: nn.Module, name: str, parameter: nn.Parameter) -> str:
    """A matrix without adapter in words: a linear layer by its name, anything else by what it is."""
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or "parametrizations" in name:
        return "convolution"
    if parameter.ndim == 3 and in_expert(owner):
        return "expert stack"
    parts = owner.split(".") if last == "weight" else [last]
    return f"`{next((part for part in reversed(parts) if not part.isdigit()), name)}`"


def main(settings: Settings) -> list[Row]:
    chosen = [architecture for architecture in ARCHITECTURES if architecture.name in (settings.only or names())]
    if unknown := set(settings.only) - set(names()):
        raise SystemExit(f"no architecture {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    if settings.page and (len(chosen) < len(ARCHITECTURES) or set(settings.methods) != set(METHODS)):
        raise SystemExit("the page has all architectures and methods: leave out --only and --methods")
    transformers.logging.set_verbosity_error()
    rows = []
    for architecture in chosen:
        began = time.monotonic()
        rows.append(examined(architecture, settings.methods))
        print(f"{line_of(rows[-1])}  [{time.monotonic() - began:.0f} s]", flush=True)
    about = facts()
    results = {"facts": about, "checks": list(CHECKS), "rows": [asdict(row) for row in rows]}
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "architectures.json").write_text(json.dumps(results, indent=1, ensure_ascii=False))
    print("\n" + "\n".join(totals(rows, settings.methods)))
    if settings.page:
        settings.page.write_text(markdown("Architectures", page_of(rows, about), settings.page.parent))
        print(f"\n{settings.page}")
    return rows


def names() -> tuple[str, ...]:
    return tuple(architecture.name for architecture in ARCHITECTURES)


def facts() -> dict[str, str]:
    packages = ("lorafamily", "torch", "transformers", "peft")
    return {"date": datetime.date.today().isoformat(), "python": sys.version.split()[0]} | {
        name: version(name) for name in packages
    }


if __name__ == "__main__":
    main(tyro.cli(Settings))
