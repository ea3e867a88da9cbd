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

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int

from hptjax.records import Request, Sample
from hptjax.rollout import sampling, waves
from hptjax.sharding.host import to_host
from hptjax.types import Array, Params

ROW_AXIS = 1  # of every array in a cache

Prefill = Callable[..., tuple[Array, Any]]
DecodeStep = Callable[..., tuple[Array, Any]]
Unembedding = Callable[[Params], Array]
Engine = Callable[..., list[Sample]]


@dataclasses.dataclass(frozen=True)
class RolloutShardings:
    """Where the engine's arrays live; build it from the rules table of hptjax.sharding.

    Args
      rows: sharding of an array whose first axis counts slots. cache: sharding, or tree of them, of the policy's cache.
      replicated: of what the host reads.
    """

    rows: Any
    cache: Any
    replicated: Any


@struct.dataclass
class Settings:
    """What a wave's slots keep from the first token to the last."""

    keys: Array
    prefix_lens: Int[Array, " S"]
    new_tokens: Int[Array, " S"]
    temperature: Float[Array, " S"]
    top_k: Int[Array, " S"]
    top_p: Float[Array, " S"]
    stop_ids: Int[Array, "S W"]


@struct.dataclass
class Progress:
    """What changes with every token.

    Args
      token, position: the last token of each row, not yet in the cache, and the place where it will enter.
      active: rows that want another token.
      counts: tokens sampled by each row. A wave's rows start together, so those still active have the same count.
      tokens, logprobs: the sampled tokens; of no meaning past a row's count.
    """

    token: Int[Array, " S"]
    position: Int[Array, " S"]
    active: Bool[Array, " S"]
    counts: Int[Array, " S"]
    tokens: Int[Array, "S N"]
    logprobs: Float[Array, "S N"]


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

    def empty_cache(params: Params) -> Any:
        tokens = jax.ShapeDtypeStruct((slots, prompt_buckets[0]), jnp.int32)
        lengths = jax.ShapeDtypeStruct((slots,), jnp.int32)
        _, cache = jax.eval_shape(prefill, params, tokens, lengths)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), cache)

    def begin(key: Array, rows: dict[str, Array]) -> tuple[Settings, Progress]:
        settings = Settings(
            keys=sampling.sample_keys(key, rows["ids"]),
            **{field: rows[field] for field in ("prefix_lens", "new_tokens", "temperature", "top_k", "top_p")},
            stop_ids=rows["stop_ids"],
        )
        progress = Progress(
            token=rows["last_token"],
            position=rows["last_position"],
            active=rows["new_tokens"] > 0,
            counts=jnp.zeros(slots, jnp.int32),
            tokens=jnp.zeros((slots, cache_capacity), jnp.int32),
            logprobs=jnp.zeros((slots, cache_capacity), jnp.float32),
        )
        return settings, progress

    def insert(params: Params, cache: Any, tokens: Array, lengths: Array, row_of_slot: Array) -> Any:
        _, fresh = prefill(params, tokens, lengths)

        def copy_rows(kept: Array, prefilled: Array) -> Array:
            asked = (row_of_slot != waves.NO_ROW).reshape((1, slots) + (1,) * (kept.ndim - 2))
            copies = jnp.take(prefilled, row_of_slot, axis=ROW_AXIS, mode="clip")
            return jnp.where(asked, copies, kept)  # whole rows, so nothing of the slot's last tenant is left

        return jax.tree.map(copy_rows, cache, fresh)

    def decode(
        params: Params, cache: Any, progress: Progress, settings: Settings, *, truncated: bool
    ) -> tuple[Any, Progress, Array]:
        head = unembedding(params)
        if head.shape[1] != vocab_size:
            raise ValueError(f"vocab_size {vocab_size}: the policy's unembedding has {head.shape[1]} columns")
        call_end = jnp.max(progress.counts) + tokens_per_call

        def wants_more(carry: tuple[Any, Progress]) -> Array:
            _, now = carry
            return jnp.any(now.active & (now.counts < call_end))

        def next_token(carry: tuple[Any, Progress]) -> tuple[Any, Progress]:
            cache, now = carry
            hidden, cache = decode_step(params, cache, now.token, now.position)
            scaled = sampling.scaled_logits(hidden, head, settings.temperature)
            noise = sampling.token_noise(settings.keys, settings.prefix_lens + now.counts, vocab_size)
            if truncated:
                token = sampling.choose_truncated(scaled, noise, settings.top_k, settings.top_p)
            else:
                token = sampling.choose(scaled, noise)
            logprob = sampling.chosen_logprobs(scaled, token)
            counts = now.counts + now.active.astype(jnp.int32)
            column = (jnp.int32(0), jnp.max(now.counts))
            done = sampling.is_stop(token, settings.stop_ids) | (counts >= settings.new_tokens)
            return cache, Progress(
                token=jnp.where(now.active, token, now.token),
                position=now.position + now.active.astype(jnp.int32),
                active=now.active & ~done,
                counts=counts,
                tokens=jax.lax.dynamic_update_slice(now.tokens, token[:, None], column),
                logprobs=jax.lax.dynamic_update_slice(now.logprobs, logprob[:, None], column),
            )

        cache, progress = jax.lax.while_loop(wants_more, next_token, (cache, progress))
        return cache, progress, jnp.any(progress.active)

    def read(progress: Progress) -> tuple[Array, Array, Array]:
        return progress.counts, progress.tokens, progress.logprobs

    placed = shardings or RolloutShardings(rows=None, cache=None, replicated=None)
    empty_cache = jax.jit(empty_cache, out_shardings=placed.cache)
    begin = jax.jit(begin, out_shardings=placed.rows)
    insert = jax.jit(insert, out_shardings=placed.cache, donate_argnames="cache")
    decode = jax.jit(
        decode,
        out_shardings=(placed.cache, placed.rows, placed.replicated),
        donate_argnames=("cache", "progress"),
        static_argnames="truncated",
    )
    read = jax.jit(read, out_shardings=placed.replicated)

    def run_wave(params: Params, cache: Any, wave: Sequence[Request], key: Array, should_stop: Callable[[], bool]):
        """(cache, host arrays), or (cache, None) where it was stopped."""
        rows = waves.wave_rows(wave, shape, pad_id)
        settings, progress = begin(key, vars(rows))
        for call in waves.plan_prefills(wave, shape, pad_id):
            if should_stop():
                return cache, None
            cache = insert(params, cache, call.tokens, call.lengths, call.row_of_slot)
        truncated = waves.truncates(wave[0])  # one path per wave, see plan_waves
        calls = math.ceil(int(rows.new_tokens.max()) / tokens_per_call)
        unread = None
        for _ in range(calls):
            if should_stop():
                return cache, None
            cache, progress, busy = decode(params, cache, progress, settings, truncated=truncated)
            # the flag is read one call late, so the device never waits for the host; a call too many ends at once
            if unread is not None and not to_host(unread):
                break
            unread = busy
        return cache, to_host(read(progress))

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
            cache = empty_cache(params) if cache is None else cache
            cache, result = run_wave(params, cache, [requests[place] for place in places], key, should_stop)
            if result is None:
                break
            counts, tokens, logprobs = result
            keep(places, [(tokens[slot, :n], logprobs[slot, :n]) for slot, n in enumerate(counts[: len(places)])])
        return [samples[place] for place in sorted(samples)]

    return sample
