"""One allocator with five scorers: ALoRA's ablation and others, with random scores as the control."""

import lorafamily
from cells.settings import Compare
from presets import Preset

preset = Preset(
    Compare(
        methods=("lora", *(f"alora:scorer={name}" for name in lorafamily.scorers())),
        budgets=("20e3",),  # rank 2: a module may lose all its slices, but not at the first drop
        seeds=5,
        options=(),
    ),
    quick={"steps": 60, "seeds": 1, "evaluations": 2, "options": ("alora.rounds=2",)},
)
