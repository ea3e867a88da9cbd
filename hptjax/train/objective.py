"""From a packed micro-batch to named losses: one forward pass, then one weighted sum per term plane.

    loss[term] = sum over live tokens of weights[term] * token_loss[term](statistics, advantages[term])

Everything that could differ between splits (normalisers, advantages, the gate) is already inside the planes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from hptjax.losses.kl import k3
from hptjax.losses.logprobs import TokenStats
from hptjax.losses.stability import StabilityMask
from hptjax.losses.upge import weighted_sum
from hptjax.losses.view import TokenView, stored
from hptjax.records import Source
from hptjax.types import Array, MicroBatch, Params, Peak, Stat, SumCount

TokenLoss = Callable[[TokenView, Float[Array, "B T"]], Float[Array, "B T"]]
"""What a term needs of the tokens, and its advantages -> its loss per token, before weights."""

TokenStatsFn = Callable[[Params, MicroBatch], TokenStats]
"""Policy parameters and a micro-batch -> log-probs and entropy of its target tokens: the only model call."""

PolicyOf = Callable[[Mapping[str, Params]], Params]
"""Named parameter trees -> what the model call takes as the policy: the tree of that name, or more of them in one."""

ValueHead = Callable[[Params, Float[Array, "B T D"], Bool[Array, "B T"]], Float[Array, "B T"]]
"""The critic's parameters, hidden states, live tokens -> values in reward units, 0 where not live."""


def per_token(segment_values: Float[Array, "B S"], micro_batch: MicroBatch, *, padding: float) -> Float[Array, "B T"]:
    """A per-segment scalar, spread over its tokens; `padding` where there is no segment."""
    slots = jnp.maximum(micro_batch.segment_ids - 1, 0)
    return jnp.where(micro_batch.segment_ids > 0, jnp.take_along_axis(segment_values, slots, axis=1), padding)


def token_view(stats: TokenStats, micro_batch: MicroBatch, values: Float[Array, "B T"] | None = None) -> TokenView:
    """What terms may read of a micro-batch; its live tokens are those of any term."""
    return TokenView(
        logprobs=stats.logprobs,
        entropy=stats.entropy,
        rollout_logprobs=micro_batch.rollout_logprobs,
        sampler_logprobs=micro_batch.sampler_logprobs,
        reference_logprobs=micro_batch.reference_logprobs,
        teacher_logprobs=micro_batch.teacher_logprobs,
        demonstration_logprobs=micro_batch.demonstration_logprobs,
        values=values,
        rollout_values=micro_batch.rollout_values,
        segment_ids=micro_batch.segment_ids,
        live=micro_batch.completion_mask,
        pair_ids=_pair_ids(micro_batch),
        max_segments=micro_batch.source.shape[1],
    )


def _pair_ids(micro_batch: MicroBatch) -> Int[Array, "B T"] | None:
    if micro_batch.pair_ids is None:
        return None
    slots = jnp.maximum(micro_batch.segment_ids - 1, 0)
    return jnp.where(micro_batch.segment_ids > 0, jnp.take_along_axis(micro_batch.pair_ids, slots, axis=1), 0)


def _is_forced(micro_batch: MicroBatch) -> Bool[Array, "B T"]:
    """True on prompt and forced prefix: the targets that their segment's author did not write."""
    if micro_batch.first_written is None:
        return jnp.zeros(micro_batch.segment_ids.shape, bool)
    slots = jnp.maximum(micro_batch.segment_ids - 1, 0)
    return micro_batch.positions < jnp.take_along_axis(micro_batch.first_written, slots, axis=1)


def term_view(view: TokenView, micro_batch: MicroBatch, name: str) -> TokenView:
    """The view of one term: a sequence's statistics count the tokens that the term weighs, and no others."""
    return dataclasses.replace(view, live=micro_batch.planes[name].weights != 0)


def policy_tree(trees: Mapping[str, Params]) -> Params:
    """The tree named `policy`: what the model call takes, where all of the model is trained."""
    return trees["policy"]


def make_losses(
    token_stats: TokenStatsFn,
    token_losses: Mapping[str, TokenLoss],
    *,
    policy_of: PolicyOf = policy_tree,
    scored: bool = False,
    stability_mask: StabilityMask | None = None,
    value_head: ValueHead | None = None,
) -> Callable[[Mapping[str, Params], MicroBatch], tuple[dict[str, Any], dict[str, Stat]]]:
    """The `Losses` of a policy objective: named scalar sums and named statistics.

    Args
      token_stats: the model call. policy_of: what it takes, of the named trees.
      token_losses: term name -> token loss; a micro-batch must carry a plane of each name.
      scored: whether `rollout_logprobs` come from a score pass, so that the distance to them means something.
      stability_mask: of the `rl` term; its share of masked tokens is then reported.
      value_head: of the tree named `critic`, where there is one; it reads the policy's hidden states.

    Gradient: flows through the policy's log-probs and entropy, and through the values to the critic; stopped at
      weights, advantages, stored log-probs, and at the hidden states that the critic reads.
    """

    def losses(params: Mapping[str, Params], micro_batch: MicroBatch) -> tuple[dict[str, Any], dict[str, Stat]]:
        stats = token_stats(policy_of(params), micro_batch)
        values = None
        if value_head is not None:
            hidden = jax.lax.stop_gradient(stored(stats.hidden, "hidden"))
            values = value_head(params["critic"], hidden, micro_batch.completion_mask)
        view = token_view(stats, micro_batch, values)
        named = {
            name: weighted_sum(
                token_loss(term_view(view, micro_batch, name), micro_batch.planes[name].advantages),
                micro_batch.planes[name].weights,
            )
            for name, token_loss in token_losses.items()
        }
        return named, _statistics(view, micro_batch, named, scored, stability_mask)

    return losses


def _statistics(
    view: TokenView,
    micro_batch: MicroBatch,
    named: Mapping[str, Any],
    scored: bool,
    stability_mask: StabilityMask | None,
) -> dict[str, Stat]:
    """Sums, counts and peaks of one micro-batch; merged over the window by kind, divided on the host."""
    live = micro_batch.completion_mask
    source = per_token(micro_batch.source.astype(jnp.float32), micro_batch, padding=-1.0)
    demonstration = live & (source == int(Source.DEMONSTRATION))
    forced = live & (source == int(Source.PREFIX)) & _is_forced(micro_batch)
    rollout = live & (source >= 0.0) & ~demonstration & ~forced
    logprobs = jax.lax.stop_gradient(view.logprobs)
    sampler_gap = jnp.abs(logprobs - micro_batch.sampler_logprobs)
    log_ratio = logprobs - view.rollout_logprobs
    one = jnp.ones((), jnp.float32)

    def over(mask: Any, values: Any) -> SumCount:
        return SumCount(
            total=jnp.sum(jnp.where(mask, values, 0.0), dtype=jnp.float32), count=jnp.sum(mask, dtype=jnp.float32)
        )

    stats: dict[str, Stat] = {
        "sft/loss": over(demonstration, -logprobs),
        "actor/rollout_nll": over(rollout, -logprobs),
        "rollout/logp_diff_mean": over(rollout, sampler_gap),
        "rollout/logp_diff_max": Peak(jnp.max(jnp.where(rollout, sampler_gap, 0.0))),
    }
    if "prefix" in named:
        stats["actor/prefix_nll"] = over(forced, -logprobs)
    if "kl" in named:
        stats["actor/kl_loss"] = over(rollout, k3(logprobs, micro_batch.reference_logprobs))
    if scored:
        stats["actor/ppo_kl"] = over(rollout, -log_ratio)
    if stability_mask is not None:
        mask = stability_mask(term_view(view, micro_batch, "rl"), micro_batch.planes["rl"].advantages)
        stats["actor/pg_clipfrac"] = over(rollout, 1.0 - mask)
    if view.entropy is not None:
        stats["actor/entropy"] = over(live, jax.lax.stop_gradient(view.entropy))
    for name, value in named.items():
        stats[f"loss/{name}"] = SumCount(total=jax.lax.stop_gradient(value).astype(jnp.float32), count=one)
    return stats
