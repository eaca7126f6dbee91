"""The processes of one run, as `torchrun` starts them: each takes some rows of every batch, and all make the same
steps."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorafamily.batch import batch_axes, cut_rows, share
from lorafamily.errors import DataError, TrainingError
from lorafamily.layers.placement import noted
from lorafamily.layers.quantised import quantised_layers
from lorafamily.layers.site import sites_in

T = TypeVar("T")
Model = TypeVar("Model", bound=nn.Module)
TIMEOUT = timedelta(minutes=10)  # of a collective: how late a hanging process is noticed; a dead one is at once


class Processes:
    """The processes that run this program together. A single process is the special case that communicates nothing.

    `rank`: number of this process, from 0; `world`: how many there are; `first`: whether this one writes the files.
    Raises TrainingError if the model is on the GPU of another process.
    """

    def __init__(self, device: torch.device):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and dist.is_available():
            if device.type == "cuda":
                _take_gpu(device)
            if not dist.is_initialized():
                if device.type == "cuda":  # gloo for Python objects, which are sent from the CPU
                    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT, device_id=device)
                else:
                    dist.init_process_group("gloo", timeout=TIMEOUT)
                atexit.register(dist.destroy_process_group)  # else its threads may abort a process that has finished
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.world = dist.get_world_size() if together else 1
        self.device, self.first = device, self.rank == 0

    def rows(self, batch: Any) -> list[Any]:
        """A batch cut into the rows of each process, in order.

        Raises:
            DataError: it has fewer rows than there are processes.
        """
        rows, places = batch_axes(batch)
        if rows < self.world:
            raise DataError(f"a batch of {rows} rows cannot be shared by {self.world} processes")
        ends = [rows * at // self.world for at in range(self.world + 1)]
        return [cut_rows(batch, begin, end, places) for begin, end in pairwise(ends)]

    def shares(self, batches: Sequence[Any], weigh: Callable[[Any], float], divided: bool) -> list[tuple[Any, float]]:
        """The batches of this process for one optimizer step, each with the share that its loss has.

        The sum of share · loss, over all batches and processes, is the loss of one large batch. A batch without a label
        that counts is left out, since its loss is 0 / 0; with several processes another is computed in its place, at
        share 0, because all must call a sharded model equally often.

        `weigh`: returns what the loss of a batch is a mean over. `divided`: whether each process drew other batches;
        otherwise all drew these, and each takes some rows.

        Raises:
            DataError: fewer rows than processes, or no label that counts in the batches that this process drew.
        """
        if self.world > 1 and not divided:
            pieces = [self.rows(batch) for batch in batches]
            all_weights = [[weigh(piece) for piece in of] for of in pieces]
            mine, weights = [of[self.rank] for of in pieces], [of[self.rank] for of in all_weights]
            whole = [sum(of) for of in all_weights]  # weights of the drawn batches, one of which may replace another
            total = sum(whole)
        else:
            mine, weights = list(batches), [weigh(batch) for batch in batches]
            whole = weights
            (total,) = self.add_up([sum(weights)])
        if not total:  # the loss is not finite, which the loop reports
            return [(batch, 1 / (len(mine) * self.world)) for batch in mine]
        if self.world == 1:
            return [(batch, share(weigh, w, total)) for batch, w in zip(mine, weights, strict=True) if w]
        heaviest, at = max((weight, at) for at, weight in enumerate(whole))
        if not heaviest:
            raise DataError(f"no label counts in any batch that process {self.rank} drew for this step")
        return [(b if w else batches[at], share(weigh, w, total)) for b, w in zip(mine, weights, strict=True)]

    def add_up(self, values: list[float]) -> list[float]:
        """Sums over all processes, in float64."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        self._collective(lambda: dist.all_reduce(tensor))
        return list(tensor.tolist())

    @torch.no_grad()
    def add_up_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes, in one collective for each dtype."""
        if self.world == 1:
            return
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for dtype, group in by_dtype.items():
            there = torch.tensor([parameter.grad is not None for parameter in group], device=self.device).to(dtype)
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            flat = torch.cat([there, *(gradient.flatten() for gradient in gradients)])
            self._collective(lambda flat=flat: dist.all_reduce(flat))
            anywhere, *pieces = flat.split([len(group), *(parameter.numel() for parameter in group)])
            for parameter, piece, has_gradient in zip(group, pieces, anywhere.tolist(), strict=True):
                if has_gradient:
                    give_gradient(parameter, piece.view_as(parameter))

    def agreed(self, value: T) -> T:
        """The first process's value, for decisions that must be the same everywhere, to the last bit."""
        if self.world == 1:
            return value
        values = [value]
        self._collective(lambda: dist.broadcast_object_list(values, 0))
        return values[0]

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, in order."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        self._collective(lambda: dist.all_gather_object(values, value))
        return values

    def check_same(self, fingerprints: Mapping[str, int], step: int) -> None:
        """Compare the weights that train among processes.

        Raises:
            TrainingError: they are not the same in every process.
        """
        everybody = self.gathered(dict(fingerprints))
        for rank, other in enumerate(everybody):
            differing = [name for name in other if other[name] != everybody[0].get(name)]
            if differing:
                raise TrainingError(
                    f"after step {step} process {rank} has another {differing[0]} than process 0: the processes do not "
                    "compute the same; give all of them the same model, data and seed"
                )

    def _collective(self, operation: Callable[..., Any]) -> None:
        try:
            operation()
        except RuntimeError as error:
            raise TrainingError(
                f"process {self.rank} of {self.world} lost the others, one of which has probably died (its own message "
                f"says why): {str(error).splitlines()[0]}"
            ) from error


def give_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Set `parameter.grad` with the strides of the parameter, as autograd does: given other strides, a fused optimizer
    would silently apply entries of the gradient to other entries of the parameter."""
    parameter.grad = torch.empty_like(parameter).copy_(gradient)


def _take_gpu(device: torch.device) -> None:
    """Make the model's GPU the current one, which collectives of objects and new tensors use. TrainingError refuses the
    first process's GPU in others, which chose none before their model went to "cuda"."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local and device.index == 0 and torch.cuda.device_count() > 1:
        raise TrainingError(
            f"process {local} of this machine has its model on cuda:0, the GPU of process 0; write "
            'torch.cuda.set_device(int(os.environ["LOCAL_RANK"])) before the model goes to "cuda"'
        )
    torch.cuda.set_device(device)


def shard(model: Model) -> Model:
    """Shard the frozen base over the processes with PyTorch's FSDP2; what trains stays whole in each of them.

    Call it after `apply` and before `train`, in a program that `torchrun` started; it returns the same model. Blocks
    (the entries of the model's `nn.ModuleList`s) are gathered one after the other as they are computed. A base in
    bitsandbytes' 4 bits is sharded in packed form; its scales stay whole in every process.

    Raises:
        TrainingError: there is only one process, or the base is quantised otherwise.
        StateError: this is a part of the model that adapters were placed in.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    processes = Processes(next(model.parameters()).device)
    if processes.world == 1:
        raise TrainingError("shard(model) spreads a model over several processes; start them with torchrun")
    for at, layer, kind in quantised_layers(model):
        if getattr(layer, "quant_state", None) is None:  # the layer has it, so it outlives the weight's tensor
            raise TrainingError(
                f"{at} ({type(layer).__name__}) is a {kind.name}, whose scales FSDP2 would lose: of quantised bases "
                "only bitsandbytes' 4-bit ones can be sharded; train this one whole in each process"
            )
        # With AVX512 bitsandbytes packs the weight at the first forward, and takes those gathered later for packed.
        vars(layer)["support_avx512bf16_for_cpu"] = False
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    whole = {parameter for parameter in model.parameters() if parameter.requires_grad}
    whole |= {parameter for _, site in sites_in(model) for parameter in site.parameters()}
    owner, state = noted(model)
    for placement in state.placements.values() if state is not None else ():
        whole |= {owner.get_parameter(path) for path in placement.inactive_values}  # of the inactive adapters, too
    blocks = [block for m in model.modules() if isinstance(m, nn.ModuleList) for block in m]
    for block in reversed(blocks):  # the inner ones first
        fully_shard(block, mesh=mesh, ignored_params={p for p in block.parameters() if p in whole})
    fully_shard(model, mesh=mesh, ignored_params=whole)
    return model
