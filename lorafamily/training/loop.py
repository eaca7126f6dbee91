"""The one training loop: the same for every method, for full fine-tuning and for no adapter at all."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lorafamily.adapter import Adapter
from lorafamily.allocation.allocator import Fixed
from lorafamily.allocation.run import Run
from lorafamily.batch import LossFn, first_rows, loss_of, to_device
from lorafamily.errors import DataError, LoraFamilyError, TrainingError
from lorafamily.history import Evaluation, History, Step
from lorafamily.penalty import orthogonality_error
from lorafamily.placement import Placement, noted, placement_of, refuse_merged, refuse_untold, targets_of
from lorafamily.reading import Reads, leave_out
from lorafamily.training import guards
from lorafamily.training.batches import Batches
from lorafamily.training.board import Setting
from lorafamily.training.checkpoints import Checkpoints, Resume
from lorafamily.training.execution import (
    Precision,
    autocast,
    chosen_precision,
    evaluating,
    modes_kept,
    recompiling,
    recomputing,
    start_training,
)
from lorafamily.training.folder_lock import FolderLock
from lorafamily.training.guards import FiniteNumbers, check_keys
from lorafamily.training.interrupt import Interrupted, StopSignals
from lorafamily.training.log import Log
from lorafamily.training.processes import Processes
from lorafamily.training.run_state import RunState
from lorafamily.training.schedule import Schedule, lr_factor, total_steps
from lorafamily.training.state import seed_all

SCORING_ROWS = 32  # ALoRA, sec. 4: ranks are scored on one fixed batch of 32 validation samples
SCALING_LIMIT = 25  # steps in a row that float16's loss scale may take to halve itself from 2¹⁶ to nothing


def train(
    model: nn.Module,
    data: Iterable[Any],
    *,
    steps: int | None = None,
    epochs: float | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    warmup: float = 0.06,
    schedule: Schedule = "linear",
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    loss_fn: LossFn | None = None,
    validation: Iterable[Any] | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    evaluate_every: int | None = None,
    patience: int | None = None,
    accumulate: int = 1,
    max_grad_norm: float = 1.0,
    precision: Precision = "auto",
    compile: bool = False,
    checkpoint_activations: bool = False,
    seed: int | None = 0,
    scoring_memory: float | None = None,
    log_dir: str | os.PathLike[str] | None = None,
    save_every: int | None = None,
    keep: int = 2,
    resume: Resume = "never",
    skip_nonfinite: int = 0,
    progress: bool = True,
    check_gradients: bool = True,
) -> History:
    """Train whatever has `requires_grad`: the active adapters and what was named beside them, or a plain model.

    Runs where the model is. Penalty and rank allocation are those of the adapters' method. Started by `torchrun`, each
    process takes its rows of every batch, and the numbers are those of one process.

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
        precision: "auto" is bfloat16 autocast on a GPU that has it and float32 elsewhere; "float16" scales the loss;
            factors stay float32.
        compile: run the model through `torch.compile`.
        checkpoint_activations: compute activations again in the backward instead of keeping them.
        seed: of Python's, NumPy's and torch's generators at the start (dropout, shuffling); None leaves them alone.
        scoring_memory: MiB of activations that ablations scored in one batch may hold. None: 1024 on a GPU, and on a
            CPU, where batches gain nothing, one ablation at a time.
        log_dir: folder of the run, for TensorBoard, for pictures of the allocation, for its record (see `ranks_at`,
            `redraw`) and for checkpoints.
        save_every: steps between checkpoints; one is written too where the best "loss" was evaluated, at the end, and
            when SIGTERM or Ctrl-C asks the run to stop: it finishes its step, saves, and ends the process with code 75.
        keep: of checkpoints, the last so many stay, and the best.
        resume: "auto": go on from the newest checkpoint in `log_dir`, if there is one; "anyway": with other settings
            too; "never": begin, and refuse a folder that has checkpoints.
        skip_nonfinite: steps in a row that are skipped where the loss or a gradient is not finite, before the run ends.
        progress: show a bar with loss, steps per second and total rank, and one while ranks are scored.
        check_gradients: after the first backward, refuse to go on where an adapter got no gradient.

    Raises:
        DataError: no batches, no loss from them, or keys that the model does not take.
        AllocationError: the method's rank schedule does not fit the run.
        StateError: the adapters are merged, or none is active; the folder is another run's.
        FileError: a checkpoint cannot be written or read.
        TrainingError: nothing to train, an adapter without gradient, a number that is not finite, or a frozen weight
            that changed.
        TargetError: a layer that somebody named as a target only has its weight read, so that its adapter is without
            effect.
        Interrupted: a signal asked the run to stop, and it has saved.
    """
    owner, noted_state = noted(model)
    placement = None if noted_state is None else placement_of(owner)
    refuse_merged(noted_state)
    if placement is not None:
        refuse_untold(owner, placement)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise TrainingError("no parameter has requires_grad; lorafamily.apply(model, ...) adds some that do")
    total = total_steps(data, steps, epochs, accumulate)
    device = trained[0].device
    precision = cast(Precision, chosen_precision(precision, device))
    in_precision = autocast(precision, device)
    checkpoints = Checkpoints(log_dir, save_every, keep)
    processes = Processes(device)
    if seed is not None:
        seed_all(seed)
    batches = Batches(data, device)

    if optimizer is None:
        optim: torch.optim.Optimizer = torch.optim.AdamW(
            trained, lr=lr, weight_decay=weight_decay, fused=device.type in ("cpu", "cuda")
        )
    else:
        optim = optimizer(trained)
    peaks = [group["lr"] for group in optim.param_groups]
    lr_factor(1, total, warmup, schedule)  # refuses what is no schedule
    runner = cast(nn.Module, torch.compile(model)) if compile else model

    @functools.cache
    def scoring_batch() -> Any:
        assert validation is not None
        seed_all(seed or 0)  # the same batch after resuming, whatever the loader draws; `evaluating` undoes it
        return to_device(first_rows(next(Batches(validation, device)), SCORING_ROWS), device)

    def validation_loss() -> Tensor:
        with evaluating(model, device), in_precision():
            return loss_of(model, scoring_batch(), loss_fn)

    def metrics() -> dict[str, float]:
        with evaluating(model, device), torch.no_grad(), in_precision():
            if evaluate is not None:
                return dict(evaluate(model))
            assert validation is not None
            losses = [loss_of(model, to_device(batch, device), loss_fn).item() for batch in validation]
            if not losses:
                raise DataError("validation gave no batch; it is empty, or an iterator that is used up")
            return {"loss": sum(losses) / len(losses)}

    adapters = {} if placement is None else placement.adapters
    extra_trained = {} if placement is None else placement.parked
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
        progress=progress and processes.first,
        agreed=processes.agreed,
    )
    run.generator.manual_seed(seed or 0)
    allocator = (placement.method.allocation if placement else Fixed()).begin(run)
    penalty = placement.method.penalty if placement else None
    evaluates = evaluate is not None or validation is not None

    settings: dict[str, Setting] = {"lr": lr, "steps": total, "schedule": schedule, "warmup": warmup}
    settings |= {"weight decay": weight_decay, "accumulate": accumulate, "seed": -1 if seed is None else seed}
    settings |= {"precision": precision, "max gradient norm": max_grad_norm, **_about(placement)}
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
    finite = FiniteNumbers(max(skip_nonfinite, SCALING_LIMIT if scaler.is_enabled() else 0))
    state = RunState(model, placement, settings, run, allocator, optim, scaler, batches, finite, processes, seed)
    state.seed_by_process()
    measure_frames = max(1, total // 100)  # steps between looks at the frames, where there are any
    with FolderLock(checkpoints.run_folder if processes.first else None):
        found = checkpoints.to_go_on_from(resume)
        if found is not None:
            allocator = state.go_on_from(found, resume)
        history = state.history
        if history.stopped:
            return history  # that run was done
        begun, trained = len(history.steps), state.trained()
        watched = placement is not None and not compile
        reads = Reads(targets_of(owner)) if watched else None
        buffers = None if placement is None else guards.FrozenBuffers(owner)
        begin_log = functools.partial(Log, log_dir if processes.first else None, history)
        log = begin_log(allocator.grows)
        try:
            with (
                modes_kept(model),
                recompiling(total if compile else None),
                recomputing(model, checkpoint_activations),
                StopSignals(checkpoints.run_folder is not None) as signals,
                tqdm(
                    total=total,
                    initial=begun,
                    disable=not (progress and processes.first),
                    unit="step",
                    dynamic_ncols=True,
                ) as bar,
            ):
                start_training(model, base_is_frozen=placement is not None)
                for step in range(begun + 1, total + 1):
                    started = time.perf_counter()
                    for group, peak in zip(optim.param_groups, peaks, strict=True):
                        group["lr"] = peak * lr_factor(step, total, warmup, schedule)
                    loss_sum, penalty_value = 0.0, 0.0
                    for _ in range(accumulate):
                        batch, share = processes.rows(next(batches))
                        batch = to_device(batch, device)
                        if step == begun + 1 and loss_fn is None:
                            check_keys(model, batch)
                        with in_precision(), reads or contextlib.nullcontext():
                            loss = share * loss_of(runner, batch, loss_fn)
                        if guards.depends(loss, adapters, extra_trained):
                            scaler.scale(loss / accumulate).backward()
                        if reads is not None and placement is not None:
                            if leave_out(owner, placement, reads.without_effect(), optim):
                                allocator = state.begin_again()
                                trained = state.trained()
                                log.close(history, settings, pictures=False)
                                log = begin_log(allocator.grows)
                            reads = None
                        loss_sum += loss.item()
                    if step == begun + 1:
                        if buffers is not None:
                            buffers.put_back()
                        if check_gradients:
                            guards.check_gradients(adapters, {at: owner.get_parameter(at) for at in extra_trained})
                    processes.add_up_gradients(trained)
                    loss_sum, stop = processes.add_up([loss_sum, float(signals.received is not None)])
                    if penalty is not None:
                        term = penalty(adapters.values())
                        scaler.scale(term).backward()
                        penalty_value = term.item()
                    scaler.unscale_(optim)
                    norm = nn.utils.clip_grad_norm_(trained, max_grad_norm).item()
                    if finite.check(step, loss_sum / accumulate, norm, accumulate, adapters):
                        scaler.step(optim)
                    else:
                        optim.zero_grad(set_to_none=True)
                    scaler.update()
                    decision = allocator.step(step)
                    if decision is not None:
                        history.decisions.append(decision)
                        trained = state.trained()  # resized tensors are new parameters
                    optim.zero_grad(set_to_none=True)
                    history.seconds += time.perf_counter() - started

                    record = Step(
                        step=step,
                        loss=loss_sum / accumulate,
                        penalty=penalty_value,
                        lr=optim.param_groups[0]["lr"],
                        gradient=norm,
                        rank=sum(allocator.ranks.values()),
                        trainable=sum(parameter.numel() for parameter in trained),
                        orthogonality=_frame_error(adapters) if step % measure_frames == 0 else None,
                    )
                    history.steps.append(record)
                    history.skipped = finite.skipped
                    log.step(record, decision)
                    bar.set_postfix(loss=f"{record.loss:.4f}", rank=record.rank, refresh=False)
                    bar.update()

                    improved = False
                    if evaluates and (step == total or (evaluate_every is not None and step % evaluate_every == 0)):
                        evaluation = Evaluation(step, processes.agreed(metrics()))
                        history.evaluations.append(evaluation)
                        log.evaluation(evaluation)
                        improved = state.improved(evaluation, patience)
                    if step == total:
                        history.stopped = f"all {total} steps done"
                    elif patience is not None and state.since_best >= patience:
                        history.stopped = f"no lower validation loss in {patience} evaluations"
                    if history.stopped:
                        if buffers is not None:
                            buffers.put_back()
                        history.ranks_end = dict(allocator.ranks)
                        state.check_end()
                    if checkpoints.due(step) or (checkpoints.run_folder and (improved or history.stopped or stop)):
                        state.save(checkpoints)
                    if history.stopped:
                        break
                    if stop:
                        raise Interrupted(f"stopped by a signal after step {step} of {total}; saved in {log_dir}")
        except Interrupted:
            log.close(history, settings, pictures=False)  # who asks a process to stop does not wait long
            raise
        except BaseException:
            with contextlib.suppress(OSError, LoraFamilyError):  # say what went wrong, not what followed from it
                log.close(history, settings)
            raise
        else:
            log.close(history, settings)
        finally:
            optim.zero_grad(set_to_none=True)
    return history


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
