"""The sampler's compiled programs: what runs on the device, a fixed number of times compiled.

    empty    a cache and slots that hold nobody
    prefill  contexts to rows of a cache (one program per bucket)
    enter    prefilled rows to the slots that asked for them, with the settings of their samples (one per bucket)
    decode   up to tokens_per_call tokens for every slot, ended early when all rows are done

Nothing that differs between requests is compiled in; only the path with top-k/top-p is a second compilation of decode.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int, UInt32

from hptjax.rollout import sampling
from hptjax.rollout.admission import FIELDS, NO_PAGE
from hptjax.rollout.requests import DecodeShape
from hptjax.types import Array, Params

ROW_AXIS = 1  # of every array in a cache

Prefill = Callable[..., tuple[Array, Any]]
DecodeStep = Callable[..., tuple[Array, Any]]
Unembedding = Callable[[Params], Array]


def as_they_are(params: Params) -> Params:
    """The default `prepare`."""
    return params


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
    """What a slot keeps from its sample's first token to the last.

    Args
      ids: question, round, index of the sample, int32 values seen as uint32. limit: tokens of the completion, forced
        prefix included.
    """

    ids: UInt32[Array, "S 3"]
    limit: Int[Array, " S"]
    temperature: Float[Array, " S"]
    top_k: Int[Array, " S"]
    top_p: Float[Array, " S"]
    stop_ids: Int[Array, "S W"]


@struct.dataclass
class Progress:
    """What changes with every token.

    Args
      token, position: the last token of each row, not yet in the cache, and the place where it will enter.
      written: tokens of the completion so far, forced prefix included.
      active: rows that want another token.
    """

    token: Int[Array, " S"]
    position: Int[Array, " S"]
    written: Int[Array, " S"]
    active: Bool[Array, " S"]


class Programs(NamedTuple):
    """The programs of one decode shape; what each does is said in the module's docstring.

    empty(params) -> (cache, settings, progress)
    prefill(params, tokens [R P], lengths [R]) -> rows: a cache of R rows and P positions
    enter(cache, settings, progress, rows, entries [S F], copies [X 3]) -> (cache, settings, progress)
    decode(params, key, cache, settings, progress, pages [S M] or None, *, truncated)
        -> (cache, progress, report [S, 2 K + 2])
    """

    empty: Callable[[Params], tuple[Any, Settings, Progress]]
    prefill: Callable[..., Any]
    enter: Callable[..., tuple[Any, Settings, Progress]]
    decode: Callable[..., tuple[Any, Progress, Array]]


def make_programs(
    shape: DecodeShape,
    *,
    prefill: Prefill,
    decode_step: DecodeStep,
    unembedding: Unembedding,
    prepare: Callable[[Params], Params] = as_they_are,
    position_axis: int = 2,
    shardings: RolloutShardings | None,
) -> Programs:
    """The programs of a decode shape, compiled when they are first called; cache and progress they are given are
    donated, and so are the settings to `enter`.

    Args
      prepare: what the weights become at the beginning of every decode call, before its loop over tokens.
      position_axis: of every array in a cache, the axis that counts positions.
    """

    def empty(params: Params) -> tuple[Any, Settings, Progress]:
        tokens = jax.ShapeDtypeStruct((shape.slots, shape.prompt_buckets[0]), jnp.int32)
        lengths = jax.ShapeDtypeStruct((shape.slots,), jnp.int32)
        _, rows = jax.eval_shape(prefill, params, tokens, lengths)

        def room(leaf: jax.ShapeDtypeStruct) -> Array:
            sizes = list(leaf.shape)
            sizes[ROW_AXIS], sizes[position_axis] = shape.cache_sizes
            return jnp.zeros(sizes, leaf.dtype)

        whole = jnp.zeros(shape.slots, jnp.int32)
        settings = Settings(
            ids=jnp.zeros((shape.slots, 3), jnp.uint32),
            limit=whole,
            temperature=jnp.ones(shape.slots, jnp.float32),
            top_k=whole,
            top_p=jnp.ones(shape.slots, jnp.float32),
            stop_ids=jnp.zeros((shape.slots, shape.max_stop_ids), jnp.int32),
        )
        progress = Progress(token=whole, position=whole, written=whole, active=jnp.zeros(shape.slots, bool))
        return jax.tree.map(room, rows), settings, progress

    def prefilled(params: Params, tokens: Array, lengths: Array) -> Any:
        return prefill(params, tokens, lengths)[1]

    placed = shardings or RolloutShardings(rows=None, cache=None, replicated=None)
    slots = (placed.cache, placed.rows, placed.rows)
    return Programs(
        empty=jax.jit(empty, out_shardings=slots),
        prefill=jax.jit(prefilled, out_shardings=rows_shardings(placed.cache, position_axis)),
        enter=jax.jit(
            functools.partial(_enter, position_axis=position_axis),
            out_shardings=slots,
            donate_argnames=("cache", "settings", "progress"),
        ),
        decode=jax.jit(
            _make_decode(shape, decode_step, unembedding, prepare),
            out_shardings=(placed.cache, placed.rows, placed.replicated),
            donate_argnames=("cache", "progress"),
            static_argnames="truncated",
        ),
    )


def rows_shardings(cache: Any, position_axis: int) -> Any:
    """Where prefilled rows live: as the cache does, but with their positions uncut, which need not divide."""

    def whole(place: NamedSharding) -> NamedSharding:
        axes = (*place.spec, *[None] * (position_axis + 1 - len(place.spec)))
        spec = PartitionSpec(*axes[:position_axis], None, *axes[position_axis + 1 :])
        return NamedSharding(place.mesh, spec)

    return jax.tree.map(whole, cache)


def _enter(
    cache: Any,
    settings: Settings,
    progress: Progress,
    rows: Any,
    entries: Int[Array, "S F"],
    copies: Int[Array, "X 3"],
    *,
    position_axis: int,
) -> tuple[Any, Settings, Progress]:
    """The slots named in `entries` hold their new samples, and the pages named in `copies` what was prefilled for
    them; the others are as they were. Where each slot has its own row, that row is its one page."""
    column = {name: entries[:, place] for place, name in enumerate(FIELDS)}
    entered = column["enters"] > 0
    page_size = jax.tree.leaves(cache)[0].shape[position_axis]

    def filled_up(leaf: Array, size: int) -> Array:
        room = [(0, 0)] * leaf.ndim
        room[position_axis] = (0, -leaf.shape[position_axis] % size)
        return jnp.pad(leaf, room)

    def copy_page(turn: Array, kept: Any) -> Any:
        row, block, page = copies[turn]

        def copy(cached: Array, prefilled: Array) -> Array:
            one = jax.lax.dynamic_index_in_dim(prefilled, row, axis=ROW_AXIS)
            width = min(page_size, one.shape[position_axis])
            one = jax.lax.dynamic_slice_in_dim(one, block * page_size, width, axis=position_axis)
            # whole pages, so nothing of the last tenant is left in one that a sample begins with
            return jax.lax.dynamic_update_index_in_dim(cached, filled_up(one, page_size), page, axis=ROW_AXIS)

        return jax.tree.map(copy, kept, blocks)

    # rows of several pages are cut into them; one that is shorter than a page is filled up when it is copied
    several = jax.tree.leaves(rows)[0].shape[position_axis] > page_size
    blocks = jax.tree.map(lambda leaf: filled_up(leaf, page_size), rows) if several else rows

    def changed(old: Array, new: Array) -> Array:
        return jnp.where(entered if old.ndim == 1 else entered[:, None], new, old)

    def real(name: str) -> Array:
        return jax.lax.bitcast_convert_type(column[name], jnp.float32)

    ids = jnp.stack([column[name] for name in ("question", "round", "index")], axis=1)
    cache = jax.lax.fori_loop(0, jnp.sum(copies[:, 2] != NO_PAGE, dtype=jnp.int32), copy_page, cache)
    new_settings = Settings(
        ids=jax.lax.bitcast_convert_type(ids, jnp.uint32),
        limit=column["prefix_len"] + column["new_tokens"],
        temperature=real("temperature"),
        top_k=column["top_k"],
        top_p=real("top_p"),
        stop_ids=entries[:, len(FIELDS) :],
    )
    new_progress = Progress(
        token=column["last_token"],
        position=column["last_position"],
        written=column["prefix_len"],
        active=column["new_tokens"] > 0,
    )
    return cache, jax.tree.map(changed, settings, new_settings), jax.tree.map(changed, progress, new_progress)


def _make_decode(
    shape: DecodeShape, decode_step: DecodeStep, unembedding: Unembedding, prepare: Callable[[Params], Params]
) -> Callable[..., Any]:
    """Up to K = `tokens_per_call` more tokens for every slot: (cache, progress, report).

    The report [S, 2 K + 2] int32 is all that the host reads, in one transfer: K tokens, the bits of K log-probs, how
    many of both are meant, and whether the row wants more.
    """

    def decode(
        params: Params,
        key: Array,
        cache: Any,
        settings: Settings,
        progress: Progress,
        pages: Int[Array, "S M"] | None,
        *,
        truncated: bool,
    ) -> tuple[Any, Progress, Array]:
        head, params = unembedding(params), prepare(params)
        if head.shape[1] != shape.vocab_size:
            raise ValueError(f"vocab_size {shape.vocab_size}: the policy's unembedding has {head.shape[1]} columns")
        keys = sampling.sample_keys(key, settings.ids)
        sizes, no_page = (shape.slots, shape.tokens_per_call), shape.pages // shape.cache_parts
        if pages is not None:  # a sample that lost its pages is not there any more
            progress = dataclasses.replace(progress, active=progress.active & (pages[:, 0] < no_page))

        def wants_more(carry: tuple[Array, Any, Progress, Array, Array]) -> Array:
            step, _, now, _, _ = carry
            return jnp.any(now.active) & (step < shape.tokens_per_call)

        def next_token(carry: tuple[Array, Any, Progress, Array, Array]) -> tuple[Array, Any, Progress, Array, Array]:
            step, cache, now, tokens, logprobs = carry
            # a row that is done reads nothing, and writes where its own slot begins, or nowhere where pages are shared
            own = {} if pages is None else {"pages": jnp.where(now.active[:, None], pages, no_page)}
            hidden, cache = decode_step(params, cache, now.token, jnp.where(now.active, now.position, 0), **own)
            scaled = sampling.scaled_logits(hidden, head, settings.temperature)
            noise = sampling.token_noise(keys, now.written, shape.vocab_size)
            if truncated:
                token = sampling.choose_truncated(scaled, noise, settings.top_k, settings.top_p)
            else:
                token = sampling.choose(scaled, noise)
            logprob = sampling.chosen_logprobs(scaled, token)
            took = now.active.astype(jnp.int32)
            done = sampling.is_stop(token, settings.stop_ids) | (now.written + took >= settings.limit)
            column = (jnp.int32(0), step)
            progress = Progress(
                token=jnp.where(now.active, token, now.token),
                position=now.position + took,
                written=now.written + took,
                active=now.active & ~done,
            )
            tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], column)
            logprobs = jax.lax.dynamic_update_slice(logprobs, logprob[:, None], column)
            return step + 1, cache, progress, tokens, logprobs

        start = (jnp.int32(0), cache, progress, jnp.zeros(sizes, jnp.int32), jnp.zeros(sizes, jnp.float32))
        _, cache, after, tokens, logprobs = jax.lax.while_loop(wants_more, next_token, start)
        counts = (after.written - progress.written)[:, None]
        bits = jax.lax.bitcast_convert_type(logprobs, jnp.int32)
        return cache, after, jnp.concatenate([tokens, bits, counts, after.active.astype(jnp.int32)[:, None]], axis=1)

    return decode
