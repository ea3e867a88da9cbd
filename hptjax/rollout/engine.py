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

With `cache_positions` decode_step is also given `pages` [S M], the page of each slot's m-th block.

A cache is a pytree whose every array has its rows on axis 1 (layers on axis 0) and its positions on one axis of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hptjax.records import Request, Sample
from hptjax.rollout.programs import DecodeStep, Prefill, RolloutShardings, Unembedding, as_they_are, make_programs
from hptjax.rollout.requests import DecodeShape, check_requests, finished_sample, needs_sampling, truncates
from hptjax.rollout.running import Running, run
from hptjax.rollout.seats import Completion
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
    prepare: Callable[[Params], Params] = as_they_are,
    position_axis: int = 2,
    vocab_size: int,
    slots: int,
    prompt_buckets: tuple[int, ...],
    cache_capacity: int,
    tokens_per_call: int,
    pad_id: int,
    prefill_rows: int | None = None,
    max_stop_ids: int = 8,
    cache_positions: int | None = None,
    cache_page: int = 64,
    cache_parts: int = 1,
    precision: str = "",
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
      prefill, decode_step, unembedding: the policy, see the module's docstring. prepare: what the weights become before
        a call's loop over tokens, for decode_step alone. position_axis: of the arrays in its cache.
      slots, prompt_buckets, cache_capacity, tokens_per_call, prefill_rows, max_stop_ids, cache_positions, cache_page,
        cache_parts, precision: compiled sizes, see `requests.DecodeShape`. prefill_rows: None is the number of slots.
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
        cache_positions=cache_positions,
        cache_page=cache_page,
        cache_parts=cache_parts,
        precision=precision,
    )
    if not 0 <= pad_id < vocab_size:
        raise ValueError(f"pad_id: expected in [0, {vocab_size}), got {pad_id}; check the tokenizer's pad token")

    programs = make_programs(
        shape,
        prefill=prefill,
        decode_step=decode_step,
        unembedding=unembedding,
        prepare=prepare,
        position_axis=position_axis,
        shardings=shardings,
    )

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
            if places:
                running = Running(shape, programs, params, key, requests, places, pad_id)
                if not run(running, should_stop=should_stop, keep=keep):
                    break
        return [samples[place] for place in sorted(samples)]

    return sample
