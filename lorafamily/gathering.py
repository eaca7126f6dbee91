"""Gathering evidence: one pass over some batches, forward and, where gradients are wanted, backward.

To need little memory, each layer is handled as soon as it is computed: of its inputs only the leading directions are
kept, and its gradient moves to the CPU before the next layer's is computed. There gradients are summed in memory up to
a bound, and beyond it in a temporary file, so that one pass is enough for a model of any size.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from lorafamily.batch import IGNORED, LossFn, call, fingerprint, loss_of, refuse_one_batch, to_device, weigher
from lorafamily.errors import DataError, MethodError
from lorafamily.evidence import Evidence, LayerEvidence
from lorafamily.layers.target import Target
from lorafamily.method import FromEvidence
from lorafamily.principal import Principal
from lorafamily.training.execution import evaluating
from lorafamily.training.processes import Processes

Ranks = Callable[[Mapping[str, LayerEvidence]], Mapping[str, int]]
"""From the evidence so far to the initial rank of every layer."""


def gathered(
    model: nn.Module,
    targets: Mapping[str, Target],
    initialisation: FromEvidence,
    rank: int,
    data: Any,
    loss_fn: LossFn | None,
    seed: int,
    needed: Ranks,
) -> Evidence:
    """The evidence that an initialisation wants, from the first batches of `data`, with the model in eval mode.

    Padding and positions whose label is masked do not count. `rank`: that of equal ranks; `needed`: how many directions
    must have been found before the pass may stop, see `FromEvidence.stop_at`. Afterwards weights, modes, gradients,
    flags and random states are what they were.

    Processes joined by `torch.distributed` must be given the same batches; all return what the first one computed.

    Raises:
        DataError: no batch, one that the model does not take, a loss that is not finite, a layer that is never called,
            fewer inputs than directions, or processes that were given different batches.
        MethodError: a layer that cannot give what is wanted.
    """
    refuse_one_batch(data)
    batches, wants = initialisation.evidence_batches, initialisation.wants
    device = next(iter(targets.values())).stored.device
    directions = initialisation.directions(rank)
    inputs = Inputs(targets, directions, initialisation.stop_at(), needed) if "inputs" in wants else None
    gradients = Gradients(targets, initialisation.evidence_memory) if "gradients" in wants else None
    weigh = weigher("auto", model, loss_fn)
    processes = Processes(device) if dist.is_available() and dist.is_initialized() else None
    seen: list[str] = []  # fingerprints of the batches, for processes to compare
    with ExitStack() as around:
        around.enter_context(evaluating(model, device))
        torch.manual_seed(seed)  # for the randomised decomposition; `evaluating` restores the state
        if inputs:
            inputs.listen(around)
        if gradients:
            gradients.listen(around, model)
        else:
            around.enter_context(torch.no_grad())
        for batch in tqdm(islice(iter(data), batches), "looking at data", batches, False, unit="batch", disable=None):
            seen.append(fingerprint(batch) if processes else "")
            batch = to_device(batch, device)
            if inputs:
                inputs.begin(masks_of(batch, model))
            weight = weigh(batch) if gradients else 1.0
            if gradients and weight:
                loss = loss_of(model, batch, loss_fn)
                if not math.isfinite(value := loss.item()):
                    raise DataError(f"batch {len(seen)} of data has a loss of {value}: nothing can be learnt from it")
                gradients.begin(weight)
                loss.backward()
            elif not gradients:
                call(model, batch) if loss_fn is None else loss_fn(model, batch)
            if inputs and inputs.done() and not gradients:
                break
    if not seen:
        raise DataError("data gave no batch; it is empty, or an iterator that is used up")
    if gradients and not gradients.total:
        raise DataError(f"no label counts in the {len(seen)} batches of data: all of them are masked")
    if processes and len(set(map(tuple, processes.gathered(seen)))) > 1:
        raise DataError(
            "the processes were given different batches to look at, so that their adapters would start differently; "
            "give all the same batches, without a DistributedSampler"
        )
    found = {}
    for at in targets:
        V, explained = inputs.of(at) if inputs else (None, None)
        found[at] = LayerEvidence(V, explained, gradients.mean(at) if gradients else None)
        for value in vars(found[at]).values():
            if processes and value is not None:  # GPUs and numbers of threads may round differently
                value.copy_(processes.agreed(value))
    return Evidence(found, len(seen))


class Inputs:
    """Decomposes what layers are called with. Layers called with the same tensor in a row (q, k, v) share one
    decomposition. `cosine`, `needed`: when a layer ignores further batches, see `FromEvidence.stop_at`."""

    def __init__(self, targets: Mapping[str, Target], directions: int, cosine: float | None, needed: Ranks):
        for at, target in targets.items():
            if not target.kind.by_sample:
                raise MethodError(
                    f"{at} ({type(target.layer).__name__}) does not multiply its input by its weight, so its inputs "
                    f'have no directions; leave it out with exclude="{at}"'
                )
        self.at = {id(target.layer): at for at, target in targets.items()}
        """One target of every layer: parts of one layer have the same inputs."""
        self.layers = {self.at[id(target.layer)]: target.layer for target in targets.values()}
        self.targets = targets
        self.k = {at: min(directions, target.shape[1]) for at, target in targets.items()}
        self.cosine, self.needed = cosine, needed
        self.stopped: set[str] = set()
        self.found: dict[str, Principal] = {}
        self.same: dict[str, str] = {}
        """Layer -> the one before it that was called with the same tensor."""
        self.masks: dict[tuple[int, ...], Tensor] = {}
        self.batch = 0
        self.last: tuple[Tensor, str] | None = None

    def begin(self, masks: dict[tuple[int, ...], Tensor]) -> None:
        """Call it before a batch. `masks`: which positions count, by shape."""
        self.masks, self.last, self.batch = masks, None, self.batch + 1

    def listen(self, around: ExitStack) -> None:
        """Hook all layers, until `around` closes."""
        for at, layer in self.layers.items():
            around.callback(layer.register_forward_pre_hook(self._hook(at), with_kwargs=True).remove)

    def _hook(self, at: str) -> Callable[..., None]:
        @torch.no_grad()
        def seen(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            if at in self.same or at in self.stopped:
                return
            if self.batch == 1 and at not in self.found and self.last is not None and self.last[0] is x:
                self.same[at] = self.last[1]
                return
            rows = self._counting(x.detach())
            if len(rows):
                self.found.setdefault(at, Principal(self.k[at])).add(rows)
                self.last = x, at

        return seen

    def done(self) -> bool:
        """After a batch: whether no layer needs another one. `needed` may rise, so every layer is asked each time."""
        if self.cosine is None or any(self.same.get(at, at) not in self.found for at in self.layers):
            return False
        results = {layer: principal.result() for layer, principal in self.found.items()}
        needed = self.needed({at: LayerEvidence(*results[self._decomposed(at)]) for at in self.targets})
        self.stopped = set(self.found)
        for at in self.targets:
            layer = self._decomposed(at)
            if not bool((self.found[layer].turned[: needed[at]] >= self.cosine).all()):
                self.stopped.discard(layer)
        return self.stopped == set(self.found)

    def _decomposed(self, at: str) -> str:
        """The layer whose decomposition holds a target's directions."""
        layer = self.at[id(self.targets[at].layer)]
        return self.same.get(layer, layer)

    def _counting(self, x: Tensor) -> Float[Tensor, "n d_in"]:
        """The rows of an input that count."""
        for shape, mask in self.masks.items():
            if tuple(x.shape[:-1]) == shape:
                return x[mask.to(x.device)]
            if x.ndim == 2 and len(x) == mask.numel():  # all positions in one axis, as experts get them
                return x[mask.flatten().to(x.device)]
        return x.flatten(0, -2)

    def of(self, at: str) -> tuple[Tensor, Tensor]:
        """Directions (k, d_in) of a target's inputs, and the share of the variance along each.

        Raises:
            DataError: the layer got no input that counts, or too few.
        """
        k = self.k[at]
        principal = self.found.get(self._decomposed(at))
        if principal is None:
            raise DataError(f'{at} was called with nothing that counts; leave it out with exclude="{at}"')
        V, explained = principal.result()
        if principal.rows <= k:
            raise DataError(
                f"{at} was called with {principal.rows} inputs that count, too few for {k} directions; give more data"
            )
        return V[:k], explained[:k]


def _empty_sums(targets: Mapping[str, Target], memory: float | None) -> dict[str, Tensor]:
    """An uninitialised matrix for every target, on the CPU, in float32 or higher. As many as fit into `memory` MiB are
    there (None: all); the others are in a temporary file, which disappears with them."""
    dtypes = {at: torch.promote_types(target.stored.dtype, torch.float32) for at, target in targets.items()}
    sizes = {at: math.prod(targets[at].shape) * dtype.itemsize for at, dtype in dtypes.items()}
    room = math.inf if memory is None else memory * 2**20
    sums, on_disk, end = dict[str, Tensor](), dict[str, int](), 0
    for at, size in sizes.items():
        if size <= room:
            room -= size
            sums[at] = torch.empty(targets[at].shape, dtype=dtypes[at], device="cpu")
        else:
            on_disk[at], end = end, end + -(-size // 8) * 8
    if end:
        with tempfile.TemporaryFile() as file:
            file.truncate(end)
            mapped = torch.from_numpy(np.memmap(file, np.uint8, "r+", shape=(end,)))
        for at, begin in on_disk.items():
            sums[at] = mapped[begin : begin + sizes[at]].view(dtypes[at]).view(targets[at].shape)
    return sums


class Gradients:
    """Weighted sums of the weights' gradients on the CPU; each gradient is added as soon as the backward has it."""

    def __init__(self, targets: Mapping[str, Target], memory: float | None):
        self.of: dict[nn.Parameter, list[str]] = {}
        self.targets = targets
        self.total = self.weight = 0.0
        for at, target in targets.items():
            weight = target.kind.weight(target.layer)
            if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
                raise MethodError(
                    f"{at}: its weight has no gradient, because it is quantised or computed from other parameters; "
                    f'leave it out with exclude="{at}"'
                )
            self.of.setdefault(weight, []).append(at)
        self.sums = _empty_sums(targets, memory)
        self.begun: set[str] = set()

    def begin(self, weight: float) -> None:
        """Call it before the backward of a loss that is a mean over `weight` rows or tokens."""
        self.weight, self.total = weight, self.total + weight

    def listen(self, around: ExitStack, model: nn.Module) -> None:
        """Take gradients of these weights, and of no other parameter, until `around` closes."""
        for parameter in model.parameters():
            around.callback(setattr, parameter, "grad", parameter.grad)
            around.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.grad = None
            parameter.requires_grad_(parameter in self.of)
        for parameter in self.of:
            around.callback(parameter.register_post_accumulate_grad_hook(self._take).remove)
        around.enter_context(torch.enable_grad())

    def _take(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        for at in self.of[cast(nn.Parameter, parameter)]:
            G = self.targets[at].kind.matrix(gradient).detach()
            G = G.to("cpu", torch.promote_types(G.dtype, torch.float32))
            if at in self.begun:
                self.sums[at].add_(G, alpha=self.weight)
            else:
                torch.mul(G, self.weight, out=self.sums[at])
                self.begun.add(at)
        parameter.grad = None

    def mean(self, at: str) -> Float[Tensor, "d_out d_in"]:
        """The gradient of the mean loss over all data. Call it once: it divides in place.

        Raises:
            DataError: the loss does not depend on the layer.
        """
        if at not in self.begun:
            raise DataError(f'the loss does not depend on {at}; leave it out with exclude="{at}"')
        return self.sums[at].div_(self.total)


def masks_of(batch: Any, model: nn.Module) -> dict[tuple[int, ...], Tensor]:
    """Which positions of a batch count, by shape (rows, length): all but padding and those whose label is masked."""
    if not isinstance(batch, Mapping):
        return {}
    masks: dict[tuple[int, ...], Tensor] = {}
    for key in ("attention_mask", "decoder_attention_mask"):
        mask = batch.get(key)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            masks[tuple(mask.shape)] = mask.bool()
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
        shape, counts = tuple(labels.shape), labels != IGNORED
        both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        if shape not in masks:
            masks[shape] = counts
        elif not both:  # the mask may be the encoder's, and labels are the decoder's
            masks[shape] = masks[shape] & counts
    return masks
