"""The one training loop: the same for every method, for full fine-tuning and for no adapter at all."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast

import torch
from torch import nn
from tqdm import tqdm

from lorafamily.batch import LossFn, LossOver, loss_of, to_device, weigher
from lorafamily.errors import TrainingError
from lorafamily.history import Evaluation, History, Step
from lorafamily.layers.placement import noted, refuse_merged
from lorafamily.training.batches import Batches
from lorafamily.training.best import Best
from lorafamily.training.checkpoints import Checkpoints, Resume
from lorafamily.training.evaluation import Evaluator, check_evaluation
from lorafamily.training.execution import (
    Precision,
    autocast,
    chosen_precision,
    modes_kept,
    recompiling,
    recomputing,
    start_training,
)
from lorafamily.training.folder_lock import FolderLock
from lorafamily.training.guards import NonFiniteGuard, check_keys
from lorafamily.training.interrupt import Interrupted, StopSignals
from lorafamily.training.log import Log
from lorafamily.training.loop_context import LoopContext
from lorafamily.training.optimisation import Optimizer, Rates, largest_norm, made, parameters_of
from lorafamily.training.processes import Processes
from lorafamily.training.run_state import RunState, method_settings
from lorafamily.training.schedule import Schedule, total_steps
from lorafamily.training.session import Session
from lorafamily.training.state import seeded

SCALING_LIMIT = 25  # steps in a row in which float16's loss scale may halve itself, from 2¹⁶ to nothing


def train(
    model: nn.Module,
    data: Iterable[Any],
    *,
    steps: int | None = None,
    epochs: float | None = None,
    lr: float | None = None,
    head_lr: float | None = None,
    up_lr: float | None = None,
    weight_decay: float | None = None,
    warmup: float | None = None,
    schedule: Schedule = "linear",
    floor: float = 0.0,
    optimizer: Optimizer | None = None,
    loss_fn: LossFn | None = None,
    loss_over: LossOver = "auto",
    accumulate: int = 1,
    max_grad_norm: float | None = 1.0,
    validation: Iterable[Any] | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    evaluate_every: int | None = None,
    monitor: str = "loss",
    mode: Literal["min", "max"] | None = None,
    patience: int | None = None,
    restore_best: bool = False,
    precision: Precision = "auto",
    compile: bool = False,
    checkpoint_activations: bool = False,
    seed: int | None = None,
    skip_nonfinite: int = 0,
    check_gradients: bool = True,
    again: bool = False,
    progress: bool = True,
    on_step: Callable[[Step], None] | None = None,
    log_dir: str | os.PathLike[str] | None = None,
    pictures: bool = True,
    save_every: int | None = None,
    keep: int = 2,
    resume: Resume = "never",
) -> History:
    """Train every parameter with `requires_grad`: the active adapters and what `also_train` named, or a plain model.

    Training runs on the model's device, with the penalty and the rank allocation of the adapters' method. Under
    `torchrun` each process takes some rows of every batch, or the batches that a DistributedSampler gives it; the
    results are those of a single process.

    Optimisation:
        data: batches, in something that can be iterated repeatedly (a DataLoader, a list). The model gets a mapping as
            keywords and a tuple as positional arguments; its output must have `.loss`, unless there is a `loss_fn`.
        steps: optimizer steps; or `epochs`: passes through the data, which then needs a length.
        lr: peak learning rate of the adapters; None: 0.001. In runs of some hundred steps LoRA² and AdaLoRA want about
            ten times LoRA's, OLoRA a tenth.
        head_lr: peak rate of other parameters that train; None: ten times `lr`, but no more than 0.01.
        up_lr: peak rate of the tensors that make U; None: `lr` times the method's `up_ratio`, 1 except for LoRA+.
        weight_decay: of AdamW; None: 0.
        warmup: a fraction of the run, or a whole number of steps, in which rates rise to their peak; None: 0.06.
        schedule: of the rates after the warm-up: "linear" and "cosine" fall to 0, "constant" stays; or a function from
            the step (from 1) to the share of the peak; or the LRScheduler of the given optimizer, which sets all rates.
        floor: share of the peak below which rates do not fall.
        optimizer: instead of AdamW: an optimizer, or a function from the parameters, see `Trained`, to one.
        loss_fn: function from model and batch to the task loss.
        loss_over: what a batch's loss is a mean over, which decides the weights of batches and processes: "tokens" (the
            labels that are not -100), "rows", or a function from a batch to a number. "auto": rows if there is a
            `loss_fn`, otherwise tokens if there are `labels`.
        accumulate: batches per optimizer step; together they count as one large batch.
        max_grad_norm: gradients are scaled down to this norm, over all parameters that train; 0 or None: no clipping.

    Evaluation:
        validation: batches; their mean loss is the metric "loss". Some methods score ranks on the first rows, which
            should not be the shortest ones or of one class.
        evaluate: function from the model (in eval mode, without gradients) to metrics by name, which replace that loss.
        evaluate_every: optimizer steps between evaluations; None: only at the end.
        monitor, mode: the metric that decides which evaluation is best, and whether low ("min") or high ("max") is
            good; None is "min" for "loss", and must be said for others.
        patience: stop after so many evaluations without a better one, counted once the ranks have settled.
        restore_best: end with the weights of the best evaluation, ranks included; `History` has the last ones, too.

    Execution:
        precision: "auto" is bfloat16 autocast on a GPU that has it and float32 elsewhere; "float16" scales the loss.
            Factors stay float32.
        compile: run the model through `torch.compile`.
        checkpoint_activations: compute activations again in the backward instead of keeping them.
        seed: for Python's, NumPy's and torch's generators (dropout, shuffling), which are restored afterwards; None:
            the generators continue from their state.
        skip_nonfinite: how many steps in a row may be skipped because the loss or a gradient is not finite.
        check_gradients: refuse to go on if adapters get no gradient in the first steps.
        again: let ranks that an earlier run settled change once more.
        progress: show a bar with loss, steps per second and slices, and one while ranks are scored.
        on_step: called with the `Step` of every step, such as by a logger.

    Persistence:
        log_dir: folder of the run, for TensorBoard, pictures of the allocation, the record (see `slices_at`, `redraw`)
            and checkpoints.
        pictures: whether they are drawn, which takes a second or two; `redraw` can do it later.
        save_every: steps between checkpoints. One is also written after the best evaluation, at the end, and when
            SIGTERM or Ctrl-C asks the run to stop: it finishes its step, saves, and ends the process with code 75.
        keep: how many of the last checkpoints are kept; the best is kept, too.
        resume: "auto": go on from the newest checkpoint in `log_dir`, if there is one; "anyway": even with other
            settings, such as more steps; "never": begin, and refuse a folder that has checkpoints or a record.

    Raises:
        DataError: no batches, no loss from them, keys that the model does not take, or processes that draw different
            batches without dividing the data.
        AllocationError: the method's rank schedule does not fit the run.
        StateError: the adapters are merged, none is active, or the folder belongs to another run.
        FileError: a checkpoint cannot be written or read.
        TrainingError: nothing to train, an optimizer that cannot train it (LBFGS), a setting that has no effect or
            makes no sense, an adapter without gradient, a frozen weight that changed.
        NonFiniteError: a loss or gradient is not finite.
        TargetError: the model never calls a layer that was named as a target but only reads its weight, so that an
            adapter has no effect.
        Interrupted: a signal asked the run to stop, and it has saved.
    """
    refuse_merged(noted(model)[1])
    if not parameters_of(model):
        raise TrainingError("no parameter has requires_grad; lorafamily.apply(model, ...) adds some that do")
    evaluates = evaluate is not None or validation is not None
    check_evaluation(evaluates, evaluate_every, patience, restore_best)
    total = total_steps(data, steps, epochs, accumulate)
    device = parameters_of(model)[0].device
    precision = chosen_precision(precision, device)
    in_precision = autocast(precision, device)
    checkpoints = Checkpoints(log_dir, save_every, keep)
    processes = Processes(device)
    if seed is None and processes.world > 1:  # batches must come in the same order everywhere
        seed = processes.agreed(int(torch.randint(2**31, ())))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
    scaling = scaler if scaler.is_enabled() else None
    clip = largest_norm(max_grad_norm)
    shown = progress and processes.first
    with contextlib.ExitStack() as around:
        around.enter_context(seeded(seed, device))
        batches = Batches(data, processes)
        weigh = weigher(loss_over, model, loss_fn)
        evaluator = Evaluator(evaluate, validation, loss_fn, weigh, in_precision, processes)
        optim = made(model, optimizer, lr, head_lr, up_lr, weight_decay)
        rates = Rates(optim, schedule, total, warmup, floor)
        session = Session(
            model,
            optim,
            steps=total,
            validation=validation,
            loss_fn=loss_fn,
            seed=seed or 0,
            loss_over=loss_over,
            check_gradients=check_gradients,
            again=again,
            loop=LoopContext(in_precision, scaling, reduces=True, progress=shown, compiled=compile),
        )
        runner = cast(nn.Module, torch.compile(model)) if compile else model
        settings = rates.settings() | {"accumulate": accumulate, "seed": -1 if seed is None else seed}
        settings |= {"loss over": loss_over if isinstance(loss_over, str) else "a function"}
        settings |= {"again": int(again), "patience": patience or 0, **method_settings(session.placement)}
        settings |= {"head lr": rates.peaks[-1]} if optimizer is None else {}
        settings |= {"precision": precision, "max gradient norm": clip}
        finite = NonFiniteGuard(max(skip_nonfinite, SCALING_LIMIT if scaling else 0))
        best = Best(model, session, monitor, mode, patience, restore_best)
        state = RunState(model, session, settings, rates, scaler, batches, finite, processes, seed, best)
        state.seed_by_process()
        around.enter_context(FolderLock(folder := checkpoints.log_folder if processes.first else None))
        found = checkpoints.to_go_on_from(resume)
        if found is not None:
            state.resume(found, resume)
        history = state.history
        if history.stopped:  # the run was over already
            best.restore_if_kept(history)
            return history
        begun = len(history.steps)
        around.enter_context(modes_kept(model))
        around.enter_context(recompiling(total, compile))
        around.enter_context(recomputing(model, checkpoint_activations))
        around.callback(optim.zero_grad, set_to_none=True)
        around.callback(rates.put_back)
        signals = around.enter_context(StopSignals(checkpoints.folder is not None))
        bar = around.enter_context(tqdm(total=total, initial=begun, disable=not shown, unit="step", dynamic_ncols=True))
        log = around.enter_context(Log(folder, history, session, settings, pictures))
        start_training(model, base_is_frozen=session.placement is not None)
        for step in range(begun + 1, total + 1):
            started = time.perf_counter()
            rates.set(step)
            losses = []
            for batch, share in batches.draw(accumulate, weigh):
                batch = to_device(batch, device)
                if step == begun + 1 and loss_fn is None:
                    check_keys(model, batch)
                with in_precision():
                    loss = share * loss_of(runner, batch, loss_fn)
                session.task_backward(loss)
                losses.append(loss.detach().reshape(()))
            trained = parameters_of(model)  # resized adapters have new parameters
            processes.add_up_gradients(trained)
            task_loss = sum(torch.stack(losses).tolist())  # read once: each reading waits for the device
            task_loss, stop = processes.add_up([task_loss, float(signals.received is not None)])
            penalty = session.add_penalty()
            scaler.unscale_(optim)
            norm = nn.utils.clip_grad_norm_(trained, clip).item()
            if finite.check(step, task_loss, norm, accumulate, session.adapters):
                scaler.step(optim)
            else:
                optim.zero_grad(set_to_none=True)
            scaler.update()
            rate = optim.param_groups[0]["lr"]
            rates.after()
            decision = session.step()
            optim.zero_grad(set_to_none=True)
            history.seconds += time.perf_counter() - started

            record = state.record(step, task_loss, penalty, rate, norm)
            log.step(record, decision)
            state.add(record, decision)
            if on_step is not None and processes.first:
                with modes_kept(model):  # it may generate, and end with model.train()
                    on_step(record)
            bar.set_postfix(loss=f"{record.loss:.4f}", slices=record.slices, refresh=False)
            bar.update()

            improved = False
            if evaluates and (step == total or (evaluate_every is not None and step % evaluate_every == 0)):
                evaluation = Evaluation(step, evaluator(model))
                history.evaluations.append(evaluation)
                log.evaluation(evaluation)
                improved = best.improved(evaluation, history)
            history.stopped = best.reason_to_stop(step)
            if history.stopped:
                state.check_end()
            if checkpoints.due(step) or (checkpoints.folder and (improved or history.stopped or stop)):
                state.save(checkpoints)
            if history.stopped:
                best.restore_if_kept(history)
                break
            if stop:
                raise Interrupted(f"stopped by a signal after step {step} of {total}; saved in {log_dir}")
    return history
