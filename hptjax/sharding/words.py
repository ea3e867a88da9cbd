"""A sum over the words of an array that any change of one word changes, and no sharding does."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt

from hptjax.types import Array


def word_sum(array: Any) -> UInt[Array, ""]:
    """Sum over entries i of word_i * (2 i + 1), modulo 2^32; an entry of 8 bytes counts as two words.

    The factors are odd, so a change of any single word changes it. Integer sums do not depend on the sharding.
    """
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    width = min(array.dtype.itemsize, 4)
    words = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(words * (place * np.uint32(2) + np.uint32(1)), dtype=jnp.uint32)
