"""Methods inside `transformers.Trainer`: its loop, our penalty and our rank allocation.

    model = lorafamily.apply(model, method="lora2", budget=0.17e6, also_train="classifier")
    trainer = Trainer(model, args, train_dataset=..., callbacks=[LoraFamilyCallback(model)])
    trainer.train(resume_from_checkpoint=...)     # goes on where it was, ranks and allocator included
    lorafamily.save(model, "my-adapter")

Tensors change size, in the model and in the optimizer. The session's state is saved within the optimizer state, so that
it is in every checkpoint that the Trainer resumes from.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate.state import GradientState  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorafamily.adapter import Adapter
from lorafamily.allocation.allocator import Fixed
from lorafamily.deploy import files, saved
from lorafamily.errors import StateError
from lorafamily.history import Decision
from lorafamily.layers.placement import noted, placement_of, refuse_merged, state_of
from lorafamily.layers.site import base_parameters
from lorafamily.layers.uncalled import leave_out
from lorafamily.training.fitting import fit_ranks
from lorafamily.training.loop_context import LoopContext
from lorafamily.training.session import Session

FOLDER = KEY = "lorafamily"


class LoraFamilyCallback(TrainerCallback):  # type: ignore[misc, unused-ignore] # transformers is not typed
    """Adds the penalty and the rank allocation of a model's active adapters to a Trainer.

    Args:
        model: the model that the Trainer gets, with adapters; or the Trainer, whose `model_init` makes a model for
            every training: the callback goes over to each.
        validation: batches, for methods that score ranks on them, such as `trainer.get_eval_dataloader()`.
        seed: for the initialisation of new slices.
        adapters_only: save only what trains in the Trainer's checkpoints, without the frozen base.
        log: called with the slices after every decision, as metrics; `trainer.log` passes them to its loggers.
        check_gradients: refuse to go on if adapters get no gradient from the task.

    `session`: the session of the training, None before it begins.

    Raises:
        StateError: no adapter is active, or one is merged.
    """

    def __init__(
        self,
        model: nn.Module | Trainer,
        *,
        validation: Iterable[Any] | None = None,
        seed: int = 0,
        adapters_only: bool = False,
        log: Callable[[dict[str, float]], None] | None = None,
        check_gradients: bool = True,
    ):
        self.validation, self.seed = validation, seed
        self.log, self.check_gradients, self.adapters_only = log, check_gradients, adapters_only
        self.session: Session | None = None
        self._hooks: list[RemovableHandle] = []
        self._none_loaded = False  # whether the state dict loaded last had no adapters
        self._follows = isinstance(model, Trainer)
        self._take(model.model if isinstance(model, Trainer) else model)

    @property
    def decisions(self) -> list[Decision]:
        """Every decision of the allocation so far."""
        return [] if self.session is None else self.session.decisions

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Check how the Trainer will wrap the model.

        Raises:
            StateError: DDP would wait for the gradient of a tensor that a decision replaced.
        """
        finds = args.ddp_find_unused_parameters
        finds = not args.gradient_checkpointing if finds is None else finds  # the Trainer's default
        if _under_ddp(args) and self._ddp_may_lose_some and not finds:
            raise StateError(
                "only adapters train, and their ranks change: DDP must allow for tensors that are gone; pass "
                "TrainingArguments(ddp_find_unused_parameters=True)"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Begin the allocation, or continue that of the checkpoint that the Trainer resumes from.

        Raises:
            StateError: ranks would change where its engine holds on to tensors (DDP, FSDP, DeepSpeed); the checkpoint
                was written without this callback, or is of other adapters; the Trainer trains another model, or one
                that its `model_init` has made, which has no adapters, resumes, or was wrapped by DDP.
            AllocationError: the method's schedule does not fit the run.
            TrainingError: the optimizer cannot train adapters.

        At the first batch, TargetError refuses named targets that have no effect; unnamed ones are left out.
        """
        self._remove_hooks()  # of a training that was broken off
        if noted(given["model"])[0] is not noted(self.model)[0]:
            if not self._follows:
                raise StateError(
                    "the Trainer trains another model than the one this LoraFamilyCallback was made for; make one for "
                    "it, or, with model_init, for the Trainer: LoraFamilyCallback(trainer)"
                )
            if state.global_step or (_under_ddp(args) and self._resizes):
                raise StateError(
                    "a model that model_init has made can neither resume nor change its ranks under DDP; give the "
                    "Trainer and LoraFamilyCallback one model"
                )
            previous = self._fits
            self._take(given["model"])
            previous.remove()
        optimizer = given["optimizer"]
        begun = _taken_out(optimizer)
        if state.global_step and begun is None:
            raise StateError(
                "the Trainer resumes from a checkpoint whose optimizer.pt has nothing of lorafamily: it was written "
                "without LoraFamilyCallback; resume from another, or begin anew"
            )
        if begun is None:
            self.start = self._slices()
        elif begun["start"] != {at: n for at, n in self.start.items() if at not in begun["left out"]}:
            raise StateError("the checkpoint is of a run with other adapters than these, or other ranks at the start")
        self.session = Session(
            self.model,
            optimizer,
            steps=state.max_steps,
            validation=self.validation,
            seed=self.seed,
            check_gradients=self.check_gradients,
            loop=LoopContext(
                scaler=getattr(optimizer, "scaler", None),
                compiled=args.torch_compile,
                last_backward=_last_backward if _under_ddp(args) and self._resizes else None,
            ),
            start=None if begun is None else begun["start"],
        )
        engine = _sharding(args)
        if engine is not None and not self.session.allocator.settled:
            raise StateError(f"{engine} holds on to the tensors it was given, and this method changes their size")
        if begun is not None:
            if not self._none_loaded:  # tensors were loaded with the model, perhaps in another precision
                del begun["adapters"], begun["beside"]
            self.session.load_state_dict(begun)
        self._none_loaded = False
        self._hooks.append(self.session.optimizer.register_state_dict_post_hook(self._put_in))
        if self.adapters_only:
            self._hooks.append(self.model._register_state_dict_hook(_without_base))

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Take all hooks off the model and the optimizer."""
        if self._none_loaded and args.load_best_model_at_end and state.best_model_checkpoint is not None:
            best = saved.read(Path(state.best_model_checkpoint) / FOLDER)
            for at, adapter in self.placement.adapters.items():
                adapter.take(best.adapters[at].state_dict())
        self._check_best(state)
        self._remove_hooks()

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Begin the step's gradient with the penalty's, so that both are clipped together."""
        assert self.session is not None
        self.session.add_penalty()

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **given: Any) -> None:
        """Let the allocator observe the gradients, and decide."""
        assert self.session is not None
        decision = self.session.step()
        if decision is not None and self.log is not None:
            slices = [float(n) for n in decision.after.values()]
            self.log({"slices": sum(slices), "slices/lowest": min(slices), "slices/highest": max(slices)})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **given: Any) -> None:
        """Save the adapters in the Trainer's checkpoint as a folder that `lorafamily.load` reads."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FOLDER
            files.save(self.model, folder, self.placement.name)

    def _take(self, model: nn.Module) -> None:
        """Belong to a model from now on."""
        refuse_merged(state_of(model))
        self.placement, self.model = placement_of(model), model
        self.start = self._slices()
        self._ddp_may_lose_some = self._resizes and _leave_to_session(model, self.placement.adapters)
        # The Trainer loads a checkpoint into the model before it calls the callback, and ranks must fit by then.
        self._fits: RemovableHandle = model.register_load_state_dict_pre_hook(self._fit_ranks)

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    @property
    def _resizes(self) -> bool:
        return not isinstance(self.placement.method.allocation, Fixed)

    def _slices(self) -> dict[str, int]:
        return {at: adapter.slices for at, adapter in self.placement.adapters.items()}

    def _check_best(self, state: TrainerState) -> None:
        """Warn if the Trainer ended with the weights of an evaluation from before the ranks settled."""
        assert self.session is not None
        settled, now = self.session.allocator.slices, self._slices()
        if self.session.allocator.settled and now != settled:
            for adapter in self.placement.adapters.values():
                adapter.settled = False
            warnings.warn(
                f"{state.best_model_checkpoint}, the best checkpoint, is from before the ranks were settled: the model "
                f"has {self.placement.trainable():,} adapter parameters in {sum(now.values())} slices, and the run "
                f"came to {sum(settled.values())}. Evaluate only once they are settled (eval_delay), or train longer",
                stacklevel=2,
            )

    def _put_in(self, optimizer: Any, state: dict[str, Any]) -> None:
        assert self.session is not None
        first, *others = state["param_groups"]
        state["param_groups"] = [{**first, KEY: self.session.state_dict()}, *others]

    def _fit_ranks(self, module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Give the adapters the ranks of the tensors that are about to be loaded, and leave out adapters without any.
        If none has any, a model was built anew from its files, as sentence-transformers does: then the adapters stay as
        they are until `on_train_begin` or `on_train_end` loads them."""
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        known = {at: prefix + names[id(next(a.parameters()))] for at, a in self.placement.adapters.items()}
        gone = [at for at, name in known.items() if name not in state_dict]
        self._none_loaded = len(gone) == len(known)
        if self._none_loaded:
            ids = {id(p) for adapter in self.placement.adapters.values() for p in adapter.parameters()}
            state_dict.update({prefix + name: p.data for name, p in module.named_parameters() if id(p) in ids})
            return
        if self.placement.by_default:  # the run that was saved had left these out
            if self.session is None:
                leave_out(self.model, self.placement, gone)
            else:
                self.session.leave_out(gone)
        if self.session is None:  # a session fits them itself
            fit_ranks(module, self.placement.adapters, state_dict, prefix)


def _leave_to_session(model: nn.Module, adapters: Mapping[str, Adapter]) -> bool:
    """Let the session average the adapters' gradients, and DDP, which the Trainer will put around the model, ignore
    them: it would wait for gradients of tensors that were replaced. If nothing else trains, DDP, which refuses a model
    without a parameter to train, gets their smallest tensor, which may be replaced. Returns whether that is so."""
    ids = {id(p) for adapter in adapters.values() for p in adapter.parameters()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ignored = {name for name, p in model.named_parameters() if id(p) in ids}
    alone = trained.keys() <= ignored
    if alone:
        ignored.discard(min(trained, key=lambda name: trained[name].numel()))
    before = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*before, *sorted(ignored)])
    return alone


def _under_ddp(args: TrainingArguments) -> bool:
    return args.world_size > 1 and _sharding(args) is None


def _sharding(args: TrainingArguments) -> str | None:
    """The engine, if any, that shards the parameters."""
    if args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        return "DeepSpeed"
    return "FSDP" if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false") == "true" else None


def _last_backward() -> bool:
    """Whether the Trainer computes the last batch of an optimizer step."""
    return bool(GradientState().sync_gradients)


def _taken_out(optimizer: Any) -> dict[str, Any] | None:
    """Take the session's state out of the optimizer state that the Trainer loaded; None if there is none."""
    found = None
    while optimizer is not None:
        for group in getattr(optimizer, "param_groups", ()):
            found = group.pop(KEY, found)
        optimizer = getattr(optimizer, "optimizer", None)
    return found


def _without_base(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, local: Any) -> None:
    for name, parameter in base_parameters(module).items():
        if not parameter.requires_grad:
            state_dict.pop(prefix + name, None)
