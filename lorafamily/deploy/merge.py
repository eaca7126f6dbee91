"""Merging is an act, not a mode: weights change when `merge` is called and at no other time."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorafamily.batch import call
from lorafamily.deploy.folder import bits_of
from lorafamily.deploy.merge_quantised import (
    check_replacement,
    forget_quantised,
    plain_layer,
    remember_quantised,
    replace_layer,
)
from lorafamily.deploy.merged_weights import merged_fingerprints, refuse_replaced, warn_of_changed
from lorafamily.errors import StateError
from lorafamily.functional import without_autocast
from lorafamily.layers.bitsandbytes import scales_kept
from lorafamily.layers.extra_trained import parameter_names
from lorafamily.layers.kinds import Acting
from lorafamily.layers.offloaded import BACK, refuse_offloaded_adapters
from lorafamily.layers.placement import (
    Model,
    adapted,
    noted,
    placement_of,
    targets_of,
    warn_of_no_step,
    warn_over_budget,
)
from lorafamily.layers.quantised import Quantised, quantised_layers
from lorafamily.layers.sharded import is_sharded, local, put_whole, reshard, whole
from lorafamily.layers.site import keep_padding, sites_in
from lorafamily.layers.state import ModelState, Placement, Replaced
from lorafamily.layers.target import Target
from lorafamily.layers.uncalled import warn_read_elsewhere


@torch.no_grad()
def merge(
    model: Model,
    *,
    keep: Literal["device", "cpu", "none"] = "device",
    dequantise: torch.dtype | None = None,
    requantise: bool = False,
) -> Model:
    """Fold the active adapters into their weights, W + ΔW, and leave nothing of them in the forward pass.

    ΔW is computed and added in float32 or higher, also under autocast, and rounded once to the weight's dtype. Merged
    modules have their original forward again and `state_dict()` the base's names, so `save_pretrained` writes an
    ordinary checkpoint. Merging a merged model changes nothing. `merge_difference` measures how far the rounding moves
    the outputs.

    For a quantised base choose `dequantise` or `requantise`; `unmerge` restores its layers.

    Args:
        keep: where to keep the original weights, whose bits `unmerge` gives back: on their device, in CPU memory, or
            nowhere, which makes merging final.
        dequantise: replace all quantised layers, also those without adapter, by ordinary ones of this dtype (best that
            of the rest of the model); the model is then as large as an ordinary one.
        requantise: quantise W + ΔW again, with the settings of each layer. A warning says how much of ΔW that loses,
            which may be most of it; `summary` has it for every layer.

    Raises:
        StateError: no adapter is active; an adapted weight is tied to another layer's, which would change too, is
            computed from others (parametrised), or offloaded; it is quantised and neither `dequantise` nor
            `requantise` is given, or one of them is given and nothing is quantised.
    """
    if keep not in ("device", "cpu", "none"):
        raise StateError(f'keep={keep!r}: must be "device", "cpu" or "none"')
    placement, (owner, state) = placement_of(model), adapted(model)
    if state.merged:
        return model
    warn_over_budget(placement)
    warn_of_no_step(placement)
    warn_read_elsewhere(owner, placement.read_elsewhere)
    reshard(owner)
    targets = targets_of(owner)
    quantised = [path for path in placement.adapters if isinstance(targets[path].layer_kind, Quantised)]
    for path in quantised:
        if is_sharded(targets[path].stored):
            raise StateError(
                f"{path} is quantised and spread over processes; save the adapter, which is whole in each, then load "
                "and merge it in one process"
            )
    check_replacement(owner, next(iter(quantised), None), dequantise, requantise)
    _check_replaceable(owner, placement, targets)
    refuse_offloaded_adapters(placement.adapters)
    for _, site in sites_in(owner):
        site.detach()
    state.originals = {}
    try:
        _merge_plain(placement, targets, state.originals, keep)
        if dequantise or requantise:
            _merge_quantised(owner, state, targets, keep, dequantise)
    except BaseException as error:
        if keep == "none" and (state.originals or state.quantised.layers):
            raise StateError(
                f'merging failed in the middle ({error}), and keep="none" kept nothing to undo it with: load the base '
                "again"
            ) from error
        _undo(owner, state)
        raise
    keep_padding(owner)
    if keep != "none":
        state.merged_fingerprints = merged_fingerprints(state, targets)
    if state.quantised.lost:
        _warn_of_lost(placement, state.quantised.lost)
    return model


def _merge_plain(
    placement: Placement, targets: Mapping[str, Target], originals: dict[str, Tensor | None], keep: str
) -> None:
    changes: dict[nn.Parameter, list[str]] = defaultdict(list)
    for path in placement.adapters:
        if not isinstance(targets[path].layer_kind, Quantised):
            changes[targets[path].parameter].append(path)
    for parameter, paths in changes.items():  # one by one, since all merged weights take as much memory as the model
        merged = changed_weight(whole(parameter), [(targets[path].kind, placement.adapters[path]) for path in paths])
        here = local(parameter).clone() if is_sharded(parameter) else parameter.data
        kept = None if keep == "none" else here if keep == "device" else here.cpu()
        originals |= dict.fromkeys(paths, kept)
        put_whole(parameter, merged)


def _merge_quantised(
    owner: nn.Module, state: ModelState, targets: Mapping[str, Target], keep: str, dequantise: torch.dtype | None
) -> None:
    adapters = placement_of(owner).adapters
    by_layer: dict[int, list[str]] = defaultdict(list)
    for path in adapters:
        by_layer[id(targets[path].layer)].append(path)
    assert state.originals is not None
    for at, layer, kind in [*quantised_layers(owner)]:
        paths = by_layer[id(layer)]
        if paths or dequantise:
            W = changed_weight(kind.weight(layer), [(targets[path].kind, adapters[path]) for path in paths])
            new = plain_layer(kind, layer, W, dequantise) if dequantise else kind.requantised(layer, W)
            state.quantised.layers[at] = replace_layer(owner, at, new, keep)
            if not dequantise:
                lost = kind.weight(new) - W
                state.quantised.lost |= {path: float(targets[path].kind.matrix(lost).norm()) for path in paths}
            state.originals |= dict.fromkeys(paths if keep == "none" else [])
    if dequantise:
        state.quantised.noted = forget_quantised(owner)


def _warn_of_lost(placement: Placement, lost: Mapping[str, float]) -> None:
    shares = {path: error / (placement.adapters[path].norm() or math.inf) for path, error in lost.items()}
    worst = max(shares, key=shares.__getitem__)
    warnings.warn(
        f"quantising W + ΔW again left an error of {min(shares.values()):.0%} to {shares[worst]:.0%} of ‖ΔW‖ (the "
        f"most in {worst}); summary has the error of every layer, and dequantise=... avoids it",
        stacklevel=4,
    )


@torch.no_grad()
def unmerge(model: Model) -> Model:
    """Restore the weights and the adapters as they were before `merge`; a model that is not merged stays unchanged.

    A warning names merged weights that were changed since, as by training or `load_state_dict`: that is discarded.

    Raises:
        StateError: merged with keep="none", or a merged weight was quantised or offloaded since, so that the original
            one cannot be put back.
    """
    owner, state = noted(model)
    if state is None or state.originals is None:
        return model
    if any(original is None for original in state.originals.values()):
        raise StateError(
            f'adapter "{state.active}" was merged with keep="none": the original weights are gone; load the base '
            'again, or merge with keep="cpu"'
        )
    reshard(owner)
    targets = targets_of(owner)
    refuse_replaced(state, targets)
    warn_of_changed(state, targets)
    _undo(owner, state)
    return model


def _undo(owner: nn.Module, state: ModelState) -> None:
    reshard(owner)
    for at, layer in state.quantised.layers.items():
        replace_layer(owner, at, layer)
    remember_quantised(owner, state.quantised.noted)
    targets = targets_of(owner)
    for path, original in (state.originals or {}).items():
        assert original is not None
        parameter = targets[path].parameter
        if is_sharded(parameter):
            local(parameter).copy_(original)
        else:
            value = original.to(parameter.device, parameter.dtype)  # the model may have moved since
            parameter.data = value
            # Comparing is free where they share memory, as is usual.
            if not value.is_meta and not torch.equal(bits_of(parameter.data), bits_of(value)):
                raise StateError(
                    f"{path}: its {type(parameter.data).__name__} did not take the original weight, and is still "
                    "merged; load the base again"
                )
    for placement in state.placements.values():
        for path, adapter in placement.adapters.items():
            like = targets[path].stored
            adapter.to(like.device, torch.promote_types(next(adapter.parameters()).dtype, like.dtype))
    for _, site in sites_in(owner):
        site.attach()
    keep_padding(owner)
    state.originals, state.quantised, state.merged_fingerprints = None, Replaced(), {}


@torch.no_grad()
def merge_difference(
    model: nn.Module, batch: Any, *, dequantise: torch.dtype | None = None, requantise: bool = False
) -> float:
    """Largest difference that merging makes to the outputs on a batch, in eval mode; the model stays unchanged.

    Outputs are the logits if the model returns an object with `.logits`, otherwise the tensor that it returns. `batch`
    goes to the model as in `train`, `dequantise` and `requantise` to `merge`.

    Raises:
        StateError: no adapter is active, merging is refused, or the model returns neither logits nor a tensor.
    """
    (_, state), training = noted(model), model.training
    merged = state is not None and state.merged
    merging = partial(merge, dequantise=dequantise, requantise=requantise)
    model.eval()
    try:
        with scales_kept(model):
            both = [_outputs_of(change(model), batch).float() for change in (unmerge, merging)]
    finally:
        (merging if merged else unmerge)(model)
        model.train(training)  # also the layers that unmerge restored, which merge removed in eval mode
    return float((both[0] - both[1]).abs().max())


def _outputs_of(model: nn.Module, batch: Any) -> Tensor:
    output = call(model, batch)
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise StateError(f"{type(model).__name__} returned a {type(output).__name__}, no tensor and without .logits")
    return output


@torch.no_grad()
def changed_weight(weight: Tensor, acting: Acting) -> Tensor:
    """W + ΔW as a new tensor in the layout and dtype of W, summed in float32 or higher and rounded once.

    Several adapters belong to parts of the layer.
    """
    changed = weight
    if any(kind.in_place for kind, _ in acting):
        changed = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    for kind, adapter in acting:
        U, V = adapter.factors()
        high = torch.promote_types(torch.promote_types(changed.dtype, U.dtype), torch.float32)
        U, V = (factor.to(weight.device, high) for factor in (U, V))
        with without_autocast(weight.device):  # which would round all of W in the sum, not only ΔW
            changed = kind.changed(changed.to(high), U, V, adapter.scale)
    return changed.to(weight.dtype).contiguous()


def _check_replaceable(model: nn.Module, placement: Placement, targets: Mapping[str, Target]) -> None:
    """Refuse adapted weights that are no parameters, not in memory, or tied to others."""
    names_of = parameter_names(model)
    for path in placement.adapters:
        try:
            parameter = targets[path].parameter
        except AttributeError:
            raise StateError(
                f"the weight of {path} is no parameter but computed from others; make it one before merging "
                "(torch.nn.utils.parametrize.remove_parametrizations)"
            ) from None
        if parameter.is_meta:
            raise StateError(
                f"the weight of {path} is not here (offloaded, or on the meta device); save the adapter and merge it "
                f"into the checkpoint (lorafamily merge), or load the weight: {BACK}"
            )
        if len(names := names_of[id(parameter)]) > 1:
            raise StateError(
                f"{' and '.join(names)} are one tied tensor: merging the adapter of {path} would change "
                "the others too; untie them (a clone of the weight) before merging"
            )
