"""The processes of one run, as `torchrun` starts them: each takes its rows of every batch, all make the same steps."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lorafamily.errors import DataError, TrainingError
from lorafamily.site import sites_in

T = TypeVar("T")
Model = TypeVar("Model", bound=nn.Module)
TIMEOUT = timedelta(minutes=10)  # of one exchange; a process that died is noticed at once, one that hangs after this


class Processes:
    """Those that run this program together; a process alone is the special case in which nothing is exchanged."""

    def __init__(self, device: torch.device):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
            atexit.register(dist.destroy_process_group)  # else its threads may abort a process that is done
        self.together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.together else 0
        self.world = dist.get_world_size() if self.together else 1
        self.device = device

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def rows(self, batch: Any) -> tuple[Any, float]:
        """This process's rows of a batch, and their share of it.

        Raises:
            DataError: fewer rows than processes.
        """
        if self.world == 1:
            return batch, 1.0
        sizes = {len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim}
        total = max(sizes, default=0)
        if total < self.world:
            raise DataError(f"a batch of {total} rows cannot be shared by {self.world} processes")
        begin, end = (total * at // self.world for at in (self.rank, self.rank + 1))

        def own(leaf: Any) -> Any:
            return leaf[begin:end] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == total else leaf

        return tree_map(own, batch), (end - begin) / total

    def add_up(self, values: list[float]) -> list[float]:
        """Sums over all processes, in float64."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        self._exchange(lambda: dist.all_reduce(tensor))
        return list(tensor.tolist())

    @torch.no_grad()
    def add_up_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes: one buffer a dtype, one exchange a buffer."""
        if self.world == 1:
            return
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for dtype, own in by_dtype.items():
            there = torch.tensor([parameter.grad is not None for parameter in own], device=self.device).to(dtype)
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
            flat = torch.cat([there, *(gradient.flatten() for gradient in gradients)])
            self._exchange(lambda flat=flat: dist.all_reduce(flat))
            anywhere, *pieces = flat.split([len(own), *(parameter.numel() for parameter in own)])
            for parameter, piece, some in zip(own, pieces, anywhere.tolist(), strict=True):
                if some:
                    parameter.grad = piece.view_as(parameter)

    def agreed(self, value: T) -> T:
        """What the first process has: decisions must be the same everywhere, to the last bit."""
        if self.world == 1:
            return value
        held = [value]
        self._exchange(lambda: dist.broadcast_object_list(held, 0, device=self.device))
        return held[0]

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, in their order."""
        if self.world == 1:
            return [value]
        held: list[Any] = [None] * self.world
        self._exchange(lambda: dist.all_gather_object(held, value))
        return held

    def check_same(self, fingerprints: Mapping[str, int], step: int) -> None:
        """Weights that train must be the same in every process.

        Raises:
            TrainingError: they are not.
        """
        all_of_them = self.gathered(dict(fingerprints))
        for rank, other in enumerate(all_of_them):
            differing = [name for name in other if other[name] != all_of_them[0].get(name)]
            if differing:
                raise TrainingError(
                    f"after step {step} process {rank} has another {differing[0]} than process 0: the processes do not "
                    "compute the same (different data, models or seeds?)"
                )

    def _exchange(self, exchange: Any) -> None:
        try:
            exchange()
        except RuntimeError as error:
            raise TrainingError(
                f"process {self.rank} of {self.world} lost the others, one of which has probably died (its own message "
                f"says why): {str(error).splitlines()[0]}"
            ) from error


def shard(model: Model) -> Model:
    """Spread the frozen base over the processes with PyTorch's FSDP2; what trains stays whole in each of them.

    Call it after `apply` and before `train`, in a program that `torchrun` started. Blocks (the entries of the model's
    `nn.ModuleList`s) are gathered one after the other as they are computed.

    Raises:
        TrainingError: this is one process alone.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    processes = Processes(next(model.parameters()).device)
    if processes.world == 1:
        raise TrainingError("shard(model) spreads a model over several processes; start them with torchrun")
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    own = {parameter for parameter in model.parameters() if parameter.requires_grad}
    own |= {parameter for _, site in sites_in(model) for parameter in site.parameters()}
    blocks = [block for m in model.modules() if isinstance(m, nn.ModuleList) for block in m]
    for block in reversed(blocks):  # the inner ones first
        fully_shard(block, mesh=mesh, ignored_params={p for p in block.parameters() if p in own})
    fully_shard(model, mesh=mesh, ignored_params=own)
    return model
