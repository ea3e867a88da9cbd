"""pass@k against the average over all subsets; its jackknife variance against the loop (P10, P11)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hptjax.diagnostics.passk import average_at_n, estimate_pass_at_k, jackknife_variance, pass_at_k


def by_subsets(n: int, c: int, k: int) -> float:
    """Share of the k-subsets of n samples, c of them solved, that hold a solved one."""
    outcomes = [True] * c + [False] * (n - c)
    subsets = list(itertools.combinations(outcomes, k))
    return sum(any(subset) for subset in subsets) / len(subsets)


@pytest.mark.parametrize("n", [1, 2, 5, 8, 10])
def test_pass_at_k_equals_the_average_over_all_subsets(n):
    for k in range(1, n + 1):
        expected = [by_subsets(n, c, k) for c in range(n + 1)]
        np.testing.assert_allclose(pass_at_k(np.arange(n + 1), n, k), expected, rtol=0, atol=1e-12)


def test_pass_at_1_is_the_share_solved():
    counts = np.arange(17)
    np.testing.assert_allclose(pass_at_k(counts, 16, 1), counts / 16, atol=1e-15)
    np.testing.assert_array_equal(average_at_n(counts, 16), counts / 16)


def test_pass_at_k_is_monotone_and_has_its_ends():
    table = np.stack([pass_at_k(np.arange(65), 64, k) for k in range(1, 65)])  # [k c]
    assert np.all(np.diff(table, axis=0) >= -1e-15)
    assert np.all(np.diff(table, axis=1) >= -1e-15)
    assert np.all(table[:, 0] == 0.0)
    for k in range(1, 65):
        assert np.all(table[k - 1, 64 - k + 1 :] == 1.0)  # fewer than k failures


def test_pass_at_k_is_not_the_plug_in_figure():
    # n = 16, c = 2, k = 8: 1 - C(14, 8) / C(16, 8) = 1 - 3003 / 12870 = 0.7667; with replacement 1 - (7/8)^8 = 0.656
    assert pass_at_k(np.array([2]), 16, 8)[0] == pytest.approx(1 - 3003 / 12870, abs=1e-12)


def test_pass_at_k_stays_finite_for_many_samples():
    value = pass_at_k(np.array([1]), 2048, 1024)[0]
    assert value == pytest.approx(0.5, abs=1e-12)  # one solved sample is in a random half of them


@pytest.mark.parametrize(("n", "k"), [(5, 1), (8, 3), (8, 7), (10, 2)])
def test_jackknife_closed_form_equals_the_loop(n, k):
    for c in range(n + 1):
        outcomes = [1] * c + [0] * (n - c)
        left_out = [by_subsets(n - 1, sum(outcomes) - outcomes[i], k) for i in range(n)]
        centre = sum(left_out) / n
        expected = (n - 1) / n * sum((value - centre) ** 2 for value in left_out)
        assert jackknife_variance(np.array([c]), n, k)[0] == pytest.approx(expected, abs=1e-14)
        assert centre == pytest.approx(by_subsets(n, c, k), abs=1e-12)  # delete-one values average to the estimate


def test_jackknife_for_k_1_is_the_binomial_variance():
    p = np.arange(9) / 8
    np.testing.assert_allclose(jackknife_variance(np.arange(9), 8, 1), p * (1 - p) / 7, atol=1e-15)


def test_estimate_of_pass_at_k_names_its_method():
    some = estimate_pass_at_k(np.array([0, 2, 8, 4] * 25), 8, 1)
    assert (some.questions, some.samples, some.method) == (100, 8, "bootstrap by question")
    assert some.value == pytest.approx(14 / 32)
    assert some.low < some.value < some.high
    none = estimate_pass_at_k(np.zeros(50, np.int64), 8, 8)
    assert (none.value, none.low, none.method) == (0.0, 0.0, "wilson")
    assert none.high > 0.05  # no question solved is no proof that none can be
    assert str(none) == f"0.0000 +- 0.0000 [0.0000, {none.high:.4f}] (Q=50, n=8, wilson)"


@pytest.mark.parametrize(
    ("counts", "n", "k", "message"),
    [([1], 8, 9, r"k in 1\.\.8"), ([1], 8, 0, r"k in 1\.\.8"), ([9], 8, 1, r"0\.\.8, got \[9\]"), ([-1], 8, 1, "got")],
)
def test_pass_at_k_refuses_what_is_out_of_range(counts, n, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(np.array(counts), n, k)


def test_jackknife_refuses_k_equal_to_n():
    with pytest.raises(ValueError, match=r"k in 1\.\.7"):
        jackknife_variance(np.array([1]), 8, 8)
