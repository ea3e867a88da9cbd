"""The sampler's compiled programs: what runs on the device, a fixed number of times compiled.

    empty_cache  room for every slot
    begin        settings and ids to the device, one random key per sample
    insert       prefill contexts, copy their cache rows to the slots that asked for them (one program per bucket)
    decode       up to tokens_per_call tokens for every slot, ended early when all rows are done
    read         what the host wants of a finished wave

Nothing that differs between requests is compiled in; only the path with top-k/top-p is a second compilation of decode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float, Int

from hptjax.rollout import sampling, waves
from hptjax.types import Array, Params

ROW_AXIS = 1  # of every array in a cache

Prefill = Callable[..., tuple[Array, Any]]
DecodeStep = Callable[..., tuple[Array, Any]]
Unembedding = Callable[[Params], Array]


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


class Programs(NamedTuple):
    """The programs of one decode shape; what each does is said in the module's docstring."""

    empty_cache: Callable[[Params], Any]
    begin: Callable[[Array, dict[str, Array]], tuple[Settings, Progress]]
    insert: Callable[..., Any]
    decode: Callable[..., tuple[Any, Progress, Array]]
    read: Callable[[Progress], tuple[Array, Array, Array]]


def make_programs(
    shape: waves.DecodeShape,
    *,
    prefill: Prefill,
    decode_step: DecodeStep,
    unembedding: Unembedding,
    shardings: RolloutShardings | None,
) -> Programs:
    """The programs of a decode shape, compiled when they are first called; the caches they are given are donated."""

    def empty_cache(params: Params) -> Any:
        tokens = jax.ShapeDtypeStruct((shape.slots, shape.prompt_buckets[0]), jnp.int32)
        lengths = jax.ShapeDtypeStruct((shape.slots,), jnp.int32)
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
            counts=jnp.zeros(shape.slots, jnp.int32),
            tokens=jnp.zeros((shape.slots, shape.cache_capacity), jnp.int32),
            logprobs=jnp.zeros((shape.slots, shape.cache_capacity), jnp.float32),
        )
        return settings, progress

    def insert(params: Params, cache: Any, tokens: Array, lengths: Array, row_of_slot: Array) -> Any:
        _, fresh = prefill(params, tokens, lengths)

        def copy_rows(kept: Array, prefilled: Array) -> Array:
            asked = (row_of_slot != waves.NO_ROW).reshape((1, shape.slots) + (1,) * (kept.ndim - 2))
            copies = jnp.take(prefilled, row_of_slot, axis=ROW_AXIS, mode="clip")
            return jnp.where(asked, copies, kept)  # whole rows, so nothing of the slot's last tenant is left

        return jax.tree.map(copy_rows, cache, fresh)

    def read(progress: Progress) -> tuple[Array, Array, Array]:
        return progress.counts, progress.tokens, progress.logprobs

    placed = shardings or RolloutShardings(rows=None, cache=None, replicated=None)
    return Programs(
        empty_cache=jax.jit(empty_cache, out_shardings=placed.cache),
        begin=jax.jit(begin, out_shardings=placed.rows),
        insert=jax.jit(insert, out_shardings=placed.cache, donate_argnames="cache"),
        decode=jax.jit(
            _make_decode(shape, decode_step, unembedding),
            out_shardings=(placed.cache, placed.rows, placed.replicated),
            donate_argnames=("cache", "progress"),
            static_argnames="truncated",
        ),
        read=jax.jit(read, out_shardings=placed.replicated),
    )


def _make_decode(shape: waves.DecodeShape, decode_step: DecodeStep, unembedding: Unembedding) -> Callable[..., Any]:
    """Up to `tokens_per_call` more tokens for every slot: (cache, progress, whether any row wants another token)."""

    def decode(
        params: Params, cache: Any, progress: Progress, settings: Settings, *, truncated: bool
    ) -> tuple[Any, Progress, Array]:
        head = unembedding(params)
        if head.shape[1] != shape.vocab_size:
            raise ValueError(f"vocab_size {shape.vocab_size}: the policy's unembedding has {head.shape[1]} columns")
        call_end = jnp.max(progress.counts) + shape.tokens_per_call

        def wants_more(carry: tuple[Any, Progress]) -> Array:
            _, now = carry
            return jnp.any(now.active & (now.counts < call_end))

        def next_token(carry: tuple[Any, Progress]) -> tuple[Any, Progress]:
            cache, now = carry
            hidden, cache = decode_step(params, cache, now.token, now.position)
            scaled = sampling.scaled_logits(hidden, head, settings.temperature)
            noise = sampling.token_noise(settings.keys, settings.prefix_lens + now.counts, shape.vocab_size)
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

    return decode
