"""Denominators: the policy that divides the likelihood gradient, as log-probs.

A denominator is a function `(view, advantages [B T]) -> log d [B T]`, in nats. It says whose samples the tokens are
taken to be. A method that is published with a weight w on grad log pi writes d = pi / w here, so that one formula
holds for all of them: LUFFY's shaped weight g p / (p + g)^2 is d = (p + g)^2 / g, CISPO's is d = p / clip(ratio).
No gradient flows through a denominator.

    name                 d                            weight p / d on grad log pi
    current_policy       p                            1                              SFT, REINFORCE
    rollout_policy       pi_rollout                   ratio                          PPO, GRPO, Dr.GRPO
    unit                 1                            p                              offline RL, DFT
    at_least(a)          max(p, a)                    min(1, p / a)                  TrSFT
    inverse_doubt        1 / (1 - p)                  p (1 - p)                      CHORD-phi
    shaped(g)            (p + g)^2 / g                g p / (p + g)^2                LUFFY
    clipped_ratio        p / clip(ratio)              clip(ratio)                    CISPO
    sequence_ratio       p / s                        s, the sequence's mean ratio   GSPO
    clipped_geometric    p / rho                      rho, of clipped ratios         GMPO
    sigmoid_gate         pi_rollout / (4 s (1 - s))   4 s (1 - s) ratio              SAPO
    suffix, block, whole p / G                        G, of demonstration ratios     PEAR (`pear.py`)
    implicit_reward      p / w(u)                     w(u), u = beta log p / p_ref   hook
    pair                 p / (beta sigma(-D))         beta sigma(-D)                 DPO

This is not the reference model of a KL penalty (`kl.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from hptjax.losses.view import TokenFn, TokenView, pair_sum, rollout_log_ratio, segment_mean, segment_sum, stored
from hptjax.losses.words import said
from hptjax.types import Array

Denominator = TokenFn


@said("p")
def current_policy(view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """sg(logprobs): the weight on grad log pi is exactly 1. SFT and REINFORCE."""
    return jax.lax.stop_gradient(view.logprobs)


@said("p_rollout")
def rollout_policy(view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """rollout_logprobs (the papers' pi_old, re-scored by the trainer): the weight is the ratio. PPO, GRPO, Dr.GRPO."""
    return jax.lax.stop_gradient(stored(view.rollout_logprobs, "rollout_logprobs"))


@said("1")
def unit(view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """log 1 = 0: the weight is pi itself, for text whose author's probabilities are unknown. Offline RL, DFT."""
    return jnp.zeros_like(view.logprobs)


def at_least(floor: float) -> TokenFn:
    """Makes `max(p, floor)`: SFT where the policy is surer than `floor`, DFT over `floor` where it is not.

    Args
      floor: 0 < floor <= 1; a probability; 0.1 in TrSFT. Towards 0 this is SFT, at 1 it is DFT.
    Raises floor outside its range -> ValueError.
    Source TrSFT: arXiv 2512.17636 (TRAPO); `clip_low` of its code.
    """
    if not 0 < floor <= 1:
        raise ValueError(f"floor: expected a probability in (0, 1], got {floor}")

    @said(f"max(p, {floor:g})")
    def denominator(view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
        return jnp.maximum(jax.lax.stop_gradient(view.logprobs), math.log(floor))

    return denominator


@said("1 / (1 - p)")
def inverse_doubt(view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """`1 / (1 - p)`: the weight is p (1 - p), which lets go of tokens that are certain either way.

    Source CHORD-phi: arXiv 2508.11408.
    """
    # a log-prob can round to a little above 0
    logprobs = jnp.minimum(jax.lax.stop_gradient(view.logprobs), 0)
    return -jnp.log(-jnp.expm1(logprobs))


def shaped(gamma: float) -> TokenFn:
    """Makes `(p + gamma)^2 / gamma`: the loss is -A p / (p + gamma), whose gradient favours improbable tokens.

    Args
      gamma: > 0; 0.1 in LUFFY. Times gamma the weight becomes p, DFT's, as gamma grows.
    Raises gamma <= 0 -> ValueError.
    Source LUFFY: arXiv 2504.14945, f(x) = x / (x + gamma) with the demonstration's policy taken as 1.
    """
    if not gamma > 0:
        raise ValueError(f"gamma: expected a number > 0, got {gamma}")

    @said(f"(p + {gamma:g})^2 / {gamma:g}")
    def denominator(view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
        probability = jnp.exp(jax.lax.stop_gradient(view.logprobs))
        return 2 * jnp.log(probability + gamma) - math.log(gamma)

    return denominator


def clipped_ratio(low: float, high: float) -> TokenFn:
    """Makes `p / clip(ratio, 1 - low, 1 + high)`: the weight is clipped and no token is dropped.

    Args
      low, high: half-widths; low >= 1 leaves the lower side open, `math.inf` the upper. TRL takes an absolute upper
        bound e with the lower side open: low = 1, high = e - 1; ScaleRL's e is 5.
    Raises low or high negative -> ValueError.
    Source CISPO: MiniMax-M1, arXiv 2506.13585.
    """
    lowest, highest = log_bounds(low, high)

    @said(f"p / clip(ratio, {interval_words(low, high)})")
    def denominator(view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
        return jax.lax.stop_gradient(view.logprobs) - jnp.clip(rollout_log_ratio(view), lowest, highest)

    return denominator


@said("p / s, s of the sequence")
def sequence_ratio(view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """`p / s` with s = exp(mean of the sequence's log ratios): one weight for the whole sequence.

    Source GSPO: arXiv 2507.18071; in this form `spec/hpt.md` 1.5.
    """
    return jax.lax.stop_gradient(view.logprobs) - segment_mean(view, rollout_log_ratio(view))


def clipped_geometric(log_low: float, log_high: float) -> TokenFn:
    """Makes `p / rho` with rho = exp(mean of log ratios, each clipped in the direction that A would push it).

        d_t = log ratio      clipped = A > 0: min(d_t, log_high)   A < 0: max(d_t, -log_low)

    A token whose advantage was taken away (`hpt.top_entropy`) counts by the sign of its sequence.

    Args
      log_low, log_high: half-widths in log ratio; 0.4 each in GMPO.
    Raises one of them negative -> ValueError.
    Source GMPO: arXiv 2507.20673.
    """
    _not_negative(log_low, log_high)

    @said(f"p / rho, of log ratios within -{log_low:g}..{log_high:g}")
    def denominator(view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
        log_ratio = rollout_log_ratio(view)
        sign = jnp.where(advantages == 0, segment_sum(view, advantages), advantages)
        held = jnp.where(sign > 0, jnp.minimum(log_ratio, log_high), jnp.maximum(log_ratio, -log_low))
        return jax.lax.stop_gradient(view.logprobs) - segment_mean(view, jnp.where(sign == 0, 0, held))

    return denominator


def sigmoid_gate(temperature_positive: float, temperature_negative: float) -> TokenFn:
    """Makes the denominator of a soft clip: `J = (4 / tau) sigma(tau (ratio - 1)) A`, weight `4 s (1 - s) ratio`.

    Args
      temperature_positive, temperature_negative: tau for A > 0 and for the rest; > 0; 1.0 and 1.05 in SAPO.
    Raises one of them <= 0 -> ValueError.
    Source SAPO: arXiv 2511.20347; constants as in TRL.
    """
    if not (temperature_positive > 0 and temperature_negative > 0):
        raise ValueError(f"temperatures: expected numbers > 0, got {temperature_positive}, {temperature_negative}")

    @said(f"p_rollout / 4 s (1 - s), tau {temperature_positive:g}, {temperature_negative:g}")
    def denominator(view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
        tau = jnp.where(advantages > 0, temperature_positive, temperature_negative).astype(view.logprobs.dtype)
        x = tau * jnp.expm1(rollout_log_ratio(view))
        gate = math.log(4.0) + jax.nn.log_sigmoid(x) + jax.nn.log_sigmoid(-x)
        return jax.lax.stop_gradient(stored(view.rollout_logprobs, "rollout_logprobs")) - gate

    return denominator


def implicit_reward(beta: float, log_weight: Callable[[Any], Any], *, whole_sequence: bool = False) -> TokenFn:
    """Makes `p / w(u)`, u = beta (logp - reference_logprobs): SFT that knows how far it is from the reference.

    Args
      beta: > 0; scale of the implicit reward.
      log_weight: u -> log w(u), elementwise; 0 everywhere is SFT.
      whole_sequence: u of the sequence (a sum over its live tokens) and not of the token.
    Source the hook for arXiv 2507.00018; its own f-divergence losses are not claimed (`spec/methods.md` 3.3).
    """

    @said(f"p / w(u), u = {beta:g} log(p / p_reference)")
    def denominator(view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
        reward = beta * jax.lax.stop_gradient(view.logprobs - stored(view.reference_logprobs, "reference_logprobs"))
        if whole_sequence:
            reward = segment_sum(view, reward)
        return jax.lax.stop_gradient(view.logprobs) - log_weight(reward)

    return denominator


def pair(beta: float) -> TokenFn:
    """Makes `p / (beta sigma(-D))`, D = beta (sum of log p / p_ref over the chosen - the same over the rejected).

    Advantages are +1 on the chosen sequence and -1 on the rejected one, which share a row of the batch and a pair id.

    Args
      beta: > 0; 0.1 in DPO.
    Source DPO: arXiv 2305.18290, the gradient of its loss.
    """

    @said(f"p / ({beta:g} sigma(-D))")
    def denominator(view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
        log_ratio = jax.lax.stop_gradient(view.logprobs - stored(view.reference_logprobs, "reference_logprobs"))
        margin = beta * pair_sum(view, advantages * log_ratio)
        return jax.lax.stop_gradient(view.logprobs) - math.log(beta) - jax.nn.log_sigmoid(-margin)

    return denominator


def log_bounds(low: float, high: float) -> tuple[float, float]:
    """`log(1 - low)` and `log(1 + high)`; minus infinity for low >= 1. Raises low or high negative -> ValueError."""
    _not_negative(low, high)
    return math.log1p(-low) if low < 1 else -math.inf, math.log1p(high)


def interval_words(low: float, high: float) -> str:
    """The interval of the ratio with these half-widths, such as `0.8..1.28`."""
    return f"{max(1 - low, 0):.5g}..{1 + high:.5g}"


def _not_negative(low: float, high: float) -> None:
    if low < 0 or high < 0:
        raise ValueError(f"clip: expected half-widths low >= 0 and high >= 0, got low={low}, high={high}")
