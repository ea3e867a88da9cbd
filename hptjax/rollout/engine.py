"""The sampler: a list of requests in, a list of samples out, a fixed number of compiled programs in between.

One wave of `slots` requests:

    begin      settings and ids to the device, one random key per sample
    insert     prefill each different context once, copy its cache row to the slots that asked for it (one per bucket)
    decode     up to tokens_per_call tokens for every slot, ended early when all rows are done; called until they are
    read       tokens and log-probs come to the host together, once

Nothing that differs between requests is compiled in; only the path with top-k/top-p is a second compilation.
The engine speaks to a policy through three functions and never sees a model:

    prefill(params, tokens [R P], lengths [R]) -> (hidden [R P D], cache), the cache of the engine's own capacity
    decode_step(params, cache, tokens [S], lengths [S]) -> (hidden [S D], cache): the token enters at lengths[s]
    unembedding(params) -> [D V]

A cache is a pytree whose every array has its rows on axis 1 (layers on axis 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hptjax.records import Request, Sample
from hptjax.rollout import waves
from hptjax.rollout.programs import DecodeStep, Prefill, RolloutShardings, Unembedding, make_programs
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
    """Returns `sample(params, requests, key, *, should_stop=never, on_wave=None) -> list[Sample]`.

    The samples come in request order. A sample follows from its request, `params`, `key` and the compiled shape,
    which it carries as `decode_shape`; the other requests, its slot, its wave and the number of calls do not enter.

      params: whatever the three functions take. key: one random key for the whole run; samples differ by their id.
      should_stop: asked before every call to the device; once true, only the samples of finished waves are returned
        (keep them by sample id and ask for the rest later). On several processes it must answer alike on all.
      on_wave: called with the samples of each finished wave; those that need no sampling come first.

    Args
      prefill, decode_step, unembedding: the policy, see the module's docstring.
      slots, prompt_buckets, cache_capacity, tokens_per_call, prefill_rows, max_stop_ids: compiled sizes, see
        `waves.DecodeShape`. prefill_rows: None is the number of slots.
      pad_id: token of empty places.
      shardings: None is one device.

    Raises ValueError for sizes that cannot work (here) and for requests that cannot be sampled (from `sample`, before
    anything runs; see `waves.check_requests`). FloatingPointError from `sample` where the policy has diverged.
    """
    shape = waves.DecodeShape(
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

    def run_wave(params: Params, cache: Any, wave: Sequence[Request], key: Array, should_stop: Callable[[], bool]):
        """(cache, host arrays), or (cache, None) where it was stopped."""
        rows = waves.wave_rows(wave, shape, pad_id)
        settings, progress = programs.begin(key, vars(rows))
        for call in waves.plan_prefills(wave, shape, pad_id):
            if should_stop():
                return cache, None
            cache = programs.insert(params, cache, call.tokens, call.lengths, call.row_of_slot)
        truncated = waves.truncates(wave[0])  # one path per wave, see plan_waves
        calls = math.ceil(int(rows.new_tokens.max()) / tokens_per_call)
        unread = None
        for _ in range(calls):
            if should_stop():
                return cache, None
            cache, progress, busy = programs.decode(params, cache, progress, settings, truncated=truncated)
            # the flag is read one call late, so the device never waits for the host; a call too many ends at once
            if unread is not None and not to_host(unread):
                break
            unread = busy
        return cache, to_host(programs.read(progress))

    def sample(
        params: Params,
        requests: Sequence[Request],
        key: Array,
        *,
        should_stop: Callable[[], bool] = never,
        on_wave: Callable[[list[Sample]], None] | None = None,
    ) -> list[Sample]:
        waves.check_requests(requests, shape)
        samples: dict[int, Sample] = {}

        def keep(places: Sequence[int], completions: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
            finished = {
                place: waves.finished_sample(requests[place], tokens, logprobs, shape)
                for place, (tokens, logprobs) in zip(places, completions, strict=True)
            }
            samples.update(finished)
            if finished and on_wave is not None:
                on_wave([finished[place] for place in sorted(finished)])

        nothing = (np.zeros(0, np.int32), np.zeros(0, np.float32))
        forced = [place for place, request in enumerate(requests) if not waves.needs_sampling(request)]
        keep(forced, [nothing] * len(forced))
        cache = None
        for places in waves.plan_waves(requests, shape):
            cache = programs.empty_cache(params) if cache is None else cache
            cache, result = run_wave(params, cache, [requests[place] for place in places], key, should_stop)
            if result is None:
                break
            counts, tokens, logprobs = result
            keep(places, [(tokens[slot, :n], logprobs[slot, :n]) for slot, n in enumerate(counts[: len(places)])])
        return [samples[place] for place in sorted(samples)]

    return sample
