"""The one gradient that all methods share, per token, and the one sum that train/ takes of it.

    gradient of token t = - mask_t * A_t * grad pi_t / pi_den_t = - (mask_t * A_t * pi_t / pi_den_t) * grad log pi_t

Mask, denominator and advantage are a method's choices (`table.py`); the likelihood gradient is common to all.

Dims: B packed rows, T target positions in a row.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from hptjax.types import Array


@jax.custom_vjp
def coefficient_token_loss(coefficient: Float[Array, "B T"], logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """`-coefficient * logprobs`, the form that every policy term takes.

    Args
      coefficient: what multiplies grad log pi; [B T]; dimensionless.
      logprobs: current policy; [B T]; nats.
    Returns [B T]. The value is a surrogate's, not the method's loss; only its gradient has a meaning.
    Gradient flows through `logprobs`; stopped at `coefficient`. Where the incoming cotangent is 0 (a token of weight
      0) the gradient is exactly 0 even if the coefficient is NaN or infinite, so garbage in padding cannot leak; on a
      token that counts, a NaN goes through and is seen. Reverse mode only.
    Source `spec/methods.md` 1: loss = -Agg(sg(c) * l).
    """
    return -coefficient * logprobs


def _coefficient_forward(coefficient: Any, logprobs: Any) -> tuple[Any, Any]:
    return -coefficient * logprobs, coefficient


def _coefficient_backward(coefficient: Any, cotangent: Any) -> tuple[Any, Any]:
    return jnp.zeros_like(coefficient), jnp.where(cotangent == 0, 0, -coefficient * cotangent)


coefficient_token_loss.defvjp(_coefficient_forward, _coefficient_backward)


def upge_coefficient(
    logprobs: Float[Array, "B T"],
    denominator_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    stability_mask: Float[Array, "B T"],
) -> Float[Array, "B T"]:
    """What multiplies grad log pi: `mask * A * exp(logp - logp_den)`.

    Returns [B T]; 0 wherever mask * A is 0, also where the exponential overflows or its arguments are NaN. The log
      ratio is not clamped (verl clamps at 20): a live token whose ratio overflows becomes infinite and is seen.
    Gradient flows through nothing.
    """
    signed_mask = stability_mask * advantages
    active = signed_mask != 0
    ratio = jnp.exp(logprobs - denominator_logprobs)
    return jax.lax.stop_gradient(jnp.where(active, signed_mask * ratio, 0))


def upge_token_loss(
    logprobs: Float[Array, "B T"],
    denominator_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    stability_mask: Float[Array, "B T"],
) -> Float[Array, "B T"]:
    """Per-token surrogate of the unified policy gradient estimator.

        loss_t = -sg(mask_t * A_t * exp(logp_t - logp_den_t)) * logp_t

    Args
      logprobs: current policy; [B T]; nats; carries the gradient.
      denominator_logprobs: log of the divisor: sg(logprobs), rollout_logprobs or 0; [B T]; nats.
      advantages: [B T]; reward units.
      stability_mask: 1 keeps a token's gradient, 0 switches it off; [B T]; same dtype as `logprobs`.
    Returns [B T], in the dtype of `logprobs`; its gradient is -mask * A * grad pi / pi_den.
    Gradient flows through `logprobs` alone; stopped at the other three.
    Source Lv et al. 2025 (HPT), arXiv 2509.04419 v2, Eq. 6, per token; `spec/hpt.md` 1.4.
    """
    coefficient = upge_coefficient(logprobs, denominator_logprobs, advantages, stability_mask)
    return coefficient_token_loss(coefficient, logprobs)


def weighted_sum(token_loss: Float[Array, "B T"], weights: Float[Array, "B T"]) -> Float[Array, ""]:
    """`sum(weights * token_loss)` over the tokens that have a weight: one term of one micro-batch, ready to be added.

    Args
      token_loss: [B T]; may hold anything, NaN included, where the weight is 0.
      weights: mask x coefficient / normaliser of the whole update; [B T]; >= 0. A NaN weight is not taken for 0.
    Returns scalar, summed in fp32 (fp64 if the loss is).
    Gradient flows through `token_loss`; exactly 0 where the weight is 0.
    """
    dtype = jnp.float64 if token_loss.dtype == jnp.float64 else jnp.float32
    # before the product, so that value, gradient and even the weights' gradient are free of what stood there
    live_loss = jnp.where(weights != 0, token_loss, 0).astype(dtype)
    return jnp.sum(weights.astype(dtype) * live_loss)
