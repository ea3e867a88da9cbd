"""A counted sum with evidence: the only way a gradient reaches an optimizer.

Each micro-batch's gradient is added once, in fp32, to its chain's sums; nothing is divided, scaled or selected on
that path. Beside the gradient leaves travels one more leaf, the *witness*: the derivative of
`probe[micro_index] * live_tokens` with respect to a vector of zeros, which is exactly `live_tokens` at
`micro_index`. It goes through the same add. Before the update it must equal, bit for bit, the token counts that the
host planned; fp32 holds integers exactly below 2^24, so there is no tolerance to argue about.

Source: accumulation spec 4.1 and 4.3; differs from it in that normalisers are inside the weights (decided before
the split), so the chain never divides.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float, Int

from hptjax.types import Array, Params

EXACT_FLOAT32_INTEGERS = 2**24  # float32 holds every integer up to it; a micro-batch with as many positions is refused


class Status(enum.IntEnum):
    """What became of a window of micro-batches. Only `UPDATED` changes parameters, moments or the schedule."""

    UPDATED = 0
    EMPTY = 1  # no live token was planned
    NONFINITE = 2  # a micro-batch had a NaN or an infinity in its gradient
    NORM_SKIPPED = 3  # the norm before clipping was above the skip threshold
    WITNESS_MISMATCH = 4  # a micro-batch was lost, repeated or scaled
    DIGEST_MISMATCH = 5  # a sample was lost or repeated
    CHECKSUM_MISMATCH = 6  # a leaf's sum is not the sum of its gradients


@struct.dataclass
class Sums:
    """What one chain has added up in the open window.

    Args
      gradients: fp32, shaped like the parameters of the chain.
      witness: [M] fp32; entry i holds the live tokens of micro-batch i, once it was added.
    """

    gradients: Params
    witness: Float[Array, " M"]


def zero_sums(params: Params, max_micro_batches: int) -> Sums:
    """An empty window for these parameters."""
    return Sums(
        gradients=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params),
        witness=jnp.zeros(max_micro_batches, jnp.float32),
    )


def add(sums: Sums, gradients: Params, witness: Float[Array, " M"]) -> Sums:
    """The sums with one more micro-batch: one unconditional fp32 add per leaf, witness included."""
    return jax.tree.map(lambda total, part: total + part.astype(jnp.float32), sums, Sums(gradients, witness))


def witness_loss(probe: Float[Array, " M"], micro_index: Int[Array, ""], live_tokens: Int[Array, ""]) -> Any:
    """A loss that is 0 where the probe is 0 and whose gradient is `live_tokens` at `micro_index`."""
    return probe[micro_index] * live_tokens.astype(jnp.float32)


def square_sums(tree: Params) -> Params:
    """Per leaf, the sum of its squares in fp32: what norms, and the check for NaN and infinities, are made of."""
    return jax.tree.map(lambda leaf: jnp.sum(jnp.square(leaf.astype(jnp.float32))), tree)


def all_finite(tree: Params, squares: Params) -> Bool[Array, ""]:
    """True where no leaf holds a NaN or an infinity.

    Args
      squares: `square_sums(tree)`. A finite sum of squares has finite terms, so the tree is read again only where one
        is not: squares overflow long before their roots do.
    """

    def look() -> Bool[Array, ""]:
        return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))

    finite = jnp.all(jnp.isfinite(jnp.stack(jax.tree.leaves(squares))))
    return jax.lax.cond(finite, lambda: jnp.ones((), bool), look)


def witness_agrees(sums: Sums, planned_tokens: Int[Array, " M"]) -> Bool[Array, ""]:
    """True where every micro-batch went through the sum exactly once, unscaled (bitwise)."""
    return jnp.all(sums.witness == planned_tokens.astype(jnp.float32))


def earliest(micro_batches: Sequence[Int[Array, ""]]) -> Int[Array, ""]:
    """The smallest of these indices that is not -1; -1 where all are."""
    places = jnp.stack(list(micro_batches))
    after_all = jnp.iinfo(jnp.int32).max
    first = jnp.min(jnp.where(places < 0, after_all, places))
    return jnp.where(first == after_all, -1, first).astype(jnp.int32)


def first_disagreement(sums: Sums, planned_tokens: Int[Array, " M"]) -> Int[Array, ""]:
    """Index of the first micro-batch whose witness is wrong; -1 where all are right."""
    wrong = sums.witness != planned_tokens.astype(jnp.float32)
    return jnp.where(jnp.any(wrong), jnp.argmax(wrong), -1).astype(jnp.int32)
