"""The task's gradient: hooks on the parameters see it before it is added to `.grad`, whoever calls `backward`."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorafamily.adapter import Adapter
from lorafamily.deploy.folder import listed
from lorafamily.errors import TrainingError
from lorafamily.training.guards import no_gradient
from lorafamily.training.loop_context import LoopContext
from lorafamily.training.processes import Processes, give_gradient

PATIENCE = 10
"""Steps within which one of the layers whose names differ only in digits must get a gradient. The others need not:
layers may be dropped at random, and no token may go to an expert."""


class TaskGradients:
    """What a run knows of the task's gradient: which adapters it reached and, if wanted, its values without the
    penalty's share. Where DDP leaves the adapters to the session, averages their gradients over the processes.

    `unreached`: adapters and extra trained parameters that no batch of the run has reached. `reached`: adapters that
    the task reached since the last step. `kept`: the task's gradient since the last step, by parameter, if wanted.

    Args:
        adapters: the model's adapters by layer, a mapping that may change.
        extra: returns the extra trained parameters by name.
        guard: whether to refuse adapters without gradient.
        wanted: returns whether the task's gradient must be kept apart from the penalty's, and whether it must be noted
            which adapters the task reached.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        extra: Callable[[], dict[str, nn.Parameter]],
        guard: bool,
        loop: LoopContext,
        processes: Processes | None,
        wanted: Callable[[], tuple[bool, bool]],
    ):
        self.adapters, self.extra, self.guard, self.wanted = adapters, extra, guard, wanted
        self.loop, self.processes = loop, processes
        present = [at for at, adapter in adapters.items() if adapter.slices]
        self.unreached = {*present, *extra()} if guard else set()
        self.reached: set[str] = set()
        self.kept: dict[nn.Parameter, Tensor] = {}
        self._hooks: dict[nn.Parameter, RemovableHandle] = {}
        # The penalty's share in the gradients that arrive, if the loop added the penalty to the loss.
        self._of_penalty: dict[nn.Parameter, Tensor] = {}
        self._from_task = True
        self._averaging = False  # whether the present backward ends with an average over the processes
        if loop.last_backward is not None:  # all processes begin with the first one's adapters, as DDP does
            for adapter in adapters.values():
                for parameter in adapter.parameters():
                    dist.broadcast(parameter.data, 0)
        self.listen()

    def listen(self) -> None:
        """Put hooks on the parameters whose gradients must be seen now, and no others. Call it again after changes."""
        wanted: dict[nn.Parameter, str] = {}
        everywhere = any(self.wanted()) or self.loop.last_backward is not None
        for at, adapter in self.adapters.items():
            if everywhere or at in self.unreached:
                wanted |= {p: at for p in adapter.update.parameters() if p.requires_grad and p.numel()}
        wanted |= {p: at for at, p in self.extra().items() if at in self.unreached and p.requires_grad}
        for parameter in self._hooks.keys() - wanted.keys():
            self._hooks.pop(parameter).remove()
        for parameter in wanted.keys() - self._hooks.keys():
            arrived = functools.partial(self._arrived, wanted[parameter], parameter)
            self._hooks[parameter] = parameter.register_hook(arrived)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """In the block the hooks ignore gradients: they are the penalty's or a scorer's."""
        before, self._from_task = self._from_task, False
        try:
            yield
        finally:
            self._from_task = before

    def add(self, penalty: Tensor) -> None:
        """Add the penalty's gradient to the task's, after the step's backward."""
        factors = self._factors()
        if self.wanted()[1]:  # a gradient that is there by now is the task's, perhaps from another process
            there = {p for p in factors if p.grad is not None}
            self.reached |= {at for at, a in self.adapters.items() if there & {*a.update.parameters()}}
        with self.paused():
            gradients = torch.autograd.grad(penalty, factors, allow_unused=True)
        for parameter, gradient in zip(factors, gradients, strict=True):
            if gradient is not None and parameter.grad is None:
                give_gradient(parameter, gradient)
            elif gradient is not None:
                parameter.grad.add_(gradient)

    def tell_apart(self, penalty: Tensor) -> Tensor:
        """The penalty, for a loop that adds it to the loss itself, with a hook that computes its share in each gradient
        before that gradient arrives."""
        if not self._hooks or not penalty.requires_grad:
            return penalty
        factors = self._factors()

        def share(weight: Tensor) -> None:  # `weight`: d loss / d penalty, a scaler's factor included
            with self.paused():
                shares = torch.autograd.grad(penalty, factors, weight, retain_graph=True, allow_unused=True)
            self._of_penalty = {p: s for p, s in zip(factors, shares, strict=True) if s is not None}

        outside = penalty.view_as(penalty)
        outside.register_hook(share)
        return outside

    def stepped(self) -> None:
        """Forget what was noted for the step that is over."""
        self.kept.clear()
        self.reached.clear()
        self._of_penalty.clear()

    def finite(self) -> bool:
        """Whether every gradient of the adapters is finite."""
        gradients = [p.grad for p in self._factors() if p.grad is not None]
        return not gradients or bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())

    def check(self, step: int, last: bool) -> None:
        """Check that gradients reach the adapters, and warn at the end of adapters that no batch reached.

        Raises:
            TrainingError: of the layers whose names differ only in digits none got a gradient in the first `PATIENCE`
                steps.
        """
        if not self.guard:
            return
        if self._hooks:
            self.listen()
        present = {at for at in self.unreached if at not in self.adapters or self.adapters[at].slices}
        if present and (step == PATIENCE or last):
            reached = {_without_digits(at) for at in {*self.adapters, *self.extra()} - self.unreached}
            silent = sorted(at for at in present if _without_digits(at) not in reached)
            if silent:
                raise TrainingError(no_gradient(silent, self.adapters, self.extra(), step))
        if self.unreached and last:
            pruned = sorted(self.unreached - present)
            also = f" ({len(pruned)} of them lost all of their rank)" if pruned else ""
            warnings.warn(
                f"no batch of the run reached {len(self.unreached)} of {len(self.adapters)} adapters: "
                f"{listed(sorted(self.unreached))}{also}. They have learnt nothing of the task",
                stacklevel=4,
            )

    def _arrived(self, at: str, parameter: nn.Parameter, gradient: Tensor | None) -> None:
        if not self._from_task or gradient is None:  # None: an expert that no token went to
            return
        if self.loop.last_backward is not None and not self._averaging and self.loop.last_backward():
            self._averaging = True
            torch.autograd.Variable._execution_engine.queue_callback(self._average)  # when this backward is done
        alone = self._of_penalty.get(parameter)
        if alone is not None and torch.equal(gradient, alone):  # the same operations gave the same bits
            return
        self.reached.add(at)
        if at in self.unreached and (at not in self.adapters or bool(gradient.any())):
            self.unreached.discard(at)
        if self.wanted()[0]:
            scale = 1.0 if self.loop.scaler is None else self.loop.scaler.get_scale()
            before = self.kept.get(parameter)
            self.kept[parameter] = gradient / scale if before is None else before + gradient / scale

    def _average(self) -> None:
        """Average the adapters' gradients over the processes, as DDP does with other gradients."""
        self._averaging = False
        assert self.processes is not None
        parameters = self._factors()
        self.processes.add_up_gradients(parameters)
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], self.processes.world)

    def _factors(self) -> list[nn.Parameter]:
        return [p for a in self.adapters.values() for p in a.update.parameters() if p.requires_grad]


def _without_digits(at: str) -> str:
    """The same for this layer in every block, and for every expert."""
    return re.sub(r"\d+", "#", at)
