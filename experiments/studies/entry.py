"""A tuned AdaLoRA entry for the folder of peft's benchmark (method_comparison/MetaMathQA), from a study's rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lorafamily.allocation.pruning import ImportancePruning
from lorafamily.penalty import Orthogonality
from lorafamily.registry import find as find_method
from studies.results import Study
from tasks import TaskError

STEPS, WEIGHT_DECAY = 5000, 0.1
"""Optimizer steps and weight decay of peft's benchmark."""


def write_entry(study: Study, rank: int, out: Path) -> Mapping[str, float]:
    """Write `adapter_config.json` and `training_params.json` into `out`: AdaLoRA that ends with `rank` slices a layer,
    with its schedule in steps of the benchmark and the learning rate that the study chose. lorafamily and peft both
    divide alpha by the initial rank, so alpha is the same.

    Returns the rate and both ranks.

    Raises:
        TaskError: the study has no rate for AdaLoRA, or peft is not installed.
    """
    try:
        from peft import AdaLoraConfig
    except ImportError:
        raise TaskError("an entry of peft's benchmark is written with peft: pip install peft") from None
    quarter = study.quarters.get("AdaLoRA")
    if quarter is None:
        raise TaskError(f"the rows of {study.problem.name} choose no rate for AdaLoRA; run that arm first")
    method = find_method("adalora")
    schedule, penalty = method.allocation, method.penalty
    assert isinstance(schedule, ImportancePruning)
    assert isinstance(penalty, Orthogonality)
    first = round(rank / schedule.target)
    config = AdaLoraConfig(
        init_r=first,
        target_r=rank,
        tinit=round(schedule.warmup * STEPS),
        tfinal=round(schedule.final * STEPS),
        deltaT=round(schedule.interval * STEPS),
        total_step=STEPS,
        orth_reg_weight=penalty.gamma,
        lora_alpha=16,  # lorafamily's default, which the study used
        target_modules="all-linear",
    )
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(out))
    lr = float(f"{10 ** (quarter / 4):.2g}")
    params = {"optimizer_kwargs": {"lr": lr, "weight_decay": WEIGHT_DECAY}}
    (out / "training_params.json").write_text(json.dumps(params, indent=2) + "\n")
    return {"lr": lr, "init_r": first, "target_r": rank}
