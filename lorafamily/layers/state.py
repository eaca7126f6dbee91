"""The state of a model with adapters: what was placed in it, and which placement is active or merged. All its sites
refer to the same `ModelState`, so that it is found through whatever wraps the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.budget import Sizing
from lorafamily.layers.fingerprints import fingerprints
from lorafamily.method import Method


@dataclass
class Placement:
    """Everything placed in a model under one name.

    `adapters`: by the full name of the target. `inactive_values`, `inactive_buffers`: while this placement is active,
    the base's values of its extra trained parameters, and of the buffers that training may move; otherwise its own.
    """

    name: str
    spec: str
    method: Method
    sizing: Sizing
    adapters: dict[str, Adapter]
    inactive_values: dict[str, Tensor]
    inactive_buffers: dict[str, Tensor] = field(default_factory=dict)
    by_default: bool = False
    """Whether the user named no targets, so that targets without effect may be left out."""
    read_elsewhere: list[str] = field(default_factory=list)
    """Layers whose weights the model was seen to read besides calling them."""
    had_session: bool = False
    """Whether this process has made a session for it."""
    file_fingerprints: dict[str, int] | None = None
    """Fingerprints of its tensors when they were loaded, imported or combined; None where `apply` made them."""

    def trainable(self) -> int:
        """Number of trainable adapter parameters at the present ranks, without extra trained ones."""
        return sum(adapter.trainable() for adapter in self.adapters.values())

    def fingerprints(self) -> dict[str, int]:
        """Of the adapters' tensors, by name, dtype and shape: a tensor that was cast or resized counts as another."""
        tensors = [(f"{at}: {name}", p) for at, a in self.adapters.items() for name, p in a.named_parameters()]
        return fingerprints((f"{name} {p.dtype} {tuple(p.shape)}", p) for name, p in tensors)


@dataclass
class Replaced:
    """What merging took out of a quantised model: its quantised `layers` by name, and what transformers had `noted` of
    them. `lost`: by adapter, ‖error‖ where W + ΔW was quantised again."""

    layers: dict[str, nn.Module] = field(default_factory=dict)
    noted: dict[str, dict[str, Any]] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)


@dataclass
class ModelState:
    """A model's placements by name, and the name of the active one. `trained_before`: by name, whether the base's
    parameters were trainable before adapters came. `originals`: while a placement is merged, the base weights by module
    name, None for those that were not kept. `merged_fingerprints`: dtype and fingerprint of each merged weight.
    `routed`: the samples of the innermost block of `routing`; None outside of it, or inside `disabled` in it."""

    trained_before: dict[str, bool]
    placements: dict[str, Placement] = field(default_factory=dict)
    active: str | None = None
    originals: dict[str, Tensor | None] | None = None
    quantised: Replaced = field(default_factory=Replaced)
    merged_fingerprints: dict[str, tuple[torch.dtype, int]] = field(default_factory=dict)
    routed: object = None

    @property
    def merged(self) -> bool:
        return self.originals is not None
