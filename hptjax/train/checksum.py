"""A second route to every leaf's sum, by a random vector: <r, sum of gradients> = sum of <r, gradient>.

The witness travels with the gradients, but it is one leaf; a fault may hit another one (a buffer copied instead of
added for tied embeddings, a lost write-back of one shard). So in a checked window each micro-batch's gradient is also
reduced to one number per leaf, these numbers are added on their own, and after every add the leaf's sum must give the
same number. The first micro-batch after which it does not is named, with the leaf.

The r of a leaf is an outer product of one vector per axis, drawn anew for every window, so that nothing of the leaf's
size is drawn: a random sign times a size between 0.5 and 1.5. <r, error> has about the error's norm; the sizes differ,
because with signs alone two entries that changed places would cancel half of the time.

Source: Freivalds 1979; accumulation spec 4.3, which takes signs, and compares once, at the flush, and so cannot name
the micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int

from hptjax.train.accumulate import earliest
from hptjax.types import Array, Params

SEED = 20_240_923  # any number; fixed, so that a run replays
UNIT_ROUNDOFF = 2.0**-24
SMALLEST = 2.0**-126  # squares below it may have been flushed to 0; the scale must not be 0 for that
SAFETY = 16.0  # as in the bound on summed gradients (docs/proofs.md)
NOT_CHECKED = -1.0
SIZE_BITS = 0x7FFFFF  # as many as a float32 holds


@struct.dataclass
class LeafChecks:
    """What is known of a chain's sums in the open window; every field is a tree of scalars, one per parameter leaf.

    Args
      expected: sum of <r, gradient> over the micro-batches. scale: sum of the gradients' norms.
      residual: largest |<r, sums> - expected| so far, as a share of what rounding may cause; above 1 is a fault.
      micro_batch: the first micro-batch after which the residual was above 1, or -1.
    """

    expected: Params
    scale: Params
    residual: Params
    micro_batch: Params


def zero_checks(params: Params) -> LeafChecks:
    """Nothing observed yet."""

    def zeros() -> Params:
        return jax.tree.map(lambda _: jnp.zeros((), jnp.float32), params)

    nobody = jax.tree.map(lambda _: jnp.full((), -1, jnp.int32), params)
    return LeafChecks(expected=zeros(), scale=zeros(), residual=zeros(), micro_batch=nobody)


def observe(
    checks: LeafChecks,
    gradients: Params,
    squares: Params,
    sums: Params,
    *,
    window: Int[Array, ""],
    added: Int[Array, ""],
    micro_index: Int[Array, ""],
) -> LeafChecks:
    """The checks after one more micro-batch.

    Args
      gradients: of the micro-batch. squares: their sums of squares, per leaf. sums: after it was added.
      window: which window of the run this is; r depends on it. added: micro-batches in the sums.
    """
    leaves, treedef = jax.tree.flatten(gradients)
    shapes = [leaf.shape for leaf in leaves]
    vectors = _vectors(jax.random.fold_in(jax.random.key(SEED), window), shapes)

    def projections(tree: Params) -> Float[Array, " leaves"]:
        parts = zip(jax.tree.leaves(tree), vectors, strict=True)
        return jnp.stack([projected(leaf.astype(jnp.float32), axes) for leaf, axes in parts])

    def stacked(tree: Params) -> Array:
        return jnp.stack(jax.tree.leaves(tree))

    blamed = stacked(checks.micro_batch)
    smallest = np.asarray([math.prod(shape) * SMALLEST for shape in shapes], np.float32)
    expected = stacked(checks.expected) + projections(gradients)
    scale = stacked(checks.scale) + jnp.sqrt(stacked(squares) + smallest)
    share = _share(jnp.abs(projections(sums) - expected), tolerance(scale, shapes, added))
    wrong = ~(share <= 1.0)  # a NaN is wrong, too
    columns = (
        expected,
        scale,
        jnp.maximum(stacked(checks.residual), jnp.where(jnp.isnan(share), jnp.inf, share)),
        jnp.where((blamed < 0) & wrong, micro_index, blamed).astype(jnp.int32),
    )
    return LeafChecks(*(jax.tree.unflatten(treedef, list(column)) for column in columns))


def projected(leaf: Float[Array, "..."], vectors: list[Any]) -> Float[Array, ""]:
    """sum of leaf * (outer product of the vectors), one axis after the other; in fp32 on every device."""
    for vector in reversed(vectors):
        leaf = jnp.matmul(leaf, vector, precision=jax.lax.Precision.HIGHEST)
    return leaf


def tolerance(
    scale: Float[Array, " leaves"], shapes: Sequence[tuple[int, ...]], added: Int[Array, ""]
) -> Float[Array, " leaves"]:
    """What rounding may do: 16 u (micro-batches + sum over axes of sqrt(length) / 4) x sum of the gradients' norms."""
    along_axes = np.asarray([sum(math.sqrt(length) / 4 for length in shape) for shape in shapes], np.float32)
    return SAFETY * UNIT_ROUNDOFF * (added.astype(jnp.float32) + along_axes) * scale


def holds(checks: LeafChecks) -> Bool[Array, ""]:
    """True where no leaf's sum is wrong."""
    return jnp.all(jnp.stack([residual <= 1.0 for residual in jax.tree.leaves(checks.residual)]))


def first_wrong(checks: LeafChecks) -> Int[Array, ""]:
    """The first micro-batch after which some leaf's sum was wrong; -1 where none was."""
    return earliest(jax.tree.leaves(checks.micro_batch))


def _vectors(key: Any, shapes: list[tuple[int, ...]]) -> list[list[Any]]:
    """Per shape one vector per axis: signs times sizes between 0.5 and 1.5.

    All are cut from one draw: a draw for each would be most of what XLA compiles in a train step.
    """
    bits = jax.random.bits(key, (sum(sum(shape) for shape in shapes),), jnp.uint32)
    sign = jnp.where(bits >> 31, -1.0, 1.0)
    entries = sign * (0.5 + (bits & SIZE_BITS).astype(jnp.float32) / (SIZE_BITS + 1))
    ends = np.cumsum([length for shape in shapes for length in shape])
    cuts = iter(jnp.split(entries, ends[:-1]))
    return [[next(cuts) for _ in shape] for shape in shapes]


def _share(gap: Float[Array, " leaves"], allowed: Float[Array, " leaves"]) -> Float[Array, " leaves"]:
    """gap / allowed; 0 where there is no gap, so that a leaf whose gradients are all 0 passes."""
    return jnp.where(gap == 0.0, 0.0, gap / allowed)
