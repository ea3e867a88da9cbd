"""Factors beside mask and denominator: importance weights between trainer and sampler, entropy weights, selections.

A factor is a function `(view, advantages [B T]) -> factor [B T]`; it multiplies the coefficient and carries no
gradient. With rho = pi_rollout / pi_sampler:

    name             factor
    token_tis        min(rho, cap)                          truncated importance sampling
    sequence_tis     min(product of the sequence's rho, cap)
    masked_is        rho where low <= rho <= high, else 0   MIS
    entropy_weight   scale * exp(sign * mean entropy of the sequence)   SRFT
    top_entropy      1 where the entropy is at least a threshold, else 0
    top_entropy_of_sequence   1 on a share of each sequence's tokens, those with the highest entropy, else 0

Weights normalised to mean 1 over an update, and the threshold of a quantile, are statistics of the whole update: they
come from the host (`mismatch.py`, `selection.py`) as numbers or as advantages, never from a micro-batch.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Float

from hptjax.losses.view import (
    TokenFn,
    TokenView,
    mismatch_log_ratio,
    segment_mean,
    segment_rank,
    segment_sum,
    stored,
)
from hptjax.losses.words import said, words_of
from hptjax.types import Array


def token_tis(cap: float = 2.0, scale: float = 1.0) -> TokenFn:
    """Makes `scale * min(rho, cap)` per token.

    Args
      cap: > 0; 1.5 to 5, usually 2.
      scale: 1 / (mean of the truncated weights over the whole update), where a method normalises them.
    Raises cap <= 0 -> ValueError.
    Source `spec/methods.md` 2.11.
    """
    log_cap = _log_positive("cap", cap)
    words = said(f"min(rho, {cap:g})")
    return words(lambda view, advantages: scale * jnp.exp(jnp.minimum(mismatch_log_ratio(view), log_cap)))


def sequence_tis(cap: float = 2.0, scale: float = 1.0) -> TokenFn:
    """Makes `scale * min(product of rho over the sequence, cap)`, the same on all its tokens.

    Args
      cap: > 0; 2 to 10. scale: as in `token_tis`.
    Raises cap <= 0 -> ValueError.
    Source `spec/methods.md` 2.11.
    """
    log_cap = _log_positive("cap", cap)

    @said(f"min(rho of the sequence, {cap:g})")
    def weight(view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
        return scale * jnp.exp(jnp.minimum(segment_sum(view, mismatch_log_ratio(view)), log_cap))

    return weight


def masked_is(low: float, high: float) -> TokenFn:
    """Makes `rho` where `low <= rho <= high` and 0 elsewhere: masked importance sampling.

    Raises not 0 <= low <= 1 <= high -> ValueError.
    Source `spec/methods.md` 2.11.
    """
    if not 0 <= low <= 1 <= high:
        raise ValueError(f"masked_is: expected 0 <= low <= 1 <= high, got low={low}, high={high}")
    lowest, highest = math.log(low) if low > 0 else -math.inf, math.log(high)

    @said(f"rho where within {low:g}..{high:g}")
    def weight(view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
        log_ratio = mismatch_log_ratio(view)
        return jnp.where((log_ratio >= lowest) & (log_ratio <= highest), jnp.exp(log_ratio), 0)

    return weight


def entropy_weight(scale: float, sign: int) -> TokenFn:
    """Makes `scale * exp(sign * H)`, H the mean entropy over the sequence's live tokens.

    Args
      scale: 0.5 for SRFT's demonstrations, 0.1 for its solved rollouts.
      sign: -1 or +1. For the demonstrations paper and official code are reported to differ (`spec/methods.md` 4.3).
    Raises sign other than -1 or +1 -> ValueError.
    Source SRFT: arXiv 2506.19767.
    """
    if sign not in (-1, 1):
        raise ValueError(f"sign: expected -1 or +1, got {sign}")

    @said(f"{scale:g} exp({'-' if sign < 0 else '+'}H)")
    def weight(view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
        return scale * jnp.exp(sign * segment_mean(view, jax.lax.stop_gradient(stored(view.entropy, "entropy"))))

    return weight


def where_positive(weight: TokenFn) -> TokenFn:
    """Makes `weight` where the advantage is positive and 1 elsewhere."""
    words = said(f"{words_of(weight, 'a weight')} where A > 0")
    return words(lambda view, advantages: jnp.where(advantages > 0, weight(view, advantages), 1))


def top_entropy(threshold: Float[Array, ""] | float) -> TokenFn:
    """Makes 1 where the entropy is at least `threshold`, else 0.

    Args
      threshold: of the whole update, from `selection.entropy_threshold`; nats.
    Source arXiv 2506.01939: the top 20 % of tokens by entropy carry the gradient.
    """

    @said("1 where H is high")
    def weight(view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
        high = jax.lax.stop_gradient(stored(view.entropy, "entropy")) >= threshold
        return high.astype(view.logprobs.dtype)

    return weight


def top_entropy_of_sequence(share: float) -> TokenFn:
    """Makes 1 on the n - floor((1 - share) n) of a sequence's n live tokens whose entropy is highest, else 0.

    Args
      share: 0 < share <= 1; at 1 no token is left out.
    Raises share outside its range -> ValueError.
    Source Prefix-RFT's selection (arXiv 2507.01679), which its code makes over the prefixes of a micro-batch.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a fraction in (0, 1], got {share}")

    @said(f"top {share:g} by H of the prefix")
    def weight(view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
        tokens = segment_sum(view, jnp.ones_like(view.logprobs))
        rank = segment_rank(view, stored(view.entropy, "entropy")).astype(view.logprobs.dtype)
        return (rank < tokens - jnp.floor((1.0 - share) * tokens)).astype(view.logprobs.dtype)

    return weight


def _log_positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name}: expected a number > 0, got {value}")
    return math.log(value)
