"""Merging is an act, not a mode: weights change when `merge` is called and at no other time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.batch import call
from lorafamily.errors import StateError
from lorafamily.layers import LayerKind, attach, detach, keep_padding, kind_for, weight_of
from lorafamily.placement import Model, Placement, adapted_modules, placement_of, point_modules, state_of


@torch.no_grad()
def merge(model: Model, *, keep: Literal["device", "cpu", "none"] = "device") -> Model:
    """Fold the active adapters into their weights, W + ΔW, and leave nothing of them in the forward pass.

    ΔW is computed and added in float32 or higher and rounded once to the weight's dtype. Merged modules have their own
    class again, and `state_dict()` the base's names: `save_pretrained` writes an ordinary checkpoint. Merging what is
    merged changes nothing. `merge_difference` says how far the rounding moves the outputs.

    Args:
        keep: where the original weights wait, whose bits `unmerge` gives back: on their device, in CPU memory, or
            nowhere, with which merging is for good.

    Raises:
        StateError: no adapter is active, or an adapted weight is shared with another layer, which would change too.
    """
    if keep not in ("device", "cpu", "none"):
        raise StateError(f'keep={keep!r}: must be "device", "cpu" or "none"')
    placement = placement_of(model)
    state = state_of(model)
    assert state is not None
    if state.merged:
        return model
    modules = adapted_modules(model, state)
    _refuse_shared(model, placement, modules)
    changes: dict[nn.Parameter, dict[str, tuple[LayerKind, Adapter]]] = defaultdict(dict)
    for path, adapter in placement.adapters.items():
        kind = kind_for(modules[path])
        changes[kind.parameter(modules[path])][path] = kind, adapter
    merged = {parameter: changed_weight(parameter.data, of.values()) for parameter, of in changes.items()}
    for other in state.placements.values():
        for path in other.adapters:
            detach(modules[path], other.name)
    keep_padding(model)
    state.originals = {}
    for parameter, weight in merged.items():
        original, parameter.data = parameter.data, weight
        kept = None if keep == "none" else original if keep == "device" else original.cpu()
        state.originals |= dict.fromkeys(changes[parameter], kept)
    return model


@torch.no_grad()
def unmerge(model: Model) -> Model:
    """Put the original weights and the adapters back as they were before `merge`; nothing if nothing is merged.

    Raises:
        StateError: merged with keep="none".
    """
    state = state_of(model)
    if state is None or state.originals is None:
        return model
    if any(original is None for original in state.originals.values()):
        raise StateError(
            f'adapter "{state.active}" was merged with keep="none": the original weights are gone; load the base '
            'again, or merge with keep="cpu"'
        )
    modules = adapted_modules(model, state)
    for path, original in state.originals.items():
        assert original is not None
        parameter = kind_for(modules[path]).parameter(modules[path])
        parameter.data = original.to(parameter.device)
    for placement in state.placements.values():
        for path, adapter in placement.adapters.items():
            device = weight_of(modules[path]).device
            attach(modules[path], placement.name, adapter if adapter.device == device else adapter.to(device))
    keep_padding(model)
    state.originals = None
    point_modules(modules, state)
    return model


@torch.no_grad()
def merge_difference(model: nn.Module, batch: Any) -> float:
    """Largest difference that merging makes to the outputs on a batch, in eval mode; the model stays as it was.

    Of the logits where the model returns an object with `.logits`, of the tensor it returns otherwise; `batch` goes to
    the model as in `train`.

    Raises:
        StateError: no adapter is active, or merging is refused.
    """
    state, training = state_of(model), model.training
    merged = state is not None and state.merged
    model.eval()
    try:
        both = [outputs_of(change(model), batch).float() for change in (unmerge, merge)]
    finally:
        model.train(training)
        (merge if merged else unmerge)(model)
    return float((both[0] - both[1]).abs().max())


def outputs_of(model: nn.Module, batch: Any) -> Tensor:
    """The logits, or the tensor, that a model returns for a batch.

    Raises:
        StateError: it returned neither.
    """
    output = call(model, batch)
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise StateError(f"{type(model).__name__} returned a {type(output).__name__}, no tensor and without .logits")
    return output


@torch.no_grad()
def changed_weight(weight: Tensor, adapters: Iterable[tuple[LayerKind, Adapter]]) -> Tensor:
    """W + ΔW in the layout and dtype of W; a new tensor. Several adapters are those of parts of the layer.

    Sums are in float32 or higher, and rounded once.
    """
    changed = weight
    for kind, adapter in adapters:
        U, V = adapter.factors()
        high = torch.promote_types(torch.promote_types(changed.dtype, U.dtype), torch.float32)
        U, V = (factor.to(weight.device, high) for factor in (U, V))
        changed = changed.to(high)
        changed = kind.restore(torch.addmm(kind.matrix(changed), U, V, alpha=adapter.scale), changed)
    return changed.to(weight.dtype).contiguous()


def _refuse_shared(model: nn.Module, placement: Placement, modules: Mapping[str, nn.Module]) -> None:
    owners = defaultdict(list)
    for name, module in model.named_modules():
        for own_name, parameter in module._parameters.items():
            owners[id(parameter)].append(f"{name}.{own_name}")
    for path in placement.adapters:
        names = owners[id(kind_for(modules[path]).parameter(modules[path]))]
        if len(names) > 1:
            raise StateError(
                f"{' and '.join(names)} are one tied tensor: merging the adapter of {path} would change "
                "the others too; untie them (a clone of the weight) before merging"
            )
