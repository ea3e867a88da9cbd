"""A sum over the words of an array that any change of one word changes, and no sharding does."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt

from hptjax.types import Array

HOST_WORDS = 1 << 20  # summed at once on the host


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


def host_word_sum(array: np.ndarray) -> int:
    """`word_sum` of a host array, with NumPy alone and a few MiB at a time."""
    flat = np.ascontiguousarray(array.astype(np.uint8) if array.dtype == bool else array).reshape(-1)
    words = flat.view(f"uint{8 * min(array.dtype.itemsize, 4)}")
    total = 0
    for first in range(0, words.size, HOST_WORDS):
        part = words[first : first + HOST_WORDS].astype(np.uint32)
        factors = np.arange(2 * first + 1, 2 * (first + part.size) + 1, 2, dtype=np.uint64).astype(np.uint32)
        total += int(np.sum(part * factors, dtype=np.uint64))  # each product modulo 2^32, as on the device
    return total % 2**32
