"""The token losses against literal losses, enumerated toy policies and hand-worked numbers (`spec/hpt.md` 6)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hptjax.losses import table
from hptjax.losses.advantages import centred, ones, raw_reward, signed, standardised
from hptjax.losses.denominators import current_policy, rollout_policy, unit
from hptjax.losses.reducers import Population, constant, official_rl, official_sft, token_mean
from hptjax.losses.stability import everywhere, ppo_clip
from hptjax.losses.table import DR_GRPO, GRPO, PPO, REINFORCE, SFT, Estimator
from hptjax.losses.upge import coefficient_token_loss, upge_coefficient, upge_token_loss, weighted_sum
from hptjax.losses.view import TokenView

B, T, V = 3, 4, 5
ROWS = (SFT, REINFORCE, PPO((0.2, 0.2)), GRPO((0.2, 0.28)), DR_GRPO((0.2, 0.2)), DR_GRPO())


def toy(seed: int = 0):
    """A tabular policy: logits [B T V], targets [B T], old log-probs, advantages of both signs, ragged weights."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(B, T, V)).astype(np.float32)
    targets = rng.integers(0, V, (B, T))
    logprobs = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[:, :, None], -1)[:, :, 0]
    # ratios in [0.3, 2] on both sides of the clip, none closer to a boundary than 1e-3
    ratio = rng.uniform(0.3, 2.0, (B, T))
    for boundary in (0.8, 1.2, 1.28):
        ratio = np.where(np.abs(ratio - boundary) < 1e-3, boundary + 2e-3, ratio)
    advantages = rng.normal(size=(B, T)).astype(np.float32)
    weights = rng.uniform(0.1, 1, (B, T)) * (np.arange(T)[None, :] < np.array([4, 2, 3])[:, None])
    return logits, targets, (logprobs - np.log(ratio)).astype(np.float32), advantages, weights.astype(np.float32)


def policy_token_loss(row, logprobs, old, advantages):
    """The row's token loss, every token live and every batch row a sequence of its own."""
    return table.policy_token_loss(row, view_of(logprobs, old), advantages)


def view_of(logprobs, old):
    shape = np.shape(logprobs)
    segments = np.ones(shape, np.int32)
    return TokenView(logprobs, rollout_logprobs=old, segment_ids=segments, live=np.ones(shape, bool))


def target_logprobs(logits, targets):
    return jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(targets)[:, :, None], -1)[:, :, 0]


def gradient(token_loss, logits, targets, weights):
    """Gradient in the logits of the weighted sum of `token_loss(logprobs)`."""
    return np.asarray(jax.grad(lambda z: weighted_sum(token_loss(target_logprobs(z, targets)), weights))(logits))


def row_gradient(row, logits, targets, old, advantages, weights):
    return gradient(lambda lp: policy_token_loss(row, lp, old, advantages), logits, targets, weights)


def literal_gradient(logits, targets, coefficient, weights):
    """Float64 NumPy: -w * c * grad log softmax, token by token."""
    out = np.zeros(logits.shape)
    for b in range(B):
        for t in range(T):
            z = logits[b, t].astype(np.float64)
            p = np.exp(z - z.max())
            p /= p.sum()
            out[b, t] = -weights[b, t] * coefficient[b, t] * (np.eye(V)[targets[b, t]] - p)
    return out


# The identity behind it all, on a policy whose 9 sequences can be written down


def sequence_logprobs(params):
    """log pi of all 9 sequences of V=3, T=2: [9 1]; params: logits of the first token, then of the second given it."""
    first, second = jax.nn.log_softmax(params[0]), jax.nn.log_softmax(params[1:])
    return (first[:, None] + second).reshape(9, 1)


@pytest.mark.parametrize("mu", [0.0, 0.5, 2.0])
def test_upge_equals_gradient_of_common_objective_property_01(mu):
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        params = jnp.asarray(rng.normal(size=(4, 3)))
        reward = jnp.asarray(rng.normal(size=(9, 1)))
        demonstrator = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(9, 1))), axis=0)

        def objective(params):
            logprobs = sequence_logprobs(params)
            kl = jnp.sum(jnp.exp(demonstrator) * (demonstrator - logprobs))
            return jnp.sum(jnp.exp(logprobs) * reward) - mu * kl

        want = jax.grad(objective)(params)
        assert np.abs(want).max() > 0.01
        for _ in range(3):  # whatever the denominator policy
            denominator = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(9, 1))), axis=0)

            def estimate(params, denominator=denominator):
                logprobs = sequence_logprobs(params)
                unified = reward + mu * jnp.exp(demonstrator - logprobs)
                loss = upge_token_loss(logprobs, denominator, unified, jnp.ones((9, 1)))
                return weighted_sum(loss, jnp.exp(denominator))

            assert jax.grad(estimate)(params).dtype == np.float64
            np.testing.assert_allclose(-jax.grad(estimate)(params), want, rtol=0, atol=1e-9)


def test_trust_region_kl_equals_shifted_advantage_property_11():
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        params, strength = jnp.asarray(rng.normal(size=(4, 3))), 0.7
        reward = jnp.asarray(rng.normal(size=(9, 1)))
        reference = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(9, 1))), axis=0)

        def objective(params):
            logprobs = sequence_logprobs(params)
            return jnp.sum(jnp.exp(logprobs) * (reward - strength * (logprobs - reference)))

        def estimate(params):
            logprobs = sequence_logprobs(params)
            shifted = reward - strength * (logprobs - reference)
            loss = upge_token_loss(logprobs, reference, shifted, jnp.ones((9, 1)))
            return weighted_sum(loss, jnp.exp(reference))

        np.testing.assert_allclose(-jax.grad(estimate)(params), jax.grad(objective)(params), rtol=0, atol=1e-9)


# The rows


def test_sft_equals_summed_cross_entropy_property_02():
    logits, targets, old, _, _ = toy()
    advantage = ones(np.zeros(B), np.arange(B)).astype(np.float32)[:, None] * np.ones((B, T), np.float32)
    got = row_gradient(SFT, logits, targets, old, advantage, np.ones((B, T), np.float32))
    want = jax.grad(lambda z: -jnp.sum(target_logprobs(z, targets)))(logits)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_reinforce_is_signed_sft_property_03():
    logits, targets, old, _, weights = toy()
    plus = np.ones((B, T), np.float32)
    likelihood = row_gradient(SFT, logits, targets, old, plus, weights)
    np.testing.assert_array_equal(row_gradient(REINFORCE, logits, targets, old, plus, weights), likelihood)
    np.testing.assert_array_equal(row_gradient(REINFORCE, logits, targets, old, -plus, weights), -likelihood)
    np.testing.assert_array_equal(REINFORCE.advantage(np.array([1.0, 0.0, 0.2]), np.arange(3)), [1.0, -1.0, 1.0])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_collapses_to_reinforce_on_policy_property_04(row):
    logits, targets, _, advantages, weights = toy()
    sampled = np.asarray(target_logprobs(logits, targets))
    got = row_gradient(row, logits, targets, sampled, advantages, weights)
    np.testing.assert_allclose(got, literal_gradient(logits, targets, advantages, weights), rtol=0, atol=1e-6)


@pytest.mark.parametrize("row", [PPO((0.2, 0.28)), GRPO((0.2, 0.28)), DR_GRPO((0.2, 0.28))], ids=lambda row: row.name)
def test_clip_rows_equal_gradient_of_min_clip_surrogate_property_05(row):
    logits, targets, old, advantages, weights = toy(3)

    def surrogate(z):
        ratio = jnp.exp(target_logprobs(z, targets) - old)
        clipped = jnp.clip(ratio, 0.8, 1.28)
        return -jnp.sum(weights * jnp.minimum(ratio * advantages, clipped * advantages))

    got = row_gradient(row, logits, targets, old, advantages, weights)
    np.testing.assert_allclose(got, jax.grad(surrogate)(logits), rtol=0, atol=1e-6)
    masked_off = np.abs(got).max(-1)[weights > 0] == 0
    assert 0 < masked_off.sum() < masked_off.size  # some tokens are clipped, not all


def moved(log_ratio):
    """A view whose log ratios to the rollout policy are these."""
    return view_of(log_ratio, np.zeros_like(log_ratio))


def test_ppo_clip_mask_four_quadrants_property_05():
    # A:     +    +    -    -   ratio 1.5 and 0.5 at 0.2: only the harmful direction is off
    mask = ppo_clip(0.2, 0.2)(moved(np.log([[1.5, 0.5, 1.5, 0.5]])), np.array([[1.0, 1.0, -1.0, -1.0]]))
    np.testing.assert_array_equal(mask, [[0, 1, 1, 0]])


def test_ppo_clip_higher_keeps_what_symmetric_clip_drops_property_06():
    log_ratio, advantages = moved(np.log(np.array([[1.25, 1.29]]))), np.ones((1, 2))
    np.testing.assert_array_equal(ppo_clip(0.2, 0.28)(log_ratio, advantages), [[1, 0]])
    np.testing.assert_array_equal(ppo_clip(0.2, 0.2)(log_ratio, advantages), [[0, 0]])


def test_ppo_clip_infinite_width_never_masks_and_negative_width_raises():
    log_ratio, advantages = moved(np.array([[40.0, -40.0]])), np.array([[1.0, -1.0]])
    np.testing.assert_array_equal(ppo_clip(math.inf, math.inf)(log_ratio, advantages), [[1, 1]])
    with pytest.raises(ValueError, match="clip"):
        ppo_clip(-0.1, 0.2)


def test_unclipped_dr_grpo_is_linear_in_the_ratio_property_21():
    logits, targets, old, advantages, weights = toy(4)
    current = np.asarray(target_logprobs(logits, targets))
    base = row_gradient(DR_GRPO(), logits, targets, old, advantages, weights)
    for factor in (0.25, 3.0, 50.0):  # dividing the old policy's probability by it multiplies every ratio
        got = row_gradient(DR_GRPO(), logits, targets, old - np.float32(math.log(factor)), advantages, weights)
        np.testing.assert_allclose(got, factor * base, rtol=1e-4, atol=1e-6)
    # the first update: re-scored by the trainer, the ratio is 1, and exactly 1 against sg(logprobs)
    np.testing.assert_array_equal(upge_coefficient(current, current, np.ones((B, T), np.float32), np.ones_like(old)), 1)
    at_one = row_gradient(DR_GRPO(), logits, targets, current, advantages, weights)
    np.testing.assert_allclose(at_one, literal_gradient(logits, targets, advantages, weights), rtol=0, atol=1e-6)


def test_rows_name_their_four_components():
    choices = [(row.stability_mask is everywhere, row.denominator, row.advantage) for row in ROWS]
    assert choices == [
        (True, current_policy, ones),
        (True, current_policy, signed),
        (False, rollout_policy, raw_reward),
        (False, rollout_policy, standardised),
        (False, rollout_policy, centred),
        (True, rollout_policy, centred),
    ]
    assert all(row.likelihood is upge_token_loss and row.source and row.formula for row in ROWS)
    assert [row.reads_rollout_logprobs for row in ROWS] == [False, False, True, True, True, True]


# A new method is one row


def luffy_denominator(view, advantages):
    """log of (p + g)^2 / g with g = 0.1: the weight p / d is g p / (p + g)^2."""
    return jax.lax.stop_gradient(2 * jnp.log(jnp.exp(view.logprobs) + 0.1) - math.log(0.1))


def cispo_denominator(view, advantages):
    """log of p / clip(ratio, 0.8, 1.2)."""
    ratio = jnp.exp(view.logprobs - view.rollout_logprobs)
    return jax.lax.stop_gradient(view.logprobs - jnp.log(jnp.clip(ratio, 0.8, 1.2)))


def extended(name, **components):
    return dataclasses.replace(DR_GRPO(), name=name, formula="test", source="test", **components)


def test_cispo_exact_keeps_every_token_and_its_table_form_does_not_property_08():
    logits, targets, old, advantages, _ = toy(5)
    weights = np.ones((B, T), np.float32)
    ratio = np.exp(np.asarray(target_logprobs(logits, targets)) - old)
    exact = row_gradient(extended("CISPO", denominator=cispo_denominator), logits, targets, old, advantages, weights)
    want = literal_gradient(logits, targets, np.clip(ratio, 0.8, 1.2) * advantages, weights)
    np.testing.assert_allclose(exact, want, rtol=0, atol=1e-6)
    assert (np.abs(exact).max(-1) > 0).all()
    assert (np.abs(row_gradient(DR_GRPO((0.2, 0.2)), logits, targets, old, advantages, weights)).max(-1) == 0).any()


def test_luffy_shaping_weights_property_09():
    row = extended("LUFFY", denominator=luffy_denominator)
    logprobs = np.log(np.array([[0.1, 0.9, 0.01]]))
    advantages = np.full((1, 3), 2.0)
    grads = -jax.grad(lambda lp: policy_token_loss(row, lp, jnp.zeros((1, 3)), advantages).sum())(jnp.asarray(logprobs))
    np.testing.assert_allclose(grads / 2, [[0.25, 0.09, 0.0826]], atol=1e-4)
    shaping = jax.grad(lambda lp: jnp.sum(jnp.exp(lp) / (jnp.exp(lp) + 0.1)))(jnp.asarray(logprobs))  # f = p/(p+g)
    np.testing.assert_allclose(grads / 2, shaping, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_unit_denominator_weighs_by_probability_property_10(dtype):
    row = extended("offline REINFORCE", denominator=unit)
    logprobs = jnp.asarray([[-0.5, -10.0, -80.0]], dtype)

    def loss(logprobs):
        return policy_token_loss(row, logprobs, jnp.zeros((1, 3), dtype), jnp.full((1, 3), 2, dtype))

    value, grads = jax.value_and_grad(lambda lp: loss(lp).sum())(logprobs)
    assert loss(logprobs).dtype == dtype
    assert np.isfinite(np.asarray(value, np.float32))
    want = -2 * np.exp([[-0.5, -10.0, -80.0]])
    np.testing.assert_allclose(np.asarray(grads, np.float64), want, rtol=2e-2 if dtype == jnp.bfloat16 else 1e-5)


def test_dft_row_is_minus_gradient_of_probability():
    logits, targets, old, _, weights = toy(6)
    dft = Estimator(
        name="DFT", stability_mask=everywhere, denominator=unit, advantage=ones, formula="grad pi", source="2508.05629"
    )
    got = row_gradient(dft, logits, targets, old, np.ones((B, T), np.float32), weights)
    want = jax.grad(lambda z: -jnp.sum(weights * jnp.exp(target_logprobs(z, targets))))(logits)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


# Gradient contract


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_gradient_is_zero_through_advantages_and_rollout_logprobs(row):
    logits, targets, old, advantages, weights = toy(7)
    logprobs = target_logprobs(logits, targets)
    by_old, by_advantages, by_logprobs = jax.grad(
        lambda o, a, lp: weighted_sum(policy_token_loss(row, lp, o, a), weights), argnums=(0, 1, 2)
    )(jnp.asarray(old), jnp.asarray(advantages), logprobs)
    np.testing.assert_array_equal(by_old, 0)
    np.testing.assert_array_equal(by_advantages, 0)
    np.testing.assert_array_equal(np.asarray(by_logprobs)[weights == 0], 0)
    assert np.abs(by_logprobs).max() > 0


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e38])
def test_garbage_where_weight_is_zero_changes_nothing_property_25(row, garbage):
    logits, targets, old, advantages, weights = toy(8)
    dead = weights == 0
    logprobs = np.asarray(target_logprobs(logits, targets))

    def value_and_gradient(lp, o, a):
        return jax.value_and_grad(lambda x: weighted_sum(policy_token_loss(row, x, o, a), weights))(jnp.asarray(lp))

    clean = value_and_gradient(logprobs, old, advantages)

    def spoilt(x):
        return np.where(dead, np.float32(garbage), x)

    for dirty in (
        value_and_gradient(spoilt(logprobs), spoilt(old), spoilt(advantages)),
        value_and_gradient(logprobs, old, spoilt(advantages)),
        value_and_gradient(logprobs, spoilt(old), advantages),
    ):
        np.testing.assert_array_equal(dirty[0], clean[0])
        np.testing.assert_array_equal(dirty[1], clean[1])


def test_nan_on_a_live_token_is_seen():
    logprobs, one = jnp.full((1, 2), -1.0), np.ones((1, 2), np.float32)
    bad = np.array([[np.nan, 1.0]], np.float32)

    def loss(logprobs):
        return weighted_sum(upge_token_loss(logprobs, logprobs, bad, one), one)

    assert np.isnan(loss(logprobs))
    np.testing.assert_array_equal(np.isnan(jax.grad(loss)(logprobs)), [[True, False]])
    assert np.isnan(weighted_sum(jnp.ones((1, 2)), bad))


def test_upge_coefficient_survives_overflow_where_mask_or_advantage_is_zero():
    # exp(300) overflows; without the inner where, inf * 0 would be NaN
    got = upge_coefficient(
        np.zeros((1, 3), np.float32),
        np.array([[-300.0, -300.0, -1.0]], np.float32),
        np.array([[0.0, 1.0, 2.0]], np.float32),
        np.array([[1.0, 0.0, 1.0]], np.float32),
    )
    np.testing.assert_allclose(got, [[0, 0, 2 * math.e]], rtol=1e-6)


def test_weighted_sum_adds_in_fp32():
    # 1001 is no bf16 number
    assert float(weighted_sum(jnp.ones((1, 1001), jnp.bfloat16), jnp.ones((1, 1001)))) == 1001.0
    assert weighted_sum(jnp.ones((1, 3)), jnp.zeros((1, 3))) == 0


def test_coefficient_token_loss_value_and_gradient_by_hand():
    value, (by_coefficient, by_logprobs) = jax.value_and_grad(
        lambda c, lp: coefficient_token_loss(c, lp)[0, 0], argnums=(0, 1)
    )(jnp.full((1, 1), 3.0), jnp.full((1, 1), -2.0))
    assert (value, by_coefficient[0, 0], by_logprobs[0, 0]) == (6, 0, -3)


# Whole updates: estimator x reducer, by hand


def update_loss(row, reducer, lengths, advantages, groups=None, width=8, logprob=-1.0):
    """Value of one term over a padded [N, width] batch of `row` at ratio 1, all log-probs equal."""
    lengths = np.array(lengths)
    groups = np.arange(len(lengths)) if groups is None else np.array(groups)
    mask = np.arange(width)[None, :] < lengths[:, None]
    weights = (reducer(Population(lengths, groups))[:, None] * mask).astype(np.float32)
    logprobs = np.full(mask.shape, logprob, np.float32)
    per_token = np.broadcast_to(np.array(advantages, np.float32)[:, None], mask.shape)
    return float(weighted_sum(policy_token_loss(row, logprobs, logprobs, per_token), weights))


def test_official_rl_loss_on_hand_batch_property_19():
    # -(0.5 * 3 - 0.5 * 5) / 8192 = 1.2207e-4; the surrogate -sg(A * 1) * logp has that value at logp = 1
    for width in (8, 16, 64):  # the padded width is no part of it
        got = update_loss(DR_GRPO(), official_rl(8192, 1), [3, 5], [0.5, -0.5], width=width, logprob=1.0)
        assert got == pytest.approx(1.2207e-4, rel=1e-4)
    got = update_loss(DR_GRPO(), official_rl(16384, 1), [3, 5], [0.5, -0.5], logprob=1.0)
    assert got == pytest.approx(1.2207e-4 / 2, rel=1e-4)


def test_rl_preset_has_no_length_or_row_normalisation_property_20():
    reducer = official_rl(8192, 1)
    np.testing.assert_array_equal(reducer(Population(np.array([10, 1000]), np.array([0, 0]))), [1 / 8192] * 2)
    once = update_loss(DR_GRPO(), reducer, [3], [0.5])
    assert update_loss(DR_GRPO(), reducer, [3, 3], [0.5, 0.5]) == pytest.approx(2 * once, rel=1e-6)


def test_sft_presets_on_two_demonstrations_property_23():
    # (NLL sum, tokens) = (100, 100) and (900, 300): NLL 1 and 3 per token
    counts, groups = np.array([100, 300]), np.array([0, 1])
    mask = np.arange(300)[None, :] < counts[:, None]
    logprobs = np.broadcast_to(np.array([[-1.0], [-3.0]], np.float32), mask.shape)

    def loss(weights):
        per_token = (weights[:, None] * mask).astype(np.float32)
        return float(
            weighted_sum(policy_token_loss(SFT, logprobs, logprobs, np.ones(mask.shape, np.float32)), per_token)
        )

    def partitioned(partition):
        return Population(counts, groups, np.array(partition))

    assert loss(official_sft(1)(partitioned([0, 0]))) == pytest.approx(2.5, rel=1e-6)
    assert loss(official_sft(1)(partitioned([0, 1]))) == pytest.approx(4.0, rel=1e-6)
    for partition in ([0, 0], [0, 1]):
        assert loss(token_mean(partitioned(partition))) == pytest.approx(2.5, rel=1e-6)


def test_coefficient_scales_only_its_own_term_property_27():
    logits, targets, old, advantages, _ = toy(9)
    demonstration = np.array([[True], [False], [False]]) & np.ones((B, T), bool)
    rl_weights = np.where(demonstration, 0, 1 / 64).astype(np.float32)

    def total(coefficient):
        sft_weights = np.where(demonstration, coefficient / T, 0).astype(np.float32)

        def loss(z):
            lp = target_logprobs(z, targets)
            sft = weighted_sum(policy_token_loss(SFT, lp, old, jnp.ones((B, T))), sft_weights)
            return sft + weighted_sum(policy_token_loss(DR_GRPO(), lp, old, advantages), rl_weights)

        return np.asarray(jax.grad(loss)(logits))

    none, some, all_of_it = total(0.0), total(0.3), total(1.0)
    np.testing.assert_allclose(some - none, 0.3 * (all_of_it - none), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(some[1:], none[1:])
    assert np.abs(all_of_it - none)[0].max() > 0.01


def test_pure_updates_equal_cross_entropy_and_plain_dr_grpo_property_26():
    logits, targets, old, _, _ = toy(10)
    lengths, rewards, groups = np.array([4, 2, 3]), np.array([1.0, 0.0, 0.0]), np.zeros(3, int)
    mask = np.arange(T)[None, :] < lengths[:, None]

    def per_token(weights):
        return (weights[:, None] * mask).astype(np.float32)

    # all SFT: mean cross-entropy of the live tokens
    got = row_gradient(
        SFT, logits, targets, old, np.ones((B, T), np.float32), per_token(token_mean(Population(lengths, groups)))
    )
    want = literal_gradient(logits, targets, np.ones((B, T)), mask / mask.sum())
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    # all RL: Dr.GRPO written out, sum of (R - mean) * ratio over tokens / constant
    ratio = np.exp(np.asarray(target_logprobs(logits, targets), np.float64) - old)
    written_out = literal_gradient(logits, targets, ratio * (rewards - 1 / 3)[:, None], mask / 96.0)
    advantages = np.broadcast_to(centred(rewards, groups).astype(np.float32)[:, None], (B, T))
    got = row_gradient(
        DR_GRPO(), logits, targets, old, advantages, per_token(constant(96.0)(Population(lengths, groups)))
    )
    np.testing.assert_allclose(got, written_out, rtol=0, atol=1e-6)
