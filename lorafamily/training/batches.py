"""Batches, round after round, and the place in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch

from lorafamily.errors import DataError
from lorafamily.training.state import random_state, set_random_state


class Batches:
    """The batches, again from the start when they end; a DataLoader shuffles anew each time round.

    Drawn with random generators of their own, so that what the model draws does not change the order of the data, and
    the place reached is known: `state()`, `restore(state)`.
    """

    def __init__(self, data: Iterable[Any], device: torch.device):
        self.data, self.device = data, device
        self.round = self.taken = 0
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

    def state(self) -> dict[str, Any]:
        """Where the data is: batches taken of which round, and what the order of that round was drawn from."""
        return {"round": self.round, "taken": self.taken, "begun": self._begun, "random": self._random}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to where the data was; the batches of the round that were taken then are read again and dropped.

        Raises:
            DataError: there are fewer batches than were taken.
        """
        self.round, self.taken = state["round"], 0
        if state["taken"]:
            with self._own_random():
                set_random_state(state["begun"], self.device)
                for generator, own in zip(_generators(self.data), state["begun"]["own"], strict=True):
                    generator.set_state(own)
                self._begin()
                assert self._iterator is not None
                for _ in islice(self._iterator, state["taken"]):
                    self.taken += 1
            if self.taken < state["taken"]:
                raise DataError(f"the run had taken {state['taken']} batches of a round, and now one has {self.taken}")
        self._random = state["random"]

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
