"""Which weights to adapt at one budget, few matrices at a high rank or many at a low one: LoRA's Table 5."""

from cells.settings import Compare
from presets import Preset

preset = Preset(
    Compare(
        methods=("lora",),
        budgets=("18432",),  # rank 18 on q alone, 9 on two matrices, 4 on all four, 2 on all six
        targets=("q", "k", "v", "o", "qk", "qv", "qkvo", "all"),
        seeds=5,
    ),
    quick={"steps": 60, "seeds": 2, "evaluations": 2},
)
