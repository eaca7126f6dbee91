"""Checks of an adapted model of any architecture; `CHECKS` lists them by name. Each gets a model of its own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lorafamily
from checks.architectures_models import Architecture, Batch, noise
from lorafamily.layers.experts import expert_weights
from lorafamily.layers.placement import placement_of

HOLDS, NOT_APPLICABLE = "holds", "–"
MERGED = 1e-4
"""Largest relative difference in float32 between two orders of the same sum: merged or unmerged, peft's or ours."""
START = {"olora": 1e-5}
"""The same right after `apply`, zero for methods that are not listed. OLoRA may round, since U V − U0 V0 has no zero
factor."""
NOISE = {"lora2": 0.3, "adalora": 0.3}
"""Standard deviation of the noise that is added to all trainable parameters before a check, 0.05 for methods that are
not listed. The updates of these two are products of three and five small values: with 0.05 they would be below
rounding."""


@dataclass(frozen=True)
class Case:
    """One architecture under one method. `base`: the model without adapters, never changed. `frozen`: its outputs while
    all its parameters are frozen, as after `apply`: for some models (WavLM, SigLIP) torch then multiplies in another
    order than for parameters that train, and the last bits differ."""

    architecture: Architecture
    method: str
    base: nn.Module
    batch: Batch
    frozen: Tensor
    folder: Path

    def fresh(self) -> nn.Module:
        """A copy of the base model."""
        return copy.deepcopy(self.base)

    def applied(self) -> nn.Module:
        """A model with new adapters."""
        return lorafamily.apply(
            self.fresh(), self.method, rank=2, targets=self.architecture.targets, example=copied(self.batch), seed=0
        )

    def moved(self) -> nn.Module:
        """A model with adapters that were moved, since at the start every update is zero."""
        return self.moved_(self.applied())

    @torch.no_grad()
    def moved_(self, model: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(1)
        for parameter in trainable(model).values():
            parameter.add_(NOISE.get(self.method, 0.05) * torch.randn(parameter.shape, generator=generator))
        return model

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> Tensor:
        return first_output(model(**copied(self.batch)))


def copied(batch: Batch) -> Batch:
    """A copy of a batch, since BLIP writes into its batch."""
    return {key: value.clone() for key, value in batch.items()}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def first_output(output: Any) -> Tensor:
    """The logits, else the last hidden state, else the first tensor."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(output.get(name), Tensor):
            return output[name]
    return next(value for value in output.values() if isinstance(value, Tensor))


def relative(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    return float((one - other).abs().max() / other.abs().max())


def start(case: Case) -> str:
    """Right after `apply` outputs are the base's."""
    outputs = case.outputs(case.applied())
    allowed = START.get(case.method, 0.0)
    apart = relative(outputs, case.frozen)
    same = apart <= allowed if allowed else torch.equal(outputs, case.frozen)
    return HOLDS if same else f"{apart:.0e} from the base"


@dataclass
class Gradients:
    """Adapted layers after a backward. `called`: those that got an input that was not empty; `none`: those with a
    trainable tensor without gradient; `zero`: those whose gradients are all zero."""

    layers: list[str]
    called: set[str] = field(default_factory=set)
    none: list[str] = field(default_factory=list)
    zero: list[str] = field(default_factory=list)

    def unvisited(self, layers: Sequence[str]) -> list[str]:
        """Those of the layers whose expert got no token, provided that another expert got some."""
        if not any(in_expert(layer) for layer in self.called):
            return []
        return [layer for layer in layers if in_expert(layer) and layer not in self.called]


def in_expert(layer: str) -> bool:
    return any(part.startswith("expert") for part in layer.split("."))


def gradients_of(case: Case, *, training: bool) -> Gradients:
    """The gradients after one forward and backward with moved adapters, in train or in eval mode."""
    model = case.moved().train(training)
    # Modules are looked up by the summary's names, so that the check need not know where adapters are attached.
    layers = {row.module: layer_of(model, row.module) for row in lorafamily.summary(model).rows}
    found = Gradients(list(layers))
    stacked = {name for name, layer in layers.items() if expert_weights(layer)}
    for name, layer in layers.items():
        if name not in stacked:
            layer.register_forward_pre_hook(partial(_note, found.called, name))
    backward(model, case.batch)
    adapters = placement_of(model).adapters
    for name, layer in layers.items():
        # The experts of a stack are one layer, so only its gradients tell whether a single expert was called.
        module = adapters[name] if name in stacked else layer
        gradients = [parameter.grad for parameter in module.parameters() if parameter.requires_grad]
        if name in stacked and any(gradient is not None for gradient in gradients):
            found.called.add(name)
        if any(gradient is None for gradient in gradients):
            found.none.append(name)
        elif not any(bool(gradient.count_nonzero()) for gradient in gradients if gradient is not None):
            found.zero.append(name)
    return found


def layer_of(model: nn.Module, name: str) -> nn.Module:
    """The layer of that name, or the one that it is a part of; the name of an expert in a stack has two more words."""
    modules = dict(model.named_modules())
    layer, stack = name.rpartition(".")[0], ".".join(name.split(".")[:-2])
    return modules.get(name) or modules.get(layer) or modules[stack]


def _note(called: set[str], name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    if inputs and isinstance(inputs[0], Tensor) and inputs[0].numel():
        called.add(name)


def backward(model: nn.Module, batch: Batch) -> None:
    """A backward from a randomly weighted sum of the outputs; random draws inside the model are seeded."""
    torch.manual_seed(0)
    np.random.seed(0)  # SpecAugment draws from it
    outputs = first_output(model(**copied(batch)))
    (outputs * noise(*outputs.shape, seed=2)).sum().backward()


def gradients(case: Case) -> str:
    """Every adapter gets a gradient, except those of experts that no token chose."""
    found = gradients_of(case, training=True)
    unvisited = found.unvisited(found.none + found.zero)
    missing = [name for name in found.none if name not in unvisited]
    if missing:
        silent = [name for name in missing if name not in found.called]
        what = "never called, no gradient" if silent == missing else "no gradient"
        return f"{what}: {listed(missing)}"
    return f"{HOLDS} ({len(unvisited)} unvisited)" if unvisited else HOLDS


def effect(case: Case) -> str:
    """Outputs differ from the base's by more than merging may change them, and every adapter contributes."""
    apart = relative(case.outputs(case.moved()), case.frozen)
    if not apart > 10 * MERGED:
        return f"outputs differ from the base's by {apart:.0e} only"
    found = gradients_of(case, training=False)  # eval mode, so that a failure in train mode hides nothing here
    without = found.none + found.zero
    dead = [name for name in without if name not in found.unvisited(without)]
    return f"without effect: {listed(dead)}" if dead else HOLDS


def merge(case: Case) -> str:
    """Merged outputs are the adapted ones up to rounding, and unmerging restores every bit."""
    model = case.moved()
    adapted = case.outputs(model)
    apart = relative(case.outputs(lorafamily.merge(model)), adapted)
    if not apart <= MERGED:
        return f"merged outputs are {apart:.0e} from adapted ones"
    return HOLDS if torch.equal(case.outputs(lorafamily.unmerge(model)), adapted) else "unmerged outputs differ"


def generate(case: Case) -> str:
    """Five greedy tokens, generated with a cache, are the same for the adapted and the merged model."""
    if not generates(case.base):
        return NOT_APPLICABLE
    model = case.moved()
    adapted = generated(model, case.batch)
    return HOLDS if torch.equal(generated(lorafamily.merge(model), case.batch), adapted) else "other tokens merged"


def generates(model: nn.Module) -> bool:
    can: Callable[[], bool] = getattr(model, "can_generate", lambda: False)
    return can() or "generate" in vars(type(model))


def generated(model: Any, batch: Batch) -> Tensor:
    prompt = {key: value for key, value in copied(batch).items() if key != "decoder_input_ids"}
    ids: Tensor = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=True)
    return ids


def file(case: Case) -> str:
    """Saved, and loaded without a warning into another model, the adapter gives the same outputs to the bit."""
    model = case.moved()
    lorafamily.save(model, case.folder / "file")
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        other = lorafamily.load(case.fresh(), case.folder / "file")
    if given:
        return f"warns: {shortened(str(given[0].message))}"
    return HOLDS if torch.equal(case.outputs(other), case.outputs(model)) else "loaded outputs differ"


def exported(case: Case) -> str:
    """Exported, and loaded by peft, the adapter gives the same outputs up to rounding."""
    import peft

    model = case.moved()
    lorafamily.export_peft(model, case.folder / "peft", card=False)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(case.fresh(), str(case.folder / "peft")).eval()
    apart = relative(case.outputs(theirs), case.outputs(model))
    if apart <= MERGED:
        return HOLDS
    warned = next((str(warning.message) for warning in given if "adapter keys" in str(warning.message)), None)
    return f"peft's outputs are {apart:.0e} from ours" + (f"; it warns: {shortened(warned, 40)}" if warned else "")


def remove(case: Case) -> str:
    """After `remove` the model equals the base: bits, flags, names and classes of modules, outputs."""
    model = case.moved()
    case.outputs(model)
    lorafamily.remove(model)
    state, before = model.state_dict(), case.base.state_dict()
    if list(state) != list(before):
        return f"other tensors: {listed(sorted(state.keys() ^ before.keys()))}"
    if changed := [name for name in before if not torch.equal(state[name], before[name])]:
        return f"changed: {listed(changed)}"
    if tree(model) != tree(case.base):
        return f"other modules: {listed(sorted(str(entry) for entry in set(tree(model)) ^ set(tree(case.base))))}"
    if list(trainable(model)) != list(trainable(case.base)):
        return "other parameters train"
    return HOLDS if torch.equal(case.outputs(model), case.outputs(case.base)) else "outputs differ from the base's"


def tree(model: nn.Module) -> list[tuple[str, type[nn.Module]]]:
    return [(name, type(module)) for name, module in model.named_modules()]


CHECKS: dict[str, Callable[[Case], str]] = {
    **{"start": start, "gradients": gradients, "effect": effect, "merge": merge, "generate": generate},
    **{"file": file, "peft": exported, "remove": remove},
}


def stands(result: str) -> bool:
    """Whether a check holds or does not apply."""
    return result.startswith(HOLDS) or result == NOT_APPLICABLE


def listed(names: Sequence[str]) -> str:
    """The first name, and the number of the others."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def shortened(text: str, length: int = 100) -> str:
    line = next(iter(text.strip().splitlines()), "")
    return line if len(line) <= length else line[: length - 1] + "…"


def judged(check: Callable[[Case], str], case: Case) -> str:
    """The result of a check, or the error that it raised."""
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of transformers and peft; `file` looks at ours
            return check(case)
    except Exception as error:
        return f"{type(error).__name__}: {shortened(str(error))}"
