"""Denominators: the policy that divides the likelihood gradient, as log-probs.

A denominator is a function `(logprobs [B T], rollout_logprobs [B T]) -> denominator_logprobs [B T]`, in nats. It says
whose samples the tokens are taken to be. A method with another weight w = pi/d writes d here: LUFFY's shaped weight
g*p/(p+g)^2 is log d = 2*log(p+g) - log g, CISPO's clipped weight is log d = logp - log(clip(ratio)).

This is not the reference model of a KL penalty (`kl.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from hptjax.types import Array

Denominator = Callable[[Any, Any], Any]


def current_policy(logprobs: Float[Array, "B T"], rollout_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """sg(logprobs): the weight on grad log pi is exactly 1. SFT and REINFORCE."""
    return jax.lax.stop_gradient(logprobs)


def rollout_policy(logprobs: Float[Array, "B T"], rollout_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """rollout_logprobs (the papers' pi_old, re-scored by the trainer): the weight is the ratio. PPO, GRPO, Dr.GRPO."""
    return jax.lax.stop_gradient(rollout_logprobs)


def unit(logprobs: Float[Array, "B T"], rollout_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """log 1 = 0: the weight is pi itself, for text whose author's probabilities are unknown. Offline RL, DFT."""
    return jnp.zeros_like(logprobs)
