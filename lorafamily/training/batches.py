"""Batches, round after round, and the place in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorafamily.errors import DataError
from lorafamily.training.state import random_state, set_random_state

SAMPLED = 4096  # elements of a tensor that its fingerprint looks at; whole batches of token ids, few of images


class Batches:
    """The batches, again from the start when they end; a DataLoader shuffles anew each time round.

    Drawn with random generators of their own, so that what the model draws does not change the order of the data, and
    the place reached is known: `state()`, `restore(state)`.
    """

    def __init__(self, data: Iterable[Any], device: torch.device):
        self.data, self.device = data, device
        self.round = self.taken = 0
        self.first = ""  # fingerprint of the round's first batch
        self._same: Any = None
        self._iterator: Iterator[Any] | None = None
        self._random = random_state(device)
        self._begun: dict[str, Any] = {}  # random states when the present round began

    def __next__(self) -> Any:
        with self._own_random():
            return self._next()

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
        sampler = getattr(self.data, "sampler", None)
        if sampler is not None and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.round)
        self._iterator = iter(self.data)

    def length(self) -> int | None:
        """Batches a round, where the data says so."""
        with suppress(TypeError):  # a DataLoader on a stream has a `__len__` and no length
            return len(self.data) if isinstance(self.data, Sized) else None
        return None

    def state(self) -> dict[str, Any]:
        """Where the data is: batches taken of which round, and what the order of that round was drawn from."""
        place = {"round": self.round, "taken": self.taken, "first": self.first, "length": self.length()}
        return place | {"begun": self._begun, "random": self._random}

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
            DataError: there are fewer batches than were taken.
        """
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


def _generators(data: Any) -> list[torch.Generator]:
    """What a DataLoader draws from besides the global generators."""
    sampler, batches = getattr(data, "sampler", None), getattr(data, "batch_sampler", None)
    held = (
        getattr(holder, "generator", None) for holder in (data, sampler, batches, getattr(batches, "sampler", None))
    )
    return list({id(generator): generator for generator in held if isinstance(generator, torch.Generator)}.values())


def fingerprint(batch: Any) -> str:
    """A short text that differs where batches differ: in kinds, shapes or values (of a large tensor a part of them)."""
    told = hashlib.sha256()
    _tell(batch, told)
    return told.hexdigest()[:16]


def _tell(value: Any, told: Any) -> None:
    told.update(type(value).__name__.encode())
    if isinstance(value, Tensor):
        told.update(f"{value.dtype}{value.layout}".encode())
        with suppress(RuntimeError, NotImplementedError):  # a nested or sparse tensor: its kind must do
            told.update(f"{list(value.shape)}".encode())
            flat = value.detach().flatten()[:: -(-max(1, value.numel()) // SAMPLED)]
            told.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray) and value.dtype != object:
        told.update(f"{value.dtype}{value.shape}".encode())
        told.update(np.ascontiguousarray(value.reshape(-1)[:: -(-max(1, value.size) // SAMPLED)]).tobytes())
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            told.update(str(key).encode())
            _tell(entry, told)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            _tell(entry, told)
    elif value is None or isinstance(value, (bool, int, float, str, bytes)):
        told.update(repr(value).encode())
