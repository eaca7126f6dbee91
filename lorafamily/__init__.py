"""Low-rank fine-tuning: LoRA, LoRA², OLoRA, ALoRA and what combines them, under one adapter class and one loop.

import lorafamily
lorafamily.apply(model, method="lora2", budget=0.17e6)
lorafamily.train(model, batches, steps=1000)
lorafamily.save(model, "my-adapter")
"""

import os as _os
import sys as _sys

if _os.path.basename("".join(_sys.argv[:1])).partition(".")[0] == "lorafamily":
    # In the command's own process idle threads should sleep. OpenMP reads this when torch is loaded, below.
    _os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# isort: split
from lorafamily.activation import disabled, remove, switch
from lorafamily.adapter import Adapter
from lorafamily.allocation.scorer import Scorer
from lorafamily.budget import Sizing
from lorafamily.contract import check_method
from lorafamily.deploy.combine import combine, compress
from lorafamily.deploy.files import load, save
from lorafamily.deploy.merge import merge, merge_difference, unmerge
from lorafamily.deploy.peft import export_peft
from lorafamily.deploy.peft_import import import_loralib, import_peft
from lorafamily.deploy.routing import routing
from lorafamily.errors import (
    AllocationError,
    BudgetError,
    DataError,
    FileError,
    LoraFamilyError,
    MethodError,
    NonFiniteError,
    StateError,
    TargetError,
    TrainingError,
)
from lorafamily.evidence import Evidence, LayerEvidence
from lorafamily.functional import fast_path
from lorafamily.history import History
from lorafamily.injection import apply, gather
from lorafamily.insight import analysis
from lorafamily.insight.record import redraw, slices_at
from lorafamily.insight.summary import Summary, summary
from lorafamily.layers.kinds import LayerKind, register_layer_kind
from lorafamily.method import FromEvidence, Initialisation, Method, Penalty, Room
from lorafamily.parametrisation import Parametrisation
from lorafamily.planner import Plan, plan
from lorafamily.rates import Suggestion, suggest_lr
from lorafamily.registry import methods, scorers
from lorafamily.training.interrupt import Interrupted
from lorafamily.training.loop import train
from lorafamily.training.optimisation import Trained, parameter_groups
from lorafamily.training.processes import shard
from lorafamily.training.session import Session, session

# Adapters in a model
__all__ = ["Evidence", "LayerEvidence", "Sizing", "apply", "disabled", "fast_path", "gather", "remove", "switch"]
# Training
__all__ += ["History", "Interrupted", "Session", "Suggestion", "Trained"]
__all__ += ["parameter_groups", "session", "shard", "suggest_lr", "train"]
# What a model has, and what it will take
__all__ += ["Plan", "Summary", "analysis", "plan", "redraw", "slices_at", "summary"]
# Files, merging, serving
__all__ += ["combine", "compress", "export_peft", "import_loralib", "import_peft", "load"]
__all__ += ["merge", "merge_difference", "routing", "save", "unmerge"]
# Methods and layer kinds
__all__ += ["Adapter", "FromEvidence", "Initialisation", "LayerKind", "Method", "Parametrisation", "Penalty", "Room"]
__all__ += ["Scorer", "check_method", "methods", "register_layer_kind", "scorers"]
# Errors
__all__ += ["AllocationError", "BudgetError", "DataError", "FileError", "LoraFamilyError", "MethodError"]
__all__ += ["NonFiniteError", "StateError", "TargetError", "TrainingError"]
