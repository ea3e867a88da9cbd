"""The requests of one compiled path on their way through the slots: admission, decoding, reading, all between calls.

Every decision follows from the requests and from what was read, which all processes read alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from hptjax.records import Request
from hptjax.rollout.admission import Prefill, copy_table, entry_table, plan_prefills
from hptjax.rollout.pages import Copy, make_room
from hptjax.rollout.programs import Programs
from hptjax.rollout.requests import DecodeShape, context_tokens, truncates
from hptjax.rollout.seats import Completion, Seats
from hptjax.sharding.host import to_host
from hptjax.types import Array, Params


class Running:
    """Slots, cache and queue of one run of the sampler.

    Who waits: the places of requests in `_waiting` have their context in the prefilled rows that are kept; those in
    `_calls` are still to be prefilled, and those in `_again`, which lost their pages to older ones, once more.
    """

    def __init__(
        self,
        shape: DecodeShape,
        programs: Programs,
        params: Params,
        key: Array,
        requests: Sequence[Request],
        places: Sequence[int],
        pad_id: int,
    ) -> None:
        self._shape, self._programs, self._params, self._key = shape, programs, params, key
        self._requests, self._pad_id = requests, pad_id
        self._truncated = truncates(requests[places[0]])
        self._calls = deque(plan_prefills(requests, places, shape, pad_id))
        self._waiting: deque[tuple[int, int]] = deque()
        self._again: list[int] = []
        self._rows: Any = None
        self._seats, self._room = Seats(shape), make_room(shape)
        self._cache, self._settings, self._progress = programs.empty(params)
        self._unread: deque[Array] = deque()

    @property
    def somebody_waits(self) -> bool:
        """Whether a request has not entered yet."""
        return bool(self._waiting or self._calls or self._again)

    @property
    def wants_prefill(self) -> bool:
        """Whether a slot is free whose next sample has no prefilled context yet."""
        return not self._waiting and self.somebody_waits and bool(self._seats.free())

    @property
    def wants_decode(self) -> bool:
        """Whether a sample may want more tokens than the calls that were sent give it."""
        return int(self._seats.wanted.max()) > self._shape.tokens_per_call * len(self._unread)

    @property
    def is_done(self) -> bool:
        """Whether nobody waits, nobody decodes and nothing is unread."""
        return not (self.somebody_waits or self.wants_decode or self._unread)

    def prefill(self) -> None:
        """Prefills the contexts that come next and keeps their rows."""
        if self._again:
            self._calls.extendleft(reversed([*plan_prefills(self._requests, self._again, self._shape, self._pad_id)]))
            self._again = []
        call: Prefill = self._calls.popleft()
        self._rows = self._programs.prefill(self._params, call.tokens, call.lengths)
        self._waiting.extend(call.entries)
        self._room.forget_rows()

    def admit(self) -> bool:
        """Lets those enter whose context is prefilled, as far as there is room; whether anybody did."""
        entering: dict[int, tuple[int, int]] = {}
        copies: list[Copy] = []
        for slot in self._seats.free():
            if not self._waiting:
                break
            place, row = self._waiting[0]
            found = self._room.enter(slot, row, context_tokens(self._requests[place]))
            if found is None:
                continue  # a slot of another share of the pages may have room
            entering[slot] = self._waiting.popleft()
            copies += found
        if not entering:
            return False
        chosen = {slot: self._requests[place] for slot, (place, _) in entering.items()}
        self._cache, self._settings, self._progress = self._programs.enter(
            self._cache,
            self._settings,
            self._progress,
            self._rows,
            entry_table(chosen, self._shape),
            copy_table(copies, self._shape),
        )
        self._seats.enter({slot: place for slot, (place, _) in entering.items()}, self._requests)
        if not self._waiting:
            self._rows = None
        return True

    def decode(self) -> None:
        """Sends the next call."""
        self._cache, self._progress, report = self._programs.decode(
            self._params,
            self._key,
            self._cache,
            self._settings,
            self._progress,
            self._room.table(),
            truncated=self._truncated,
        )
        self._unread.append(report)

    def make_room(self) -> bool:
        """Gives every sample the pages that the next call may fill, the oldest first; the youngest lose theirs, and
        come again, where there are too few. False where that waits for what is unread."""
        if self._shape.cache_positions is None:
            return True
        calls = len(self._unread) + 1
        for slot in self._seats.by_age():
            while not self._seats.is_free(slot) and not self._room.cover(slot, self._seats.positions(slot, calls)):
                if self._unread:
                    return False
                self._room.forget_rows()
                if not self._room.cover(slot, self._seats.positions(slot, calls)):
                    part = self._room.part(slot)
                    youngest = [other for other in self._seats.by_age() if self._room.part(other) == part][-1]
                    self._again.append(self._seats.leave(youngest))
                    self._room.leave(youngest)
        return True

    def read(self, *, leave: int = 0) -> list[Completion]:
        """The samples that are done by all calls but the last `leave`."""
        done = []
        while len(self._unread) > leave:
            for slot, completion in self._seats.take(to_host(self._unread.popleft())):
                self._room.leave(slot)
                done.append(completion)
        return done


def run(running: Running, *, should_stop: Callable[[], bool], keep: Callable[[Sequence[Completion]], None]) -> bool:
    """Samples until all is done; False if it was stopped before. `keep` is told what is done after every reading."""
    while not running.is_done:
        going = True
        while going and (running.wants_prefill or running.admit()):
            if running.wants_prefill and (going := not should_stop()):
                running.prefill()
        sent = going and running.wants_decode and running.make_room() and (going := not should_stop())
        if sent:
            running.decode()
        # A call is read before the next goes out only where somebody waits for the slots that it may have set free;
        # else the device never waits for the host.
        keep(running.read(leave=1 if sent and not running.somebody_waits else 0))
        if not going:
            return False
    return True
