"""The family's methods inside `transformers.Trainer`: its loop, our penalty and our rank allocation.

    model = lorafamily.apply(model, method="lora2", budget=0.17e6, also_train="classifier")
    trainer = Trainer(model, args, train_dataset=..., callbacks=[LoraFamilyCallback(model)])
    trainer.train(resume_from_checkpoint=...)     # where it was, ranks and allocator included
    lorafamily.save(model, "my-adapter")

Tensors really change size, in the model and in the optimiser. The Trainer clips gradients before it calls back, so the
penalty's gradient is not clipped here, as it is in `lorafamily.train`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorafamily.allocation.allocator import Allocator
from lorafamily.allocation.run import Run
from lorafamily.allocation.surgery import exchange
from lorafamily.batch import first_rows, loss_of, to_device
from lorafamily.deploy import files
from lorafamily.deploy.folder import read_record, read_sealed_tensors, write_sealed
from lorafamily.errors import DataError, FileError, StateError
from lorafamily.history import Decision
from lorafamily.placement import noted, placement_of, refuse_merged, state_of, targets_of
from lorafamily.reading import Reads, leave_out
from lorafamily.training.execution import evaluating
from lorafamily.training.state import pack, unpack

FOLDER, STATE, TENSORS, FORMAT = "lorafamily", "allocator.json", "allocator.safetensors", 1


class LoraFamilyCallback(TrainerCallback):  # type: ignore[misc, unused-ignore] # transformers is not typed
    """Penalty and rank allocation of a model's active adapters, in a Trainer.

    Args:
        model: the model that the Trainer gets, with its adapters.
        validation: batches, needed by methods that score ranks on them; `trainer.get_eval_dataloader()` has some.
        seed: of the numbers that new ranks start from.

    `decisions`: every change of the allocation so far.

    Raises:
        StateError: no adapter is active, or one is merged.
    """

    def __init__(self, model: nn.Module, *, validation: Iterable[Any] | None = None, seed: int = 0):
        refuse_merged(state_of(model))
        self.placement = placement_of(model)
        self.model, self.validation, self.seed = model, validation, seed
        self.decisions: list[Decision] = []
        self.start = {at: adapter.rank for at, adapter in self.placement.adapters.items()}
        self.run: Run | None = None
        self.allocator: Allocator | None = None
        # The Trainer loads a checkpoint into the model before it calls back; ranks must fit by then.
        model.register_load_state_dict_pre_hook(self._fit_ranks)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Begin the allocation, or go on with that of the checkpoint that the Trainer resumes from.

        Raises:
            StateError: ranks would change where the Trainer's engine holds on to tensors (DDP, FSDP, DeepSpeed).
            AllocationError: the method's schedule does not fit the run.

        The first batch raises TargetError where targets that somebody named have no effect; others are left out.
        """
        allocation, sizing = self.placement.method.allocation, self.placement.sizing
        engine = "DeepSpeed" if args.deepspeed else "FSDP" if args.fsdp else "DDP" if args.world_size > 1 else None
        held = getattr(given["optimizer"], "optimizer", given["optimizer"])  # inside what Accelerate wraps it in
        self.run = Run(
            model=self.model,
            adapters=self.placement.adapters,
            steps=state.max_steps,
            limit=sizing.budget,
            rank_limit=sizing.rank_budget,
            optimizer=held,
            validation_loss=self._validation_loss(args.device),
            start=self.start,
        )
        self.run.generator.manual_seed(self.seed)
        self.allocator = allocation.begin(self.run)
        if engine is not None and not self.allocator.settled:
            raise StateError(
                f"{engine} holds on to the tensors it was given, and this method changes their size; use "
                "lorafamily.train under torchrun, or a method with fixed ranks"
            )
        if state.global_step:
            path = args.resume_from_checkpoint
            self._go_on(Path(path if isinstance(path, str) else f"{args.output_dir}/checkpoint-{state.global_step}"))
        elif not args.torch_compile:
            self._watch()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Add the penalty's gradient."""
        if self.placement.method.penalty is not None:
            self.placement.method.penalty(self.placement.adapters.values()).backward()

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **given: Any) -> None:
        """Let the allocator see the gradients, and decide."""
        assert self.allocator is not None
        made = not getattr(given["optimizer"], "step_was_skipped", False)
        if not made:  # float16: the gradients are not finite
            self.model.zero_grad(set_to_none=True)
        decision = self.allocator.step(state.global_step + 1, observe=made)
        if decision is not None:
            self.decisions.append(decision)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **given: Any) -> None:
        """Add the adapters and the allocator to the Trainer's checkpoint."""
        assert self.run is not None
        assert self.allocator is not None
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FOLDER
        files.save(self.model, folder, self.placement.name)
        tree = {"allocator": self.allocator.state(), "generator": self.run.generator.get_state(), "start": self.start}
        tensors: dict[str, Tensor] = {}
        packed = pack(tree | {"decisions": [vars(decision) for decision in self.decisions]}, "state", tensors)
        write_sealed(folder, STATE, {"format": FORMAT, "state": packed}, TENSORS, tensors)

    def _watch(self) -> None:
        """See at the first batch which targets' weights the model reads without calling the layers, as `train` does."""
        owner, _ = noted(self.model)
        reads = Reads(targets_of(owner))
        hooks: list[RemovableHandle] = []

        def begin(module: nn.Module, inputs: Any) -> None:
            if module.training:  # not in an evaluation before
                reads.__enter__()

        def end(module: nn.Module, inputs: Any, output: Any) -> None:
            if module.training:
                for hook in hooks:
                    hook.remove()
                reads.__exit__(None, None, None)
                if output is not None:  # nothing was raised
                    self._leave_out(reads.without_effect())

        hooks += [
            self.model.register_forward_pre_hook(begin),
            self.model.register_forward_hook(end, always_call=True),
        ]

    def _leave_out(self, names: list[str]) -> None:
        if leave_out(self.model, self.placement, names, None if self.run is None else self.run.optimizer):
            for name in names:
                del self.start[name]
            if self.run is not None:
                self.allocator = self.placement.method.allocation.begin(self.run)

    def _go_on(self, checkpoint: Path) -> None:
        assert self.run is not None
        assert self.run.optimizer is not None
        folder, what = checkpoint / FOLDER, "a Trainer's checkpoint written with this callback has one"
        record = read_record(folder / STATE, what, FORMAT)
        state = unpack(record["state"], read_sealed_tensors(folder / TENSORS, what, record))
        saved = files.read(folder)
        if saved.adapters.keys() != self.placement.adapters.keys() or state["start"] != self.start:
            raise FileError(f"{folder}: of a run with other adapters than these, or other ranks at the start")
        for at, adapter in self.placement.adapters.items():
            for old, new in adapter.take_over(saved.adapters[at]):
                exchange(self.run.optimizer, old, new)
                if old in self.run.optimizer.state:
                    self.run.optimizer.state[new] = self.run.optimizer.state.pop(old)
        assert self.allocator is not None
        self.allocator.restore(state["allocator"])
        self.run.generator.set_state(state["generator"])
        self.decisions = [Decision(**decision) for decision in state["decisions"]]

    def _fit_ranks(self, module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        known = {at: prefix + names[id(next(a.parameters()))] for at, a in self.placement.adapters.items()}
        gone = [at for at, name in known.items() if name not in state_dict]
        if self.placement.by_default and len(gone) < len(known):  # it has adapters, without those that it left out
            self._leave_out(gone)
        for adapter in self.placement.adapters.values():
            for name, parameter in list(adapter.update.named_parameters()):
                value = state_dict.get(prefix + names[id(parameter)])
                if value is not None and value.shape != parameter.shape:
                    new = nn.Parameter(parameter.new_empty(value.shape), parameter.requires_grad)
                    setattr(adapter.update, name, new)

    def _validation_loss(self, device: torch.device) -> Callable[[int], Tensor] | None:
        if self.validation is None:
            return None
        data = self.validation
        held: list[Any] = []

        def loss(rows: int) -> Tensor:
            with evaluating(self.model, device):
                if not held:
                    torch.manual_seed(self.seed)  # the same batch after resuming; `evaluating` undoes it
                    batch = next(iter(data), None)
                    if batch is None:
                        raise DataError("the validation data gave no batch to score ranks on")
                    held.append(to_device(first_rows(batch, rows), device))
                return loss_of(self.model, held[0])

        return loss
