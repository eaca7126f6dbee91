"""Batches, round after round, and the place in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lorafamily.batch import fingerprint, refuse_one_batch
from lorafamily.errors import DataError
from lorafamily.training.processes import Processes
from lorafamily.training.state import random_state, set_random_state


class Batches:
    """The batches, again from the start when they end; a DataLoader shuffles anew each time round.

    Drawn with random generators of their own, so that what the model draws does not change the order of the data, and
    the place reached is known: `state()`, `restore(state)`.

    Of several processes each draws from its own copy of the data. Where that divides itself among them
    (DistributedSampler, the loaders that accelerate prepares, split_dataset_by_node) a batch is the process's own; else
    all must draw the same, and each takes its rows.

    Raises:
        DataError: the data is one batch, or is divided among another number of processes than there are.
    """

    def __init__(self, data: Iterable[Any], device: torch.device, processes: Processes | None = None):
        refuse_one_batch(data)
        self.data, self.device, self.processes = data, device, processes
        self.divided = False if processes is None else _is_divided(data, processes)
        self._compared = processes is None or processes.world == 1 or self.divided
        self.round = self.taken = 0
        self.first = ""  # fingerprint of the round's first batch
        self._same: Any = None
        self._iterator: Iterator[Any] | None = None
        self._random = random_state(device)
        self._begun: dict[str, Any] = {}  # random states when the present round began

    def __next__(self) -> Any:
        with self._own_random():
            return self._next()

    def draw(self, count: int, weigh: Callable[[Any], float]) -> list[tuple[Any, float]]:
        """What this process computes of an optimiser step of `count` batches, and by how much each loss counts: see
        `Processes.shares`.

        Raises:
            DataError: no batch; or the processes draw different ones of data that is not divided among them.
        """
        assert self.processes is not None
        drawn = [next(self) for _ in range(count)]
        if not self._compared:
            self._compare(drawn[0])
        return self.processes.shares(drawn, weigh, self.divided)

    def _compare(self, batch: Any) -> None:
        """Each process would take its rows of another batch, and the other rows would be seen by nobody."""
        assert self.processes is not None
        first, *others = self.processes.gathered(fingerprint(batch))
        for rank, other in enumerate(others, 1):
            if other != first:
                raise DataError(
                    f"process {rank} draws other batches than process 0, and the data says nothing of being divided. "
                    "Make it the same in all (train's seed, or a generator that is seeded alike), or divide it with a "
                    "DistributedSampler"
                )
        self._compared = True

    def _next(self) -> Any:
        if self._iterator is None:
            self._begin()
        assert self._iterator is not None
        for batch in self._iterator:
            self.taken += 1
            if self.taken == 1 and batch is not self._same:
                self.first = fingerprint(batch)
                self._same = batch if isinstance(self.data, (list, tuple)) else None  # a list of one: each step a round
            return batch
        if not self.taken:
            raise DataError(
                "the data gave no batch; it is empty, or an iterator that is used up: pass something that can be "
                "iterated again, such as a DataLoader or a list"
            )
        self.round, self.taken, self._iterator = self.round + 1, 0, None
        return self._next()

    def _begin(self) -> None:
        self._begun = random_state(self.device) | {"own": [g.get_state() for g in _generators(self.data)]}
        for holder in _holders(self.data):
            if callable(getattr(holder, "set_epoch", None)):
                holder.set_epoch(self.round)
        self._iterator = iter(self.data)

    def length(self) -> int | None:
        """Batches a round, where the data says so."""
        with suppress(TypeError):  # a DataLoader on a stream has a `__len__` and no length
            return len(self.data) if isinstance(self.data, Sized) else None
        return None

    def state(self) -> dict[str, Any]:
        """Where the data is: batches taken of which round, and what the order of that round was drawn from."""
        among = self.processes.world if self.processes is not None and self.divided else 1
        place = {"round": self.round, "taken": self.taken, "first": self.first, "length": self.length()}
        return {**place, "divided among": among, "begun": self._begun, "random": self._random}

    def differences(self, state: Mapping[str, Any]) -> list[str]:
        """In what the data is another than that of `state`: its length, and the first batch of the round, drawn again
        as it was drawn then. Empty where it is the same."""
        found = []
        if (then := state["length"]) != (now := self.length()):
            found.append(f"length of the data was {then}, is {now}")
        if state["taken"]:
            before = [generator.get_state() for generator in _generators(self.data)]
            self._go_to_round(state)
            for generator, own in zip(_generators(self.data), before, strict=True):
                generator.set_state(own)  # whether the run goes on is not yet said
            if self.first != state["first"]:
                found.append("first batch of the data is another (or follows from no random generator)")
        return found

    def restore(self, state: Mapping[str, Any], other: bool = False) -> None:
        """Go to where the data was; the batches of the round that were taken then are read again and dropped.

        `other`: it is known to be other data; where it has no such place, a new round begins.

        Raises:
            DataError: there are fewer batches than were taken, or they were divided among another number of processes.
        """
        then, now = state.get("divided among", 1), self.state()["divided among"]
        if then != now:
            raise DataError(f"the run's data was divided among {then} processes by its sampler, and is now among {now}")
        self.round, self.taken = state["round"], 0
        if state["taken"]:
            self._go_to_round(state)
            with self._own_random():
                for _ in islice(self._iterator or (), state["taken"] - 1):
                    self.taken += 1
            if self.taken < state["taken"] and not other:
                raise DataError(f"the run had taken {state['taken']} batches of a round, and now one has {self.taken}")
            if self.taken < state["taken"]:
                self.round, self.taken, self._iterator = self.round + 1, 0, None
        self._random = state["random"]

    def _go_to_round(self, state: Mapping[str, Any]) -> None:
        """Begin the round of `state` as it began then, and take its first batch."""
        self.round, self.taken, self.first = state["round"], 0, ""
        with self._own_random():
            set_random_state(state["begun"], self.device)
            for generator, own in zip(_generators(self.data), state["begun"]["own"], strict=False):
                generator.set_state(own)
            self._begin()
            for batch in islice(self._iterator or (), 1):
                self.taken, self.first = 1, fingerprint(batch)

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        outside = random_state(self.device)
        set_random_state(self._random, self.device)
        try:
            yield
        finally:
            self._random = random_state(self.device)
            set_random_state(outside, self.device)


def _holders(data: Any) -> list[Any]:
    """The data and what it draws from: samplers, those inside them, the data set, the loader that somebody wrapped."""
    found: list[Any] = []
    to_do = [data]
    while to_do:
        holder = to_do.pop(0)
        if holder is None or isinstance(holder, (list, tuple, dict, str)) or any(holder is other for other in found):
            continue
        found.append(holder)
        inner = ("sampler", "batch_sampler", "dataset", "base_dataloader", "dataloader", "_distributed")
        to_do += [getattr(holder, name, None) for name in inner]
        if hasattr(holder, "slice_fn"):  # accelerate's loader in which one process reads for all
            to_do.append(getattr(holder, "state", None))
    return found


def _is_divided(data: Any, processes: Processes) -> bool:
    """Whether the data divides itself among the processes.

    Raises:
        DataError: among another number of them, or two have the same part, or other numbers of batches.
    """
    among, part = 1, 0
    for holder in _holders(data):
        for number, own in (("num_replicas", "rank"), ("num_processes", "process_index"), ("world_size", "rank")):
            replicas, at = getattr(holder, number, None), getattr(holder, own, None)
            if isinstance(replicas, int) and isinstance(at, int) and replicas > 1:
                among, part = replicas, at
    length = None
    with suppress(TypeError):  # a loader of a data set that is a stream says that it has one, and has not
        length = len(data) if isinstance(data, Sized) else None
    everybody = processes.gathered((among, part, length))
    numbers, parts, lengths_of_all = zip(*everybody, strict=True)
    if set(numbers) not in ({1}, {processes.world}):
        raise DataError(
            f"a sampler divides the data among {max(numbers)} processes, and this run has {processes.world}: start it "
            "with torchrun, or leave the sampler out"
        )
    if among > 1 and len(set(parts)) < processes.world:
        raise DataError(f"the processes' samplers draw the parts {', '.join(map(str, parts))}; each needs its own")
    if len(set(lengths_of_all)) > 1:
        raise DataError(
            f"the processes have {', '.join(map(str, lengths_of_all))} batches a round; all make the same steps, so it "
            "must be one number (drop_last=True, or a DistributedSampler, which fills up)"
        )
    return among > 1


def mean_loss(
    data: Iterable[Any], loss: Callable[[Any], Tensor], weigh: Callable[[Any], float], processes: Processes
) -> float:
    """The mean loss over all batches, each counted by what its own loss is a mean over: that of one large batch.

    Where the data divides itself among the processes, the mean is over the batches of all.

    Raises:
        DataError: no batch, or no label that counts in any of them.
    """
    losses, weights = [], []
    for batch in data:
        weights.append(weigh(batch))
        losses.append(loss(batch).detach().reshape(()))
    if not losses:
        raise DataError("validation gave no batch; it is empty, or an iterator that is used up")
    counted = [(weight, value) for weight, value in zip(weights, torch.stack(losses).tolist(), strict=True) if weight]
    total, everything = sum(weight * value for weight, value in counted), sum(weights)
    if _is_divided(data, processes):
        total, everything = processes.add_up([total, everything])
    if not everything:
        raise DataError("no label counts in the whole validation data: all of them are masked")
    return total / everything


def _generators(data: Any) -> list[torch.Generator]:
    """What a DataLoader draws from besides the global generators."""
    held = (getattr(holder, "generator", None) for holder in _holders(data))
    return list({id(generator): generator for generator in held if isinstance(generator, torch.Generator)}.values())
