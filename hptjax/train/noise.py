"""Random keys for tokens that belong to the sample, not to its place in a batch.

Dropout keyed by the place of a token in a micro-batch would draw another mask for every split, packing or order, and
the summed gradient would depend on them. Keyed by the sample and the position inside it, it does not.

Source: accumulation spec 3.5.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Int, Key, UInt32

from hptjax.types import Array, MicroBatch


def token_noise_keys(key: Key[Array, ""], micro_batch: MicroBatch) -> Key[Array, "B T"]:
    """One key per token: a function of `key`, the 64 bits of the sample's id, and the position in the sample alone.

    Args
      key: of the update and of the layer that draws; fold both in before the call, or every update draws the same.
    Returns keys; on padding they all belong to the sample with hash 0 at position 0.
    Example: `jax.vmap(jax.vmap(lambda key: jax.random.bernoulli(key, 0.9, (D,))))(keys)`: 9 of 10 entries of [B T D].
    """
    segment = micro_batch.segment_ids
    place = jnp.maximum(segment - 1, 0)[:, :, None]
    words = jnp.take_along_axis(micro_batch.sample_hash, place, axis=1)  # [B T 2]
    words = jnp.where(segment[:, :, None] > 0, words, jnp.zeros((), jnp.uint32))

    def one(words: UInt32[Array, " 2"], position: Int[Array, ""]) -> Any:
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, words[0]), words[1]), position)

    return jax.vmap(jax.vmap(one))(words, micro_batch.positions)
