"""What must be true of an adapter before it is written: a file that `load` or clients would refuse is not written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from lorafamily.deploy.folder import listed
from lorafamily.errors import StateError
from lorafamily.layers.sharded import local

AGAIN = "training diverged: take an earlier checkpoint, or train again at a lower rate"
"""What to do with such an adapter, for messages."""


def refuse_not_finite(tensors: Mapping[str, Tensor], instead: str = AGAIN) -> None:
    """Check every number once; tensors on the meta device have none. `instead`: what to do, for the message.

    Raises:
        StateError: a tensor has entries that are nan or infinite.
    """
    flags: dict[torch.device, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if not tensor.is_meta:
            flags[tensor.device][name] = local(tensor).isfinite().all()
    wrong = set()
    for of_device in flags.values():  # one answer a device: asking for each tensor would wait for it as often
        finite = torch.stack([*of_device.values()]).tolist()
        wrong |= {name for name, ok in zip(of_device, finite, strict=True) if not ok}
    if found := [name for name in tensors if name in wrong]:
        raise StateError(f"{listed(found)}: not all finite numbers; {instead}")
