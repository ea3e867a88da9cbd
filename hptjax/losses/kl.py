"""KL to a frozen model, from one sampled token: three values, and losses in the coefficient form.

The frozen model is the reference of a penalty or, for distillation on the policy's own tokens (KDRL), a teacher.

    x = logp - reference_logprobs        tokens sampled from the current policy pi
    estimator   value            gradient of it as a loss      which, over tokens from pi, is the gradient of
    k1          x                1 * grad logp                 nothing: its mean is 0
    k2          x^2 / 2          x * grad logp                 KL(pi || reference), the one a penalty means
    k3          exp(-x) - 1 + x  (1 - exp(-x)) * grad logp     KL(reference || pi), the other direction
    k3+         that of k3       that of k2                    KL(pi || reference)
    ratio * k3  that of k3       ratio * x * grad logp         KL(pi || reference), tokens from the rollout policy

As *values*, k1 and k3 estimate KL(pi || reference) without bias, k2 with a small one. All of it per token: the
gradient is that of each token's conditional KL, the states being taken as given.

Source Schulman 2020, "Approximating KL divergence" (values); `spec/methods.md` 2.12 and identities 16, 17 (gradients).
GRPO (arXiv 2402.03300, Eq. 4) uses k3 as a loss. verl clamps k3 to +-10; here nothing is clamped. verl has k3+;
DeepSeek-V3.2 multiplies k3 by the ratio (both as `spec/methods.md` 2.12 reports them).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float

from hptjax.losses.upge import coefficient_token_loss
from hptjax.types import Array


def k1(logprobs: Float[Array, "B T"], reference_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """`x`: unbiased value of KL(pi || reference); negative on some tokens; nats. For metrics."""
    return logprobs - reference_logprobs


def k2(logprobs: Float[Array, "B T"], reference_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """`x^2 / 2`: never negative, biased by the third order of x; nats. For metrics."""
    return 0.5 * jnp.square(logprobs - reference_logprobs)


def k3(logprobs: Float[Array, "B T"], reference_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """`exp(-x) - 1 + x`: unbiased value of KL(pi || reference), never negative, low variance; nats. For metrics."""
    x = logprobs - reference_logprobs
    return jnp.expm1(-x) + x


def k1_token_loss(logprobs: Float[Array, "B T"], reference_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Loss with the gradient of k1: `+grad logp`.

    On-policy its mean is 0 (the score function's), so it adds noise and no pull; k1 belongs in the reward, where
    `A - beta * sg(x)` is what `k2_token_loss` does. Offered for comparison.
    Gradient flows through `logprobs`; stopped at the coefficient and the reference.
    """
    return coefficient_token_loss(-jnp.ones_like(logprobs), logprobs)


def k2_token_loss(logprobs: Float[Array, "B T"], reference_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Loss with the gradient of k2: `x * grad logp`, on-policy an unbiased gradient of KL(pi || reference).

    The same as shifting the advantage by -beta * sg(x) at ratio 1.
    Gradient flows through `logprobs`; stopped at the coefficient and the reference.
    """
    return coefficient_token_loss(jax.lax.stop_gradient(reference_logprobs - logprobs), logprobs)


def k3_token_loss(logprobs: Float[Array, "B T"], reference_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Loss with the gradient of k3: `(1 - exp(-x)) * grad logp`, on-policy unbiased for KL(reference || pi).

    That is the forward direction, though the value of k3 estimates the reverse one; GRPO's published choice.
    Gradient flows through `logprobs`; stopped at the coefficient and the reference.
    """
    return coefficient_token_loss(jax.lax.stop_gradient(jnp.expm1(reference_logprobs - logprobs)), logprobs)


def k3_plus_token_loss(logprobs: Float[Array, "B T"], reference_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Loss with the value of k3 and the gradient of k2: `x * grad logp`.

    Gradient flows through `logprobs`; stopped at the coefficient and the reference.
    """
    loss = k2_token_loss(logprobs, reference_logprobs)
    return loss + jax.lax.stop_gradient(k3(logprobs, reference_logprobs) - loss)


def corrected_k3_token_loss(
    logprobs: Float[Array, "B T"], reference_logprobs: Float[Array, "B T"], rollout_logprobs: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """Loss with the gradient of `ratio * k3`, the ratio p / pi_rollout differentiated too: `ratio * x * grad logp`.

    Over tokens from the rollout policy, which other k's take for tokens from pi, its value estimates KL(pi ||
    reference) and its gradient the gradient of that: what k2's is on-policy.
    Gradient flows through `logprobs`; stopped at the coefficient, the reference and the rollout policy.
    """
    ratio = jnp.exp(logprobs - rollout_logprobs)
    return coefficient_token_loss(jax.lax.stop_gradient(ratio * (reference_logprobs - logprobs)), logprobs)
