"""Stability masks: which tokens' gradients are switched off because the update would go too far.

A mask is a function `(log_ratio [B T], advantages [B T]) -> mask [B T]` of 1s and 0s in the dtype of `log_ratio`,
where log_ratio = logp - rollout_logprobs in nats. No gradient flows through a mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float

from hptjax.types import Array

StabilityMask = Callable[[Any, Any], Any]


def everywhere(log_ratio: Float[Array, "B T"], advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """1 on every token: no mask. SFT, REINFORCE and the published HPT script."""
    return jnp.ones_like(log_ratio)


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
    if low < 0 or high < 0:
        raise ValueError(f"clip: expected half-widths low >= 0 and high >= 0, got low={low}, high={high}")
    log_lowest = math.log1p(-low) if low < 1 else -math.inf
    log_highest = math.log1p(high)

    def ppo_clip_mask(log_ratio: Float[Array, "B T"], advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
        too_high = (advantages > 0) & (log_ratio > log_highest)
        too_low = (advantages < 0) & (log_ratio < log_lowest)
        return jnp.where(too_high | too_low, jnp.zeros_like(log_ratio), jnp.ones_like(log_ratio))

    return ppo_clip_mask
