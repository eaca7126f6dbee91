"""One allocator, five ideas of what a rank is worth: ALoRA's ablation, with chance as the control."""

import lorafamily
from cells.settings import Compare
from presets import Preset

preset = Preset(
    Compare(
        methods=("lora", *(f"alora:scorer={name}" for name in lorafamily.scorers())),
        budgets=("20e3",),  # rank 2: no module is lost at once, none is safe
        seeds=5,
        options=(),
    ),
    quick={"steps": 60, "seeds": 1, "evaluations": 2, "options": ("alora.rounds=2",)},
)
