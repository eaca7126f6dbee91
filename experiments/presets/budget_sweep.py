"""Quality against trainable parameters, all methods."""

from cells.settings import Compare
from presets import Preset

preset = Preset(
    Compare(budgets=("10e3", "20e3", "40e3", "80e3", "160e3"), seeds=3),
    quick={"steps": 40, "seeds": 1, "evaluations": 1, "budgets": ("10e3", "40e3", "160e3")},
)
