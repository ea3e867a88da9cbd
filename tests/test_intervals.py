"""Error bars: exact coverage, bootstraps against closed forms, permutation tests against enumeration (P13)."""

from __future__ import annotations

import itertools
import math

import jaxtyping
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from hptjax.diagnostics.intervals import (
    bootstrap_means,
    estimate_mean,
    fixed_benchmark_se,
    paired_difference,
    question_se,
    sign_flip_p,
    two_level_difference,
    wilson,
)

GRID = np.linspace(0.02, 0.98, 97)


def exact_coverage(intervals, trials: int, p: float) -> float:
    """Chance that the interval of a Binomial(trials, p) count holds p, summed over all counts."""
    return sum(
        math.comb(trials, count) * p**count * (1 - p) ** (trials - count)
        for count, (low, high) in enumerate(intervals)
        if low <= p <= high
    )


# the least coverage over the hundredths, and over a grid fine enough to meet the jumps between them
@pytest.mark.parametrize(("trials", "least", "least_between"), [(30, 0.9297, 0.916), (234, 0.9419, 0.933)])
def test_wilson_exact_coverage(trials, least, least_between):
    intervals = [wilson(count, trials) for count in range(trials + 1)]
    assert min(exact_coverage(intervals, trials, p) for p in GRID) == pytest.approx(least, abs=1e-4)
    fine = np.linspace(0.02, 0.98, 2000)
    low, high = np.array(intervals).T
    chances = scipy.stats.binom.pmf(np.arange(trials + 1)[None, :], trials, fine[:, None])
    covered = (low[None, :] <= fine[:, None]) & (fine[:, None] <= high[None, :])
    assert (chances * covered).sum(axis=1).min() >= least_between


def test_wilson_agrees_with_scipy():
    for successes, trials in [(0, 30), (7, 30), (30, 30), (100, 234)]:
        expected = scipy.stats.binomtest(successes, trials).proportion_ci(0.95, "wilson")
        assert wilson(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_covers_where_the_normal_approximation_does_not():
    rates = [count / 30 for count in range(31)]
    halves = [1.96 * math.sqrt(rate * (1 - rate) / 30) for rate in rates]
    normal = [(rate - half, rate + half) for rate, half in zip(rates, halves, strict=True)]
    assert min(exact_coverage(normal, 30, p) for p in GRID) == pytest.approx(0.45, abs=0.01)


def test_wilson_solves_its_equation():
    # the ends are the p with |p_hat - p| = z sqrt(p (1 - p) / n)
    z = 1.959963984540054
    for successes, trials in [(3, 10), (50, 234), (117, 234)]:
        for end in wilson(successes, trials):
            distance = abs(successes / trials - end)
            assert distance == pytest.approx(z * math.sqrt(end * (1 - end) / trials), abs=1e-12)


@settings(max_examples=200)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_wilson_holds_the_share_and_lies_in_the_unit_interval(pair, level):
    low, high = wilson(*pair, level=level)
    assert 0.0 <= low <= pair[0] / pair[1] <= high <= 1.0


@pytest.mark.parametrize("pair", [(-1, 3), (4, 3), (0, 0)])
def test_wilson_refuses_impossible_counts(pair):
    with pytest.raises(ValueError, match="at least one trial"):
        wilson(*pair)


def test_question_se_by_hand():
    # values 0, 1, 1, 0: sd = sqrt(4 x 0.25 / 3), over sqrt(4)
    assert question_se(np.array([0.0, 1.0, 1.0, 0.0])) == pytest.approx(math.sqrt(1 / 3) / 2, abs=1e-15)
    assert math.isnan(question_se(np.array([1.0])))
    # thirty questions at p = 0.5 with one sample: about 9.1 points
    assert question_se(np.array([0.0, 1.0] * 15)) == pytest.approx(0.0928, abs=1e-4)


def test_fixed_benchmark_se_by_hand():
    assert fixed_benchmark_se(np.array([0.04, 0.05])) == pytest.approx(0.3 / 2)


def test_bootstrap_spread_is_the_standard_error():
    values = np.random.default_rng(0).random(200)
    replicates = bootstrap_means(values, resamples=20_000, seed=1)
    assert replicates.std() == pytest.approx(values.std() / math.sqrt(200), rel=0.03)
    assert replicates.mean() == pytest.approx(values.mean(), abs=5e-4)


def test_bootstrap_equals_the_enumeration_of_all_draws():
    # three questions: 27 draws, each as likely
    values = np.array([0.0, 0.3, 1.0])
    every = [sum(draw) / 3 for draw in itertools.product(values, repeat=3)]
    replicates = bootstrap_means(values, resamples=40_000, seed=3)
    for level in (0.1, 0.5, 0.9):
        assert np.mean(replicates <= level) == pytest.approx(np.mean(np.array(every) <= level), abs=0.01)


def test_bootstrap_is_seeded_and_does_not_depend_on_chunks(monkeypatch):
    values = np.random.default_rng(0).random(7)
    first = bootstrap_means(values, resamples=100, seed=5)
    np.testing.assert_array_equal(first, bootstrap_means(values, resamples=100, seed=5))
    assert not np.array_equal(first, bootstrap_means(values, resamples=100, seed=6))
    monkeypatch.setattr("hptjax.diagnostics.intervals.CHUNK_ENTRIES", 21)
    np.testing.assert_allclose(first, bootstrap_means(values, resamples=100, seed=5))


def test_estimate_of_a_mean_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(200):
        rates = rng.beta(0.5, 1.0, size=100)  # mean 1/3
        estimate = estimate_mean(rng.binomial(8, rates) / 8, samples=8, resamples=500, seed=trial)
        hits += estimate.low <= 1 / 3 <= estimate.high
    assert 0.89 <= hits / 200 <= 0.99  # 0.95 +- 4 standard errors of 200 trials


@pytest.mark.parametrize("values", [[0.375], [0.5, 0.5, 0.5, 0.5]])
def test_estimate_mean_has_a_width_where_all_questions_agree(values):
    """A few questions that all have the same share of solved samples do not settle the figure."""
    estimate = estimate_mean(np.array(values), samples=8)
    assert estimate.method == "wilson"
    assert estimate.low < values[0] - 0.1 < values[0] + 0.1 < estimate.high


def test_paired_difference_of_identical_predictions_is_zero():
    values = np.random.default_rng(0).random(50)
    estimate = paired_difference(values, values, samples=4)
    assert (estimate.value, estimate.se, estimate.low, estimate.high) == (0.0, 0.0, 0.0, 0.0)


def test_paired_difference_is_narrower_than_the_two_intervals():
    rng = np.random.default_rng(0)
    before = rng.random(200)
    after = before + 0.05 + 0.02 * rng.standard_normal(200)
    paired = paired_difference(before, after, samples=1)
    alone = estimate_mean(after, samples=1)
    assert 0 < paired.low < paired.value < paired.high
    assert paired.value == pytest.approx((after - before).mean())
    assert paired.high - paired.low < 0.2 * (alone.high - alone.low)


def test_paired_difference_is_antisymmetric_in_its_value_and_refuses_other_questions():
    one, other = np.array([0.0, 0.5, 1.0]), np.array([1.0, 0.5, 0.5])
    assert paired_difference(one, other, samples=1).value == -paired_difference(other, one, samples=1).value
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match=r"same questions on both sides|Q=3"):
        paired_difference(one, other[:2], samples=1)


def test_two_level_bootstrap_of_one_seed_is_the_bootstrap_by_question():
    values = np.random.default_rng(0).standard_normal(80)
    joint = two_level_difference(values[None, :], samples=1, resamples=20_000)
    single = paired_difference(np.zeros(80), values, samples=1, resamples=20_000)
    assert joint.value == pytest.approx(single.value)
    assert joint.low == pytest.approx(single.low, abs=0.02)
    assert joint.high == pytest.approx(single.high, abs=0.02)


def test_two_level_bootstrap_adds_the_spread_of_seeds_and_of_questions():
    # a seed effect u_s and a question effect w_q: the replicate is mean of drawn u + mean of drawn w, independent
    rng = np.random.default_rng(1)
    seed_effect, question_effect = rng.standard_normal(5), 2 * rng.standard_normal(60)
    estimate = two_level_difference(seed_effect[:, None] + question_effect[None, :], samples=1, resamples=40_000)
    expected = math.sqrt(seed_effect.var() / 5 + question_effect.var() / 60)
    assert estimate.se == pytest.approx(expected, rel=0.02)
    assert estimate.value == pytest.approx(seed_effect.mean() + question_effect.mean())
    assert estimate.method == "bootstrap over 5 seeds and questions"


def test_sign_flip_p_by_hand():
    # |sum| of 1, 1, 1, 1 is reached by two of sixteen patterns; zeros take no part
    assert sign_flip_p(np.array([1.0, 1.0, 0.0, 1.0, 1.0])) == 2 / 16
    # 3 - 1 = 2: patterns +3 +1, +3 -1, -3 +1, -3 -1 have |sum| 4, 2, 2, 4
    assert sign_flip_p(np.array([3.0, -1.0])) == 1.0
    assert sign_flip_p(np.zeros(5)) == 1.0


def test_sign_flip_p_by_sampling_agrees_with_enumeration():
    differences = np.random.default_rng(4).standard_normal(14) + 0.4
    signs = np.array(list(itertools.product((-1, 1), repeat=14)))
    exact = np.mean(np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12)
    assert sign_flip_p(differences, flips=40_000, seed=0) == pytest.approx(exact, abs=0.01)
    assert sign_flip_p(np.ones(40), flips=999) == 1 / 1000  # never 0
