"""What a row of the table may read of a packed micro-batch, and sums over its sequences.

A row of `[B T]` holds several sequences (segments). A statistic of a sequence is a sum over the positions that share a
segment id, spread back over them; it never looks across a border, and whatever stands in padding, in a neighbour or
on a token that is not live cannot reach it, NaN included.

Nothing here is a statistic of the micro-batch: those would depend on the split. Numbers that need the whole update are
made on the host before the split (`advantages.py`, `returns.py`, `selection.py`, `mismatch.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float, Int

from hptjax.masked import inverse_counts
from hptjax.types import Array


@struct.dataclass
class TokenView:
    """What a term's token loss may look at; None where nothing was stored.

    Gradient flows through `logprobs`, `entropy` and `values` only.

    Args
      logprobs: current policy; [B T]; nats.
      entropy: of the current next-token distribution; [B T]; nats.
      rollout_logprobs: trainer's at sampling weights (the papers' pi_old). sampler_logprobs: as decoded.
      reference_logprobs: frozen, for KL. teacher_logprobs: another model's. demonstration_logprobs: the author's of
        the demonstration.
      values: of the current critic, reward units. rollout_values: at sampling weights.
      segment_ids: 0 is padding, 1..max_segments count the sequences of a row.
      live: True on the tokens of this term; the only ones that statistics of a sequence count.
      pair_ids: 0 no pair; 1..max_segments: the sequences of a row that are compared with each other share it.
      max_segments: S, static.
    """

    logprobs: Float[Array, "B T"]
    entropy: Float[Array, "B T"] | None = None
    rollout_logprobs: Float[Array, "B T"] | None = None
    sampler_logprobs: Float[Array, "B T"] | None = None
    reference_logprobs: Float[Array, "B T"] | None = None
    teacher_logprobs: Float[Array, "B T"] | None = None
    demonstration_logprobs: Float[Array, "B T"] | None = None
    values: Float[Array, "B T"] | None = None
    rollout_values: Float[Array, "B T"] | None = None
    segment_ids: Int[Array, "B T"] | None = None
    live: Bool[Array, "B T"] | None = None
    pair_ids: Int[Array, "B T"] | None = None
    max_segments: int = struct.field(pytree_node=False, default=1)


TokenFn = Callable[[TokenView, Any], Any]
"""(view, advantages [B T]) -> [B T] in the dtype of `view.logprobs`; no gradient flows through it."""


def stored(value: Any, name: str) -> Any:
    """`value`, a field of the view, which must not be None. Raises ValueError at trace time."""
    if value is None:
        raise ValueError(f"expected {name} in the token view, got None: this row needs them stored with the samples")
    return value


def rollout_log_ratio(view: TokenView) -> Float[Array, "B T"]:
    """`logp - rollout_logprobs`, how far the policy has moved since it sampled; nats. Carries no gradient."""
    return jax.lax.stop_gradient(view.logprobs - stored(view.rollout_logprobs, "rollout_logprobs"))


def mismatch_log_ratio(view: TokenView) -> Float[Array, "B T"]:
    """`rollout_logprobs - sampler_logprobs`, trainer against sampler at the same weights; nats. Carries no gradient."""
    rollout = stored(view.rollout_logprobs, "rollout_logprobs")
    return jax.lax.stop_gradient(rollout - stored(view.sampler_logprobs, "sampler_logprobs"))


def segment_sum(view: TokenView, values: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Sum of `values` over the live tokens of each token's sequence; 0 in padding."""
    return _sum_by(stored(view.segment_ids, "segment_ids"), stored(view.live, "live"), values, view.max_segments)


def segment_mean(view: TokenView, values: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Mean of `values` over the live tokens of each token's sequence; 0 where it has none."""
    return segment_sum(view, values) * inverse_counts(segment_sum(view, jnp.ones_like(values)))


def pair_sum(view: TokenView, values: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Sum of `values` over the live tokens of all sequences of each token's pair; 0 outside pairs."""
    return _sum_by(stored(view.pair_ids, "pair_ids"), stored(view.live, "live"), values, view.max_segments)


def segment_suffix(view: TokenView, values: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Sum of `values` over the live tokens that come after each token in its sequence; 0 at the last one."""
    ids, kept = stored(view.segment_ids, "segment_ids"), jnp.where(stored(view.live, "live"), values, 0)
    follows = jnp.pad(ids[:, 1:] == ids[:, :-1], ((0, 0), (0, 1)))  # [B T]
    following = jnp.where(follows, jnp.pad(kept[:, 1:], ((0, 0), (0, 1))), 0)  # [B T]

    def join(late: Any, early: Any) -> Any:
        (late_goes_on, late_sum), (early_goes_on, early_sum) = late, early
        return early_goes_on & late_goes_on, early_sum + jnp.where(early_goes_on, late_sum, 0)

    _, sums = jax.lax.associative_scan(join, (follows, following), reverse=True, axis=1)
    return sums


def segment_rank(view: TokenView, values: Float[Array, "B T"]) -> Int[Array, "B T"]:
    """How many live tokens of each token's sequence have a larger value, the earlier of equals first; 0 where not live.

    By sorting, O(T log T): comparing all pairs of a row would hold [B T T].
    """
    ids, live = stored(view.segment_ids, "segment_ids"), stored(view.live, "live")
    slot = jnp.where(live, ids, view.max_segments + 1)  # what is not live comes last, whatever stands there
    falling = jnp.where(live, -jax.lax.stop_gradient(values), 0)
    place = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=ids.dtype), ids.shape)
    sorted_slot, _, sorted_place = jax.lax.sort((slot, falling, place), dimension=1, num_keys=2, is_stable=True)
    first = jnp.pad(sorted_slot[:, 1:] != sorted_slot[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    rank = place - jax.lax.cummax(jnp.where(first, place, 0), axis=1)
    _, back = jax.lax.sort((sorted_place, rank), dimension=1, num_keys=1, is_stable=True)
    return jnp.where(live, back, 0)


def block_suffix(view: TokenView, values: Float[Array, "B T"], block_tokens: int) -> Float[Array, "B T"]:
    """Sum of `values` over the live tokens of all later blocks of each token's sequence; the same within a block.

    With `block_tokens` 1 this is `segment_suffix`. Raises block_tokens < 1 -> ValueError.
    """
    _at_least_one("block_tokens", block_tokens)
    rank = _rank(view)
    tokens = segment_sum(view, jnp.ones_like(values)).astype(rank.dtype)
    ends_block = view.live & ((rank % block_tokens == block_tokens - 1) | (rank == tokens - 1))

    def nearest(late: Any, early: Any) -> Any:
        (late_ends, late_value), (early_ends, early_value) = late, early
        return early_ends | late_ends, jnp.where(early_ends, early_value, late_value)

    after = segment_suffix(view, values)
    _, values_at_end = jax.lax.associative_scan(nearest, (ends_block, after), reverse=True, axis=1)
    return values_at_end


def _sum_by(ids: Any, live: Any, values: Any, slots: int) -> Any:
    # one masked sum per slot and not a cumulative one: another slot's size or NaN must not reach this one's bits
    slot = jnp.arange(1, slots + 1, dtype=ids.dtype)
    member = (ids[:, None, :] == slot[None, :, None]) & live[:, None, :]  # [B S T]
    sums = jnp.sum(jnp.where(member, values[:, None, :], 0), axis=2)  # [B S]
    spread = jnp.take_along_axis(sums, jnp.maximum(ids - 1, 0), axis=1)  # [B T]
    return jnp.where(ids > 0, spread, 0)


def _rank(view: TokenView) -> Any:
    """How many live tokens of its sequence stand before each token."""
    ids = stored(view.segment_ids, "segment_ids")
    one = stored(view.live, "live").astype(ids.dtype)
    before = jnp.cumsum(one, axis=1) - one  # of the whole row; exact in integers
    first = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    start = jax.lax.cummax(jnp.where(first, before, 0), axis=1)
    return before - start


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value
