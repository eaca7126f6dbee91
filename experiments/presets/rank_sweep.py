"""How much rank is enough, on few and on many matrices of a block: LoRA's Table 6."""

from cells.settings import Compare
from presets import Preset

preset = Preset(
    Compare(methods=("lora",), budgets=(), ranks=(1, 2, 4, 8, 16, 32, 64), targets=("q", "qv", "qkvo", "all"), seeds=3),
    quick={"steps": 40, "seeds": 1, "evaluations": 1, "ranks": (1, 4, 16, 64)},
)
