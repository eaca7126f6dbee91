"""How adapters sit on the layers of a model.

From the inside out: `wrapper.py` wraps a module's `forward`. `kinds.py` says what must be known of a class of layers;
`standard.py`, `quantised.py` (with `bitsandbytes.py`, `torchao.py` and `formats.py`), `rows.py` and `experts.py` are
the kinds there are. `site.py` holds the adapters of one layer, `target.py` finds the weights that can carry one,
`placement.py` puts adapters into a whole model and notes them in its `state.py`. `sharded.py` and `offloaded.py` know
weights that are not whole in this process, `extra_trained.py` what trains besides the adapters, `uncalled.py` layers
that the model never calls.
"""

from lorafamily.layers import standard  # isort: skip
from lorafamily.layers import formats  # isort: skip  (the kinds that are registered last are asked first)

__all__ = ["formats", "standard"]
