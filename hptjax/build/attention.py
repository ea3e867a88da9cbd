"""Which attention a run uses, by platform and shape, and its form on a mesh.

On a mesh every device has its own rows, heads and queries: keys and values are gathered over the mesh axes that cut the
time axis, and their gradients are summed and cut over the same axes again. The plain form on an uncut time axis is left
to the compiler instead, which cuts it the same way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hptjax.config import Config
from hptjax.config_batch import SHORT_ROW_TOKENS
from hptjax.models.attention import (
    Attend,
    Implementation,
    PackedAttention,
    PartAttention,
    reference_attention,
    reference_part,
)
from hptjax.models.attention_chunked import chunked_part
from hptjax.models.attention_kernels import (
    cudnn_part,
    cudnn_refusal,
    splash_block,
    splash_kernel,
    splash_part,
    splash_refusal,
)
from hptjax.models.shape import DecoderConfig
from hptjax.sharding.rules import Rules, partition_spec, parts
from hptjax.types import Array


def choose_attention(
    name: Literal["auto"] | Implementation,
    *,
    tokens: int,
    parts: int,
    head_dim: int,
    dtype: Any,
    platform: str,
    block: int,
) -> Implementation:
    """The implementation for rows of `tokens` positions, cut over `parts` devices.

    `auto`: the plain form for short rows; for longer ones splash on TPU and cuDNN on NVIDIA GPUs where their limits
    allow, else tiles in plain JAX.

    Raises an implementation named that cannot take these rows -> ValueError with the reason.
    """
    refusals = {
        "splash": splash_refusal(tokens // parts, head_dim, block=block, platform=platform),
        "cudnn": cudnn_refusal(tokens, head_dim, dtype=dtype, platform=platform),
    }
    if name == "auto":
        if tokens <= SHORT_ROW_TOKENS:
            return "reference"
        if refusals["splash"] is None:
            return "splash"
        return "cudnn" if refusals["cudnn"] is None else "chunked"
    if refusals.get(name) is not None:
        raise ValueError(
            f'model.attention = "{name}" {refusals[name]}; change model.attention to "auto" or "chunked", or that field'
        )
    return name


def training_attention(config: Config, shape: DecoderConfig, mesh: Mesh, rules: Rules) -> PackedAttention:
    """What `model.attention` names, for the rows of a micro-batch.

    Raises an implementation that cannot take them -> ValueError with the reason.
    """
    training_implementation(config, shape, parts(mesh.shape, "time", rules), mesh.devices.flat[0].platform)
    return build_attention(
        config.model.attention,
        mesh=mesh,
        rules=rules,
        head_dim=shape.head_dim,
        dtype=config.model.compute_dtype,
        block=config.model.attention_block,
    )


def training_implementation(config: Config, shape: DecoderConfig, cuts: int, platform: str) -> Implementation:
    """What `training_attention` is on a platform, with the time axis cut over so many devices."""
    if config.batch.share_prompts:
        if cuts > 1:
            raise ValueError(
                f"expected the time axis whole with batch.share_prompts, got it cut over {cuts} devices; change "
                "mesh.sequence, mesh.axes or batch.share_prompts"
            )
        return "reference"
    return choose_attention(
        config.model.attention,
        tokens=config.batch.row_tokens,
        parts=cuts,
        head_dim=shape.head_dim,
        dtype=config.model.compute_dtype,
        platform=platform,
        block=config.model.attention_block,
    )


def prefill_attention(config: Config, shape: DecoderConfig, mesh: Mesh, rules: Rules) -> PackedAttention:
    """What `model.attention` names, for prompts; `auto` where it names a kernel, whose limits are not theirs."""
    name = config.model.attention
    return build_attention(
        name if name in ("reference", "chunked") else "auto",
        mesh=mesh,
        rules=rules,
        head_dim=shape.head_dim,
        dtype=config.model.compute_dtype,
        block=config.model.attention_block,
    )


def cache_block(config: Config, platform: str) -> int | None:
    """Positions of the cache that a decode step reads at a time; None, the whole of it, where that is short.

    The whole of it on TPU as well: for a loop over blocks its compiler turns all layers' cache round for every token,
    which moves more than the blocks that are left out.
    """
    if config.model.attention == "reference" or config.rollout.cache_capacity <= SHORT_ROW_TOKENS or platform == "tpu":
        return None
    return config.model.attention_block


def build_attention(
    name: Literal["auto"] | Implementation,
    *,
    mesh: Mesh,
    rules: Rules,
    head_dim: int,
    dtype: Any,
    block: int,
    interpret: bool = False,
) -> PackedAttention:
    """The decoder's attention on this mesh: segment ids [B T] -> attend; chosen when the rows' length is known.

    Args
      block: positions of a tile's side (`model.attention_block`). interpret: splash without a TPU, for tests.
    """
    platform = "tpu" if interpret else mesh.devices.flat[0].platform

    def packed(segment_ids: Array) -> Attend:
        tokens = segment_ids.shape[1]
        spec = partition_spec(mesh, ("batch", "time"), segment_ids.shape, rules)
        time_axes = _names(spec, 1)
        cuts = math.prod(mesh.shape[axis] for axis in time_axes)
        kind = choose_attention(
            name, tokens=tokens, parts=cuts, head_dim=head_dim, dtype=dtype, platform=platform, block=block
        )
        if kind == "reference" and cuts == 1:
            return reference_attention(segment_ids)
        side = block if kind != "splash" else splash_block(tokens // cuts, block) or block

        def attend(query: Array, key: Array, value: Array) -> Array:
            cut = functools.partial(partition_spec, mesh, rules=rules)
            of_query = cut(("batch", "time", "heads", "head_dim"), query.shape)
            of_key = cut(("batch", "time", "kv_heads", "head_dim"), key.shape)
            _check_heads(of_query, of_key)
            heads = query.shape[2] // math.prod(mesh.shape[axis] for axis in _names(of_query, 2))
            kernel, of_kernel = None, None
            if kind == "splash":
                kernel = splash_kernel(heads, tokens, tokens, block=side, parts=cuts, interpret=interpret)
                of_kernel = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, time_axes or None)))
            if mesh.size == 1:
                return _part(kind, kernel, side)(query, key, value, segment_ids, segment_ids, 0)
            on_device = functools.partial(
                _on_device, kind=kind, side=side, heads=_names(of_query, 2), kv_heads=_names(of_key, 2), time=time_axes
            )
            return jax.shard_map(
                functools.partial(on_device, group=query.shape[2] // key.shape[2]),
                mesh=mesh,
                in_specs=(of_kernel, of_query, of_key, of_key, spec),
                out_specs=of_query,
                check_vma=False,  # kernels do not say over which mesh axes their results vary
            )(kernel, query, key, value, segment_ids)

        return attend

    return packed


def _part(kind: Implementation, kernel: Any, side: int) -> PartAttention:
    if kind == "splash":
        return lambda query, key, value, queries, keys, first: splash_part(kernel, query, key, value, queries, keys)
    if kind == "cudnn":
        return cudnn_part
    return functools.partial(chunked_part, block=side) if kind == "chunked" else reference_part


def _on_device(
    kernel: Any,
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    *,
    kind: Implementation,
    side: int,
    heads: Sequence[str],
    kv_heads: Sequence[str],
    time: Sequence[str],
    group: int,
) -> Array:
    """One device's queries over all keys of its rows.

    Args
      heads, kv_heads, time: mesh axes that cut them. group: query heads per kv head.
    """
    first: Array | int = 0
    key_segments = segment_ids
    if time:
        first = jax.lax.axis_index(tuple(time)) * query.shape[1]
        key, value, key_segments = (
            jax.lax.all_gather(x, tuple(time), axis=1, tiled=True) for x in (key, value, segment_ids)
        )
    copied = tuple(axis for axis in heads if axis not in kv_heads)
    if copied:  # more parts of the query heads than kv heads: this device's queries read some of the copied ones
        here = query.shape[2]
        first_head = jax.lax.axis_index(copied) * here
        if here % group and group % here:  # parts of several groups: a kv head for each query head
            of_query = (first_head + jnp.arange(here)) // group
            key, value = (jnp.take(x, of_query, axis=2) for x in (key, value))
        else:
            width = max(1, here // group)
            key, value = (jax.lax.dynamic_slice_in_dim(x, first_head // group, width, axis=2) for x in (key, value))
    return _part(kind, kernel, side)(query, key, value, segment_ids, key_segments, first)


def _check_heads(of_query: PartitionSpec, of_key: PartitionSpec) -> None:
    """Raises ValueError where a device would not hold the kv heads of its query heads, or parts of heads."""
    heads, kv_heads = _names(of_query, 2), _names(of_key, 2)
    if kv_heads != heads[: len(kv_heads)]:
        raise ValueError(
            f"expected kv_heads to be cut over the first of the mesh axes of heads ({list(heads)}), got "
            f"{list(kv_heads)}; change mesh.axes (or mesh.rollout_axes)"
        )
    if _names(of_query, 3):
        raise ValueError(
            f"expected attention's head_dim whole on every device, got it cut over {list(_names(of_query, 3))}; change "
            'mesh.axes (or mesh.rollout_axes), or set model.attention to "reference" and mesh.sequence to 1'
        )


def _names(spec: PartitionSpec, place: int) -> tuple[str, ...]:
    """The mesh axes of one array axis."""
    entry = spec[place]
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
