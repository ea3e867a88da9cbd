"""The host's side of the slots: whose sample is in which, and what has been sampled for it so far.

Dims: S slots, K tokens of a call, N positions of a slot's cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from hptjax.records import Request
from hptjax.rollout.requests import DecodeShape, new_tokens

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
        room = (shape.slots, shape.cache_capacity + shape.tokens_per_call)  # a last call may reach over the end
        self._tokens, self._logprobs = np.zeros(room, np.int32), np.zeros(room, np.float32)

    def free(self) -> list[int]:
        """The slots that hold nobody, rising."""
        return np.flatnonzero(self.places == NOBODY).tolist()

    def enter(self, places: Mapping[int, int], requests: Sequence[Request]) -> None:
        """Slot by slot, the requests at these places take them."""
        slots = list(places)
        self.places[slots] = list(places.values())
        self.wanted[slots] = [new_tokens(requests[place]) for place in places.values()]
        self._counts[slots] = 0

    def take(self, report: Int32[np.ndarray, "S R"]) -> list[Completion]:
        """Writes down what a call has sampled, and empties the slots whose samples are done; these, by place.

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
        finished = [
            Completion(int(self.places[slot]), self._tokens[slot, :n].copy(), self._logprobs[slot, :n].copy())
            for slot, n in zip(done.tolist(), self._counts[done].tolist(), strict=True)
        ]
        self.places[done], self.wanted[done] = NOBODY, 0
        return sorted(finished)
