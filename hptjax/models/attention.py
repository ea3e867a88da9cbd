"""Who may look at whom: attention over packed rows in the plain form, and what every form of it shares.

A packed row holds several segments. A query sees the keys at or before it in its own segment and nothing else; padding
(segment 0) sees padding. Query head h reads kv head h // (H / K); keys and values are never repeated. Scores and
softmax are float32 whatever the operands are.

Dims: B rows, T queries, S keys, H query heads, K kv heads, R = H / K, E head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from hptjax.types import Array

# attend(query [B T H E], key [B T K E], value [B T K E]) -> [B T H E]
Attend = Callable[[Array, Array, Array], Array]
# segment ids [B T] -> the attend of these rows; what the decoder is given
PackedAttention = Callable[[Array], Attend]
# the same over part of the queries: query [B T H E], key and value [B S K E], query segments [B T], key segments [B S],
# place of the first query among the keys -> [B T H E]
PartAttention = Callable[[Array, Array, Array, Array, Array, Array | int], Array]

Implementation = Literal["reference", "chunked", "splash", "cudnn"]

SAVED = "attention"  # name of what the remat policy of this name keeps: results and log normalisers
QUERY_BLOCKS, SMALLEST_BLOCK = 4, 32  # of the plain form: more blocks leave out more and take longer to compile
MASKED_SCORE = -1e30  # finite, so that no row can become NaN; exp(MASKED_SCORE - any real score) is exactly 0


def grouped(query: Float[Array, "*B H E"], num_kv_heads: int) -> Float[Array, "*B K R E"]:
    """Queries times E^-1/2, those that read the same kv head side by side."""
    num_heads, head_dim = query.shape[-2:]
    scaled = query * head_dim**-0.5
    return scaled.reshape(*query.shape[:-2], num_kv_heads, num_heads // num_kv_heads, head_dim)


def reference_attention(segment_ids: Int[Array, "B T"]) -> Attend:
    """The attend of packed rows in the plain form: one [B T T] mask for all layers, its scores whole in each."""
    return functools.partial(causal_attention, mask=packed_mask(segment_ids))


def packed_mask(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """True where query t may see key s: s <= t, same segment."""
    return part_mask(segment_ids, segment_ids, 0)


def part_mask(
    query_segments: Int[Array, "B T"], key_segments: Int[Array, "B S"], first_query: Int[Array, ""] | int
) -> Bool[Array, "B T S"]:
    """`packed_mask` of the queries that begin at position `first_query` of the row."""
    at = jnp.arange(query_segments.shape[1], dtype=jnp.int32) + first_query
    causal = at[:, None] >= jnp.arange(key_segments.shape[1], dtype=jnp.int32)[None, :]  # [T S]
    return causal[None, :, :] & (query_segments[:, :, None] == key_segments[:, None, :])


def causal_attention(
    query: Float[Array, "B T H E"],
    key: Float[Array, "B S K E"],
    value: Float[Array, "B S K E"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T H E"]:
    """`attention` where no query may see a key that comes after it. The queries are those of the last T keys.

    Queries come in up to QUERY_BLOCKS blocks, each over the keys up to its own end, which leaves out 3/8 of the scores.
    """
    length = query.shape[1]
    before = key.shape[1] - length
    block = max(SMALLEST_BLOCK, -(-length // QUERY_BLOCKS))
    parts = []
    for start in range(0, length, block):
        end = min(start + block, length)
        seen = before + end
        parts.append(attention(query[:, start:end], key[:, :seen], value[:, :seen], mask[:, start:end, :seen]))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def attention(
    query: Float[Array, "B T H E"],
    key: Float[Array, "B S K E"],
    value: Float[Array, "B S K E"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T H E"]:
    """Grouped-query softmax attention.

    Where the mask is False the probability is exactly 0, so what stands there (if finite) changes no bit of the result.
    Every query needs at least one True.
    """
    shape, query = query.shape, grouped(query, key.shape[2])
    # heads before positions, so that both products are plain batched ones: the CPU takes half the time
    query, key, value = jnp.moveaxis(query, 1, 3), key.swapaxes(1, 2), value.swapaxes(1, 2)
    scores = jnp.einsum("bkrte,bkse->bkrts", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None, :, :], scores, MASKED_SCORE)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    mixed = jnp.einsum("bkrts,bkse->bkrte", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    mixed = mixed / jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.moveaxis(mixed, 3, 1).reshape(shape).astype(value.dtype)


def reference_part(
    query: Float[Array, "B T H E"],
    key: Float[Array, "B S K E"],
    value: Float[Array, "B S K E"],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    first_query: Int[Array, ""] | int,
) -> Float[Array, "B T H E"]:
    """The plain form over part of the queries of a row."""
    return attention(query, key, value, part_mask(query_segments, key_segments, first_query))
