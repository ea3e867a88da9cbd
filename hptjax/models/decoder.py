"""One pure decoder for all dense families: parameters, training forward, prefill and one decode step.

Parameters are a nested dict of float32 arrays; those under "layers" are stacked on axis 0 and scanned:

    embedding [V D]   final_norm [D]   unembedding [D V] (absent when tied)
    layers: attention_norm [L D]  query [L D H E]  key, value [L D K E]  output [L H E D]
            query_bias [L H E]  key_bias, value_bias [L K E]   (attention_bias)
            query_norm, key_norm [L E]                         (qk_norm)
            mlp_norm [L D]  gate, up [L D F]  down [L F D]

The model knows logical axis names and a `constrain` function, never a mesh.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from hptjax.models.attention import PackedAttention, reference_attention
from hptjax.models.attention_cache import attention_step, attention_step_in_blocks, attention_step_in_pages
from hptjax.models.attention_shared import SharedPrompt, shared_attention
from hptjax.models.cache import Cache, as_kept, step_arguments, write
from hptjax.models.layers import Constrain, layer, rms_norm, unconstrained
from hptjax.models.remat import Remat, rematerialised
from hptjax.models.rope import rotation
from hptjax.models.shape import DecoderConfig
from hptjax.types import Array, Params

EMBEDDING_STD = 0.02


def param_shapes(config: DecoderConfig) -> dict[str, Any]:
    """The parameter tree with a shape tuple in the place of each array."""
    V, D, L, F = config.vocab_size, config.hidden_size, config.num_layers, config.mlp_size
    H, K, E = config.num_heads, config.num_kv_heads, config.head_dim
    layers: dict[str, Any] = {
        "attention_norm": (L, D),
        "query": (L, D, H, E),
        "key": (L, D, K, E),
        "value": (L, D, K, E),
        "output": (L, H, E, D),
        "mlp_norm": (L, D),
        "gate": (L, D, F),
        "up": (L, D, F),
        "down": (L, F, D),
    }
    if config.attention_bias:
        layers |= {"query_bias": (L, H, E), "key_bias": (L, K, E), "value_bias": (L, K, E)}
    if config.qk_norm:
        layers |= {"query_norm": (L, E), "key_norm": (L, E)}
    shapes: dict[str, Any] = {"embedding": (V, D), "final_norm": (D,), "layers": layers}
    if not config.tie_embeddings:
        shapes["unembedding"] = (D, V)
    return shapes


def logical_axes(config: DecoderConfig) -> dict[str, Any]:
    """The parameter tree with a tuple of logical axis names in the place of each array."""
    layers: dict[str, Any] = {
        "attention_norm": ("layers", "embed"),
        "query": ("layers", "embed", "heads", "head_dim"),
        "key": ("layers", "embed", "kv_heads", "head_dim"),
        "value": ("layers", "embed", "kv_heads", "head_dim"),
        "output": ("layers", "heads", "head_dim", "embed"),
        "mlp_norm": ("layers", "embed"),
        "gate": ("layers", "embed", "mlp"),
        "up": ("layers", "embed", "mlp"),
        "down": ("layers", "mlp", "embed"),
    }
    if config.attention_bias:
        layers |= {
            "query_bias": ("layers", "heads", "head_dim"),
            "key_bias": ("layers", "kv_heads", "head_dim"),
            "value_bias": ("layers", "kv_heads", "head_dim"),
        }
    if config.qk_norm:
        layers |= {"query_norm": ("layers", "head_dim"), "key_norm": ("layers", "head_dim")}
    axes: dict[str, Any] = {"embedding": ("vocab", "embed"), "final_norm": ("embed",), "layers": layers}
    if not config.tie_embeddings:
        axes["unembedding"] = ("embed", "vocab")
    return axes


def init_params(key: Array, config: DecoderConfig) -> Params:
    """Fresh float32 parameters.

    Norm scales 1, biases 0, kernels normal with std 1 / sqrt(fan in), the two that write to the residual stream
    (`output`, `down`) divided by sqrt(2 L) besides, embeddings normal with std 0.02.

    Source: GPT-2's residual scaling (Radford et al. 2019, section 2.3); 0.02 is the families' `initializer_range`.
    """
    shapes = param_shapes(config)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes, is_leaf=lambda node: isinstance(node, tuple))
    keys = jax.random.split(key, len(leaves))
    values = [_init_leaf(keys[i], path[-1].key, shape, config) for i, (path, shape) in enumerate(leaves)]
    return jax.tree.unflatten(treedef, values)


def _init_leaf(key: Array, name: str, shape: tuple[int, ...], config: DecoderConfig) -> Float[Array, "..."]:
    if name.endswith("norm"):
        return jnp.ones(shape, jnp.float32)
    if name.endswith("bias"):
        return jnp.zeros(shape, jnp.float32)
    if name.endswith("embedding"):
        return EMBEDDING_STD * jax.random.normal(key, shape, jnp.float32)
    fan_in = {"output": config.num_heads * config.head_dim, "down": config.mlp_size}.get(name, config.hidden_size)
    residual = 2 * config.num_layers if name in ("output", "down") else 1
    return jax.random.normal(key, shape, jnp.float32) * (1.0 / math.sqrt(fan_in * residual))


def forward(
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    config: DecoderConfig,
    compute_dtype: Any,
    constrain: Constrain = unconstrained,
    attention: PackedAttention = reference_attention,
    shared: SharedPrompt | None = None,
    remat: Remat = "none",
    unroll: int = 1,
) -> Float[Array, "B T D"]:
    """Hidden states of packed rows after the final norm; logits are `hidden @ unembedding(params, config)`.

    A token sees the tokens at or before it in its own segment and nothing else. Padding (segment 0) sees only
    padding: its hidden states are finite and mean nothing.

    Args
      positions: for the rotation; restart in each segment, at 0 or behind the shared prompt. segment_ids: 0 is padding.
      compute_dtype: weights are cast to it where they are used; norms and softmax stay float32.
      attention: segment ids [B T] -> attend, as `hptjax.models.attention` makes them.
      shared: the prompt that every segment of a row goes on from: its positions follow those, it sees them, and no
        hidden states of them are returned. The plain form of attention then, whatever `attention` is.
      remat: what the layers keep for the backward pass, see `hptjax.models.remat`.
      unroll: layers per turn of the scan; more compiles longer and copies less.
    """
    room = 0
    if shared is None:
        attend = attention(segment_ids)
    else:
        attend, room = shared_attention(segment_ids, shared), shared.tokens.shape[1]
        first = jnp.broadcast_to(jnp.arange(room, dtype=positions.dtype)[None, :], shared.tokens.shape)
        tokens, positions = (jnp.concatenate(pair, axis=1) for pair in ((shared.tokens, tokens), (first, positions)))
    turn = rotation(positions, config)

    def body(hidden: Array, weights: dict[str, Any]) -> tuple[Array, None]:
        return layer(hidden, weights, turn, attend, config=config, constrain=constrain)[0], None

    hidden = embed(params, tokens, compute_dtype, constrain)
    hidden, _ = jax.lax.scan(rematerialised(body, remat), hidden, params["layers"], unroll=unroll)
    return rms_norm(hidden[:, room:], params["final_norm"], config.rms_norm_eps)


def unembedding(params: Params, config: DecoderConfig) -> Float[Array, "D V"]:
    """The float32 matrix that turns hidden states into logits; the transposed embedding where they are tied."""
    return params["embedding"].T if config.tie_embeddings else params["unembedding"]


def prefill(
    params: Params,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    *,
    config: DecoderConfig,
    capacity: int | None = None,
    compute_dtype: Any,
    constrain: Constrain = unconstrained,
    attention: PackedAttention = reference_attention,
    int8_cache: bool = False,
) -> tuple[Float[Array, "B P D"], Cache]:
    """Hidden states of right-padded prompts, and a cache of `capacity` positions that holds their keys and values.

    Args
      lengths: prompt tokens of each row; what stands past them changes nothing before them.
      capacity: C; P at least, and P where it is None.
      int8_cache: the prompt's own positions see each other as they are; what is kept of them is int8.

    Raises capacity < P -> ValueError.
    """
    batch, prompt_tokens = tokens.shape
    capacity = prompt_tokens if capacity is None else capacity
    if capacity < prompt_tokens:
        raise ValueError(
            f"prefill needs a cache capacity of at least {prompt_tokens} (the prompt bucket), got {capacity}"
        )
    time = jnp.broadcast_to(jnp.arange(prompt_tokens, dtype=jnp.int32)[None, :], (batch, prompt_tokens))
    attend, turn = attention((time < lengths[:, None]).astype(jnp.int32)), rotation(time, config)

    def body(hidden: Array, weights: dict[str, Any]) -> tuple[Array, Cache]:
        hidden, key, value = layer(hidden, weights, turn, attend, config=config, constrain=constrain)
        return hidden, as_kept(key, value, int8_cache)

    def with_room(leaf: Array) -> Array:  # [L B P ...]
        return jnp.pad(leaf, [(0, 0), (0, 0), (0, capacity - prompt_tokens), *[(0, 0)] * (leaf.ndim - 3)])

    hidden = embed(params, tokens, compute_dtype, constrain)
    hidden, new = jax.lax.scan(body, hidden, params["layers"])
    return rms_norm(hidden, params["final_norm"], config.rms_norm_eps), jax.tree.map(with_room, new)


def decode_step(
    params: Params,
    cache: Cache,
    tokens: Int[Array, " B"],
    lengths: Int[Array, " B"],
    *,
    config: DecoderConfig,
    compute_dtype: Any,
    constrain: Constrain = unconstrained,
    cache_block: int | None = None,
    pages: Int[Array, "B M"] | None = None,
    parts: int = 1,
) -> tuple[Float[Array, "B D"], Cache]:
    """Hidden state of one more token per row, and the cache with its keys and values at `lengths[b]`.

    Rows do not see each other: at an unchanged compiled shape a row's result depends on that row alone, bit for bit.
    A row whose length has reached the capacity writes nothing (its result means nothing either).

    Args
      lengths: tokens already cached in each row; the new token's position.
      cache_block: None reads the whole cache; else so many positions at a time, up to the longest row's length.
      pages: of each row's m-th C positions, where the cache is in pages; past the last page where it has none. Then
        they are read one at a time.
      parts: equal shares of rows and of the cache, one per device that rows are cut over; `pages` counts within one.
    """
    capacity, int8 = cache.keys.shape[2], cache.key_scales is not None
    mask = jnp.arange(capacity, dtype=jnp.int32)[None, :] < lengths[:, None]  # [B C]
    turn, longest = rotation(lengths[:, None], config), jnp.max(lengths)

    def whole(hidden: Array, xs: tuple[dict[str, Any], Cache]) -> tuple[Array, Cache]:
        weights, cached = xs
        attend = functools.partial(attention_step, **step_arguments(cached), mask=mask)
        hidden, key, value = layer(hidden, weights, turn, attend, config=config, constrain=constrain)
        return hidden, as_kept(key[:, 0], value[:, 0], int8)

    def in_parts(hidden: Array, xs: tuple[dict[str, Any], Array]) -> tuple[Array, Cache]:
        weights, number = xs
        kept = {**step_arguments(cache), "layer": number, "lengths": lengths, "longest": longest}
        if pages is None:
            attend = functools.partial(attention_step_in_blocks, block=cache_block or capacity, **kept)
        else:
            attend = functools.partial(attention_step_in_pages, pages=pages, parts=parts, **kept)
        hidden, key, value = layer(hidden, weights, turn, attend, config=config, constrain=constrain)
        return hidden, as_kept(key[:, 0], value[:, 0], int8)

    hidden = embed(params, tokens[:, None], compute_dtype, constrain)
    if pages is None and (cache_block is None or cache_block >= capacity):
        hidden, new = jax.lax.scan(whole, hidden, (params["layers"], cache))  # [L B K E], [L B K]
    else:
        numbers = jnp.arange(config.num_layers, dtype=jnp.int32)
        hidden, new = jax.lax.scan(in_parts, hidden, (params["layers"], numbers))
    hidden = rms_norm(hidden, params["final_norm"], config.rms_norm_eps)
    rows, at = jnp.arange(lengths.shape[0], dtype=lengths.dtype) % (lengths.shape[0] // parts), lengths
    if pages is not None:
        none = jnp.iinfo(jnp.int32).max
        page = jnp.take_along_axis(pages, lengths[:, None] // capacity, axis=1, mode="fill", fill_value=none)
        rows, at = page[:, 0], lengths % capacity
    put = functools.partial(write, rows=rows, at=at, parts=parts)
    return hidden[:, 0], jax.tree.map(put, cache, new)


def embed(params: Params, tokens: Int[Array, "B T"], compute_dtype: Any, constrain: Constrain) -> Float[Array, "B T D"]:
    """The tokens' rows of the embedding, in the compute type."""
    # The table is gathered along its other axis first: rows cut over the same devices as its columns would otherwise
    # make the compiler copy [B T D] to every device. Cast after the lookup, so that its gradient adds in float32.
    table = constrain(params["embedding"], ("vocab", "features"))
    hidden = jnp.take(table, tokens, axis=0, mode="clip").astype(compute_dtype)
    return constrain(hidden, ("batch", "time", "features"))
