"""What is noted of a model with adapters.

Every site of the model refers to the same note, so that it is found through whatever wraps the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.budget import Sizing
from lorafamily.layers.fingerprints import fingerprints
from lorafamily.method import Method


@dataclass
class Placement:
    """Everything placed in a model under one name.

    `adapters`: by full name of their targets. `inactive_values`, `inactive_buffers`: for each extra trained parameter,
    and for each buffer that training may move, the values that are not in the model now: the base's while this
    placement is active, its own while it is not.
    """

    name: str
    spec: str
    method: Method
    sizing: Sizing
    adapters: dict[str, Adapter]
    inactive_values: dict[str, Tensor]
    inactive_buffers: dict[str, Tensor] = field(default_factory=dict)
    by_default: bool = False
    """Whether nobody named the targets, so that targets without effect may be left out."""
    had_session: bool = False
    """Whether a session was made for it in this process."""
    file_fingerprints: dict[str, int] | None = None
    """Fingerprints of its tensors as they were loaded, None where they were not loaded."""

    def trainable(self) -> int:
        """Trainable adapter parameters at the present ranks, without the extra trained ones."""
        return sum(adapter.trainable() for adapter in self.adapters.values())

    def fingerprints(self) -> dict[str, int]:
        """Of the adapters' tensors, by name, dtype and shape: cast, or of another rank, it is another tensor."""
        tensors = [(f"{at}: {name}", p) for at, a in self.adapters.items() for name, p in a.named_parameters()]
        return fingerprints((f"{name} {p.dtype} {tuple(p.shape)}", p) for name, p in tensors)


@dataclass
class Replaced:
    """What merging took out of a quantised model: `layers`: the quantised ones, by name; `noted`: what transformers
    noted of them; `lost`: ‖error‖ by adapter where W + ΔW was quantised again."""

    layers: dict[str, nn.Module] = field(default_factory=dict)
    noted: dict[str, dict[str, Any]] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)


@dataclass
class ModelState:
    """What is noted of a model: placements by name, the active one, which base parameters trained before, and while a
    placement is merged the original weights by module name (None for those that were not kept)."""

    trained_before: dict[str, bool]
    placements: dict[str, Placement] = field(default_factory=dict)
    active: str | None = None
    originals: dict[str, Tensor | None] | None = None
    quantised: Replaced = field(default_factory=Replaced)

    @property
    def merged(self) -> bool:
        return self.originals is not None
