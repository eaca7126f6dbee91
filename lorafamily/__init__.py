"""Low-rank fine-tuning: LoRA, LoRA², OLoRA, ALoRA and what combines them, under one adapter class and one loop.

import lorafamily
lorafamily.apply(model, method="lora2", budget=0.17e6)
lorafamily.train(model, batches, steps=1000)
lorafamily.save(model, "my-adapter")
"""

import os as _os
import sys as _sys

if _os.path.basename("".join(_sys.argv[:1])).partition(".")[0] == "lorafamily":
    # The command's own process: threads that wait shall sleep. OpenMP reads this when torch is loaded, below.
    _os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# isort: split
from lorafamily.adapter import Adapter, Parametrisation
from lorafamily.allocation.scorer import Scorer
from lorafamily.budget import Sizing
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
from lorafamily.injection import apply, disabled, gather, remove, switch
from lorafamily.insight import analysis
from lorafamily.insight.record import ranks_at, redraw
from lorafamily.insight.summary import Summary, summary
from lorafamily.layers import LayerKind, register_layer_kind
from lorafamily.method import FromEvidence, Initialisation, Method, Penalty, Room
from lorafamily.planner import Plan, plan
from lorafamily.rates import Suggestion, suggest_lr
from lorafamily.registry import methods, scorers
from lorafamily.training.interrupt import Interrupted
from lorafamily.training.loop import train
from lorafamily.training.optimisation import Trained, parameter_groups
from lorafamily.training.processes import shard
from lorafamily.training.session import Session, session

__all__ = [
    "Adapter",
    "AllocationError",
    "BudgetError",
    "DataError",
    "Evidence",
    "FileError",
    "FromEvidence",
    "History",
    "Initialisation",
    "Interrupted",
    "LayerEvidence",
    "LayerKind",
    "LoraFamilyError",
    "Method",
    "MethodError",
    "NonFiniteError",
    "Parametrisation",
    "Penalty",
    "Plan",
    "Room",
    "Scorer",
    "Session",
    "Sizing",
    "StateError",
    "Suggestion",
    "Summary",
    "TargetError",
    "Trained",
    "TrainingError",
    "analysis",
    "apply",
    "combine",
    "compress",
    "disabled",
    "export_peft",
    "fast_path",
    "gather",
    "import_loralib",
    "import_peft",
    "load",
    "merge",
    "merge_difference",
    "methods",
    "parameter_groups",
    "plan",
    "ranks_at",
    "redraw",
    "register_layer_kind",
    "remove",
    "routing",
    "save",
    "scorers",
    "session",
    "shard",
    "suggest_lr",
    "summary",
    "switch",
    "train",
    "unmerge",
]
