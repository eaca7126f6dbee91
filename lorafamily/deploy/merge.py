"""Merging is an act, not a mode: weights change when `merge` is called and at no other time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.batch import call
from lorafamily.errors import StateError
from lorafamily.layers import Acting
from lorafamily.names import join
from lorafamily.parts import Target
from lorafamily.placement import Model, Placement, noted, placement_of, targets_of
from lorafamily.site import keep_padding, sites_in


@torch.no_grad()
def merge(model: Model, *, keep: Literal["device", "cpu", "none"] = "device") -> Model:
    """Fold the active adapters into their weights, W + ΔW, and leave nothing of them in the forward pass.

    ΔW is computed and added in float32 or higher and rounded once to the weight's dtype. Merged modules have their own
    forward again, and `state_dict()` the base's names: `save_pretrained` writes an ordinary checkpoint. Merging what is
    merged changes nothing. `merge_difference` says how far the rounding moves the outputs.

    Args:
        keep: where the original weights wait, whose bits `unmerge` gives back: on their device, in CPU memory, or
            nowhere, with which merging is for good.

    Raises:
        StateError: no adapter is active, an adapted weight is shared with another layer, which would change too, or it
            is not there: computed from others (parametrised), or offloaded.
    """
    if keep not in ("device", "cpu", "none"):
        raise StateError(f'keep={keep!r}: must be "device", "cpu" or "none"')
    placement = placement_of(model)
    owner, state = noted(model)
    assert state is not None
    if state.merged:
        return model
    targets = targets_of(owner)
    _refuse_shared(owner, placement, targets)
    changes: dict[nn.Parameter, list[tuple[str, Target, Adapter]]] = defaultdict(list)
    for path, adapter in placement.adapters.items():
        changes[_replaceable(path, targets[path])].append((path, targets[path], adapter))
    originals: dict[str, Tensor | None] = {}
    try:
        for parameter, of in changes.items():  # one by one: all merged weights at once would be a second model
            merged = changed_weight(parameter.data, [(target.kind, adapter) for _, target, adapter in of])
            kept = None if keep == "none" else parameter.data if keep == "device" else parameter.data.cpu()
            originals |= {path: kept for path, _, _ in of}
            parameter.data = merged
    except BaseException as error:
        if None in originals.values():
            raise StateError(
                f'merging failed in the middle ({error}), and with keep="none" nothing can be undone: load the base '
                "again"
            ) from error
        _put_back(originals, targets)
        raise
    for _, site in sites_in(owner):
        site.step_aside()
    keep_padding(owner)
    state.originals = originals
    return model


@torch.no_grad()
def unmerge(model: Model) -> Model:
    """Put the original weights and the adapters back as they were before `merge`; nothing if nothing is merged.

    Raises:
        StateError: merged with keep="none".
    """
    owner, state = noted(model)
    if state is None or state.originals is None:
        return model
    if any(original is None for original in state.originals.values()):
        raise StateError(
            f'adapter "{state.active}" was merged with keep="none": the original weights are gone; load the base '
            'again, or merge with keep="cpu"'
        )
    targets = targets_of(owner)
    _put_back(state.originals, targets)
    for placement in state.placements.values():
        for path, adapter in placement.adapters.items():
            like = targets[path].weight
            adapter.to(like.device, torch.promote_types(next(adapter.parameters()).dtype, like.dtype))
    for _, site in sites_in(owner):
        site.stand()
    keep_padding(owner)
    state.originals = None
    return model


@torch.no_grad()
def merge_difference(model: nn.Module, batch: Any) -> float:
    """Largest difference that merging makes to the outputs on a batch, in eval mode; the model stays as it was.

    Of the logits where the model returns an object with `.logits`, of the tensor it returns otherwise; `batch` goes to
    the model as in `train`.

    Raises:
        StateError: no adapter is active, or merging is refused.
    """
    (_, state), training = noted(model), model.training
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
def changed_weight(weight: Tensor, acting: Acting) -> Tensor:
    """W + ΔW in the layout and dtype of W; a new tensor. Several adapters are those of parts of the layer.

    Sums are in float32 or higher, and rounded once.
    """
    changed = weight
    if any(kind.in_place for kind, _ in acting):
        changed = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    for kind, adapter in acting:
        U, V = adapter.factors()
        high = torch.promote_types(torch.promote_types(changed.dtype, U.dtype), torch.float32)
        U, V = (factor.to(weight.device, high) for factor in (U, V))
        changed = kind.changed(changed.to(high), U, V, adapter.scale)
    return changed.to(weight.dtype).contiguous()


def _put_back(originals: Mapping[str, Tensor | None], targets: Mapping[str, Target]) -> None:
    for path, original in originals.items():
        assert original is not None
        parameter = targets[path].parameter
        parameter.data = original.to(parameter.device, parameter.dtype)  # the model may have moved since


def _replaceable(path: str, target: Target) -> nn.Parameter:
    try:
        parameter = target.parameter
    except AttributeError:
        raise StateError(
            f"the weight of {path} is no parameter but computed from others; make it one before merging "
            "(torch.nn.utils.parametrize.remove_parametrizations)"
        ) from None
    if parameter.is_meta:
        raise StateError(f"the weight of {path} is not here (offloaded, or on the meta device); merge the checkpoint")
    return parameter


def _refuse_shared(model: nn.Module, placement: Placement, targets: Mapping[str, Target]) -> None:
    owners = defaultdict(list)
    for name, module in model.named_modules():
        for own_name, parameter in module._parameters.items():
            owners[id(parameter)].append(join(name, own_name))
    for path in placement.adapters:
        names = owners[id(_replaceable(path, targets[path]))]
        if len(names) > 1:
            raise StateError(
                f"{' and '.join(names)} are one tied tensor: merging the adapter of {path} would change "
                "the others too; untie them (a clone of the weight) before merging"
            )
