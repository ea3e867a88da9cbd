"""Prefill and one decode step with the layers written out one after the other, and a cache for each.

For the CPU and few layers: where all layers share an array, its compiler copies a layer's weights and cache before
every use, for every token. Here the new keys and values enter first and are read with the rest, so that a cache is
changed where it lies, and heads come before positions, so that products read it as it lies.

Dims: as in `models/decoder.py`; a layer's arrays keep their first axis, 1 long.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from hptjax.models.attention import PackedAttention, reference_attention
from hptjax.models.attention_cache import attention_by_heads
from hptjax.models.cache import Cache
from hptjax.models.decoder import embed, prefill
from hptjax.models.layers import Constrain, Turned, layer, rms_norm, unconstrained
from hptjax.models.quantise import MATRICES, SCALE
from hptjax.models.rope import rotation_table
from hptjax.models.shape import DecoderConfig
from hptjax.types import Array, Params

Caches = tuple[Cache, ...]
"""Of each layer, [1 B K C E]."""

POSITION_AXIS = 3
TURNED_FROM = 1 << 19  # entries of a matrix that lies with its outputs first; a smaller one stays in a cache as it is


def layers_apart(params: Params) -> Params:
    """The parameters with a tree for each layer in the place of one for all; large matrices with outputs first."""
    return {**params, "layers": tuple(_turned(weights) for weights in _apart(params["layers"]))}


def of_one_layer(axes_or_shapes: Cache) -> Cache:
    """Axis names or shapes of a `Cache` of all layers as those of one layer's, heads before positions."""

    def turned(entry: tuple[Any, ...]) -> tuple[Any, ...]:
        layers, rows, positions, heads, features = entry
        return (1 if isinstance(layers, int) else layers, rows, heads, positions, features)

    return Cache(turned(axes_or_shapes.keys), turned(axes_or_shapes.values))


def prefill_apart(
    params: Params,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    *,
    config: DecoderConfig,
    capacity: int | None = None,
    compute_dtype: Any,
    constrain: Constrain = unconstrained,
    attention: PackedAttention = reference_attention,
) -> tuple[Float[Array, "B P D"], Caches]:
    """`decoder.prefill`, of parameters that are together, with its cache by layers."""
    hidden, cache = prefill(
        params,
        tokens,
        lengths,
        config=config,
        capacity=capacity,
        compute_dtype=compute_dtype,
        constrain=constrain,
        attention=attention,
    )
    return hidden, _apart(jax.tree.map(lambda leaf: leaf.swapaxes(2, POSITION_AXIS), cache))


def decode_step_apart(
    params: Params,
    caches: Caches,
    tokens: Int[Array, " B"],
    lengths: Int[Array, " B"],
    *,
    config: DecoderConfig,
    compute_dtype: Any,
    constrain: Constrain = unconstrained,
) -> tuple[Float[Array, "B D"], Caches]:
    """`decoder.decode_step` over a cache that is read whole; `params` as `layers_apart` makes them."""
    capacity, new_caches = caches[0].keys.shape[POSITION_AXIS], []
    mask = jnp.arange(capacity, dtype=jnp.int32)[None, :] <= lengths[:, None]  # [B C]
    cosine, sine = (
        jnp.asarray(table).at[lengths[:, None]].get(mode="clip") for table in rotation_table(capacity, config)
    )

    def attend(query: Array, key: Array, value: Array, *, cache: Cache) -> Array:
        new = Cache(_put(cache.keys, key, lengths), _put(cache.values, value, lengths))
        new_caches.append(new)
        return attention_by_heads(query, new.keys[0], new.values[0], mask)

    hidden = embed(params, tokens[:, None], compute_dtype, constrain)
    for weights, cache in zip(params["layers"], caches, strict=True):
        one = jax.tree.map(lambda leaf: leaf[0], weights)
        looking = functools.partial(attend, cache=cache)
        hidden, _, _ = layer(hidden, one, (cosine, sine), looking, config=config, constrain=constrain)
    return rms_norm(hidden, params["final_norm"], config.rms_norm_eps)[:, 0], tuple(new_caches)


def _apart(stacked: Any) -> tuple[Any, ...]:
    """A tree of arrays with the layers on axis 0 as a tree for each layer, that axis 1 long."""
    parts = jax.tree.map(lambda leaf: jnp.split(leaf, leaf.shape[0]), stacked)
    return tuple(jax.tree.transpose(jax.tree.structure(stacked), None, parts))


def _turned(weights: dict[str, Any]) -> dict[str, Any]:
    """One layer's weights with large matrices as `decode_step_apart` reads them; those of int8 as they are."""
    turned = dict(weights)
    for name, inputs in MATRICES.items():
        kernel = weights[name]
        if kernel.size >= TURNED_FROM and name + SCALE not in weights:
            flat = kernel.reshape(1, math.prod(kernel.shape[1 : 1 + inputs]), *kernel.shape[1 + inputs :])
            turned[name] = Turned(jnp.moveaxis(flat, 1, -1))
    return turned


def _put(
    cached: Float[Array, "1 B K C E"], new: Float[Array, "B 1 K E"], at: Int[Array, " B"]
) -> Float[Array, "1 B K C E"]:
    """Puts `new` at each row's position, and nowhere where that is past the end."""
    # rows are a dimension of the scatter and no index, so that no device is sent what another one writes
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3),
        inserted_window_dims=(3,),
        scatter_dims_to_operand_dims=(3,),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    return jax.lax.scatter(cached, at[:, None], new, numbers, unique_indices=True, mode="drop")
