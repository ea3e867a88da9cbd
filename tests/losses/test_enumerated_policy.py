"""UPGE's claim on a policy whose strings can all be written down (`spec/hpt.md` 6, properties 1, 7, 8 and 11).

Strings of three tokens over three letters: 27 sequences, packed three to a row. The exact gradient of the expected
reward is taken by central differences in NumPy over the sum of all strings; the estimate goes through the table.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hptjax.losses.denominators import sequence_ratio
from hptjax.losses.stability import everywhere
from hptjax.losses.table import CISPO, CISPO_TABLE, DR_GRPO, GSPO, SFT, policy_token_loss
from hptjax.losses.upge import weighted_sum
from hptjax.losses.view import TokenView, segment_sum

LETTERS, LENGTH = 3, 3
STRINGS = np.array(list(itertools.product(range(LETTERS), repeat=LENGTH)))  # [27 3]
CONTEXTS = 1 + LETTERS + LETTERS**2


def context(string, t):
    """Which row of the table of logits predicts token t: one per prefix."""
    return sum(LETTERS**k for k in range(t)) + sum(int(string[k]) * LETTERS ** (t - 1 - k) for k in range(t))


CONTEXT = np.array([[context(s, t) for t in range(LENGTH)] for s in STRINGS])  # [27 3]
ROWS = (9, 9)
SEGMENTS = np.broadcast_to(np.repeat(np.arange(1, 4, dtype=np.int32), 3)[None, :], ROWS)


def token_logprobs(logits):
    """log pi of every token of every string, packed three strings to a row: [9 9]."""
    return jax.nn.log_softmax(logits)[CONTEXT, STRINGS].reshape(ROWS)


def string_probabilities(logits):
    """In NumPy: the probability of each of the 27 strings."""
    table = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return table[CONTEXT, STRINGS].prod(1)


def exact_gradient(logits, reward, step=1e-5):
    """Central differences of the expected reward, over the sum of all strings."""
    out = np.zeros_like(logits)
    for at in np.ndindex(*logits.shape):
        bump = np.zeros_like(logits)
        bump[at] = step
        out[at] = ((string_probabilities(logits + bump) - string_probabilities(logits - bump)) @ reward) / (2 * step)
    return out


def spread(per_string):
    return np.repeat(per_string, LENGTH).reshape(ROWS)


def setup(seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(CONTEXTS, LETTERS)), rng.normal(size=27), rng.normal(size=(CONTEXTS, LETTERS))


def estimate(row, logits, advantages, sampling, **fields):
    """Minus the expected gradient of the row's token losses, strings drawn from `sampling [27]`."""

    def loss(logits):
        view = TokenView(
            token_logprobs(logits), segment_ids=SEGMENTS, live=np.ones(ROWS, bool), max_segments=3, **fields
        )
        return weighted_sum(policy_token_loss(row, view, spread(advantages)), spread(sampling))

    return -np.asarray(jax.grad(loss)(jnp.asarray(logits)))


def whole_string(denominator):
    """UPGE's exact form: pi(string) / d(string) on every token of the string."""

    def function(view, advantages):
        ratio = segment_sum(view, jax.lax.stop_gradient(view.logprobs)) - jnp.log(denominator)
        return jax.lax.stop_gradient(view.logprobs) - ratio

    return function


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_property_01_any_denominator_with_full_support_gives_the_exact_gradient(seed):
    logits, reward, other = setup(seed)
    want = exact_gradient(logits, reward)
    assert np.abs(want).max() > 0.05
    rng = np.random.default_rng(100 + seed)
    arbitrary = rng.dirichlet(np.ones(27))
    for sampling in (string_probabilities(logits), string_probabilities(other), arbitrary, np.full(27, 1 / 27)):
        row = dataclasses.replace(DR_GRPO(), denominator=whole_string(spread(sampling)))
        np.testing.assert_allclose(estimate(row, logits, reward, sampling), want, rtol=0, atol=1e-8)
    # SFT's and REINFORCE's choice, d = pi per token, is exact on the policy's own strings
    np.testing.assert_allclose(estimate(SFT, logits, reward, string_probabilities(logits)), want, rtol=0, atol=1e-8)


def test_property_01_the_supervised_part_is_an_advantage():
    """A = r + mu pi_beta / pi gives the gradient of E r - mu KL(pi_beta || pi), whatever the denominator."""
    logits, reward, other = setup(3)
    author, own = string_probabilities(other), string_probabilities(logits)
    likelihood = exact_gradient(logits, author / own)  # sum of pi_beta grad log pi, pi_beta / pi held fixed
    for mu in (0.5, 2.0):
        row = dataclasses.replace(DR_GRPO(), denominator=whole_string(spread(author)))
        got = estimate(row, logits, reward + mu * author / own, author)
        np.testing.assert_allclose(got, exact_gradient(logits, reward) + mu * likelihood, rtol=0, atol=1e-7)


def test_token_ratios_are_biased_off_policy_and_exact_on_policy():
    """What the paper calls ill-posed: dividing token by token is not the change of measure of the string."""
    logits, reward, other = setup(4)
    want, own, sampled = exact_gradient(logits, reward), string_probabilities(logits), string_probabilities(other)
    stored = np.asarray(token_logprobs(jnp.asarray(other)))
    assert np.abs(estimate(DR_GRPO(), logits, reward, sampled, rollout_logprobs=stored) - want).max() > 0.05
    at_home = np.asarray(token_logprobs(jnp.asarray(logits)))
    for row in (DR_GRPO(), DR_GRPO((0.2, 0.2)), CISPO(), GSPO()):
        got = estimate(row, logits, reward, own, rollout_logprobs=at_home)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-8)


def test_property_07_gspo_denominator_is_the_gradient_of_the_sequence_ratio():
    logits, reward, other = setup(5)
    stored = np.asarray(token_logprobs(jnp.asarray(other)))
    row = dataclasses.replace(GSPO(), stability_mask=everywhere)
    assert row.denominator is sequence_ratio
    sampled = string_probabilities(other)

    def literal(logits):  # A * s per string
        mine = jax.nn.log_softmax(logits)[CONTEXT, STRINGS]
        return jnp.sum(sampled * reward * jnp.exp(jnp.mean(mine - stored.reshape(27, LENGTH), axis=1)))

    got = estimate(row, logits, reward, sampled / LENGTH, rollout_logprobs=stored)
    np.testing.assert_allclose(got, jax.grad(literal)(jnp.asarray(logits)), rtol=0, atol=1e-12)


def test_property_08_exact_cispo_silences_no_token_and_the_table_form_does():
    logits, reward, other = setup(6)
    stored = np.asarray(token_logprobs(jnp.asarray(other)))

    def silent(row):
        def loss(logprobs):
            view = TokenView(
                logprobs, rollout_logprobs=stored, segment_ids=SEGMENTS, live=np.ones(ROWS, bool), max_segments=3
            )
            return jnp.sum(policy_token_loss(row, view, spread(reward)))

        return int((jax.grad(loss)(token_logprobs(jnp.asarray(logits))) == 0).sum())

    assert silent(CISPO(0.2, 0.2)) == 0
    assert 0 < silent(CISPO_TABLE()) < 81
