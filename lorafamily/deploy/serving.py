"""What inference servers need of a LoRA folder: one rank that they accept, and adapters on all layers they fuse."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from lorafamily.layers.target import Target
from lorafamily.names import join

SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM accepts, without 1, which other servers do not accept."""
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_q", "in_proj_k", "in_proj_v", "in_proj_z"),
)
"""Groups of layers that SGLang fuses. It assumes that an adapter on the first is on the others too."""
_EXPERTS = re.compile(r"(.*experts)\.\d+\..+")


def left_out(able: Mapping[str, Target], adapted: Collection[str]) -> Iterator[str]:
    """Layers without an adapter that a server fuses with adapted ones: SGLang the groups in `FUSED`, vLLM all experts
    of a list. `able`: every layer that can carry an adapter."""
    lists = {match[1] for at in adapted if (match := _EXPERTS.fullmatch(at))}
    for at in able:
        parent, _, name = at.rpartition(".")
        fused = {join(parent, member) for group in FUSED if name in group for member in group}
        match = _EXPERTS.fullmatch(at)
        if at not in adapted and (fused & set(adapted) or (match and match[1] in lists)):
            yield at
