"""Silent failures of training, made loud."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorafamily.beside import movable_buffers
from lorafamily.deploy.folder import listed
from lorafamily.errors import DataError, NonFiniteError, TrainingError

CUT = "the graph is cut (gradient checkpointing with use_reentrant=True?)"


def depends(loss: Tensor, adapters: Mapping[str, Any], extra_trained: Mapping[str, Tensor]) -> bool:
    """Whether the loss has gradients to give. It must, unless an allocation ended at rank 0 everywhere and no other
    parameters train.

    Raises:
        TrainingError: it has none, and something would train.
    """
    emptied = adapters and not extra_trained and not any(adapter.rank for adapter in adapters.values())
    if not loss.requires_grad and not emptied:
        raise TrainingError(f"the loss depends on nothing that trains: it was computed without gradients, or {CUT}")
    return loss.requires_grad


def check_gradients(adapters: Mapping[str, Any], beside: Mapping[str, nn.Parameter]) -> None:
    """Every adapter, and every parameter that trains beside them, must have got a gradient from the task loss alone.

    Of an adapter one tensor is enough, not all zero: where one factor starts at zero, the other's gradient is zero at
    first.

    Raises:
        TrainingError: some got none; they are named.
    """
    silent = [path for path, adapter in adapters.items() if adapter.rank and not _learns(adapter)]
    if silent:
        raise TrainingError(
            f"{len(silent)} of {len(adapters)} adapters got no gradient from the first batch: {listed(silent)}. "
            f"Their layers do not take part in the loss, or {CUT}. Narrow targets, or pass check_gradients=False if "
            "that is meant"
        )
    silent = [name for name, parameter in beside.items() if parameter.requires_grad and parameter.grad is None]
    if silent:
        raise TrainingError(
            f"{len(silent)} of {len(beside)} parameters that train beside the adapters got no gradient from the first "
            f"batch: {listed(silent)}. They do not take part in the loss, or {CUT}. Narrow also_train, or pass "
            "check_gradients=False if that is meant"
        )


class FrozenBuffers:
    """Keeps the persistent buffers of a frozen base what they are: running statistics and the like, which a module in
    train mode may move. `frozen`: those of modules in which nothing trains."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.values = {
            at: buffer.clone()
            for at, buffer in movable_buffers(model).items()
            if not any(p.requires_grad for p in model.get_submodule(at.rpartition(".")[0]).parameters())
        }

    def put_back(self) -> None:
        """Give moved ones their values back, and their modules eval mode from now on; they are named in a warning."""
        moved = [at for at, value in self.values.items() if not torch.equal(self.model.get_buffer(at), value)]
        for at in moved:
            self.model.get_buffer(at).copy_(self.values[at])
            self.model.get_submodule(at.rpartition(".")[0]).eval()
        if moved:
            warnings.warn(
                f"training moved {len(moved)} buffers of the frozen base, {listed(moved)}; they are what they were "
                "again, and their modules stay in eval mode. To train one, name a parameter of it in also_train",
                stacklevel=3,
            )


def _learns(adapter: nn.Module) -> bool:
    return any(bool(p.grad.any()) for p in adapter.parameters() if p.grad is not None)


class FiniteNumbers:
    """What happens where the loss or a gradient is not finite: the run stops, or the step is skipped, `limit` times in
    a row at most. `skipped` counts all of them."""

    def __init__(self, limit: int):
        self.limit, self.skipped, self.in_a_row = limit, 0, 0

    def check(self, step: int, loss: float, norm: float, accumulate: int, adapters: Mapping[str, nn.Module]) -> bool:
        """Whether the step can be made.

        Raises:
            NonFiniteError: it cannot, and no more may be skipped.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_a_row = 0
            return True
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row <= self.limit:
            return False
        broken = next((path for path, adapter in adapters.items() if _has_broken_gradient(adapter)), None)
        where = f"; first adapter with such a gradient: {broken}" if broken else ""
        before = f" after {self.limit} steps skipped for the same reason" if self.limit else ""
        raise NonFiniteError(
            f"loss {loss:g}, gradient norm {norm:g} at step {step} (batches {(step - 1) * accumulate} to "
            f"{step * accumulate - 1} of the run){where}{before}. Nothing of this step was applied; lower lr or look "
            "at the batch"
        )


def _has_broken_gradient(adapter: nn.Module) -> bool:
    return any(p.grad is not None and not p.grad.isfinite().all() for p in adapter.parameters())


def fingerprints(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """A number for each tensor, the sum of its bits read as integers: every single flipped bit changes it."""
    sums = {name: _fingerprint(value) for name, value in parameters}
    return {name: int(value) for name, value in sums.items()}


@torch.no_grad()
def _fingerprint(value: Tensor) -> Tensor:
    local = value.detach()
    local = local.to_local() if hasattr(local, "to_local") else local  # a sharded tensor: the part that is here
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(local.element_size(), torch.int64)
    return local.contiguous().view(words).sum(dtype=torch.int64)


def added_up(pieces: list[int]) -> int:
    """The fingerprint of a tensor from those of its pieces; sums of 64-bit integers wrap."""
    return (sum(pieces) + 2**63) % 2**64 - 2**63


def check_base(before: Mapping[str, int], now: Mapping[str, int]) -> None:
    """The frozen base must be what it was when the run began.

    Raises:
        TrainingError: a weight is another.
    """
    changed = [name for name in before if now.get(name) != before[name]]
    if changed:
        raise TrainingError(
            f"{len(changed)} frozen base weights are not what they were when the run began: {listed(changed)}. "
            "Something other than this loop wrote into them, or this is another base"
        )


def check_keys(model: nn.Module, batch: Any) -> None:
    """A mapping goes to the model as keywords: it must take every key.

    Raises:
        DataError: it does not; the message has both lists.
    """
    if not isinstance(batch, Mapping):
        return
    takes = inspect.signature(model.forward).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in takes.values()):
        return
    missing = [
        name
        for name, parameter in takes.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        and name not in batch
    ]
    unknown = [key for key in batch if key not in takes]
    if unknown or missing:
        wrong = [f"does not take {', '.join(map(str, unknown))}"] if unknown else []
        wrong += [f"needs {', '.join(missing)}"] if missing else []
        raise DataError(
            f"a batch has the keys {', '.join(map(str, batch))}; {type(model).__name__} {' and '.join(wrong)}. It "
            f"takes {', '.join(takes)}"
        )
