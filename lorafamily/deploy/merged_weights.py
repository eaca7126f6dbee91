"""What became of merged weights since they were merged: whether `unmerge` can restore them, and what that discards."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from lorafamily.deploy.folder import listed
from lorafamily.errors import StateError
from lorafamily.layers.fingerprints import fingerprints
from lorafamily.layers.quantised import Quantised
from lorafamily.layers.sharded import is_sharded
from lorafamily.layers.state import ModelState
from lorafamily.layers.target import Target


def merged_fingerprints(state: ModelState, targets: Mapping[str, Target]) -> dict[str, tuple[torch.dtype, int]]:
    """Dtype and fingerprint of every merged weight, by the first target on it; quantised layers, which are replaced as
    a whole, have none."""
    first: dict[nn.Parameter, str] = {}
    for path in state.originals or {}:
        if not isinstance(targets[path].layer_kind, Quantised):
            first.setdefault(targets[path].parameter, path)
    found = fingerprints((path, parameter) for parameter, path in first.items())
    return {path: (parameter.dtype, found[path]) for parameter, path in first.items()}


def refuse_replaced(state: ModelState, targets: Mapping[str, Target]) -> None:
    """Check that the original weights can be put back.

    Raises:
        StateError: since the merge a weight was offloaded, or became a tensor of another class, as where it is
            quantised: that keeps its own values, whatever it is given.
    """
    replaced = []
    for path, original in (state.originals or {}).items():
        now, layer = targets[path].parameter, targets[path].layer
        offloaded = now.is_meta and hasattr(layer, "_hf_hook")  # without accelerate's hook there are no values at all
        if offloaded or (not is_sharded(now) and type(now.data) is not type(original)):
            replaced.append(f"{path} is {'offloaded' if offloaded else f'of class {type(now.data).__name__}'}")
    if replaced:
        raise StateError(
            f'the weights that "{state.active}" was merged into are others now, and the original ones cannot be put '
            f"back ({listed(replaced)}); load the base again, or unmerge before you quantise or offload"
        )


def warn_of_changed(state: ModelState, targets: Mapping[str, Target]) -> None:
    """Warn if merged weights have other values than the merge gave them. A model cast since is not compared."""
    before = state.merged_fingerprints
    now = {path: targets[path].parameter for path in before}
    here = ((path, p) for path, p in now.items() if p.dtype == before[path][0] and not p.is_meta)
    found = fingerprints(here)
    if changed := [path for path, value in found.items() if value != before[path][1]]:
        warnings.warn(
            f'weights changed since "{state.active}" was merged into them, by training or by loading others: '
            f"{listed(changed)}; unmerging discards that, and leaves what changed in other layers. If you meant to "
            "keep it, save the merged model first",
            stacklevel=4,
        )
