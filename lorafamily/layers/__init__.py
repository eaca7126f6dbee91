"""How adapters sit on the layers of a model.

From the inside out: `wrapper.py` wraps a module's `forward`. `kinds.py` says what a layer kind is; `standard.py`,
`quantised.py` (with `bitsandbytes.py`, `torchao.py` and `formats.py`), `rows.py` and `experts.py` have them all.
`site.py` holds the adapters of one layer, `target.py` finds the weights that can carry one, `placement.py` puts
adapters into a whole model, and `state.py` is what it keeps of them. `sharded.py` and `offloaded.py` handle weights
that are not whole in this process, `extra_trained.py` extra trained parameters, and `uncalled.py` layers that the model
never calls.
"""

from lorafamily.layers import standard  # isort: skip
from lorafamily.layers import formats  # isort: skip  (layer kinds registered last are asked first)

__all__ = ["formats", "standard"]
