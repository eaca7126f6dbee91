"""Every method at two budgets on the embedded model: what `make compare` runs."""

from presets import Preset
from settings import Compare

preset = Preset(Compare(), quick={"steps": 60, "seeds": 1, "evaluations": 2})
