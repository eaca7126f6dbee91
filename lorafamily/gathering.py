"""Gathering evidence: one pass over some batches, forward and, where gradients are wanted, backward.

Layer by layer as they are computed: of inputs only the leading directions stay, and a gradient leaves its device as
soon as the backward has it, so that no more than one layer's is there at a time. All of them stay on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import islice
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from lorafamily.batch import IGNORED, LossFn, call, loss_of, refuse_one_batch, to_device, weigher
from lorafamily.errors import DataError, MethodError
from lorafamily.evidence import Evidence, LayerEvidence, Wanted
from lorafamily.layers import whole_weights
from lorafamily.parts import Target
from lorafamily.training.execution import evaluating

EXACT = 512
"""Up to so many rows or columns a whole decomposition is cheap; beyond, a randomised one is taken, as peft does."""


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
) -> Evidence:
    """Evidence from the first so many batches of `data`, in eval mode, of the model as it computes now.

    `directions`: how many of a layer's inputs to keep, where it has as many. Padding and positions whose label is
    masked do not count. Weights, modes, gradients, flags and random states are afterwards what they were.

    Raises:
        DataError: no batch, one that the model does not take, a loss that is not finite, a layer that is never called,
            or fewer inputs than directions.
        MethodError: a layer that cannot give what is wanted.
    """
    refuse_one_batch(data)
    wants = set(wants)
    device = next(iter(targets.values())).held.device
    inputs = Inputs(targets, directions) if "inputs" in wants else None
    gradients = Gradients(targets) if "gradients" in wants else None
    weigh = weigher("auto", model, loss_fn)
    seen = 0
    with ExitStack() as around:
        around.enter_context(evaluating(model, device))
        torch.manual_seed(seed)  # the randomised decomposition draws from it; `evaluating` puts the state back
        around.enter_context(inputs.listening() if inputs else nullcontext())
        around.enter_context(gradients.listening(model) if gradients else torch.no_grad())
        for batch in tqdm(islice(iter(data), batches), "looking at data", batches, False, unit="batch", disable=None):
            batch = to_device(batch, device)
            seen += 1
            if inputs is not None:
                inputs.begin(masks_of(batch, model))
            weight = weigh(batch) if gradients else 1.0
            if gradients and weight:
                loss = loss_of(model, batch, loss_fn)
                if not math.isfinite(value := loss.item()):
                    raise DataError(f"batch {seen} of data has a loss of {value}: nothing can be learnt from it")
                gradients.begin(weight)
                loss.backward()
            elif not gradients:
                call(model, batch) if loss_fn is None else loss_fn(model, batch)
    if not seen:
        raise DataError("data gave no batch; it is empty, or an iterator that is used up")
    if gradients and not gradients.total:
        raise DataError(f"no label counts in the {seen} batches of data: all of them are masked")
    found = {}
    for at in targets:
        V, explained = inputs.of(at) if inputs else (None, None)
        found[at] = LayerEvidence(V, explained, gradients.mean(at) if gradients else None)
    return Evidence(found, seen)


class Principal:
    """The k leading principal directions of rows that come batch by batch (Ross et al. 2008, incremental SVD with the
    mean followed): as in EVA's code, so that directions are the same."""

    mean: Float[Tensor, " d_in"]
    S: Float[Tensor, " k"]
    V: Float[Tensor, "k d_in"]

    def __init__(self, k: int):
        self.k, self.rows = k, 0
        self.scatter = 0.0
        """Sum over all rows of their squared distance from the mean."""

    def add(self, x: Float[Tensor, "n d_in"]) -> None:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        n, mean = len(x), x.mean(0)
        x = x - mean
        self.scatter += float(x.square().sum(dtype=torch.float64))
        if self.rows:
            shared = self.rows * n / (self.rows + n)
            apart = self.mean - mean
            self.scatter += shared * float(apart.square().sum(dtype=torch.float64))
            x = torch.cat([self.S[:, None] * self.V, x, math.sqrt(shared) * apart[None]])
            mean = mean + apart * (self.rows / (self.rows + n))
        self.mean, self.rows = mean, self.rows + n
        if min(x.shape) <= max(EXACT, 2 * self.k):
            _, S, V = torch.linalg.svd(x, full_matrices=False)
        else:
            _, S, V = torch.svd_lowrank(x, 2 * self.k, niter=4)
            V = V.T
        self.S, self.V = S[: self.k], V[: self.k]

    def result(self) -> tuple[Float[Tensor, "k d_in"], Float[Tensor, " k"]]:
        """Directions and the share of the variance along each. Of each direction the largest entry is positive: no
        backend chooses signs."""
        largest = self.V.gather(1, self.V.abs().argmax(1, keepdim=True))
        V = self.V * torch.where(largest < 0, -1.0, 1.0).to(self.V)
        return V.cpu(), (self.S.double().square() / self.scatter).cpu() if self.scatter else self.S.double().cpu()


class Inputs:
    """Listens to what layers are called with. Layers that are called with one tensor after the other (q, k, v) share
    one decomposition."""

    def __init__(self, targets: Mapping[str, Target], directions: int):
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
            if at in self.same:
                return
            if self.batch == 1 and at not in self.found and self.last is not None and self.last[0] is x:
                self.same[at] = self.last[1]
                return
            rows = self._counting(x.detach())
            if len(rows):
                self.found.setdefault(at, Principal(self.k[at])).add(rows)
                self.last = x, at

        return seen

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
        own = self.at[id(self.targets[at].layer)]
        principal = self.found.get(self.same.get(own, own))
        if principal is None:
            raise DataError(f'{at} was called with nothing that counts; leave it out with exclude="{at}"')
        V, explained = principal.result()
        if principal.rows <= k:
            raise DataError(
                f"{at} was called with {principal.rows} inputs that count, too few for {k} directions; give more data"
            )
        return V[:k], explained[:k]


class Gradients:
    """Adds up weights' gradients on the CPU, each as soon as the backward has it."""

    def __init__(self, targets: Mapping[str, Target]):
        self.of: dict[nn.Parameter, list[str]] = {}
        self.targets = targets
        self.sums: dict[str, Tensor] = {}
        self.total = self.weight = 0.0
        for at, target in targets.items():
            weight = target.kind.weight(target.layer)
            if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
                raise MethodError(
                    f"{at}: the loss has no gradient in its weight, which is quantised or computed from other "
                    f'parameters; leave it out with exclude="{at}"'
                )
            self.of.setdefault(weight, []).append(at)

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
            G = G.to("cpu", torch.promote_types(G.dtype, torch.float32))
            if at in self.sums:
                self.sums[at].add_(G, alpha=self.weight)
            else:
                self.sums[at] = G * self.weight
        parameter.grad = None

    def mean(self, at: str) -> Float[Tensor, "d_out d_in"]:
        """Over all that the losses were means over.

        Raises:
            DataError: the loss does not depend on it.
        """
        if at not in self.sums:
            raise DataError(f'the loss does not depend on {at}; leave it out with exclude="{at}"')
        return self.sums[at] / self.total


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
