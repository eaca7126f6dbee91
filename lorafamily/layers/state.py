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

    `adapters`: by full name of what they adapt. `parked`: for each parameter that trains beside the adapters, and for
    each buffer that training may move, the values that are not in the model now: the base's while this placement is
    active, its own while it is not.
    """

    name: str
    spec: str
    method: Method
    sizing: Sizing
    adapters: dict[str, Adapter]
    parked: dict[str, Tensor]
    buffers: dict[str, Tensor] = field(default_factory=dict)
    by_default: bool = False
    """Whether nobody named the targets, so that one without effect may be left out."""
    had_session: bool = False
    """Whether a session was made for it here."""
    as_read: dict[str, int] | None = None
    """Fingerprints of its tensors where they came from a file."""

    def trainable(self) -> int:
        """Trainable adapter parameters at the present ranks; what trains beside them is not counted."""
        return sum(adapter.trainable() for adapter in self.adapters.values())

    def fingerprints(self) -> dict[str, int]:
        """Of the adapters' tensors, by name, dtype and shape: a cast one, or one of another rank, is another tensor."""
        own = [(f"{at}: {name}", p) for at, a in self.adapters.items() for name, p in a.named_parameters()]
        return fingerprints((f"{name} {p.dtype} {tuple(p.shape)}", p) for name, p in own)


@dataclass
class Replaced:
    """Of a merged model: `layers`: the quantised ones, by name, that others stand in for; `noted`: what transformers
    said of them; `lost`: ‖error‖ by adapter where W + ΔW was quantised again."""

    layers: dict[str, nn.Module] = field(default_factory=dict)
    noted: dict[str, dict[str, Any]] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)


@dataclass
class ModelState:
    """What lorafamily notes of a model: placements by name, the active one, which base parameters trained before, and
    while a placement is merged the original weights by module name (None for those that were not kept)."""

    trained_before: dict[str, bool]
    placements: dict[str, Placement] = field(default_factory=dict)
    active: str | None = None
    originals: dict[str, Tensor | None] | None = None
    quantised: Replaced = field(default_factory=Replaced)

    @property
    def merged(self) -> bool:
        return self.originals is not None
