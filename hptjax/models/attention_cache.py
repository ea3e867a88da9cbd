"""Attention of one new position over a cache: read whole, block by block, or page by page.

Dims as in `hptjax.models.attention`; C positions of a cache, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Num

from hptjax.models.attention import MASKED_SCORE
from hptjax.types import Array

# scales of int8 keys and of int8 values, see `models/quantise.py`; where these are not int8, nothing
Scales = tuple[Array | None, Array | None]
UNSCALED: Scales = (None, None)
Block = tuple[Array, Array, Scales, Array]


def attention_step(
    query: Float[Array, "B 1 H E"],
    key: Float[Array, "B 1 K E"],
    value: Float[Array, "B 1 K E"],
    cached_keys: Num[Array, "B C K E"],
    cached_values: Num[Array, "B C K E"],
    mask: Bool[Array, "B C"],
    scales: Scales = UNSCALED,
) -> Float[Array, "B 1 H E"]:
    """Attention of one new position over the cached ones (where the mask is True) and itself.

    The new key and value stand beside the cache instead of in it, so that a step reads the cache and writes it once
    for all layers.

    Args
      scales: of int8 keys and values, [B C K] each, which scores and weights are multiplied by.
    """
    shape, query = query.shape, _by_kv_head(query, key.shape[2])
    scores = jnp.where(mask[:, None, None, :], _scores(query, cached_keys, scales[0]), MASKED_SCORE)
    own = jnp.einsum("bkre,bke->bkr", query, key[:, 0], preferred_element_type=jnp.float32)[..., None]
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), own)  # [B K R 1]
    weights, own_weight = jnp.exp(scores - top), jnp.exp(own - top)
    total = jnp.sum(weights, axis=-1, keepdims=True) + own_weight
    mixed = _mixed(weights, cached_values, scales[1], value.dtype)
    mixed = (mixed + own_weight * value.astype(jnp.float32).swapaxes(1, 2)) / total  # [B K R E]
    return mixed.reshape(shape).astype(value.dtype)


def attention_by_heads(
    query: Float[Array, "B 1 H E"],
    keys: Float[Array, "B K C E"],
    values: Float[Array, "B K C E"],
    mask: Bool[Array, "B C"],
) -> Float[Array, "B 1 H E"]:
    """Attention of one new position over a cache that holds it already, where the mask is True (once at least)."""
    shape, query = query.shape, _by_kv_head(query, keys.shape[1])
    # keys on the left, and turned only afterwards: the other way round the CPU's compiler turns all keys
    scores = jnp.einsum("bkce,bkre->bkcr", keys, query, preferred_element_type=jnp.float32)
    scores = jax.lax.optimization_barrier(scores).swapaxes(2, 3)
    scores = jnp.where(mask[:, None, None, :], scores, MASKED_SCORE)  # [B K R C]
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    mixed = jnp.einsum("bkrc,bkce->bkre", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    mixed = mixed / jnp.sum(weights, axis=-1, keepdims=True)
    return mixed.reshape(shape).astype(values.dtype)


def attention_step_in_blocks(
    query: Float[Array, "B 1 H E"],
    key: Float[Array, "B 1 K E"],
    value: Float[Array, "B 1 K E"],
    cached_keys: Num[Array, "L B C K E"],
    cached_values: Num[Array, "L B C K E"],
    layer: Int[Array, ""],
    lengths: Int[Array, " B"],
    *,
    block: int,
    scales: Scales = UNSCALED,
    longest: Int[Array, ""] | None = None,
) -> Float[Array, "B 1 H E"]:
    """`attention_step` over the first `lengths[b]` positions of one layer's cache, `block` of them at a time.

    Reads the cache up to the longest row's length and no further. A block that holds nothing of a row changes no bit of
    that row's result, so it does not depend on the other rows' lengths.

    Args
      cached_keys, cached_values: of all layers, because a slice of one layer would be a copy before the loop.
      block: positions, at most C. longest: of `lengths`, where it is known, so that layers need not find it again.
      scales: as `attention_step`, of all layers.
    """
    batch, capacity = query.shape[0], cached_keys.shape[2]

    def read(number: Array) -> Block:
        # the last block begins early where it would reach over the end; what it shares with the one before is masked
        start = jnp.minimum(number * block, capacity - block)

        def cut(cached: Array) -> Array:
            beyond = cached.shape[3:]
            found = jax.lax.dynamic_slice(cached, (layer, 0, start, *[0] * len(beyond)), (1, batch, block, *beyond))
            return found[0]

        at = start + jnp.arange(block, dtype=jnp.int32)
        mask = (at >= number * block)[None, :] & (at[None, :] < lengths[:, None])
        return *jax.tree.map(cut, (cached_keys, cached_values, scales)), mask

    longest = jnp.max(lengths) if longest is None else longest
    return _step_by_blocks(query, key, value, jnp.minimum(longest, capacity), block, read)


def attention_step_in_pages(
    query: Float[Array, "B 1 H E"],
    key: Float[Array, "B 1 K E"],
    value: Float[Array, "B 1 K E"],
    cached_keys: Num[Array, "L N C K E"],
    cached_values: Num[Array, "L N C K E"],
    layer: Int[Array, ""],
    lengths: Int[Array, " B"],
    pages: Int[Array, "B M"],
    *,
    parts: int = 1,
    scales: Scales = UNSCALED,
    longest: Int[Array, ""] | None = None,
) -> Float[Array, "B 1 H E"]:
    """`attention_step_in_blocks` over a cache of N pages of C positions, which rows take as they grow.

    Which pages a row has changes no bit of its result, and neither does what stands in other pages (if finite).

    Args
      pages: the page of each row's m-th block of C positions; anything where it has none.
      parts: rows and pages come in so many equal shares, and a row's pages are counted within its own.
      scales, longest: as `attention_step_in_blocks`.
    """
    page = cached_keys.shape[2]

    def read(number: Array) -> Block:
        chosen = jax.lax.dynamic_index_in_dim(pages, number, axis=1, keepdims=False)
        found = jax.tree.map(lambda one: read_pages(one, layer, chosen, parts), (cached_keys, cached_values, scales))
        at = number * page + jnp.arange(page, dtype=jnp.int32)
        return *found, at[None, :] < lengths[:, None]

    longest = jnp.max(lengths) if longest is None else longest
    return _step_by_blocks(query, key, value, jnp.minimum(longest, pages.shape[1] * page), page, read)


def read_pages(
    cached: Num[Array, "L N C *K"], layer: Int[Array, ""], pages: Int[Array, " B"], parts: int
) -> Num[Array, "B C *K"]:
    """One page of one layer for each row, see `attention_step_in_pages`."""
    if parts == 1:
        return cached.at[layer, pages].get(mode="clip")
    shares = cached.reshape(cached.shape[0], parts, -1, *cached.shape[2:])
    places = pages.reshape(parts, -1)
    # the share is a dimension of the gather and no index, so that a device that holds one asks no other for its pages
    found = jax.lax.gather(
        shares,
        jnp.stack([jnp.broadcast_to(layer, places.shape), places], axis=-1),
        jax.lax.GatherDimensionNumbers(
            offset_dims=tuple(range(2, cached.ndim)),
            collapsed_slice_dims=(0, 2),
            start_index_map=(0, 2),
            operand_batching_dims=(1,),
            start_indices_batching_dims=(0,),
        ),
        slice_sizes=(1, 1, 1, *cached.shape[2:]),
        mode="clip",
    )
    return found.reshape(-1, *found.shape[2:])


def _step_by_blocks(
    query: Float[Array, "B 1 H E"],
    key: Float[Array, "B 1 K E"],
    value: Float[Array, "B 1 K E"],
    longest: Int[Array, ""],
    block: int,
    read: Callable[[Array], Block],
) -> Float[Array, "B 1 H E"]:
    """The running softmax over the blocks that hold the first `longest` positions, beginning with the new one itself.

    Args
      read: number of a block -> its keys and values [B block K E], their scales, and where they are meant [B block].
    """
    shape, query = query.shape, _by_kv_head(query, key.shape[2])

    def turn(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, mixed = carry
        keys, values, scales, mask = read(number)
        scores = jnp.where(mask[:, None, None, :], _scores(query, keys, scales[0]), MASKED_SCORE)
        new_top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), top)
        shrink, weights = jnp.exp(top - new_top), jnp.exp(scores - new_top)
        added = _mixed(weights, values, scales[1], value.dtype)
        total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
        return new_top, total, mixed * shrink + added

    own = jnp.einsum("bkre,bke->bkr", query, key[:, 0], preferred_element_type=jnp.float32)[..., None]
    own_value = jnp.broadcast_to(value.astype(jnp.float32).swapaxes(1, 2), query.shape)  # [B K R E]
    blocks = (longest + block - 1) // block
    _, total, mixed = jax.lax.fori_loop(0, blocks, turn, (own, jnp.ones_like(own), own_value))
    return (mixed / total).reshape(shape).astype(value.dtype)


def _by_kv_head(query: Float[Array, "B 1 H E"], num_kv_heads: int) -> Float[Array, "B K R E"]:
    """Queries times E^-1/2, those that read the same kv head side by side."""
    batch, _, num_heads, head_dim = query.shape
    return (query * head_dim**-0.5).reshape(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)


def _scores(
    query: Float[Array, "B K R E"], keys: Num[Array, "B C K E"], scale: Float[Array, "B C K"] | None
) -> Float[Array, "B K R C"]:
    """query . key in float32."""
    if scale is None:
        return jnp.einsum("bkre,bcke->bkrc", query, keys, preferred_element_type=jnp.float32)
    scores = jnp.einsum("bkre,bcke->bkrc", query, keys.astype(query.dtype), preferred_element_type=jnp.float32)
    return scores * scale.swapaxes(1, 2)[:, :, None, :]


def _mixed(
    weights: Float[Array, "B K R C"], values: Num[Array, "B C K E"], scale: Float[Array, "B C K"] | None, dtype: Any
) -> Float[Array, "B K R E"]:
    """Sum of weight x value in float32; int8 values are read as `dtype`."""
    if scale is None:
        dtype = values.dtype
    else:
        weights, values = weights * scale.swapaxes(1, 2)[:, :, None, :], values.astype(dtype)
    return jnp.einsum("bkrc,bcke->bkre", weights.astype(dtype), values, preferred_element_type=jnp.float32)
