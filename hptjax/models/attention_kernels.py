"""Attention over packed rows by kernels that others wrote: splash (Pallas, TPU) and cuDNN (NVIDIA); their limits.

Dims as in `hptjax.models.attention`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Float, Int

from hptjax.models.attention import SAVED, part_mask
from hptjax.types import Array

LANES = 128  # of a TPU's vector unit: what splash asks block sizes to be a multiple of
CUDNN_HEAD_DIM = 128  # largest that cuDNN's flash attention takes in both directions on every supported card


def splash_block(tokens: int, block: int) -> int | None:
    """The largest multiple of 128 that is at most `block` and divides `tokens`; None where there is none."""
    sizes = range(block - block % LANES, 0, -LANES)
    return next((size for size in sizes if tokens % size == 0), None)


def splash_kernel(
    num_heads: int, queries: int, keys: int, *, block: int, parts: int = 1, interpret: bool = False
) -> splash.SplashAttentionKernel:
    """The causal splash kernel of one row, forward and backward; tiles above the diagonal are not visited.

    Args
      num_heads: query heads on one device. queries, keys: positions of a row; queries are cut into `parts` over a mesh
        axis, and the kernel's mask tables with them (`manual_sharding_spec`).
      block: side of a tile; divides queries / parts and keys. interpret: without a TPU, for tests.
    """
    mask = masks.MultiHeadMask([masks.CausalMask((queries, keys)) for _ in range(num_heads)])
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash.make_splash_mha(
        mask,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=parts,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )


def splash_part(
    kernel: Any,
    query: Float[Array, "B T H E"],
    key: Float[Array, "B S K E"],
    value: Float[Array, "B S K E"],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
) -> Float[Array, "B T H E"]:
    """Causal attention within segments by splash; which queries these are is in the kernel's tables.

    Gradient flows through query, key and value.
    """

    def row(query: Array, key: Array, value: Array, query_row: Array, key_row: Array) -> Array:
        heads_first = (jnp.swapaxes(x, 0, 1) for x in (query, key, value))  # [H T E], [K S E]
        return jnp.swapaxes(kernel(*heads_first, segment_ids=splash.SegmentIds(q=query_row, kv=key_row)), 0, 1)

    scaled = query * query.shape[-1] ** -0.5
    return jax.vmap(row)(scaled, key, value, query_segments, key_segments).astype(value.dtype)


def cudnn_part(
    query: Float[Array, "B T H E"],
    key: Float[Array, "B S K E"],
    value: Float[Array, "B S K E"],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    first_query: Int[Array, ""] | int,
) -> Float[Array, "B T H E"]:
    """Causal attention within segments by cuDNN's flash attention.

    It knows no segment ids, so who sees whom is a [B 1 T S] bias in the operands' type; scores are never held.
    """
    mask = part_mask(query_segments, key_segments, first_query)[:, None]  # [B 1 T S]
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")


def splash_refusal(tokens: int, head_dim: int, *, block: int, platform: str) -> str | None:
    """Why splash cannot take rows of so many positions per device, in words; None where it can."""
    if platform != "tpu":
        return f"runs on TPU only, this is {platform}"
    if block < LANES:
        return f"takes a model.attention_block of at least {LANES}, got {block}"
    if splash_block(tokens, block) is None:
        return f"takes rows whose positions per device are a multiple of {LANES}, got {tokens}"
    if head_dim % LANES and head_dim != LANES // 2:
        return f"takes a head_dim of 64 or a multiple of {LANES}, got {head_dim}"
    return None


def cudnn_refusal(tokens: int, head_dim: int, *, dtype: Any, platform: str) -> str | None:
    """Why cuDNN cannot take these rows, in words; None where it can."""
    if platform not in ("gpu", "cuda"):
        return f"runs on NVIDIA GPUs only, this is {platform}"
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        return f"computes in bfloat16 or float16, model.compute_dtype is {jnp.dtype(dtype)}"
    if head_dim % 8 or head_dim > CUDNN_HEAD_DIM:
        return f"takes a head_dim that is a multiple of 8 and at most {CUDNN_HEAD_DIM}, got {head_dim}"
    if tokens % 2:
        return f"takes an even number of positions, got {tokens}"
    return None
