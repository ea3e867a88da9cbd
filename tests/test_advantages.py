"""Advantages against the numbers of `spec/hpt.md` section 6 and `spec/methods.md` section 11."""

from __future__ import annotations

import numpy as np
import pytest

from hptjax.losses.advantages import centred, ones, raw_reward, signed, standardised

ALL = (ones, raw_reward, signed, centred, standardised)
ONE_OF_EIGHT, ONE_GROUP = np.array([1.0] + [0.0] * 7), np.zeros(8, int)


def test_centred_one_solved_of_eight_property_17():
    got = centred(ONE_OF_EIGHT, ONE_GROUP)
    np.testing.assert_array_equal(got, [0.875] + [-0.125] * 7)
    assert got.sum() == 0


def test_standardised_one_solved_of_eight_property_18():
    got = standardised(ONE_OF_EIGHT, ONE_GROUP)
    np.testing.assert_allclose(got, [2.47486] + [-0.35355] * 7, atol=1e-4)
    # the other convention is far from these numbers
    assert np.abs(standardised(ONE_OF_EIGHT, ONE_GROUP, ddof=0) - got).max() > 0.1


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_equal_rewards_give_exactly_zero_properties_17_and_18(reward):
    for advantage in (centred, standardised):
        np.testing.assert_array_equal(advantage(np.full(8, reward), ONE_GROUP), np.zeros(8))


def test_group_of_one_keeps_its_reward():
    rewards, groups = np.array([1.0, 0.3]), np.array([4, 9])
    np.testing.assert_array_equal(centred(rewards, groups), rewards)
    np.testing.assert_allclose(standardised(rewards, groups), rewards / (1 + 1e-6), rtol=1e-15)


@pytest.mark.parametrize("advantage", ALL)
def test_advantages_follow_the_group_id_not_the_row_order_property_22(advantage):
    rng = np.random.default_rng(0)
    groups = np.repeat(np.array([70, 3, 12, 5]), [1, 2, 5, 8])
    rewards = rng.normal(size=16)
    order = rng.permutation(16)
    np.testing.assert_array_equal(advantage(rewards[order], groups[order]), advantage(rewards, groups)[order])


def test_advantages_equal_a_loop_over_ragged_groups():
    rng = np.random.default_rng(1)
    groups, rewards = rng.integers(0, 5, 40), rng.normal(size=40)
    for i in range(40):
        members = [rewards[j] for j in range(40) if groups[j] == groups[i]]
        centre = sum(members) / len(members)
        variance = sum((r - centre) ** 2 for r in members) / (len(members) - 1)
        np.testing.assert_allclose(centred(rewards, groups)[i], rewards[i] - centre, atol=1e-12)
        want = (rewards[i] - centre) / (variance**0.5 + 1e-6)
        np.testing.assert_allclose(standardised(rewards, groups)[i], want, atol=1e-12)


def test_standardised_ignores_affine_changes_of_the_reward_and_centred_shifts():
    rng = np.random.default_rng(2)
    groups, rewards = np.repeat(np.arange(4), 4), rng.normal(size=16)
    plain = standardised(rewards, groups, eps=0.0)
    np.testing.assert_allclose(standardised(3 * rewards - 7, groups, eps=0.0), plain, atol=1e-12)
    np.testing.assert_allclose(centred(3 * rewards - 7, groups), 3 * centred(rewards, groups), atol=1e-12)
    # two rollouts, one right: +-1/sqrt(2) with ddof 1, +-1 with ddof 0
    pair, one = np.array([1.0, 0.0]), np.zeros(2, int)
    np.testing.assert_allclose(standardised(pair, one, eps=0.0), [0.5**0.5, -(0.5**0.5)], rtol=1e-12)
    np.testing.assert_allclose(standardised(pair, one, eps=0.0, ddof=0), [1, -1], rtol=1e-12)


def test_fixed_advantages_by_hand():
    rewards, groups = np.array([1.0, 0.0, -0.5]), np.array([0, 0, 1])
    np.testing.assert_array_equal(ones(rewards, groups), [1, 1, 1])
    np.testing.assert_array_equal(raw_reward(rewards, groups), rewards)
    np.testing.assert_array_equal(signed(rewards, groups), [1, -1, -1])


@pytest.mark.parametrize("advantage", ALL)
def test_advantages_of_no_samples_are_empty_and_inputs_stay_untouched(advantage):
    assert advantage(np.zeros(0), np.zeros(0, int)).shape == (0,)
    rewards = np.array([1.0, 0.0])
    advantage(rewards, np.zeros(2, int))[:] = 99
    np.testing.assert_array_equal(rewards, [1, 0])


def test_advantages_refuse_a_reward_that_is_no_number():
    for advantage in (raw_reward, signed, centred, standardised):
        with pytest.raises(ValueError, match="rewards"):
            advantage(np.array([1.0, np.nan]), np.zeros(2, int))
