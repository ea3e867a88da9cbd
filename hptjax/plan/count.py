"""Floating-point operations and bytes of a decoder by arithmetic: compilers undercount loops and kernels.

A multiply and an add are two operations. Dims: D model, L layers, H query heads, K kv heads, E head dim, F mlp,
V vocab, T tokens of a row.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from hptjax.models.shape import DecoderConfig
from hptjax.train.optimizer import HOST_MEMORY

BACKWARD = 2  # of every product, one for each factor's gradient
FLASH_BACKWARD = 2.5  # of attention that keeps no scores: five products where the forward pass has two


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of one call of a program on all devices together, by kind.

    Args
      matmuls: of the layers' weights. attention: scores and mixing. unembedding: logits.
    """

    matmuls: float
    attention: float
    unembedding: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.matmuls + self.attention + self.unembedding


def layer_weights(shape: DecoderConfig) -> int:
    """Entries of the matrices of all layers: L (2 D H E + 2 D K E + 3 D F)."""
    D, E = shape.hidden_size, shape.head_dim
    heads = 2 * D * shape.num_heads * E + 2 * D * shape.num_kv_heads * E
    return shape.num_layers * (heads + 3 * D * shape.mlp_size)


def forward_flops(shape: DecoderConfig, *, tokens: int, pairs: float, logits: int) -> Flops:
    """Of a forward pass.

    Args
      tokens: that go through the layers. pairs: of a query and a key that are multiplied, in one layer.
      logits: tokens whose logits are made.
    """
    return Flops(
        matmuls=2.0 * tokens * layer_weights(shape),
        attention=4.0 * pairs * shape.num_layers * shape.num_heads * shape.head_dim,
        unembedding=2.0 * logits * shape.hidden_size * shape.vocab_size,
    )


def train_flops(
    forward: Flops, *, again_matmuls: float, again_attention: float, flash: bool, adapters: float | None = None
) -> Flops:
    """Of a micro-step: forward, backward and what the backward pass recomputes.

    Args
      again_matmuls: operations of the layers' weights that are done again. again_attention: share of attention's.
      flash: whether the attention keeps no scores and makes them again in its backward pass.
      adapters: of their forward pass, where they are trained and the weights have no gradients; None: all is trained.
    """
    of_weights = BACKWARD if adapters is None else BACKWARD - 1
    return Flops(
        matmuls=forward.matmuls * (1 + of_weights) + again_matmuls + (1 + BACKWARD) * (adapters or 0.0),
        attention=forward.attention * (1 + again_attention + (FLASH_BACKWARD if flash else BACKWARD)),
        unembedding=forward.unembedding * (2 + of_weights),  # the chunks' logits are always made again
    )


def model_flops(shape: DecoderConfig, *, tokens: int, pairs: float, adapters: float | None = None) -> float:
    """Of a forward and backward pass without any recomputation and with causal pairs only: what MFU is a share of."""
    forward = forward_flops(shape, tokens=tokens, pairs=pairs, logits=tokens)
    if adapters is None:
        return (1 + BACKWARD) * forward.total
    return BACKWARD * forward.total + forward.attention + (1 + BACKWARD) * adapters


def causal_pairs(rows: int, row_tokens: int, sample_tokens: int) -> float:
    """Pairs that attention needs in packed rows: t (t + 1) / 2 for each sample of t tokens, rows taken to be full."""
    return rows * row_tokens * (min(sample_tokens, row_tokens) + 1) / 2


def entries(shapes: Any) -> int:
    """Entries of all arrays of a tree of shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def bytes_per_device(tree: Any, *, on_host: bool = False) -> float:
    """Of a tree of `jax.ShapeDtypeStruct`s with shardings: the largest share of any device, in its own memory.

    Args
      on_host: what lies in the host's memory for it instead.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if _on_host(leaf) == on_host]
    return float(sum(_leaf_bytes(leaf) for leaf in leaves))


def _on_host(leaf: Any) -> bool:
    sharding = getattr(leaf, "sharding", None)
    return sharding is not None and sharding.memory_kind == HOST_MEMORY


def _leaf_bytes(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    sizes = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(sizes) * leaf.dtype.itemsize
