"""Identities of `spec/methods.md` 11 for penalties, pairs and sums: numbers 16 to 19, 21, 30; value and entropy."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hptjax.losses import kl
from hptjax.losses.entropy import entropy_coefficient_in_use, entropy_token_loss, next_entropy_coefficient
from hptjax.losses.reducers import Population, legacy_micro_token_mean, token_mean
from hptjax.losses.table import DPO, GRPO, REINFORCE, SFT
from hptjax.losses.upge import weighted_sum
from hptjax.losses.value import value_token_loss
from tests.losses.packed import V, literal_gradient, make_toy, row_gradient, same, view_of


def policies(seed=0):
    rng = np.random.default_rng(seed)
    z, reference, rollout = (rng.normal(size=(1, V)) for _ in range(3))
    return z, np.asarray(jax.nn.log_softmax(reference)), np.asarray(jax.nn.log_softmax(rollout))


def expected(token_loss, z, sampled_from):
    """Exact mean over tokens of `sampled_from` of the gradient of `token_loss(logprobs)`."""
    weights = np.exp(sampled_from)
    return jax.grad(lambda z: weighted_sum(token_loss(jax.nn.log_softmax(z)), weights))(jnp.asarray(z))


def kl_gradient(z, reference, *, forward):
    """By central differences in NumPy: of KL(reference || pi) if forward, else of KL(pi || reference)."""

    def divergence(z):
        own = z - np.log(np.exp(z).sum())
        first, second = (reference, own) if forward else (own, reference)
        return (np.exp(first) * (first - second)).sum()

    step = 1e-5
    return np.array([[(divergence(z + step * e) - divergence(z - step * e)) / (2 * step) for e in np.eye(V)]])


def test_identity_16_what_each_k_estimates():
    z, reference, _ = policies()
    own = np.asarray(jax.nn.log_softmax(z))
    reverse, forward = (kl_gradient(z, reference, forward=way) for way in (False, True))
    assert np.abs(reverse - forward).max() > 0.01
    np.testing.assert_allclose(expected(lambda lp: kl.k1_token_loss(lp, reference), z, own), 0, atol=1e-12)
    same(expected(lambda lp: kl.k2_token_loss(lp, reference), z, own), reverse, atol=1e-9)
    same(expected(lambda lp: kl.k3_token_loss(lp, reference), z, own), forward, atol=1e-9)
    same(expected(lambda lp: kl.k3_plus_token_loss(lp, reference), z, own), reverse, atol=1e-9)
    value = (np.exp(own) * (own - reference)).sum()
    for estimate in (kl.k1, kl.k3, kl.k3_plus_token_loss):
        assert float(jnp.sum(np.exp(own) * estimate(own, reference))) == pytest.approx(value, rel=1e-12)


def test_corrected_k3_is_unbiased_off_policy_where_k2_and_k3_are_not():
    z, reference, rollout = policies(1)
    reverse = kl_gradient(z, reference, forward=False)
    same(expected(lambda lp: kl.corrected_k3_token_loss(lp, reference, rollout), z, rollout), reverse, atol=1e-9)
    for plain in (kl.k2_token_loss, kl.k3_token_loss):
        assert np.abs(expected(lambda lp, p=plain: p(lp, reference), z, rollout) - reverse).max() > 0.01

    def literal(lp):
        return jnp.exp(lp - rollout) * (jnp.exp(reference - lp) - 1 + lp - reference)

    own = jnp.asarray(jax.nn.log_softmax(z))
    got, want = (
        jax.grad(lambda lp, f=f: jnp.sum(f(lp)))(own)
        for f in (lambda lp: kl.corrected_k3_token_loss(lp, reference, rollout), literal)
    )
    same(got, want)


def with_penalty(row, toy, weights, penalty, advantages):
    """Gradient of the row's term plus a penalty term with the same weights."""

    def loss(logits):
        view = view_of(toy, logits)
        return weighted_sum(penalty(view), weights)

    return row_gradient(row, toy, weights, advantages) + np.asarray(jax.grad(loss)(jnp.asarray(toy.logits)))


@pytest.mark.parametrize("row", [REINFORCE, GRPO((0.2, 0.2))], ids=lambda row: row.name)
def test_identity_17_k1_in_the_advantage_is_the_k2_loss_at_ratio_one(row):
    toy, beta = make_toy(30, on_policy=True), 0.3
    penalised = with_penalty(
        row, toy, toy.token_mean, lambda v: beta * kl.k2_token_loss(v.logprobs, v.reference_logprobs), toy.advantages
    )
    x = np.where(toy.live, np.asarray(view_of(toy, toy.logits).logprobs) - toy.reference, 0)
    shifted = toy.spread(toy.advantages) - beta * x
    score = score_of(toy)
    same(penalised, -(toy.token_mean * shifted)[:, :, None] * score)


def score_of(toy):
    """grad log pi of every target, in NumPy."""
    p = np.exp(toy.logits) / np.exp(toy.logits).sum(-1, keepdims=True)
    return np.eye(V)[toy.targets] - p


def test_identity_18_kdrl_adds_the_teachers_log_difference_to_the_advantage():
    toy, beta = make_toy(31, on_policy=True), 0.5

    def distil(v):
        return beta * kl.k2_token_loss(v.logprobs, v.teacher_logprobs)

    row = GRPO((0.2, 0.2))
    difference = np.where(toy.live, toy.teacher - np.asarray(view_of(toy, toy.logits).logprobs), 0)
    advantage = toy.spread(toy.advantages)
    score, weights = score_of(toy), toy.token_mean
    got = with_penalty(row, toy, weights, distil, toy.advantages)
    same(got, -(weights * (advantage + beta * difference))[:, :, None] * score)
    # A = 0 is distillation on the policy's own tokens; beta = 0 is GRPO
    nothing = np.zeros(len(toy.sequences))
    same(with_penalty(row, toy, weights, distil, nothing), -(weights * beta * difference)[:, :, None] * score)
    np.testing.assert_array_equal(
        with_penalty(row, toy, weights, lambda v: 0.0 * distil(v), toy.advantages), row_gradient(row, toy, weights)
    )


def test_identity_19_dpo_at_the_reference_is_half_beta_of_reinforce():
    toy = make_toy(32, layout=[[(1, 4), (1, 6)], [(0, 3), (2, 5)], [], []])
    sign, beta, one = np.array([1.0, -1.0, 1.0, -1.0]), 0.4, toy.live.astype(float)
    at_reference = np.asarray(view_of(toy, toy.logits).logprobs)
    got = row_gradient(DPO(beta), toy, one, sign, reference_logprobs=at_reference)
    same(got, beta / 2 * row_gradient(REINFORCE, toy, one, sign))
    assert np.abs(row_gradient(DPO(beta), toy, one, sign) - got).max() > 1e-3


def test_identity_21_token_mean_survives_any_split_and_a_mean_of_means_does_not():
    toy = make_toy(33)
    n = len(toy.sequences)
    ids, lengths = np.arange(n), toy.lengths
    weights = token_mean(Population(lengths, ids))
    want = literal_gradient(toy, lambda lp, A, s: -A * jnp.sum(lp) / float(lengths.sum()))
    whole = row_gradient(SFT, toy, toy.spread(weights))
    same(whole, want)
    rng = np.random.default_rng(0)
    for _ in range(3):
        part = rng.integers(0, 3, n)
        pieces = [row_gradient(SFT, toy, toy.spread(np.where(part == k, weights, 0))) for k in range(3)]
        np.testing.assert_allclose(sum(pieces), whole, rtol=1e-12, atol=1e-15)
        means = legacy_micro_token_mean(Population(lengths, ids, part))
        assert np.abs(row_gradient(SFT, toy, toy.spread(means)) - whole).max() > 1e-3


def test_identity_30_entropy_gradient():
    toy, weights = make_toy(34), make_toy(34).token_mean

    def loss(logits):
        return weighted_sum(entropy_token_loss(view_of(toy, logits).entropy), weights)

    got = np.asarray(jax.grad(loss)(jnp.asarray(toy.logits)))
    p = np.exp(toy.logits) / np.exp(toy.logits).sum(-1, keepdims=True)
    entropy = -(p * np.log(p)).sum(-1, keepdims=True)
    # grad H = -sum_v p_v (log p_v + H) (e_v - p)
    inner = p * (np.log(p) + entropy)
    grad_entropy = -(inner - inner.sum(-1, keepdims=True) * p)
    same(got, -weights[:, :, None] * grad_entropy)


def test_entropy_controller_by_hand():
    step = {"target": 1.0, "step": 0.25}
    assert next_entropy_coefficient(0.5, 0.9, **step) == 0.75
    assert next_entropy_coefficient(0.5, 1.1, **step) == 0.25
    assert next_entropy_coefficient(0.1, 1.1, **step) == 0.0
    assert entropy_coefficient_in_use(0.5, 1.0, target=1.0) == 0.5
    assert entropy_coefficient_in_use(0.5, 1.01, target=1.0) == 0.0


def test_value_loss_by_hand_and_its_gradient():
    # V, V_rollout, return, e = 0.5:   inside | clipped branch larger | unclipped branch larger | not live
    values, old = jnp.array([[1.2, 3.0, 3.0, jnp.nan]]), jnp.array([[1.0, 1.0, 1.0, 0.0]])
    returns, live = jnp.array([[2.0, 4.0, 0.0, jnp.nan]]), jnp.array([[True, True, True, False]])

    def loss(values, clip=0.5):
        return value_token_loss(values, old, returns, live, clip=clip)

    # (0.8^2, (1.5 - 4)^2, 3^2) / 2
    np.testing.assert_allclose(loss(values), [[0.32, 3.125, 4.5, 0.0]], rtol=1e-12)
    np.testing.assert_allclose(jax.grad(lambda v: jnp.sum(loss(v)))(values), [[-0.8, 0.0, 3.0, 0.0]], rtol=1e-12)
    plain = jax.grad(lambda v: jnp.sum(loss(v, math.inf)))(values)
    np.testing.assert_allclose(plain, [[-0.8, -1.0, 3.0, 0.0]], rtol=1e-12)
