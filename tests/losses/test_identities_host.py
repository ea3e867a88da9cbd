"""Identities of `spec/methods.md` 11 for advantages, numbers 13 to 15 and 23, and what else runs on the host."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hptjax.losses.advantages import (
    batch_standardised,
    centred,
    leave_one_out,
    overlong_penalty,
    prefix_hierarchy,
    standardised,
)
from hptjax.losses.mismatch import scale_to_mean_one, truncated_weights
from hptjax.losses.returns import gae, reinforce_pp_advantages, return_to_go, reward_at_end, whitened
from hptjax.losses.selection import entropy_threshold, finished, group_varies
from hptjax.records import FinishReason

GROUPS = np.repeat(np.array([7, 3, 12, 5]), [2, 3, 5, 8])
REWARDS = np.random.default_rng(0).normal(size=18)
LENGTHS = np.array([3, 0, 1, 5])
TOKENS = np.random.default_rng(1).normal(size=9)
VALUES = np.random.default_rng(2).normal(size=9)


def members(group):
    return np.flatnonzero(group == GROUPS)


# 13 to 15


def test_identity_13_rloo_is_dr_grpo_times_g_over_g_minus_one():
    got = leave_one_out(REWARDS, GROUPS)
    sizes = np.array([(g == GROUPS).sum() for g in GROUPS])
    np.testing.assert_allclose(got, sizes / (sizes - 1) * centred(REWARDS, GROUPS), rtol=1e-12)
    for i in range(18):  # by its definition
        others = [REWARDS[j] for j in members(GROUPS[i]) if j != i]
        assert got[i] == pytest.approx(REWARDS[i] - sum(others) / len(others), abs=1e-12)
    np.testing.assert_array_equal(leave_one_out(np.array([0.3]), np.array([1])), [0.3])


def test_identity_14_grpo_ignores_affine_changes_and_group_sums_are_zero():
    plain = standardised(REWARDS, GROUPS, eps=0.0)
    np.testing.assert_allclose(standardised(2.5 * REWARDS - 4, GROUPS, eps=0.0), plain, atol=1e-12)
    np.testing.assert_allclose(centred(REWARDS + 9, GROUPS), centred(REWARDS, GROUPS), atol=1e-12)
    np.testing.assert_allclose(centred(2.5 * REWARDS, GROUPS), 2.5 * centred(REWARDS, GROUPS), atol=1e-12)
    for advantages in (plain, centred(REWARDS, GROUPS), leave_one_out(REWARDS, GROUPS)):
        assert max(abs(advantages[members(g)].sum()) for g in GROUPS) < 1e-12
        assert np.abs(advantages).max() > 0.1


def test_identity_15_two_rollouts_one_right():
    pair, one = np.array([1.0, 0.0]), np.zeros(2, int)
    np.testing.assert_allclose(standardised(pair, one, eps=0.0), [0.5**0.5, -(0.5**0.5)], rtol=1e-12)
    np.testing.assert_allclose(standardised(pair, one, eps=0.0, ddof=0), [1.0, -1.0], rtol=1e-12)


# other group advantages


def test_union_with_the_demonstration_is_a_flag():
    # one demonstration (reward 1) beside three failures, which it lowers only if it is counted
    rewards, groups = np.array([1.0, 0.0, 0.0, 0.0]), np.zeros(4, int)
    rollouts = np.array([False, True, True, True])
    np.testing.assert_allclose(centred(rewards, groups), [0.75, -0.25, -0.25, -0.25])
    np.testing.assert_allclose(centred(rewards, groups, in_baseline=rollouts), [1, 0, 0, 0])
    rewards = np.array([1.0, 0.5, 0.0, -0.5])
    got = standardised(rewards, groups, eps=0.0, in_baseline=rollouts)
    np.testing.assert_allclose(got, [2.0, 1.0, 0.0, -1.0], atol=1e-12)
    np.testing.assert_array_equal(
        standardised(REWARDS, GROUPS, in_baseline=np.ones(18, bool)), standardised(REWARDS, GROUPS)
    )


def test_batch_standardised_has_one_scale():
    own = centred(REWARDS, GROUPS)
    scale = math.sqrt(((own - own.mean()) ** 2).sum() / 17)
    np.testing.assert_allclose(batch_standardised(REWARDS, GROUPS), own / (scale + 1e-6), rtol=1e-10)
    assert np.abs(batch_standardised(REWARDS, GROUPS) - standardised(REWARDS, GROUPS)).max() > 0.05


def test_prefix_hierarchy_by_hand():
    # question 0: three free rollouts (mean 1/3), two with prefix 1, one with prefix 2; question 1: two free
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    groups, prefixes = np.array([0, 0, 0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 2, 0, 0])
    got = prefix_hierarchy(rewards, groups, prefixes)
    third, half = 1 / 3**0.5, 1 / 2**0.5
    want = [2 * third, -third, -third, half, -half, 1.0, 0.0, 0.0]  # a lone prefix keeps its reward
    np.testing.assert_allclose(got.continuation, want, rtol=1e-5)
    np.testing.assert_allclose(got.prefix, [0, 0, 0, (2 / 3) / 2, (-1 / 3) / 2, 2 / 3, 0, 0], rtol=1e-12)


def test_overlong_penalty_by_hand():
    got = overlong_penalty(np.array([0, 6, 7, 8, 9, 10, 11, 50]), 10, 4)
    np.testing.assert_allclose(got, [0, 0, -0.25, -0.5, -0.75, -1, -1, -1])
    with pytest.raises(ValueError, match="cushion_tokens"):
        overlong_penalty(np.array([1]), 10, 0)


# 23: advantages per token


def spans():
    stops = np.cumsum(LENGTHS)
    return list(zip((stops - LENGTHS).tolist(), stops.tolist(), strict=True))


def test_identity_23_gae_at_its_ends():
    to_go = gae(TOKENS, VALUES, LENGTHS, gamma=1.0, smoothing=1.0)
    np.testing.assert_allclose(to_go.advantages, return_to_go(TOKENS, LENGTHS) - VALUES, atol=1e-12)
    np.testing.assert_allclose(to_go.returns, return_to_go(TOKENS, LENGTHS), atol=1e-12)
    error = gae(TOKENS, VALUES, LENGTHS, gamma=0.9, smoothing=0.0)
    for a, b in spans():
        for t in range(a, b):
            after = VALUES[t + 1] if t + 1 < b else 0.0
            assert error.advantages[t] == pytest.approx(TOKENS[t] + 0.9 * after - VALUES[t], abs=1e-12)
    reinforce = gae(TOKENS, np.zeros(9), LENGTHS, gamma=0.9, smoothing=1.0)
    np.testing.assert_allclose(reinforce.advantages, return_to_go(TOKENS, LENGTHS, gamma=0.9), atol=1e-12)
    # between the ends: the sum over k of (gamma lambda)^k delta
    got = gae(TOKENS, VALUES, LENGTHS, gamma=0.9, smoothing=0.8).advantages
    for a, b in spans():
        for t in range(a, b):
            assert got[t] == pytest.approx(sum(0.72 ** (k - t) * error.advantages[k] for k in range(t, b)), abs=1e-12)


def test_gae_carries_through_tokens_the_policy_did_not_write():
    """Leaving the masked tokens out of the arrays altogether gives the same numbers."""
    valid = np.array([1, 0, 1, 1, 1, 0, 0, 1, 1], bool)
    kept = np.array([valid[a:b].sum() for a, b in spans()])
    got = gae(TOKENS, VALUES, LENGTHS, gamma=0.9, smoothing=0.8, valid=valid)
    want = gae(TOKENS[valid], VALUES[valid], kept, gamma=0.9, smoothing=0.8)
    np.testing.assert_allclose(got.advantages[valid], want.advantages, atol=1e-12)
    np.testing.assert_allclose(got.returns[valid], want.returns, atol=1e-12)
    np.testing.assert_array_equal(got.advantages[~valid], 0)


def test_return_to_go_and_reward_at_end_by_hand():
    rewards = reward_at_end(np.array([1.0, 9.0, 2.0, 3.0]), LENGTHS)
    np.testing.assert_array_equal(rewards, [0, 0, 1, 2, 0, 0, 0, 0, 3])
    got = return_to_go(rewards, LENGTHS, gamma=0.5)
    np.testing.assert_allclose(got, [0.25, 0.5, 1, 2, 3 / 16, 3 / 8, 3 / 4, 1.5, 3])
    with pytest.raises(ValueError, match="lengths"):
        return_to_go(rewards, LENGTHS + 1)


def test_whitened_has_mean_zero_and_deviation_one_over_valid_tokens():
    valid = np.arange(9) != 4
    got = whitened(TOKENS, valid, eps=0.0)
    assert got[4] == 0
    assert got[valid].mean() == pytest.approx(0, abs=1e-12)
    assert got[valid].std(ddof=1) == pytest.approx(1, rel=1e-12)
    np.testing.assert_array_equal(whitened(np.ones(1)), 0)
    np.testing.assert_array_equal(whitened(np.full(4, 2.0)), 0)


def test_reinforce_pp_whitens_over_tokens_and_not_over_samples():
    rewards = np.array([1.0, 0.0, 0.0, 0.0])
    got = reinforce_pp_advantages(rewards, np.zeros(4, int), LENGTHS)
    # 3 of 9 tokens have return 1: mean 1/3, variance 9/8 * (1/3) * (2/3) = 1/4
    np.testing.assert_allclose(got, [4 / 3] * 3 + [-2 / 3] * 6, rtol=1e-6)
    with pytest.raises(ValueError, match="rewards"):
        reinforce_pp_advantages(np.array([np.nan, 0, 0, 0]), np.zeros(4, int), LENGTHS)


# selection and mismatch


def test_selection_by_hand():
    groups = np.array([4, 1, 4, 1, 9])
    np.testing.assert_array_equal(group_varies(np.array([1.0, 0, 0, 0, 1]), groups), [1, 0, 1, 0, 0])
    reasons = np.array([int(FinishReason.STOP), int(FinishReason.LENGTH)])
    np.testing.assert_array_equal(finished(reasons), [True, False])
    assert group_varies(np.zeros(0), np.zeros(0, int)).size == 0


def test_entropy_threshold_keeps_the_share():
    entropies = np.random.default_rng(3).permutation(np.arange(50, dtype=float))
    for share, kept in ((0.2, 10), (0.01, 1), (1.0, 50)):
        assert (entropies >= entropy_threshold(entropies, share)).sum() == kept
    with pytest.raises(ValueError, match="share"):
        entropy_threshold(entropies, 0.0)
    with pytest.raises(ValueError, match="none"):
        entropy_threshold(np.zeros(0))


def test_truncated_weights_per_token_and_per_sequence():
    log_ratio = np.log([1.0, 3.0, 0.5, 4.0, 1.0, 1.0, 0.5, 1.0, 1.0])
    np.testing.assert_allclose(truncated_weights(log_ratio, LENGTHS), [1, 2, 0.5, 2, 1, 1, 0.5, 1, 1], rtol=1e-12)
    whole = truncated_weights(log_ratio, LENGTHS, cap=3.0, whole_sequence=True)
    np.testing.assert_allclose(whole, [1.5] * 3 + [3.0] + [0.5] * 5, rtol=1e-12)
    assert (whole * scale_to_mean_one(whole)).mean() == pytest.approx(1.0, rel=1e-12)
    assert scale_to_mean_one(np.zeros(0)) == 0.0
