"""KL and entropy token losses on a policy small enough to take expectations exactly, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hptjax.losses import kl
from hptjax.losses.entropy import entropy_token_loss
from hptjax.losses.stability import everywhere
from hptjax.losses.table import DR_GRPO, policy_token_loss
from hptjax.losses.upge import upge_token_loss, weighted_sum
from hptjax.losses.view import TokenView

V = 6
PAIRS = ((kl.k1, kl.k1_token_loss), (kl.k2, kl.k2_token_loss), (kl.k3, kl.k3_token_loss))


def policies(seed=0):
    """Logits of a policy and log-probs of a reference over V tokens, [1 V]: every token is looked at once."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(1, V))), jax.nn.log_softmax(jnp.asarray(rng.normal(size=(1, V))))


def expected_gradient(token_loss, logits, reference):
    """Exact mean over tokens drawn from the policy of the gradient of `token_loss`."""
    probabilities = jax.nn.softmax(logits)
    return jax.grad(lambda z: weighted_sum(token_loss(jax.nn.log_softmax(z), reference), probabilities))(logits)


@pytest.mark.parametrize(("value", "token_loss"), PAIRS)
def test_kl_coefficient_form_has_the_gradient_of_the_value(value, token_loss):
    with jax.enable_x64(True):
        logits, reference = policies()
        got = expected_gradient(token_loss, logits, reference)
        probabilities = jax.nn.softmax(logits)
        want = jax.grad(lambda z: jnp.sum(probabilities * value(jax.nn.log_softmax(z), reference)))(logits)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_kl_losses_estimate_what_their_docstrings_say():
    with jax.enable_x64(True):
        logits, reference = policies(1)
        lp = jax.nn.log_softmax
        reverse = jax.grad(lambda z: jnp.sum(jnp.exp(lp(z)) * (lp(z) - reference)))(logits)
        forward = jax.grad(lambda z: jnp.sum(jnp.exp(reference) * (reference - lp(z))))(logits)
        assert np.abs(reverse - forward).max() > 0.01
        np.testing.assert_allclose(expected_gradient(kl.k1_token_loss, logits, reference), 0, atol=1e-12)
        np.testing.assert_allclose(expected_gradient(kl.k2_token_loss, logits, reference), reverse, atol=1e-12)
        np.testing.assert_allclose(expected_gradient(kl.k3_token_loss, logits, reference), forward, atol=1e-12)


def test_kl_values_estimate_the_reverse_kl():
    with jax.enable_x64(True):
        logits, reference = policies(2)
        logprobs = jax.nn.log_softmax(logits)
        want = jnp.sum(jnp.exp(logprobs) * (logprobs - reference))
        mean = lambda value: jnp.sum(jnp.exp(logprobs) * value(logprobs, reference))  # noqa: E731
        np.testing.assert_allclose([mean(kl.k1), mean(kl.k3)], [want, want], rtol=1e-12)
        assert (kl.k3(logprobs, reference) >= 0).all()
        assert (kl.k2(logprobs, reference) >= 0).all()


def test_kl_values_by_hand():
    logprobs, reference = jnp.full((1, 1), -1.0), jnp.full((1, 1), -3.0)  # x = 2
    got = [float(value(logprobs, reference)[0, 0]) for value, _ in PAIRS]
    np.testing.assert_allclose(got, [2.0, 2.0, np.exp(-2) - 1 + 2], rtol=1e-6)


def test_k2_loss_equals_shifted_advantage_at_ratio_one():
    with jax.enable_x64(True):
        logits, reference = policies(3)
        logprobs, beta, advantages = jax.nn.log_softmax(logits), 0.3, jnp.linspace(-1, 1, V)[None, :]
        ones = jnp.ones((1, V))
        separate = jax.grad(
            lambda lp: jnp.sum(upge_token_loss(lp, logprobs, advantages, ones) + beta * kl.k2_token_loss(lp, reference))
        )(logprobs)
        shifted = advantages - beta * kl.k1(logprobs, reference)
        folded = jax.grad(lambda lp: jnp.sum(upge_token_loss(lp, logprobs, shifted, ones)))(logprobs)
        np.testing.assert_allclose(separate, folded, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("value", "token_loss"), PAIRS)
def test_kl_losses_stop_at_the_reference_and_ignore_garbage_property_25(value, token_loss):
    logprobs, weights = jnp.full((1, 3), -1.0), jnp.asarray([[1.0, 0.0, 1.0]])
    reference = jnp.asarray([[-2.0, np.nan, -0.5]])
    by_logprobs, by_reference = jax.grad(lambda lp, ref: weighted_sum(token_loss(lp, ref), weights), argnums=(0, 1))(
        logprobs, reference
    )
    np.testing.assert_array_equal(by_reference, 0)
    assert by_logprobs[0, 1] == 0
    assert np.isfinite(by_logprobs).all()


def test_entropy_loss_gradient_equals_score_form():
    # grad H = -E[(logp + H) grad logp], the expectation over the vocabulary
    with jax.enable_x64(True):
        logits, _ = policies(4)

        def entropy(z):
            logprobs = jax.nn.log_softmax(z)
            return -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1, keepdims=True)

        got = jax.grad(lambda z: weighted_sum(entropy_token_loss(entropy(z)), jnp.ones((1, 1))))(logits)
        probabilities, logprobs = jax.nn.softmax(logits)[0], jax.nn.log_softmax(logits)[0]
        score = np.eye(V) - np.asarray(probabilities)[None, :]  # row v: grad log p_v
        want = np.asarray(probabilities * (logprobs + entropy(logits)[0, 0])) @ score
        np.testing.assert_allclose(got[0], want, rtol=0, atol=1e-12)
        assert np.abs(want).max() > 0.01


def test_equal_rewards_give_no_gradient_but_entropy_does_property_17():
    logits = jnp.asarray(np.random.default_rng(5).normal(size=(1, 2, V)), jnp.float32)
    advantages = DR_GRPO().advantage(np.ones(8), np.zeros(8, int))[:1].astype(np.float32)[:, None] * np.ones(
        (1, 2), np.float32
    )

    def loss(z, entropy_coefficient):
        logprobs = jax.nn.log_softmax(z)
        policy = weighted_sum(
            policy_token_loss(DR_GRPO(), TokenView(logprobs[:, :, 0], rollout_logprobs=logprobs[:, :, 0]), advantages),
            jnp.ones((1, 2)),
        )
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        return policy + weighted_sum(entropy_token_loss(entropy), jnp.full((1, 2), entropy_coefficient))

    assert DR_GRPO().stability_mask is everywhere
    np.testing.assert_array_equal(jax.grad(loss)(logits, 0.0), 0)
    assert np.abs(jax.grad(loss)(logits, 0.001)).max() > 1e-5
