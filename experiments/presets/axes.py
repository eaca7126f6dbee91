"""Parametrisation × start × allocation × penalty: every combination with a meaning, most of them in no paper.

A penalty needs frames, which the plain product has not; a gated parametrisation is plain once its gates are frozen.
"""

from itertools import product

from cells.settings import Compare
from presets import Preset

STARTS = ("", "+olora")
ALLOCATIONS = ("", "+pruning", "+alora")
PENALTIES = ("", ":gamma=0")

PLAIN = ("lora", "olora", "pruning", "olora+pruning", "alora", "olora+alora")
FRAMED = tuple(map("".join, product(("svd", "dual-plane"), STARTS, ALLOCATIONS, PENALTIES)))

preset = Preset(
    Compare(methods=(*PLAIN, *FRAMED), budgets=("80e3",), seeds=3),
    quick={"steps": 40, "seeds": 1, "evaluations": 1},
    published={
        "lora": "LoRA",
        "olora": "OLoRA",
        "alora": "ALoRA",
        "svd+pruning": "AdaLoRA",
        "dual-plane+pruning": "LoRA²",
    },
)
