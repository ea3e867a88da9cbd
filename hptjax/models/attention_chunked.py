"""Attention over packed rows, one tile of queries and keys at a time: no array of queries x keys is ever held.

The softmax is kept as a running maximum, sum and mixture per query (Milakov and Gimelshein 2018, 1805.02867); the
backward pass computes each tile's probabilities again from the saved log of the sum (Dao et al. 2022, 2205.14135).
Memory beyond operands and results: the float32 accumulators, [B T H E] forward and three of these backward, and a few
[B H block block] tiles.

Dims as in `hptjax.models.attention`; N query blocks, M key blocks, Q and P positions of a block.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from hptjax.models.attention import MASKED_SCORE, SAVED, Attend, grouped
from hptjax.types import Array


def chunked_attention(segment_ids: Int[Array, "B T"], *, block: int) -> Attend:
    """The attend of packed rows in tiles of `block` x `block`; of the tiles above the diagonal none is computed."""

    def attend(query: Array, key: Array, value: Array) -> Array:
        return chunked_part(query, key, value, segment_ids, segment_ids, 0, block=block)

    return attend


def chunked_part(
    query: Float[Array, "B T H E"],
    key: Float[Array, "B S K E"],
    value: Float[Array, "B S K E"],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    first_query: Int[Array, ""] | int,
    *,
    block: int,
) -> Float[Array, "B T H E"]:
    """Causal attention within segments, of the queries that begin at position `first_query` of the row.

    Args
      first_query: a number lets the tiles that no query may see be left out; a traced one has all T x S computed.
      block: positions of a tile's side; sides shorter than it are one block.

    A query that may see nothing gets 0. Gradient flows through query, key and value.
    """
    batch, length, num_heads, head_dim = query.shape
    query_block, key_block = min(block, length), min(block, key.shape[1])
    scaled = grouped(query, key.shape[2])
    query_blocks, key_blocks = -(-length // query_block), -(-key.shape[1] // key_block)
    pairs = np.stack(np.meshgrid(np.arange(query_blocks), np.arange(key_blocks), indexing="ij"), -1).reshape(-1, 2)
    if isinstance(first_query, int):
        last_query = first_query + (pairs[:, 0] + 1) * query_block - 1
        pairs = pairs[pairs[:, 1] * key_block <= last_query]
    query_at = jnp.arange(query_blocks * query_block, dtype=jnp.int32) + first_query
    key_at = jnp.arange(key_blocks * key_block, dtype=jnp.int32)
    mixed = _attend(
        _cut(scaled, query_block),
        _cut(key, key_block),
        _cut(value, key_block),
        _Places(
            jnp.asarray(pairs, jnp.int32),
            _cut(query_segments, query_block),
            _cut(key_segments, key_block),
            query_at.reshape(query_blocks, query_block),
            key_at.reshape(key_blocks, key_block),
        ),
    )  # [N B K R Q E]
    mixed = jnp.moveaxis(mixed, (0, 4), (1, 2))  # [B N Q K R E]
    return mixed.reshape(batch, -1, num_heads, head_dim)[:, :length]


class _Places(NamedTuple):
    """Which tiles there are, and what decides in each of them who sees whom.

    Args
      pairs: (query block, key block) of every tile, in the order of the work; [tiles 2]. The rest by block.
    """

    pairs: Int[Array, "tiles 2"]
    query_segments: Int[Array, "N B Q"]
    key_segments: Int[Array, "M B P"]
    query_at: Int[Array, "N Q"]
    key_at: Int[Array, "M P"]


def _cut(x: Array, block: int) -> Array:
    """[B, T, ...] -> [N, B, block, ...]; zeros past the end, which lie after every query of the row."""
    batch, length = x.shape[:2]
    blocks = -(-length // block)
    padded = jnp.pad(x, [(0, 0), (0, blocks * block - length), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(padded.reshape(batch, blocks, block, *x.shape[2:]), 1, 0)


def _at(blocks: Array, number: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(blocks, number, keepdims=False)


def _put(blocks: Array, value: Array, number: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(blocks, value, number, 0)


def _tile(query: Array, key: Array, places: _Places, pair: Array) -> tuple[Array, Array]:
    """Scores of one tile, and who sees whom in it; both [B K R Q P]."""
    i, j = pair[0], pair[1]
    scores = jnp.einsum("bqkre,bpke->bkrqp", _at(query, i), _at(key, j), preferred_element_type=jnp.float32)
    causal = _at(places.query_at, i)[:, None] >= _at(places.key_at, j)[None, :]  # [Q P]
    same = _at(places.query_segments, i)[:, :, None] == _at(places.key_segments, j)[:, None, :]  # [B Q P]
    return scores, jnp.broadcast_to((causal[None] & same)[:, None, None], scores.shape)


@jax.custom_vjp
def _attend(
    query: Float[Array, "N B Q K R E"],
    key: Float[Array, "M B P K E"],
    value: Float[Array, "M B P K E"],
    places: _Places,
) -> Float[Array, "N B K R Q E"]:
    return _forward(query, key, value, places)[0]


def _forward(query: Array, key: Array, value: Array, places: _Places) -> tuple[Array, tuple[Any, ...]]:
    blocks, batch, width, kv_heads, per_kv, head_dim = query.shape
    stats = (blocks, batch, kv_heads, per_kv, width)  # [N B K R Q]

    def turn(carry: tuple[Array, Array, Array], pair: Array) -> tuple[tuple[Array, Array, Array], None]:
        tops, totals, mixes = carry
        i, j = pair[0], pair[1]
        scores, visible = _tile(query, key, places, pair)
        top, values = _at(tops, i), _at(value, j)
        new_top = jnp.maximum(top, jnp.max(jnp.where(visible, scores, MASKED_SCORE), axis=-1))
        shrink = jnp.exp(top - new_top)
        weights = jnp.where(visible, jnp.exp(jnp.minimum(scores - new_top[..., None], 0.0)), 0.0)
        added = jnp.einsum(
            "bkrqp,bpke->bkrqe", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
        )
        totals = _put(totals, _at(totals, i) * shrink + jnp.sum(weights, axis=-1), i)
        mixes = _put(mixes, _at(mixes, i) * shrink[..., None] + added, i)
        return (_put(tops, new_top, i), totals, mixes), None

    start = (jnp.full(stats, MASKED_SCORE), jnp.zeros(stats), jnp.zeros((*stats, head_dim)))
    (tops, totals, mixes), _ = jax.lax.scan(turn, start, places.pairs)
    totals = jnp.where(totals == 0, 1.0, totals)  # of a query that sees nothing
    mixed = checkpoint_name((mixes / totals[..., None]).astype(value.dtype), SAVED)
    log_totals = checkpoint_name(tops + jnp.log(totals), SAVED)
    return mixed, (query, key, value, places, mixed, log_totals)


def _backward(saved: tuple[Any, ...], gradient: Array) -> tuple[Array, Array, Array, None]:
    query, key, value, places, mixed, log_totals = saved
    gradient = gradient.astype(value.dtype)
    # sum over keys of probability x d probability, which is what the softmax subtracts
    mean = jnp.einsum("nbkrqe,nbkrqe->nbkrq", gradient, mixed, preferred_element_type=jnp.float32)

    def turn(carry: tuple[Array, Array, Array], pair: Array) -> tuple[tuple[Array, Array, Array], None]:
        d_query, d_key, d_value = carry
        i, j = pair[0], pair[1]
        scores, visible = _tile(query, key, places, pair)
        weights = jnp.where(visible, jnp.exp(jnp.minimum(scores - _at(log_totals, i)[..., None], 0.0)), 0.0)
        d_mixed, dtype = _at(gradient, i), query.dtype
        d_weights = jnp.einsum("bkrqe,bpke->bkrqp", d_mixed, _at(value, j), preferred_element_type=jnp.float32)
        d_scores = (weights * (d_weights - _at(mean, i)[..., None])).astype(dtype)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        d_query = _put(d_query, _at(d_query, i) + product("bkrqp,bpke->bqkre", d_scores, _at(key, j)), i)
        d_key = _put(d_key, _at(d_key, j) + product("bkrqp,bqkre->bpke", d_scores, _at(query, i)), j)
        d_value = _put(d_value, _at(d_value, j) + product("bkrqp,bkrqe->bpke", weights.astype(dtype), d_mixed), j)
        return (d_query, d_key, d_value), None

    zeros = (
        jnp.zeros(query.shape, jnp.float32),
        jnp.zeros(key.shape, jnp.float32),
        jnp.zeros(value.shape, jnp.float32),
    )
    (d_query, d_key, d_value), _ = jax.lax.scan(turn, zeros, places.pairs)
    return d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype), None


_attend.defvjp(_forward, _backward)
