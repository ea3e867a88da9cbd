"""PEAR: supervised tokens weighted by how likely the policy is to go on as the demonstration does.

    delta_t = clip(logp_t - demonstration_logprobs_t, -0.08, 0.3)       G_t = clip(exp(sum of later delta), 0.1, 10)

The weight on grad log pi is G_t, so the denominator is p / G_t. What "later" means is the variant.

Source "Good SFT Optimizes for SFT, Better SFT Prepares for RL", arXiv 2602.01058. Its abstract names the three
variants; all constants, gamma and the block's exponent of gamma are from one re-implementation and not verified, nor is
whether the ratio reads the live or the initial policy (here the live one, no gradient through it). `spec/methods.md`
3.2.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from hptjax.losses.view import TokenFn, TokenView, block_suffix, segment_suffix, segment_sum, stored
from hptjax.losses.words import said
from hptjax.types import Array


@dataclasses.dataclass(frozen=True)
class PearRange:
    """Where PEAR's ratios are held: log ratio per token, weight per token. Not verified against the paper."""

    log_ratio_low: float = -0.08
    log_ratio_high: float = 0.3
    weight_low: float = 0.1
    weight_high: float = 10.0


PUBLISHED = PearRange()


def pear_suffix(gamma: float = 0.999, held: PearRange = PUBLISHED) -> TokenFn:
    """Makes the denominator of the token variant: `G_t = gamma^(tokens after t) * product of their ratios`."""
    step = _log_gamma(gamma)

    @said("p / G, G of the tokens after")
    def denominator(view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
        return _over(view, segment_suffix(view, _held_log_ratio(view, held) + step), held)

    return denominator


def pear_blocks(block_tokens: int, gamma: float = 0.999, held: PearRange = PUBLISHED) -> TokenFn:
    """Makes the denominator of the block variant: one weight per block, of the ratios in later blocks.

    Args
      block_tokens: live tokens to a block, counted from the sequence's start; 1 is the token variant.
    """
    step = _log_gamma(gamma)

    @said(f"p / G, G of the blocks after, {block_tokens} tokens each")
    def denominator(view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
        return _over(view, block_suffix(view, _held_log_ratio(view, held) + step, block_tokens), held)

    return denominator


def pear_whole(held: PearRange = PUBLISHED) -> TokenFn:
    """Makes the denominator of the sequence variant: the product of all the sequence's ratios, on every token."""
    return said("p / G, G of the whole")(
        lambda view, advantages: _over(view, segment_sum(view, _held_log_ratio(view, held)), held)
    )


def _held_log_ratio(view: TokenView, held: PearRange) -> Any:
    log_ratio = jax.lax.stop_gradient(view.logprobs - stored(view.demonstration_logprobs, "demonstration_logprobs"))
    return jnp.clip(log_ratio, held.log_ratio_low, held.log_ratio_high)


def _over(view: TokenView, log_weight: Any, held: PearRange) -> Any:
    low = math.log(held.weight_low) if held.weight_low > 0 else -math.inf
    return jax.lax.stop_gradient(view.logprobs) - jnp.clip(log_weight, low, math.log(held.weight_high))


def _log_gamma(gamma: float) -> float:
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma: expected a number in (0, 1], got {gamma}")
    return math.log(gamma)
