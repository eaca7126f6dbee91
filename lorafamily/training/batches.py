"""Batches, epoch after epoch, and the position in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import torch
from torch import nn

from lorafamily.batch import LossFn, fingerprint, loss_of, refuse_one_batch, to_device
from lorafamily.errors import DataError
from lorafamily.training.processes import Processes
from lorafamily.training.state import random_kept, random_state, set_random_state


class Batches:
    """The batches of the data, over and over, drawn with random generators of their own, so that the model's random
    numbers do not change the order of the data. `state()` is the position reached, `restore(state)` goes back to it.

    If the data divides itself among the processes (DistributedSampler, loaders that accelerate prepared,
    split_dataset_by_node), each process trains on the batches it draws; otherwise all must draw the same batches, and
    each takes some rows of them.

    Raises:
        DataError: the data is one batch, or is divided among another number of processes than there are.
    """

    def __init__(self, data: Iterable[Any], processes: Processes):
        refuse_one_batch(data)
        self.data, self.device, self.processes = data, processes.device, processes
        self.divided = _is_divided(data, processes)
        self._compared = processes.world == 1 or self.divided
        self.epoch = self.taken = 0
        self.first = ""  # fingerprint of the epoch's first batch
        self._fingerprinted: Any = None
        self._iterator: Iterator[Any] | None = None
        self._random = random_state(self.device)
        self._begun: dict[str, Any] = {}  # random states when the present epoch began

    def __next__(self) -> Any:
        with self._data_generators():
            while True:
                if self._iterator is None:
                    self._iterator = self._begin()
                for batch in self._iterator:
                    self.taken += 1
                    if self.taken == 1 and batch is not self._fingerprinted:
                        self.first = fingerprint(batch)
                        # In a list of one batch every step begins an epoch, with the same batch.
                        self._fingerprinted = batch if isinstance(self.data, (list, tuple)) else None
                    return batch
                if not self.taken:
                    raise DataError(
                        "the data gave no batch; it is empty, or an iterator that is used up: pass something that can "
                        "be iterated again, such as a DataLoader or a list"
                    )
                self.epoch, self.taken, self._iterator = self.epoch + 1, 0, None

    def draw(self, count: int, weigh: Callable[[Any], float]) -> list[tuple[Any, float]]:
        """`Processes.shares` of the next `count` batches, those of one optimizer step.

        Raises:
            DataError: no batch, or the processes draw different batches of data that is not divided among them.
        """
        drawn = [next(self) for _ in range(count)]
        if not self._compared:  # if batches differed, some of their rows would be in no process
            first, *others = self.processes.gathered(fingerprint(drawn[0]))
            for rank, other in enumerate(others, 1):
                if other != first:
                    raise DataError(
                        f"process {rank} draws other batches than process 0, and no sampler divides the data. Make all "
                        "draw the same (train's seed, or a generator with the same seed), or divide it with a "
                        "DistributedSampler"
                    )
            self._compared = True
        return self.processes.shares(drawn, weigh, self.divided)

    def _begin(self) -> Iterator[Any]:
        self._begun = random_state(self.device) | {"own": [g.get_state() for g in _generators(self.data)]}
        for source in _sources(self.data):
            if callable(getattr(source, "set_epoch", None)):
                source.set_epoch(self.epoch)
        return iter(self.data)

    def state(self) -> dict[str, Any]:
        """The batches taken of the epoch, and the generators' states that its order was drawn from."""
        among = self.processes.world if self.divided else 1
        place = {"round": self.epoch, "taken": self.taken, "first": self.first, "length": _length(self.data)}
        return {**place, "divided among": among, "begun": self._begun, "random": self._random}

    def differences(self, state: Mapping[str, Any]) -> list[str]:
        """How the data differs from that of `state`: in its length, or in the epoch's first batch, which is drawn again
        from the same random states. Empty if neither differs."""
        found = []
        if (then := state["length"]) != (now := _length(self.data)):
            found.append(f"length of the data was {then}, is {now}")
        if state["taken"]:
            before = [generator.get_state() for generator in _generators(self.data)]
            self._go_to_epoch(state)
            for generator, state_before in zip(_generators(self.data), before, strict=True):
                generator.set_state(state_before)  # the run may still be refused
            if self.first != state["first"]:
                found.append("first batch of the data is another (or no random generator decides its order)")
        return found

    def restore(self, state: Mapping[str, Any], other: bool = False) -> None:
        """Go to the position of `state`: the batches taken of its epoch are read again and dropped.

        `other`: the data is known to be other data; if it is too short for the position, a new epoch begins.

        Raises:
            DataError: there are fewer batches than were taken, or they were divided among another number of processes.
        """
        then, now = state.get("divided among", 1), self.state()["divided among"]
        if then != now:
            raise DataError(f"the run's data was divided among {then} processes by its sampler, and is now among {now}")
        self.epoch, self.taken = state["round"], 0
        if state["taken"]:
            self._go_to_epoch(state)
            with self._data_generators():
                for _ in islice(self._iterator or (), state["taken"] - 1):
                    self.taken += 1
            if self.taken < state["taken"]:
                if not other:
                    taken = state["taken"]
                    raise DataError(f"the run had taken {taken} batches of an epoch, and now one has {self.taken}")
                self.epoch, self.taken, self._iterator = self.epoch + 1, 0, None
        self._random = state["random"]

    def _go_to_epoch(self, state: Mapping[str, Any]) -> None:
        """Begin the epoch of `state` from the random states of then, and take its first batch."""
        self.epoch, self.taken, self.first = state["round"], 0, ""
        with self._data_generators():
            set_random_state(state["begun"], self.device)
            for generator, then in zip(_generators(self.data), state["begun"]["own"], strict=False):
                generator.set_state(then)
            self._iterator = self._begin()
            for batch in islice(self._iterator, 1):
                self.taken, self.first = 1, fingerprint(batch)

    @contextmanager
    def _data_generators(self) -> Iterator[None]:
        """In the block the random generators are in the data's states, and the model's are restored afterwards."""
        with random_kept(self.device):
            set_random_state(self._random, self.device)
            try:
                yield
            finally:
                self._random = random_state(self.device)


def _length(data: Any) -> int | None:
    """Batches of an epoch, None if the data does not say."""
    with suppress(TypeError):  # a DataLoader of a stream has a `__len__` that raises
        return len(data) if isinstance(data, Sized) else None
    return None


def _sources(data: Any) -> list[Any]:
    """The data and what it draws from: samplers and samplers inside them, the data set, a wrapped loader."""
    found: list[Any] = []
    to_do = [data]
    while to_do:
        source = to_do.pop(0)
        if source is None or isinstance(source, (list, tuple, dict, str)) or any(source is other for other in found):
            continue
        found.append(source)
        inner = ("sampler", "batch_sampler", "dataset", "base_dataloader", "dataloader", "_distributed")
        to_do += [getattr(source, name, None) for name in inner]
        if hasattr(source, "slice_fn"):  # accelerate's loader, where one process reads for all
            to_do.append(getattr(source, "state", None))
    return found


def _is_divided(data: Any, processes: Processes) -> bool:
    """Whether the data divides itself among the processes. DataError: it is divided among another number of processes,
    two of them have the same part, or they have different numbers of batches."""
    among, part = 1, 0
    for source in _sources(data):
        for count, index in (("num_replicas", "rank"), ("num_processes", "process_index"), ("world_size", "rank")):
            replicas, at = getattr(source, count, None), getattr(source, index, None)
            if isinstance(replicas, int) and isinstance(at, int) and replicas > 1:
                among, part = replicas, at
    counts, parts, lengths = zip(*processes.gathered((among, part, _length(data))), strict=True)
    if set(counts) not in ({1}, {processes.world}):
        raise DataError(
            f"a sampler divides the data among {max(counts)} processes, and this run has {processes.world}: start it "
            "with torchrun, or leave the sampler out"
        )
    if among > 1 and len(set(parts)) < processes.world:
        raise DataError(f"the processes' samplers draw the parts {', '.join(map(str, parts))}; each must draw another")
    if len(set(lengths)) > 1:
        raise DataError(
            f"the processes have {', '.join(map(str, lengths))} batches an epoch; all make the same steps, so it "
            "must be one number (drop_last=True, or a DistributedSampler, which fills up)"
        )
    return among > 1


def mean_loss(
    model: nn.Module,
    data: Iterable[Any],
    loss_fn: LossFn | None,
    weigh: Callable[[Any], float],
    processes: Processes,
) -> float:
    """The mean loss over all batches, those of all processes if the data divides itself among them, as of one large
    batch: each is weighted by what its loss is a mean over.

    Raises:
        DataError: no batch, or no label that counts in any of them.
    """
    losses, weights = [], []
    for batch in data:
        weights.append(weigh(batch))
        loss = loss_of(model, to_device(batch, processes.device), loss_fn)
        losses.append(loss.detach().reshape(()))
    if not losses:
        raise DataError("validation gave no batch; it is empty, or an iterator that is used up")
    counted = [(weight, value) for weight, value in zip(weights, torch.stack(losses).tolist(), strict=True) if weight]
    weighted_sum, weight_sum = sum(weight * value for weight, value in counted), sum(weights)
    if _is_divided(data, processes):
        weighted_sum, weight_sum = processes.add_up([weighted_sum, weight_sum])
    if not weight_sum:
        raise DataError("no label counts in the whole validation data: all of them are masked")
    return weighted_sum / weight_sum


def _generators(data: Any) -> list[torch.Generator]:
    """Generators that the data draws from, besides the global ones."""
    found = (getattr(source, "generator", None) for source in _sources(data))
    return list(dict.fromkeys(generator for generator in found if isinstance(generator, torch.Generator)))
