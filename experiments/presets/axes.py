"""Parametrisation × initialisation × allocation × penalty: every combination that makes sense, most of them
unpublished.

A penalty needs frames, which the plain product does not have. A gated parametrisation is the plain one once its gates
are frozen.
"""

from itertools import product

from cells.settings import Compare
from presets import Preset

INITIALISATIONS = ("", "+olora")
ALLOCATIONS = ("", "+pruning", "+alora")
PENALTIES = ("", ":gamma=0")

PLAIN = ("lora", "olora", "pruning", "olora+pruning", "alora", "olora+alora")
FRAMED = tuple(map("".join, product(("svd", "dual-plane"), INITIALISATIONS, ALLOCATIONS, PENALTIES)))

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
