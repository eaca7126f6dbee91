"""Every method at two budgets on the embedded model: what `make compare` runs."""

from cells.settings import Compare
from presets import Preset

preset = Preset(Compare(), quick={"steps": 60, "seeds": 1, "evaluations": 2})
