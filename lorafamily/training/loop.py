"""The one training loop: the same for every method, for full fine-tuning and for no adapter at all."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from itertools import islice
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lorafamily.adapter import Adapter
from lorafamily.allocation.allocator import Fixed
from lorafamily.allocation.run import Run
from lorafamily.errors import DataError, TrainingError
from lorafamily.history import Evaluation, History, Step
from lorafamily.penalty import orthogonality_error
from lorafamily.placement import Placement, placement_of, refuse_merged, state_of
from lorafamily.training.batches import LossFn, endless, first_rows, loss_of, to_device
from lorafamily.training.board import Setting
from lorafamily.training.log import Log

SCORING_ROWS = 32  # ALoRA, sec. 4: ranks are scored on one fixed batch of 32 validation samples


def train(
    model: nn.Module,
    data: Iterable[Any],
    *,
    steps: int | None = None,
    epochs: float | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    warmup: float = 0.06,
    schedule: Literal["linear", "cosine", "constant"] = "linear",
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    loss_fn: LossFn | None = None,
    validation: Iterable[Any] | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    evaluate_every: int | None = None,
    patience: int | None = None,
    accumulate: int = 1,
    max_grad_norm: float = 1.0,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    compile: bool = False,
    seed: int | None = 0,
    scoring_memory: float | None = None,
    log_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    check_gradients: bool = True,
) -> History:
    """Train whatever has `requires_grad`: the active adapters and what was named beside them, or a plain model.

    Runs where the model is. Penalty and rank allocation are those of the adapters' method.

    Args:
        data: batches, iterable again and again (a DataLoader, a list). A mapping goes to the model as keywords, a
            tuple as positions; the model's output must have `.loss`, unless `loss_fn(model, batch)` gives it.
        steps: optimiser steps; or `epochs`: rounds through the data, which then must have a length.
        lr: peak learning rate; after `warmup` (share of the run) it falls to 0 (linear, cosine) or stays (constant).
            In runs of some hundred steps LoRA² and AdaLoRA want about ten times LoRA's, OLoRA a tenth.
        weight_decay, optimizer: of AdamW; or a function from parameters to an optimiser of your own.
        validation: batches, needed by methods that score ranks on them; their mean loss is evaluated as "loss".
        evaluate: function from the model (in eval mode, without gradients) to metrics by name, instead of that loss.
        evaluate_every: optimiser steps between evaluations; None: only at the end.
        patience: stop after so many evaluations without a lower "loss", counted once the allocation is settled.
        accumulate: batches per optimiser step, averaged.
        max_grad_norm: gradients are scaled down to this norm, over all trained parameters.
        precision: "auto" is bfloat16 autocast on a GPU that has it and float32 elsewhere; factors stay float32.
        compile: run the model through `torch.compile`.
        seed: of Python's, NumPy's and torch's generators at the start (dropout, shuffling); None leaves them alone.
        scoring_memory: MiB of activations that ablations scored in one batch may hold. None: 1024 on a GPU, and on a
            CPU, where batches gain nothing, one ablation at a time.
        log_dir: folder for TensorBoard, for pictures of the allocation, and for its record: see `ranks_at`, `redraw`.
        progress: show a bar with loss, steps per second and total rank, and one while ranks are scored.
        check_gradients: after the first backward, refuse to go on where an adapter got no gradient.

    Raises:
        DataError: no batches, or no loss from them.
        AllocationError: the method's rank schedule does not fit the run.
        StateError: the adapters are merged, or none is active.
        TrainingError: nothing to train, an adapter without gradient, or a number that is not finite.
    """
    placement = placement_of(model) if state_of(model) is not None else None
    refuse_merged(state_of(model))
    trained = _trained(model)
    if not trained:
        raise TrainingError("no parameter has requires_grad; lorafamily.apply(model, ...) adds some that do")
    total = _total_steps(data, steps, epochs, accumulate)
    device = trained[0].device
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    if optimizer is None:
        optim: torch.optim.Optimizer = torch.optim.AdamW(
            trained, lr=lr, weight_decay=weight_decay, fused=device.type == "cuda"
        )
    else:
        optim = optimizer(trained)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optim, lambda step: _lr_factor(step, total, warmup, schedule))
    autocast = _autocast(precision, device)
    runner = cast(nn.Module, torch.compile(model)) if compile else model

    @functools.cache
    def scoring_batch() -> Any:
        assert validation is not None
        return to_device(first_rows(next(endless(validation)), SCORING_ROWS), device)

    def validation_loss() -> Tensor:
        with _evaluating(model), autocast():
            return loss_of(model, scoring_batch(), loss_fn)

    def metrics() -> dict[str, float]:
        with _evaluating(model), torch.no_grad(), autocast():
            if evaluate is not None:
                return dict(evaluate(model))
            assert validation is not None
            losses = [loss_of(model, to_device(batch, device), loss_fn).item() for batch in validation]
            if not losses:
                raise DataError("validation gave no batch; it is empty, or an iterator that is used up")
            return {"loss": sum(losses) / len(losses)}

    adapters = {} if placement is None else placement.adapters
    run = Run(
        model=model,
        adapters=adapters,
        steps=total,
        # With a budget for the end the start may be larger; the allocator must be below it when it is done.
        limit=placement.sizing.budget if placement else None,
        rank_limit=placement.sizing.rank_budget if placement else None,
        optimizer=optim,
        validation_loss=validation_loss if validation is not None else None,
        scoring_memory=scoring_memory,
        progress=progress,
    )
    run.generator.manual_seed(seed or 0)
    allocator = (placement.method.allocation if placement else Fixed()).begin(run)
    penalty = placement.method.penalty if placement else None

    settings: dict[str, Setting] = {"lr": lr, "steps": total, "schedule": schedule, "warmup": warmup}
    settings |= {"weight decay": weight_decay, "accumulate": accumulate, "seed": -1 if seed is None else seed}
    settings |= _about(placement)
    history = History(ranks_start=dict(allocator.ranks))
    log = Log(log_dir, allocator)
    measure_frames = max(1, total // 100)  # steps between looks at the frames, where there are any
    evaluates = evaluate is not None or validation is not None
    best, since_best = math.inf, 0
    batches = endless(data)
    was_training = model.training
    model.train()
    try:
        with (
            _recompiling(total if compile else None),
            tqdm(total=total, disable=not progress, unit="step", dynamic_ncols=True) as bar,
        ):
            for step in range(1, total + 1):
                begun = time.perf_counter()
                loss_sum, penalty_value = 0.0, 0.0
                for batch in islice(batches, accumulate):
                    with autocast():
                        loss = loss_of(runner, to_device(batch, device), loss_fn)
                    (loss / accumulate).backward()
                    loss_sum += loss.item()
                if step == 1 and check_gradients:
                    _check_gradients(adapters)
                if penalty is not None:
                    term = penalty(adapters.values())
                    term.backward()
                    penalty_value = term.item()
                norm = nn.utils.clip_grad_norm_(trained, max_grad_norm).item()
                _check_finite(step, loss_sum, norm, accumulate, adapters)
                optim.step()
                decision = allocator.step(step)
                if decision is not None:
                    history.decisions.append(decision)
                    trained = _trained(model)  # resized tensors are new parameters
                optim.zero_grad(set_to_none=True)
                lr_used = optim.param_groups[0]["lr"]
                scheduler.step()
                history.seconds += time.perf_counter() - begun

                record = Step(
                    step=step,
                    loss=loss_sum / accumulate,
                    penalty=penalty_value,
                    lr=lr_used,
                    gradient=norm,
                    rank=sum(allocator.ranks.values()),
                    trainable=sum(parameter.numel() for parameter in trained),
                    orthogonality=_frame_error(adapters) if step % measure_frames == 0 else None,
                )
                history.steps.append(record)
                log.step(record, decision)
                bar.set_postfix(loss=f"{record.loss:.4f}", rank=record.rank, refresh=False)
                bar.update()

                due = step == total or (evaluate_every is not None and step % evaluate_every == 0)
                if evaluates and due:
                    evaluation = Evaluation(step, metrics())
                    history.evaluations.append(evaluation)
                    log.evaluation(evaluation)
                    if patience is not None and allocator.settled:
                        best, since_best = _improved(evaluation, best, since_best)
                        if since_best >= patience:
                            history.stopped = f"no lower validation loss in {patience} evaluations"
                            break
    finally:
        optim.zero_grad(set_to_none=True)
        log.close(history, settings)
        model.train(was_training)
    history.stopped = history.stopped or f"all {total} steps done"
    history.ranks_end = dict(allocator.ranks)
    return history


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _about(placement: Placement | None) -> dict[str, Setting]:
    """What was adapted how, for the table of runs."""
    if placement is None:
        return {"method": "none"}
    sizing, options = placement.sizing, placement.method.options()
    about = {"method": placement.spec, "start rank": sizing.rank, "budget at": sizing.budget_at, **options}
    about |= {"budget": sizing.budget or 0, "rank budget": sizing.rank_budget or 0}
    return {name: value if isinstance(value, (int, float)) else str(value) for name, value in about.items()}


@torch.no_grad()
def _frame_error(adapters: Mapping[str, Adapter]) -> float | None:
    error = orthogonality_error(adapters.values())
    return None if error is None else error.item()


def _total_steps(data: Iterable[Any], steps: int | None, epochs: float | None, accumulate: int) -> int:
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise DataError(f"accumulate={accumulate!r}: must be a whole number of batches, at least 1")
    if (steps is None) == (epochs is None):
        raise DataError(f"steps={steps!r}, epochs={epochs!r}: give one of them")
    if steps is None:
        assert epochs is not None
        if not isinstance(data, Sized):
            raise DataError(f"epochs={epochs} needs data with a length; a {type(data).__name__} has none: give steps")
        steps = math.ceil(len(data) * epochs / accumulate)
        if steps < 1:
            raise DataError(f"{len(data)} batches and epochs={epochs!r} make no step; is the data empty?")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise DataError(f"steps={steps!r}: must be a whole number of optimiser steps, at least 1")
    return steps


def _lr_factor(step: int, total: int, warmup: float, schedule: str) -> float:
    """The share of the peak learning rate for the step after `step` steps."""
    rising = warmup * total
    if step < rising:
        return (step + 1) / (rising + 1)
    if schedule == "constant":
        return 1.0
    left = (total - step) / max(1.0, total - rising)
    if schedule == "linear":
        return left
    if schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * left))
    raise TrainingError(f'schedule={schedule!r}: must be "linear", "cosine" or "constant"')


def _autocast(precision: str, device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if precision == "float32":
        return contextlib.nullcontext
    if precision == "bfloat16":
        return lambda: torch.autocast(device.type, torch.bfloat16)
    raise TrainingError(f'precision={precision!r}: must be "auto", "float32" or "bfloat16"')


def _recompiling(times: int | None) -> contextlib.AbstractContextManager[Any]:
    """Let every change of the ranks compile anew; after eight shapes torch.compile would give up without a word."""
    if times is None:
        return contextlib.nullcontext()
    import torch._dynamo.config as dynamo  # slow to import, for those who compile alone

    return dynamo.patch(recompile_limit=max(dynamo.recompile_limit, times))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, with the random state put back: how often one looks must not change what is trained."""
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        model.train(was_training)


def _check_gradients(adapters: Mapping[str, Any]) -> None:
    """Every adapter must have got a gradient from the task loss alone, finite and not all zero.

    One tensor of it is enough: where one factor starts at zero, the other's gradient is zero at first.
    """
    silent = [path for path, adapter in adapters.items() if adapter.rank and not _learns(adapter)]
    if silent:
        more = f" and {len(silent) - 5} more" if len(silent) > 5 else ""
        raise TrainingError(
            f"{len(silent)} of {len(adapters)} adapters got no gradient from the first batch: {', '.join(silent[:5])}"
            f"{more}. Their layers do not take part in the loss, or the graph is cut (gradient checkpointing with "
            "use_reentrant=True?). Narrow targets, or pass check_gradients=False if that is meant"
        )


def _learns(adapter: nn.Module) -> bool:
    gradients = [p.grad for p in adapter.parameters() if p.grad is not None]
    return any(bool(g.isfinite().all()) and bool(g.any()) for g in gradients)


def _check_finite(step: int, loss: float, norm: float, accumulate: int, adapters: Mapping[str, nn.Module]) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    broken = next(
        (
            path
            for path, a in adapters.items()
            for p in a.parameters()
            if p.grad is not None and not p.grad.isfinite().all()
        ),
        None,
    )
    where = f"; first adapter with such a gradient: {broken}" if broken else ""
    raise TrainingError(
        f"loss {loss / accumulate:g}, gradient norm {norm:g} at step {step} (batches {(step - 1) * accumulate} to "
        f"{step * accumulate - 1} of the run){where}. Nothing of this step was applied; lower lr or look at the batch"
    )


def _improved(evaluation: Evaluation, best: float, since_best: int) -> tuple[float, int]:
    if "loss" not in evaluation.metrics:
        raise TrainingError(f'patience watches "loss", but evaluate gave {", ".join(evaluation.metrics)}')
    loss = evaluation.metrics["loss"]
    return (loss, 0) if loss < best else (best, since_best + 1)
