"""The host's side of the slots: whose sample is in which, and what has been sampled for it so far.

Dims: S slots, K tokens of a call, N positions of a slot's cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from hptjax.records import Request
from hptjax.rollout.requests import DecodeShape, context_tokens, new_tokens

NOBODY = -1


class Completion(NamedTuple):
    """What was sampled for the request at `place`."""

    place: int
    tokens: Int32[np.ndarray, " n"]
    logprobs: Float32[np.ndarray, " n"]


class Seats:
    """Who sits where. Every decision of the engine follows from this, and this from what all processes read alike.

    Attributes
      places: [S] place of the request that a slot works for, or NOBODY. wanted: [S] tokens it may still get.
    """

    def __init__(self, shape: DecodeShape) -> None:
        self.places = np.full(shape.slots, NOBODY, np.int64)
        self.wanted = np.zeros(shape.slots, np.int64)
        self._call = shape.tokens_per_call
        self._counts = np.zeros(shape.slots, np.int64)
        self._starts = np.zeros(shape.slots, np.int64)  # where in the cache the first sampled token's turn begins
        self._ages, self._age = np.zeros(shape.slots, np.int64), 0
        room = (shape.slots, shape.cache_capacity + shape.tokens_per_call)  # a last call may reach over the end
        self._tokens, self._logprobs = np.zeros(room, np.int32), np.zeros(room, np.float32)

    def free(self) -> list[int]:
        """The slots that hold nobody, rising."""
        return np.flatnonzero(self.places == NOBODY).tolist()

    def is_free(self, slot: int) -> bool:
        """Whether the slot holds nobody."""
        return bool(self.places[slot] == NOBODY)

    def by_age(self) -> list[int]:
        """The slots that hold somebody, those first who entered first."""
        return sorted(np.flatnonzero(self.places != NOBODY).tolist(), key=lambda slot: self._ages[slot])

    def positions(self, slot: int, calls: int) -> int:
        """Places of the cache that a sample may have filled after so many calls more."""
        more = min(calls * self._call, int(self.wanted[slot]))
        return int(self._starts[slot] + self._counts[slot]) + more

    def enter(self, places: Mapping[int, int], requests: Sequence[Request]) -> None:
        """Slot by slot, the requests at these places take them."""
        slots, entering = list(places), [requests[place] for place in places.values()]
        self.places[slots] = list(places.values())
        self.wanted[slots] = [new_tokens(request) for request in entering]
        self._starts[slots] = [context_tokens(request) - 1 for request in entering]
        self._counts[slots] = 0
        self._ages[slots] = np.arange(self._age, self._age + len(slots))
        self._age += len(slots)

    def leave(self, slot: int) -> int:
        """Empties a slot and forgets what was sampled in it; the place of its request."""
        place = int(self.places[slot])
        self.places[slot], self.wanted[slot] = NOBODY, 0
        return place

    def take(self, report: Int32[np.ndarray, "S R"]) -> list[tuple[int, Completion]]:
        """Writes down what a call has sampled, and empties the slots whose samples are done: (slot, sample), by place.

        A sample with a log-prob that is not finite is done too: nothing sensible can follow.
        """
        call = self._call
        counts, active = report[:, 2 * call], report[:, 2 * call + 1].astype(bool)
        taken = np.flatnonzero((self.places != NOBODY) & (counts > 0))
        logprobs = report[taken, call : 2 * call].view(np.float32)
        columns = self._counts[taken, None] + np.arange(call)
        self._tokens[taken[:, None], columns] = report[taken, :call]
        self._logprobs[taken[:, None], columns] = logprobs
        self._counts[taken] += counts[taken]
        self.wanted[taken] -= counts[taken]
        broken = ~np.isfinite(logprobs) & (np.arange(call) < counts[taken, None])
        done = taken[~active[taken] | broken.any(axis=1)]
        finished = []
        for slot, count in zip(done.tolist(), self._counts[done].tolist(), strict=True):
            tokens, logprobs = self._tokens[slot, :count].copy(), self._logprobs[slot, :count].copy()
            finished.append((slot, Completion(self.leave(slot), tokens, logprobs)))
        return sorted(finished, key=lambda pair: pair[1].place)
