"""Identities of `spec/methods.md` 11, numbers 20 and 32: who learns from what, on ragged rows with active clipping."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest

from hptjax.hpt.controllers import is_sft_step, sft_chance
from hptjax.hpt.gate import demonstration_sample
from hptjax.hpt.resample import draw_by_weight, opposed_pairs
from hptjax.records import SampleId
from tests.hpt import tabular

EVERYTHING = tabular.judged()
QUESTIONS = EVERYTHING.questions
FAILED = [q for q, solved in zip(QUESTIONS, tabular.SOLVED, strict=True) if solved == 0]
LIMIT = 20  # rollout.max_completion_tokens
ROWS = len(QUESTIONS) * tabular.GROUP


def rollouts_of(questions):
    return [sample for question in questions for sample in EVERYTHING.groups[question.question_id]]


def group_rewards(sample):
    return np.array([s.reward for s in EVERYTHING.groups[sample.group_id]])


def rl_loss(table, questions):
    """Minus the clipped surrogates of the groups, advantages R - mean, over L C with C = rows / 64."""
    scale = 1 / (LIMIT * ROWS / 64)
    rollouts = rollouts_of(questions)
    return -tabular.clipped(table, rollouts, lambda s: s.reward - group_rewards(s).mean(), lambda s: scale)


def sft_loss(table, questions, coefficient=1.0):
    """The token mean of the questions' demonstrations."""
    demonstrations = [demonstration_sample(question) for question in questions]
    tokens = sum(len(s.completion_tokens) for s in demonstrations)
    return -tabular.likelihood(table, demonstrations, lambda s: coefficient / tokens)


def grpo_loss(table, questions):
    """GRPO as published: sequence mean of token means, advantages over the std with ddof 1."""

    def advantage(sample):
        rewards = group_rewards(sample)
        return (sample.reward - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)

    rollouts = rollouts_of(questions)
    return -tabular.clipped(table, rollouts, advantage, lambda s: 1 / (len(s.completion_tokens) * len(rollouts)))


def assert_same(got, want):
    assert np.abs(want).max() > 1e-3
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-7 * np.abs(want).max())  # weights travel in fp32


def test_clipping_is_active_here():
    inputs, targets, _ = tabular.flat(rollouts_of(QUESTIONS), lambda s: 0.0)
    now, then = (np.exp(table) / np.exp(table).sum(1, keepdims=True) for table in (tabular.TABLE, tabular.OLD))
    outside = np.abs(now[inputs, targets] / then[inputs, targets] - 1) > 0.2
    assert 0.1 < outside.mean() < 0.9


@pytest.mark.parametrize("shape", [{"rows": 2, "row_tokens": 60}, {"rows": 5, "row_tokens": 34}], ids=str)
def test_identity_20_hpt_at_gate_zero_is_rl_on_all_groups_and_sft_on_the_failed(shape):
    config = tabular.config_of(hpt={"gate": 0, "sft_coefficient": 0.7})
    got, update = tabular.gradient(config, "hpt", **shape)
    assert len(update.micro_batches) > 1
    # groups that all failed have advantages of 0, so RL may as well take all groups
    want = tabular.literal_gradient(lambda table: rl_loss(table, QUESTIONS) + sft_loss(table, FAILED, 0.7))
    assert_same(got, want)
    others = [q for q in QUESTIONS if q not in FAILED]
    assert_same(got, tabular.literal_gradient(lambda table: rl_loss(table, others) + sft_loss(table, FAILED, 0.7)))


@pytest.mark.parametrize("method", ["hpt", "dr_grpo"])
def test_identity_20_a_negative_gate_is_pure_rl(method):
    got, _ = tabular.gradient(tabular.config_of(hpt={"gate": -1}), "hpt")
    assert_same(got, tabular.literal_gradient(lambda table: rl_loss(table, QUESTIONS)))
    if method != "hpt":  # its own reducer counts all rows and L, as C does here but for the 64
        alone, _ = tabular.gradient(tabular.config_of(), method)
        assert_same(64 * alone, got)


def test_identity_20_a_gate_of_the_whole_group_is_pure_sft():
    got, _ = tabular.gradient(tabular.config_of(hpt={"gate": tabular.GROUP}), "hpt")
    assert_same(got, tabular.literal_gradient(lambda table: sft_loss(table, QUESTIONS)))
    assert_same(tabular.gradient(tabular.config_of(), "sft")[0], got)


@pytest.mark.parametrize("mu", [0.0, 1.0, 0.3])
def test_identity_32_chord_is_grpo_at_mu_zero_and_sft_at_mu_one(mu):
    config = tabular.config_of(methods={"chord_peak": mu, "chord_valley": mu})
    got, _ = tabular.gradient(config, "chord_mu")
    grpo, sft = (tabular.gradient(tabular.config_of(), name)[0] for name in ("grpo", "sft"))
    assert_same(grpo, tabular.literal_gradient(lambda table: grpo_loss(table, QUESTIONS)))
    assert_same(got, (1 - mu) * grpo + mu * sft)
    assert np.abs(grpo - sft).max() > 0.01


def test_identity_32_sasr_is_sft_at_chance_one_and_grpo_at_chance_zero():
    """SASR is no method of the table; its controller chooses between two that are."""
    assert sft_chance(3.0, 2.0, gamma=0.0) == 1.0  # the warm-up does not count: SFT for ever
    assert sft_chance(0.0, 2.0) == 0.0  # nothing left to learn from demonstrations: GRPO for ever
    assert sft_chance(1.0, 3.0, gamma=0.5) == pytest.approx(0.4, abs=1e-15)
    for seed, step in itertools.product(range(5), range(40)):
        assert is_sft_step(1.0, seed=seed, step=step)
        assert not is_sft_step(0.0, seed=seed, step=step)
    drawn = [is_sft_step(0.4, seed=1, step=step) for step in range(2000)]
    assert abs(np.mean(drawn) - 0.4) < 4 * np.sqrt(0.24 / 2000)
    assert drawn == [is_sft_step(0.4, seed=1, step=step) for step in range(2000)]
    with pytest.raises(ValueError, match="chance"):
        is_sft_step(1.2, seed=0, step=0)


def test_identity_32_pts_with_everything_kept_keeps_the_batch():
    rng = np.random.default_rng(0)
    groups = np.repeat([4, 1, 9], [6, 4, 8])[np.argsort(rng.random(18))]
    advantages = rng.normal(size=18)
    whole = opposed_pairs(advantages, groups, keep=1.0)
    assert sorted(whole.ravel().tolist()) == list(range(18))
    half = opposed_pairs(advantages, groups, keep=0.5)
    sizes = collections.Counter(groups[half[:, 0]].tolist())
    assert sizes == {1: 1, 4: 1, 9: 2}
    for better, worse in half:  # by its definition: nobody outside the kept pairs is better or worse
        members = np.flatnonzero(groups == groups[better])
        outside = [i for i in members if i not in half]
        assert advantages[better] > max(advantages[outside])
        assert advantages[worse] < min(advantages[outside])
    assert opposed_pairs(np.array([1.0, 3.0, 2.0]), np.zeros(3, int), keep=1.0).tolist() == [[1, 0]]


IDS = [SampleId(question, 0, 0) for question in range(7)]


def test_identity_32_abs_with_equal_weights_is_uniform_subsampling():
    drawn = draw_by_weight(np.full(7, 2.5), IDS, count=3, rounds=3000, seed=0).reshape(3000, 3)
    assert all(len(set(row)) == 3 for row in drawn.tolist())
    subsets = collections.Counter(tuple(sorted(row)) for row in drawn.tolist())
    assert len(subsets) == 35  # every subset of three of seven, each as often: 3000 / 35, within 5 deviations
    expected = 3000 / 35
    assert max(abs(n - expected) for n in subsets.values()) < 5 * np.sqrt(expected)
    np.testing.assert_array_equal(draw_by_weight(np.ones(7), IDS, count=3, rounds=3000, seed=0).reshape(3000, 3), drawn)


def test_abs_draws_in_proportion_without_replacement_by_id_and_not_by_place():
    weights = np.array([4.0, 1.0, 0.0, 2.0, 1.0, 0.5, 0.5])
    drawn = draw_by_weight(weights, IDS, count=2, rounds=4000, seed=1).reshape(4000, 2)
    p = weights / weights.sum()
    second = np.array([sum(p[i] * p[j] / (1 - p[i]) for i in range(7) if i != j) for j in range(7)])
    for place, exact in ((0, p), (1, second)):
        seen = np.bincount(drawn[:, place], minlength=7) / 4000
        assert np.abs(seen - exact).max() < 5 * np.sqrt(0.25 / 4000)
        assert seen[2] == 0
    order = np.random.default_rng(2).permutation(7)
    moved = draw_by_weight(weights[order], [IDS[i] for i in order], count=2, rounds=50, seed=1)
    np.testing.assert_array_equal(order[moved], drawn[:50].ravel())
    assert draw_by_weight(np.array([0.0, 1.0]), IDS[:2], count=2, rounds=1, seed=0).tolist() == [1]
    with pytest.raises(ValueError, match="weights"):
        draw_by_weight(-weights, IDS, count=1, rounds=1, seed=0)
