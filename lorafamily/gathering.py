"""Gathering evidence: one pass over some batches, forward and, where gradients are wanted, backward.

Layer by layer as they are computed: of inputs only the leading directions stay, and a gradient leaves its device as
soon as the backward has it, so that no more than one layer's is there at a time. The sums stay on the CPU, in memory as
far as a bound allows and beyond it in a temporary file, so that one pass over the data is enough however large a model
is.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
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
from lorafamily.evidence import Evidence, LayerEvidence, Wanted
from lorafamily.layers.target import Target
from lorafamily.layers.weights import whole_weights
from lorafamily.principal import Principal
from lorafamily.training.execution import evaluating
from lorafamily.training.processes import Processes


@dataclass(frozen=True)
class Stop:
    """When a layer's inputs are looked at no more: as soon as all its directions that are needed have turned, from one
    batch to the next, by no more than `cosine` says. `needed`: how many those are, by layer, from what is known so far.
    """

    cosine: float
    needed: Callable[[Mapping[str, LayerEvidence]], Mapping[str, int]]


def gathered(
    model: nn.Module,
    targets: Mapping[str, Target],
    wants: Iterable[Wanted],
    directions: int,
    data: Any,
    *,
    batches: int,
    loss_fn: LossFn | None,
    seed: int,
    memory: float | None = None,
    stop: Stop | None = None,
) -> Evidence:
    """Evidence from the first so many batches of `data`, in eval mode, of the model as it computes now.

    `directions`: how many of a layer's inputs to keep, where it has as many. Padding and positions whose label is
    masked do not count. `memory`: MiB of gradients' sums to hold in memory, see `Sums`. Weights, modes, gradients,
    flags and random states are afterwards what they were.

    Several processes that were joined by `torch.distributed` must be given the same batches; all of them end with what
    the first one computed.

    Raises:
        DataError: no batch, one that the model does not take, a loss that is not finite, a layer that is never called,
            fewer inputs than directions, or processes that were given different batches.
        MethodError: a layer that cannot give what is wanted.
    """
    refuse_one_batch(data)
    wants = set(wants)
    device = next(iter(targets.values())).stored.device
    inputs = Inputs(targets, directions, stop) if "inputs" in wants else None
    gradients = Gradients(targets, memory) if "gradients" in wants else None
    weigh = weigher("auto", model, loss_fn)
    processes = Processes(device) if dist.is_available() and dist.is_initialized() else None
    seen: list[str] = []  # of processes that compare them, what the batches were
    with ExitStack() as around:
        around.enter_context(evaluating(model, device))
        torch.manual_seed(seed)  # the randomised decomposition draws from it; `evaluating` puts the state back
        around.enter_context(inputs.listening() if inputs else nullcontext())
        around.enter_context(gradients.listening(model) if gradients else torch.no_grad())
        for batch in tqdm(islice(iter(data), batches), "looking at data", batches, False, unit="batch", disable=None):
            seen.append(fingerprint(batch) if processes else "")
            batch = to_device(batch, device)
            if inputs is not None:
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
            if inputs is not None and inputs.done() and not gradients:
                break
    if not seen:
        raise DataError("data gave no batch; it is empty, or an iterator that is used up")
    if gradients and not gradients.total:
        raise DataError(f"no label counts in the {len(seen)} batches of data: all of them are masked")
    if processes and len(set(map(tuple, processes.gathered(seen)))) > 1:
        raise DataError(
            "the processes were given different batches to look at, and would start from different adapters; give all "
            "of them the same, without a DistributedSampler"
        )
    found = {}
    for at in targets:
        V, explained = inputs.of(at) if inputs else (None, None)
        found[at] = LayerEvidence(V, explained, gradients.mean(at) if gradients else None)
        if processes:
            _as_first(found[at], processes)
    return Evidence(found, len(seen))


def _as_first(layer: LayerEvidence, processes: Processes) -> None:
    """Overwrite what this process found by what the first one did: threads and GPUs may round differently."""
    for value in (layer.directions, layer.explained, layer.gradient):
        if value is not None:
            value.copy_(processes.agreed(value))


class Inputs:
    """Listens to what layers are called with. Layers that are called with one tensor after the other (q, k, v) share
    one decomposition."""

    def __init__(self, targets: Mapping[str, Target], directions: int, stop: Stop | None = None):
        for at, target in targets.items():
            if not target.kind.by_sample:
                raise MethodError(
                    f"{at} ({type(target.layer).__name__}) does not multiply its input by its weight, so that its "
                    f'inputs have no directions; leave it out with exclude="{at}"'
                )
        self.at = {id(target.layer): at for at, target in targets.items()}
        """Of a layer that is adapted by parts one of these; all have its inputs."""
        self.layers = {self.at[id(target.layer)]: target.layer for target in targets.values()}
        self.targets = targets
        self.k = {at: min(directions, target.shape[1]) for at, target in targets.items()}
        self.stop = stop
        self.stopped: set[str] = set()
        self.found: dict[str, Principal] = {}
        self.same: dict[str, str] = {}
        self.masks: dict[tuple[int, ...], Tensor] = {}
        self.batch = 0
        self.last: tuple[Tensor, str] | None = None

    def begin(self, masks: dict[tuple[int, ...], Tensor]) -> None:
        """A batch follows. `masks`: which positions count, by their shape."""
        self.masks, self.last, self.batch = masks, None, self.batch + 1

    @contextmanager
    def listening(self) -> Iterator[None]:
        hooks = []
        for at, layer in self.layers.items():
            hooks.append(layer.register_forward_pre_hook(self._hook(at), with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

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
        """After a batch: whether no layer needs another one. Which do is decided anew every time: directions that are
        needed now may not have been before."""
        if self.stop is None or any(self.same.get(at, at) not in self.found for at in self.layers):
            return False
        principals = {at: self.found[self._decomposed(at)] for at in self.targets}
        results = {at: principals[at].result() for at in {self._decomposed(at): at for at in self.targets}.values()}
        by_principal = {id(principals[at]): result for at, result in results.items()}
        known = {at: LayerEvidence(*by_principal[id(principals[at])]) for at in self.targets}
        needed = self.stop.needed(known)
        self.stopped = set(self.found)
        for at, principal in principals.items():
            if not bool((principal.turned[: needed[at]] >= self.stop.cosine).all()):
                self.stopped.discard(self._decomposed(at))
        return self.stopped == set(self.found)

    def _decomposed(self, at: str) -> str:
        """The layer whose decomposition a target's is."""
        layer = self.at[id(self.targets[at].layer)]
        return self.same.get(layer, layer)

    def _counting(self, x: Tensor) -> Float[Tensor, "n d_in"]:
        """The rows of an input that count."""
        for shape, mask in self.masks.items():
            if tuple(x.shape[:-1]) == shape:
                return x[mask.to(x.device)]
            if x.ndim == 2 and len(x) == mask.numel():  # positions one below the other, as to experts
                return x[mask.flatten().to(x.device)]
        return x.flatten(0, -2)

    def of(self, at: str) -> tuple[Tensor, Tensor]:
        """Directions and shares of a target.

        Raises:
            DataError: nothing that counts, or too little.
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


class Sums:
    """A weighted sum of matrices for every layer, on the CPU, in float32 or higher. The first layers' are in memory, as
    many as fit into so many MiB (None: all); the others lie in one file in the folder for temporary files, which goes
    with them."""

    def __init__(self, targets: Mapping[str, Target], memory: float | None):
        dtypes = {at: torch.promote_types(target.stored.dtype, torch.float32) for at, target in targets.items()}
        sizes = {at: math.prod(targets[at].shape) * dtype.itemsize for at, dtype in dtypes.items()}
        room = math.inf if memory is None else memory * 2**20
        self.sums, on_disk = dict[str, Tensor](), dict[str, int]()
        end = 0
        for at, size in sizes.items():
            if size <= room:
                room -= size
                self.sums[at] = torch.empty(targets[at].shape, dtype=dtypes[at], device="cpu")
            else:
                on_disk[at], end = end, end + -(-size // 8) * 8
        if end:
            with tempfile.TemporaryFile() as file:
                file.truncate(end)
                mapped = torch.from_numpy(np.memmap(file, np.uint8, "r+", shape=(end,)))
            for at, begin in on_disk.items():
                self.sums[at] = mapped[begin : begin + sizes[at]].view(dtypes[at]).view(targets[at].shape)
        self.begun: set[str] = set()

    def add(self, at: str, value: Float[Tensor, "d_out d_in"], weight: float) -> None:
        if at in self.begun:
            self.sums[at].add_(value, alpha=weight)
        else:
            torch.mul(value, weight, out=self.sums[at])
            self.begun.add(at)


class Gradients:
    """Adds up weights' gradients on the CPU, each as soon as the backward has it."""

    def __init__(self, targets: Mapping[str, Target], memory: float | None = None):
        self.of: dict[nn.Parameter, list[str]] = {}
        self.targets = targets
        self.total = self.weight = 0.0
        for at, target in targets.items():
            weight = target.kind.weight(target.layer)
            if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
                raise MethodError(
                    f"{at}: the loss has no gradient in its weight, which is quantised or computed from other "
                    f'parameters; leave it out with exclude="{at}"'
                )
            self.of.setdefault(weight, []).append(at)
        self.sums = Sums(targets, memory)

    def begin(self, weight: float) -> None:
        """A backward follows, of a loss that is a mean over so many."""
        self.weight, self.total = weight, self.total + weight

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
        hooks = []
        try:
            for parameter in before:
                parameter.grad = None
                parameter.requires_grad_(parameter in self.of)
            for parameter in self.of:
                hooks.append(parameter.register_post_accumulate_grad_hook(self._take))
            with torch.enable_grad():
                yield
        finally:
            for hook in hooks:
                hook.remove()
            for parameter, (flag, gradient) in before.items():
                parameter.requires_grad_(flag)
                parameter.grad = gradient

    def _take(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        for at in self.of[cast(nn.Parameter, parameter)]:
            G = self.targets[at].kind.matrix(gradient).detach()
            self.sums.add(at, G.to("cpu", torch.promote_types(G.dtype, torch.float32)), self.weight)
        parameter.grad = None

    def mean(self, at: str) -> Float[Tensor, "d_out d_in"]:
        """Over all that the losses were means over; to be asked for once.

        Raises:
            DataError: the loss does not depend on it.
        """
        if at not in self.sums.begun:
            raise DataError(f'the loss does not depend on {at}; leave it out with exclude="{at}"')
        return self.sums.sums[at].div_(self.total)


def masks_of(batch: Any, model: nn.Module) -> dict[tuple[int, ...], Tensor]:
    """Which positions of a batch count, by the shape (rows, length): no padding, and none whose label is masked."""
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
        elif not both:  # an encoder's positions are no decoder's, even where there are as many
            masks[shape] = masks[shape] & counts
    return masks


def weights_of(targets: Mapping[str, Target]) -> Callable[[str], Tensor]:
    """A layer's weight by name, brought to where it can be read."""

    def weight(at: str) -> Tensor:
        with whole_weights(targets[at].layer):
            return targets[at].weight.detach().clone()

    return weight
