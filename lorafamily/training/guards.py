"""Guards against failures of training that would otherwise go unnoticed."""

from __future__ import annotations

import inspect
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorafamily.adapter import Adapter
from lorafamily.deploy.folder import listed
from lorafamily.errors import DataError, NonFiniteError, StateError, TrainingError
from lorafamily.layers.extra_trained import movable_buffers
from lorafamily.layers.state import ModelState, Placement

CUT = "the graph is cut (gradient checkpointing with use_reentrant=True?)"


def no_gradient(silent: Sequence[str], adapters: Mapping[str, Any], extra: Mapping[str, Any], steps: int) -> str:
    """The message that adapters, or else extra trained parameters, got no gradient from the task."""
    trained, what, argument = adapters, "adapters", "targets"
    if adapters.keys().isdisjoint(silent):
        trained, what, argument = extra, "extra trained parameters", "also_train"
    names = [at for at in silent if at in trained]
    since = "the first batch" if steps == 1 else f"the first {steps} steps"
    return (
        f"{len(names)} of {len(trained)} {what} got no gradient from {since}: {listed(names)}. They do not take part "
        f"in the loss, or {CUT}. Narrow {argument}, or pass check_gradients=False if they need none"
    )


class FrozenBuffers:
    """Copies of the `movable_buffers` of modules in which nothing trains: a module in train mode may change them.

    `stilled`: the modules that `put_back` put into eval mode, by name. They stay in it until the run is over, also in
    loops that call `model.train()` at every step, as transformers' Trainer does.
    """

    def __init__(self, model: nn.Module):
        self.model, self.stilled = model, set[str]()
        self.values = {
            at: buffer.clone()
            for at, buffer in movable_buffers(model).items()
            if not any(p.requires_grad for p in model.get_submodule(at.rpartition(".")[0]).parameters())
        }

    def put_back(self, *, last: bool) -> None:
        """Restore buffers that changed, with a warning, and put their modules into eval mode. `last`: the run is over,
        and does not keep them there any longer."""
        moved = [at for at, value in self.values.items() if not torch.equal(self.model.get_buffer(at), value)]
        for at in moved:
            self.model.get_buffer(at).copy_(self.values[at])
        self.still(at.rpartition(".")[0] for at in moved)
        if moved:
            warnings.warn(
                f"training moved {len(moved)} buffers of the frozen base, {listed(moved)}; they were put back, and "
                "their modules stay in eval mode. To train one, name a parameter of it in also_train",
                stacklevel=3,
            )
        if last:
            _STILLING.pop(self.model, None)

    def still(self, names: Iterable[str]) -> None:
        """Put modules into eval mode, in which their buffers do not move, and keep them there."""
        self.stilled |= set(names)
        if self.stilled:
            if _keep_still not in self.model._forward_pre_hooks.values():  # of an earlier run, or of a copied model
                self.model.register_forward_pre_hook(_keep_still)
            _STILLING[self.model] = weakref.ref(self)
        self.put_into_eval_mode()

    def put_into_eval_mode(self) -> None:
        """Put the stilled modules into eval mode, unless something in them trains by now."""
        for module in map(self.model.get_submodule, self.stilled):
            if module.training and not any(p.requires_grad for p in module.parameters()):
                module.eval()


_STILLING: weakref.WeakKeyDictionary[nn.Module, weakref.ref[FrozenBuffers]] = weakref.WeakKeyDictionary()
"""By model what keeps some of its modules in eval mode. A hook that held it could not be pickled with the model."""


def _keep_still(model: nn.Module, inputs: Any) -> None:
    buffers = None if torch.compiler.is_compiling() else _STILLING.get(model, lambda: None)()
    if buffers is not None:
        buffers.put_into_eval_mode()


def refuse_other_adapters(state: ModelState, placement: Placement, adapters: Mapping[str, nn.Module]) -> None:
    """Check that the adapters that a session trains are the active ones still.

    Raises:
        StateError: others are, or they were replaced.
    """
    if state.active != placement.name:
        now = "no adapter" if state.active is None else f'adapter "{state.active}"'
        raise StateError(
            f'{now} is active, and this session trains "{placement.name}": switch(model, "{placement.name}") before '
            "the next batch, or make a session for what is active"
        )
    if placement.adapters is not adapters:
        raise StateError(
            f'the adapters of "{placement.name}" were replaced (lorafamily.compress?), and the optimizer holds the old '
            "ones: make an optimizer and a session for the new ones"
        )


class OptimizerSteps:
    """Whether the optimizer has stepped since `begin_next`, and on which gradients. When these are gone, a session
    would score slices on nothing; without a step it would come to the end of its schedule too soon.

    `extra_trained()`: what trains besides the adapters, by name.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        adapters: Mapping[str, Adapter],
        extra_trained: Callable[[], Mapping[str, nn.Parameter]],
    ):
        self.optimizer, self.adapters, self.extra_trained = optimizer, adapters, extra_trained
        self.made = False
        self._held: set[int] = set()
        self._seen: list[tuple[nn.Parameter, int]] = []
        optimizer.register_step_post_hook(self._note)

    def check_order(self, finite: Callable[[], bool] | None) -> None:
        """Check that the optimizer stepped, and that the gradients of its step are still there.

        `finite`: whether all gradients are; None: the loop may leave out a step.

        Raises:
            TrainingError: one of these does not hold.
        """
        if not self.made and finite is not None and self._gradients() and finite():
            raise TrainingError(
                "the optimizer has made no step since the last session.step(): call it once for each optimizer.step(), "
                "also where several batches make one step"
            )
        if self._seen and all(_cleared(parameter, version) for parameter, version in self._seen):
            raise TrainingError(
                "the gradients of this step are cleared, and ranks would be moved by scores of nothing: call "
                "session.step() after optimizer.step() and before optimizer.zero_grad()"
            )
        if self._lacks():
            trained = {at: [*adapter.update.tensors()] for at, adapter in self.adapters.items()}
            trained |= {at: [parameter] for at, parameter in self.extra_trained().items()}
            names = [at for at, tensors in trained.items() if any(id(p) not in self._held for p in tensors)]
            raise TrainingError(
                f"the optimizer does not hold the tensors of {listed(names)}, replaced since the session was "
                "made (load_state_dict with assign=True? another layer?), and trains the old ones: make an optimizer "
                "and a session for the model as it is"
            )

    def _lacks(self) -> bool:
        """Whether something that has a gradient is not what the optimizer holds."""
        trained = {id(parameter) for parameter, _ in self._gradients()}
        trained |= {id(p) for p in self.extra_trained().values() if p.grad is not None}
        if not trained <= self._held:  # ranks changed, if nothing is wrong
            self._held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return not trained <= self._held

    def begin_next(self) -> None:
        """Forget the step that is over."""
        self.made, self._seen = False, []

    def _note(self, *_: Any) -> None:
        self.made = True
        self._seen = [(parameter, gradient._version) for parameter, gradient in self._gradients()]

    def _gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        parameters = (p for adapter in self.adapters.values() for p in adapter.update.tensors())
        return [(p, p.grad) for p in parameters if p.grad is not None]


def _cleared(parameter: nn.Parameter, version: int) -> bool:
    """Whether a gradient is gone, or was filled with zeros since it had this version."""
    gradient = parameter.grad
    return gradient is None or (gradient._version != version and not bool(gradient.any()))


class NonFiniteGuard:
    """Skips a step whose loss or gradient is not finite, at most `limit` times in a row; then the run stops. `skipped`:
    how many steps of the run were."""

    def __init__(self, limit: int):
        self.limit, self.skipped, self.in_a_row = limit, 0, 0

    def check(self, step: int, loss: float, norm: float, accumulate: int, adapters: Mapping[str, nn.Module]) -> bool:
        """Whether the step can be made; False skips it.

        Raises:
            NonFiniteError: no more steps may be skipped.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_a_row = 0
            return True
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row <= self.limit:
            return False
        gradients = {at: [p.grad for p in a.parameters() if p.grad is not None] for at, a in adapters.items()}
        broken = next((at for at, of in gradients.items() if not all(g.isfinite().all() for g in of)), None)
        where = f"; first adapter with such a gradient: {broken}" if broken else ""
        before = f" after {self.limit} steps skipped for the same reason" if self.limit else ""
        raise NonFiniteError(
            f"loss {loss:g}, gradient norm {norm:g} at step {step} (batches {(step - 1) * accumulate} to "
            f"{step * accumulate - 1} of the run){where}{before}. Nothing of this step was applied; lower lr or look "
            "at the batch"
        )


def check_base(before: Mapping[str, int], now: Mapping[str, int]) -> None:
    """Compare the fingerprints of frozen weights with those at the beginning of the run.

    Raises:
        TrainingError: a frozen weight changed.
    """
    changed = [name for name in before if now.get(name) != before[name]]
    if changed:
        raise TrainingError(
            f"{len(changed)} frozen base weights are not what they were when the run began: {listed(changed)}. "
            "Something other than this loop wrote into them, or this is another base"
        )


def check_keys(model: nn.Module, batch: Any) -> None:
    """Compare a batch, if it is a mapping, with the arguments of the model.

    Raises:
        DataError: the model's `forward` cannot be called with it as keywords.
    """
    if not isinstance(batch, Mapping):
        return
    takes = inspect.signature(model.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        return
    needed = [p for p in takes.values() if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [p.name for p in needed if p.name not in batch]
    unknown = [key for key in batch if key not in takes]
    if unknown or missing:
        wrong = [f"does not take {', '.join(map(str, unknown))}"] if unknown else []
        wrong += [f"needs {', '.join(missing)}"] if missing else []
        raise DataError(
            f"a batch has the keys {', '.join(map(str, batch))}; {type(model).__name__} {' and '.join(wrong)}. It "
            f"takes {', '.join(takes)}"
        )
