"""The keys and values that decoding keeps: what they are, how they lie, and how a token's are put among them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Num

from hptjax.models.quantise import quantised
from hptjax.models.shape import DecoderConfig
from hptjax.types import Array


class Cache(NamedTuple):
    """Rotated keys and values of the positions seen so far; what lies at or past a row's length is never read.

    In pages, B counts them and C is their size. Where keys and values are int8, each head of each position has a scale.
    """

    keys: Num[Array, "L B C K E"]
    values: Num[Array, "L B C K E"]
    key_scales: Float[Array, "L B C K"] | None = None
    value_scales: Float[Array, "L B C K"] | None = None


def cache_axes(*, int8: bool = False) -> Cache:
    """A `Cache` with logical axis names in the place of its arrays."""
    names = ("layers", "batch", "cache", "kv_heads", "head_dim")
    return Cache(names, names, names[:-1], names[:-1]) if int8 else Cache(names, names)


def cache_shapes(config: DecoderConfig, rows: int, positions: int, *, int8: bool = False) -> Cache:
    """A `Cache` of so many rows and positions with shape tuples in the place of its arrays."""
    sizes = (config.num_layers, rows, positions, config.num_kv_heads, config.head_dim)
    return Cache(sizes, sizes, sizes[:-1], sizes[:-1]) if int8 else Cache(sizes, sizes)


def as_kept(key: Float[Array, "... K E"], value: Float[Array, "... K E"], int8: bool) -> Cache:
    """What a cache holds of one layer's new keys and values."""
    if not int8:
        return Cache(key, value)
    (keys, key_scales), (values, value_scales) = (quantised(new, (new.ndim - 1,)) for new in (key, value))
    return Cache(keys, values, key_scales, value_scales)


def step_arguments(cache: Cache) -> dict[str, Any]:
    """A cache, or one layer of it, as the steps of `models/attention_cache.py` take it."""
    scales = (cache.key_scales, cache.value_scales)
    return {"cached_keys": cache.keys, "cached_values": cache.values, "scales": scales}


def write(
    cached: Num[Array, "L N C *K"],
    new: Num[Array, "L B *K"],
    rows: Int[Array, " B"],
    at: Int[Array, " B"],
    parts: int,
) -> Num[Array, "L N C *K"]:
    """Puts `new` at (row, position); a row counts within its share of the cache."""
    # A scatter is done in place inside a loop; a one-hot select would rewrite the whole cache. Layers are indices too:
    # as part of what is written they would have the TPU's compiler turn the whole cache round before and after.
    layers = jnp.arange(cached.shape[0], dtype=at.dtype)
    if parts == 1:
        return cached.at[layers[:, None], rows[None, :], at[None, :]].set(new, mode="drop", unique_indices=True)
    shares = cached.reshape(cached.shape[0], parts, -1, *cached.shape[2:])
    places = jnp.broadcast_arrays(layers[None, None, :], *(one.reshape(parts, -1, 1) for one in (rows, at)))
    # the share is a dimension of the scatter and no index, so that no device is sent what another one writes
    written = jax.lax.scatter(
        shares,
        jnp.stack(places, axis=-1),
        jnp.moveaxis(new, 0, 1).reshape(parts, -1, cached.shape[0], *new.shape[2:]),
        jax.lax.ScatterDimensionNumbers(
            update_window_dims=tuple(range(3, cached.ndim)),
            inserted_window_dims=(0, 2, 3),
            scatter_dims_to_operand_dims=(0, 2, 3),
            operand_batching_dims=(1,),
            scatter_indices_batching_dims=(0,),
        ),
        unique_indices=True,
        mode="drop",
    )
    return written.reshape(cached.shape)
