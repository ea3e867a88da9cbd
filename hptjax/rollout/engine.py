"""The sampler: a list of requests in, a list of samples out, a fixed number of compiled programs in between.

Continuous batching: `slots` rows decode together, up to `tokens_per_call` tokens per call to the device. Between calls
the samples that are done leave and waiting ones enter.

    prefill    each different context once, as many at a time as the program has rows; kept while somebody waits for it
    enter      copies of prefilled rows, with settings and ids, to the slots that are free
    decode     up to tokens_per_call tokens for every slot
    read       what that call sampled, one small array

Nothing that differs between requests is compiled in; only the path with top-k/top-p is a second compilation.
The engine speaks to a policy through three functions and never sees a model:

    prefill(params, tokens [R P], lengths [R]) -> (hidden [R P D], cache of R rows and P positions)
    decode_step(params, cache, tokens [S], lengths [S]) -> (hidden [S D], cache): the token enters at lengths[s]
    unembedding(params) -> [D V]

A cache is a pytree whose every array has its rows on axis 1 and its positions on axis 2 (layers on axis 0).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hptjax.records import Request, Sample
from hptjax.rollout.admission import entry_table, plan_prefills
from hptjax.rollout.programs import DecodeStep, Prefill, RolloutShardings, Unembedding, make_programs
from hptjax.rollout.requests import DecodeShape, check_requests, finished_sample, needs_sampling, truncates
from hptjax.rollout.seats import Completion, Seats
from hptjax.sharding.host import to_host
from hptjax.types import Array, Params

Engine = Callable[..., list[Sample]]


def never() -> bool:
    """The default `should_stop`."""
    return False


def make_engine(
    *,
    prefill: Prefill,
    decode_step: DecodeStep,
    unembedding: Unembedding,
    vocab_size: int,
    slots: int,
    prompt_buckets: tuple[int, ...],
    cache_capacity: int,
    tokens_per_call: int,
    pad_id: int,
    prefill_rows: int | None = None,
    max_stop_ids: int = 8,
    shardings: RolloutShardings | None = None,
) -> Engine:
    """Returns `sample(params, requests, key, *, should_stop=never, on_finished=None) -> list[Sample]`.

    The samples come in request order. A sample follows from its request, `params`, `key` and the compiled shape,
    which it carries as `decode_shape`; the other requests, its slot, when it entered and the number of calls do not
    enter.

      params: whatever the three functions take. key: one random key for the whole run; samples differ by their id.
      should_stop: asked before every prefill and decode call; once true, only the samples that are done are returned
        (keep them by sample id and ask for the rest later). On several processes it must answer alike on all.
      on_finished: called with the samples that a call has finished, in request order; those that need no sampling come
        first.

    Args
      prefill, decode_step, unembedding: the policy, see the module's docstring.
      slots, prompt_buckets, cache_capacity, tokens_per_call, prefill_rows, max_stop_ids: compiled sizes, see
        `requests.DecodeShape`. prefill_rows: None is the number of slots.
      pad_id: token of empty places.
      shardings: None is one device.

    Raises ValueError for sizes that cannot work (here) and for requests that cannot be sampled (from `sample`, before
    anything runs; see `requests.check_requests`). FloatingPointError from `sample` where the policy has diverged.
    """
    shape = DecodeShape(
        vocab_size=vocab_size,
        slots=slots,
        prefill_rows=slots if prefill_rows is None else prefill_rows,
        prompt_buckets=tuple(prompt_buckets),
        cache_capacity=cache_capacity,
        tokens_per_call=tokens_per_call,
        max_stop_ids=max_stop_ids,
    )
    if not 0 <= pad_id < vocab_size:
        raise ValueError(f"pad_id: expected in [0, {vocab_size}), got {pad_id}; check the tokenizer's pad token")

    programs = make_programs(
        shape, prefill=prefill, decode_step=decode_step, unembedding=unembedding, shardings=shardings
    )

    def run(
        params: Params,
        requests: Sequence[Request],
        places: Sequence[int],
        key: Array,
        should_stop: Callable[[], bool],
        keep: Callable[[Sequence[Completion]], None],
    ) -> bool:
        """Samples the requests at `places`, which share a compiled path; False if it was stopped before the end."""
        truncated = truncates(requests[places[0]])
        seats, calls = Seats(shape), deque(plan_prefills(requests, places, shape, pad_id))
        waiting: deque[tuple[int, int]] = deque()  # place and row of those whose context is in `rows`
        rows: Any = None
        cache, settings, progress = programs.empty(params)
        unread: deque[Array] = deque()

        def admit() -> bool:
            nonlocal cache, settings, progress, rows
            while (free := seats.free()) and (waiting or calls):
                if not waiting:
                    if should_stop():
                        return False
                    call = calls.popleft()
                    rows = programs.prefill(params, call.tokens, call.lengths)
                    waiting.extend(call.entries)
                entering = {slot: waiting.popleft() for slot in free[: len(waiting)]}
                entries = entry_table({s: (requests[p], row) for s, (p, row) in entering.items()}, shape)
                cache, settings, progress = programs.enter(cache, settings, progress, rows, entries)
                seats.enter({slot: place for slot, (place, _) in entering.items()}, requests)
                rows = rows if waiting else None
            return True

        going = True
        while going:
            going = admit()
            wanted = int(seats.wanted.max()) - tokens_per_call * len(unread)
            if going and wanted > 0 and (going := not should_stop()):
                cache, progress, report = programs.decode(params, key, cache, settings, progress, truncated=truncated)
                unread.append(report)
            elif not unread:
                return going
            # A call is read before the next goes out only where somebody waits for the slots that it may have set free;
            # else the device never waits for the host.
            ahead = 0 if waiting or calls or wanted <= 0 or not going else 1
            while len(unread) > ahead:
                keep(seats.take(to_host(unread.popleft())))
        return False

    def sample(
        params: Params,
        requests: Sequence[Request],
        key: Array,
        *,
        should_stop: Callable[[], bool] = never,
        on_finished: Callable[[list[Sample]], None] | None = None,
    ) -> list[Sample]:
        check_requests(requests, shape)
        samples: dict[int, Sample] = {}

        def keep(completions: Sequence[Completion]) -> None:
            finished = [finished_sample(requests[p], tokens, logprobs, shape) for p, tokens, logprobs in completions]
            samples.update(zip((done.place for done in completions), finished, strict=True))
            if finished and on_finished is not None:
                on_finished(finished)

        nothing = (np.zeros(0, np.int32), np.zeros(0, np.float32))
        asked = range(len(requests))
        keep([Completion(place, *nothing) for place in asked if not needs_sampling(requests[place])])
        for path in (False, True):  # never together, so that each runs the path that its own settings ask for
            places = [p for p in asked if needs_sampling(requests[p]) and truncates(requests[p]) == path]
            if places and not run(params, requests, places, key, should_stop, keep):
                break
        return [samples[place] for place in sorted(samples)]

    return sample
