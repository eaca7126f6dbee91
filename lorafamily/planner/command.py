"""The command `lorafamily plan`: what training with each method will need, of a model that need not be downloaded."""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import torch

from lorafamily.errors import BudgetError, TargetError
from lorafamily.planner import Plan, Planner
from lorafamily.planner.costs import table
from lorafamily.planner.models import SHAPES, example_batch, model_of, targets_of
from lorafamily.registry import methods

DTYPES = ("float64", "float32", "bfloat16", "float16")


def plan_methods(given: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What training with each method will need: trainable parameters, file size, memory; nothing is allocated."""
    gc.disable()  # what is made here stays, and searching it for garbage takes a third of the command's time
    try:
        model = model_of(given.model, given.architecture)
        gc.freeze()
    finally:
        gc.enable()
    import transformers

    transformers.logging.set_verbosity_error()  # about configs
    batch = None if given.batch is None else example_batch(model, given.batch, given.length)
    targets, fused = targets_of(model, given.targets)
    fused = _fused(given.fused) if given.fused else fused
    planner = Planner(
        model,
        batch,
        dtype=_dtype(given.dtype),
        factors=_dtype(given.factors),
        states=_dtype(given.states),
        checkpoint_activations=given.recompute,
    )
    arguments = {name: getattr(given, name) for name in ("budget", "rank", "rank_budget", "budget_at", "also_train")}
    plans: list[Plan] = []
    refused: list[str] = []
    asked = given.method or sorted(methods())
    for method in asked:
        try:
            plans.append(planner.plan(method, targets=targets, fused=fused, **arguments))
        except BudgetError as error:
            refused.append(f"{method}: {error}")
            if given.method or len(refused) == len(asked):
                raise
    if given.png is not None:
        from lorafamily.insight.drawing import save
        from lorafamily.planner.bars import memory_bars

        uses = [*(plan.use for plan in plans), plans[0].full, plans[0].floor]
        save(memory_bars({use.way: use.memory for use in uses}, _title(given, plans[0])), given.png)
    return {"plans": [plan.record() for plan in plans], "refused": refused}, table(plans, refused)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("model", help=f"folder of a transformers checkpoint, its config.json, or one of {', '.join(SHAPES)}")
    add("--method", nargs="+", metavar="NAME", help='such as lora2, or "lora2+olora"; default: every method')
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--budget", type=float, help="the most trainable adapter parameters, such as 0.17e6")
    size.add_argument("--rank", type=int, help="rank of every layer; default: the method's own")
    size.add_argument("--rank-budget", type=int, help="rank slices of all layers together")
    add("--budget-at", choices=("peak", "end"), default="peak", help="at which steps the budget must not be exceeded")
    add(
        "--targets",
        nargs="+",
        metavar="WHICH",
        help="matrices of a layer by short name (q k v o up down gate), regular expressions for full names, or "
        "attention; default: all linear layers without head and pooler",
    )
    add("--fused", nargs="+", metavar="LAYER=PARTS", help="projections to adapt by parts, such as c_attn$=q,k,v")
    add("--also-train", nargs="+", metavar="WHICH", help="regular expressions for parameters of the base to train too")
    add("--batch", type=int, help="rows of a batch; without it activations are not counted")
    add("--length", type=int, default=128, help="tokens of a row")
    add("--dtype", choices=DTYPES, help="of the base's weights and the activations; default: float32")
    add("--factors", choices=DTYPES, help="of adapters; default: float32, as lorafamily.apply makes them")
    add("--states", choices=DTYPES, help="of AdamW's two states of each parameter; default: the parameter's")
    add("--recompute", action="store_true", help="recompute activations in the backward, block by block")
    add("--architecture", help="class of transformers, instead of the one that the config names")
    add("--png", type=Path, help="draw the memory by part into this file")


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def _fused(given: list[str]) -> dict[str, list[str]]:
    found = {}
    for option in given:
        layer, equals, parts = option.rpartition("=")
        if not equals:
            raise TargetError(f'--fused {option}: must be a regular expression, "=" and names, such as c_attn$=q,k,v')
        found[layer] = parts.split(",")
    return found


def _title(given: argparse.Namespace, plan: Plan) -> str:
    name = given.model if given.model in SHAPES else plan.model
    size = f"rank {given.rank}" if given.rank else f"budget {given.budget:,.0f}" if given.budget else ""
    batch = "activations not counted" if given.batch is None else f"batch {given.batch} × {given.length} tokens"
    return ", ".join(part for part in (f"Training {name}", size, batch, given.dtype or "float32") if part)
