"""Stability masks: which tokens' gradients are switched off because the update would go too far.

A mask is a function `(view, advantages [B T]) -> mask [B T]` of 1s and 0s in the dtype of the log-probs. With
ratio = p / pi_rollout and s = exp(mean of the sequence's log ratios):

    name                 0 where A > 0 and        0 where A < 0 and                       method
    everywhere           never                    never                                   SFT, REINFORCE, HPT's script
    ppo_clip             ratio > 1 + high         ratio < 1 - low                         PPO, GRPO, DAPO
    dual_clip            ratio > 1 + high         ratio < 1 - low or ratio > c            dual-clip PPO
    two_sided_clip       ratio > min(1+high, d)   ratio < 1 - low or > max(1+high, d)     INTELLECT-2
    sequence_clip        s > 1 + high             s < 1 - low                             GSPO
    log_clip             log ratio > log_high     log ratio < -log_low                    GMPO
    band                 pi_rollout / pi_sampler outside [low, high], whatever A          IcePop
    sequence_band        the same of the sequence's geometric mean                        geometric rejection

No gradient flows through a mask.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float

from hptjax.losses.denominators import interval_words, log_bounds
from hptjax.losses.view import TokenFn, TokenView, mismatch_log_ratio, rollout_log_ratio, segment_mean
from hptjax.losses.words import said
from hptjax.types import Array

StabilityMask = TokenFn


@said("1")
def everywhere(view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """1 on every token: no mask. SFT, REINFORCE and the published HPT script."""
    return jnp.ones_like(view.logprobs)


def ppo_clip(low: float, high: float) -> StabilityMask:
    """Makes the mask that the min/clip surrogate of PPO amounts to.

        mask = 0  where A > 0 and ratio > 1 + high,  or  A < 0 and ratio < 1 - low;  else 1

    Args
      low, high: half-widths of the trust region in the ratio; PPO and GRPO 0.2 and 0.2, DAPO ("clip-higher") 0.2 and
        0.28; low >= 1 never clips from below; `math.inf` turns a side off.
    Raises low or high negative -> ValueError.
    Source Schulman et al. 2017, arXiv 1707.06347, Eq. 7 (its derivative; `spec/hpt.md` 1.5); clip-higher: DAPO, arXiv
      2503.14476.
    """
    lowest, highest = log_bounds(low, high)

    @said(f"ratio in {interval_words(low, high)}")
    def ppo_clip_mask(view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
        return _kept(rollout_log_ratio(view), advantages, highest, lowest)

    return ppo_clip_mask


def dual_clip(low: float, high: float, cap: float = 3.0) -> StabilityMask:
    """Makes PPO's mask that also lets go of tokens with A < 0 whose ratio exceeds `cap`.

    Its objective for A < 0 is `max(min(ratio A, clip(ratio) A), cap A)`.

    Args
      cap: > 1; 3 in the paper, verl and Prefix-RFT; `math.inf` is `ppo_clip`.
    Raises cap <= 1, low or high negative -> ValueError.
    Source Ye et al. 2019, arXiv 1912.09729.
    """
    lowest, highest = log_bounds(low, high)
    log_cap = _log_above_one("cap", cap)

    @said(f"ratio in {interval_words(low, high)}, {cap:g} where A < 0")
    def dual_clip_mask(view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
        return _kept(rollout_log_ratio(view), advantages, highest, lowest, log_cap)

    return dual_clip_mask


def two_sided_clip(low: float, high: float, delta: float = 4.0) -> StabilityMask:
    """Makes the mask of `min(min(ratio, delta) A, clip(ratio) A)`: the unclipped branch has a ceiling.

    Args
      delta: > 1; 4 in INTELLECT-2. Above 1 + high it is `dual_clip` with cap delta; below, it lowers the ceiling for
        A > 0, and for A < 0 the clipped branch still runs up to 1 + high.
    Raises delta <= 1, low or high negative -> ValueError.
    Source INTELLECT-2, as TRL's `delta` has it.
    """
    lowest, highest = log_bounds(low, high)
    log_delta = _log_above_one("delta", delta)
    ceiling, cap = min(highest, log_delta), max(highest, log_delta)

    @said(f"ratio in {interval_words(low, high)}, ceiling {delta:g}")
    def two_sided_mask(view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
        return _kept(rollout_log_ratio(view), advantages, ceiling, lowest, cap)

    return two_sided_mask


def sequence_clip(low: float, high: float) -> StabilityMask:
    """Makes PPO's mask from the sequence's ratio, one bit for the whole sequence.

    Args
      low, high: half-widths; 3e-4 and 4e-4 in GSPO.
    Raises low or high negative -> ValueError.
    Source GSPO: arXiv 2507.18071.
    """
    lowest, highest = log_bounds(low, high)

    @said(f"s in {interval_words(low, high)}")
    def sequence_clip_mask(view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
        return _kept(segment_mean(view, rollout_log_ratio(view)), advantages, highest, lowest)

    return sequence_clip_mask


def log_clip(log_low: float, log_high: float) -> StabilityMask:
    """Makes PPO's mask with half-widths in log ratio. GMPO (0.4 and 0.4), beside `clipped_geometric`.

    Raises log_low or log_high negative -> ValueError.
    """
    if log_low < 0 or log_high < 0:
        raise ValueError(f"clip: expected half-widths >= 0 in log ratio, got low={log_low}, high={log_high}")

    @said(f"log ratio in -{log_low:g}..{log_high:g}")
    def log_clip_mask(view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
        return _kept(rollout_log_ratio(view), advantages, log_high, -log_low)

    return log_clip_mask


def band(low: float = 0.5, high: float = 5.0) -> StabilityMask:
    """Makes the mask that keeps tokens on which trainer and sampler agree: `low <= pi_rollout / pi_sampler <= high`.

    Args
      low, high: 0 <= low <= 1 <= high. The default band is from memory and not verified.
    Source IcePop (`spec/methods.md` 2.11).
    """
    inside = _inside(low, high)
    words = said(f"p_rollout / p_sampler in {low:g}..{high:g}")
    return words(lambda view, advantages: inside(mismatch_log_ratio(view)))


def sequence_band(low: float = 0.999, high: float = 1.001) -> StabilityMask:
    """Makes `band` of the geometric mean over the sequence, which keeps or drops it whole.

    Args
      low, high: 0 <= low <= 1 <= high; tight, for a mean over many tokens.
    Source verl's geometric rejection (`spec/methods.md` 2.11).
    """
    inside = _inside(low, high)
    words = said(f"sequence's p_rollout / p_sampler in {low:g}..{high:g}")
    return words(lambda view, advantages: inside(segment_mean(view, mismatch_log_ratio(view))))


def _kept(log_ratio: Any, advantages: Any, highest: float, lowest: float, cap: float = math.inf) -> Any:
    """0 where A > 0 above `highest`, or A < 0 below `lowest` or above `cap`; bounds in log ratio."""
    too_high = (advantages > 0) & (log_ratio > highest)
    too_low = (advantages < 0) & ((log_ratio < lowest) | (log_ratio > cap))
    return jnp.where(too_high | too_low, jnp.zeros_like(log_ratio), jnp.ones_like(log_ratio))


def _inside(low: float, high: float) -> Any:
    if not 0 <= low <= 1 <= high:
        raise ValueError(f"band: expected 0 <= low <= 1 <= high, got low={low}, high={high}")
    lowest, highest = math.log(low) if low > 0 else -math.inf, math.log(high)

    def mask(log_ratio: Any) -> Any:
        return ((log_ratio >= lowest) & (log_ratio <= highest)).astype(log_ratio.dtype)

    return mask


def _log_above_one(name: str, value: float) -> float:
    if not value > 1:
        raise ValueError(f"{name}: expected a ratio > 1, got {value}")
    return math.log(value)
