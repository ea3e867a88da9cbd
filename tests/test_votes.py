"""maj@k, G-pass@k and worst@k against every subset written out, and by hand (P12)."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hptjax.diagnostics import votes
from hptjax.diagnostics.passk import average_at_n, pass_at_k
from hptjax.diagnostics.tails import g_pass_at_k, worst_at_k
from hptjax.diagnostics.votes import answer_classes, maj_at_k

RIGHT = 0  # the class that is right in the random questions below


def by_enumeration(classes, solved, k):
    """The vote of every subset, with dictionaries."""
    total, count = 0.0, 0
    for subset in itertools.combinations(range(len(classes)), k):
        tally = {}
        for place in subset:
            if classes[place] >= 0:
                tally[classes[place]] = tally.get(classes[place], 0) + 1
        count += 1
        if tally:
            best = [name for name, times in tally.items() if times == max(tally.values())]
            right = [name for name in best if solved[list(classes).index(name)]]
            total += len(right) / len(best)
    return total / count


QUESTIONS = st.lists(st.integers(-1, 3), min_size=1, max_size=7)


@given(QUESTIONS, st.data())
def test_maj_is_the_mean_vote_of_every_subset(classes, data):
    k = data.draw(st.integers(1, len(classes)))
    solved = [name == RIGHT for name in classes]
    got = maj_at_k(np.array([classes]), np.array([solved]), k)[0]
    assert got == pytest.approx(by_enumeration(classes, solved, k), abs=1e-12)
    shuffled = data.draw(st.permutations(classes))
    again = maj_at_k(np.array([shuffled]), np.array([[name == RIGHT for name in shuffled]]), k)[0]
    assert again == pytest.approx(got, abs=1e-12)  # samples are exchangeable


def test_maj_by_hand():
    def vote(*classes, k=None):
        solved = [[name == RIGHT for name in classes]]
        return maj_at_k(np.array([classes]), np.array(solved), k or len(classes))[0]

    assert vote(0, 0, 1) == 1.0
    assert vote(0, 1) == 0.5  # a tie shares the credit
    assert vote(0, 1, 2) == pytest.approx(1 / 3)
    assert vote(-1, -1, 0) == 1.0  # abstentions never win
    assert vote(-1, -1) == 0.0
    assert vote(1, 1, 1) == 0.0
    assert vote(0, 0, 1, 1, 1, k=1) == pytest.approx(2 / 5)  # maj@1 is avg@n
    assert vote(0, 0, 0, -1, k=1) == pytest.approx(3 / 4)


def test_maj_of_too_many_subsets_is_drawn_and_near_the_exact_one(monkeypatch):
    rng = np.random.default_rng(3)
    classes = rng.integers(-1, 3, (40, 16))
    solved = classes == RIGHT
    exact = maj_at_k(classes, solved, 5)  # 4,368 subsets
    monkeypatch.setattr(votes, "EXACT_SUBSETS", 0)
    drawn = maj_at_k(classes, solved, 5)
    assert np.array_equal(drawn, maj_at_k(classes, solved, 5))
    spread = np.sqrt(exact * (1 - exact) / votes.DRAWN_SUBSETS) + 1e-12
    assert np.all(np.abs(drawn - exact) <= 4 * spread)
    assert not np.array_equal(drawn, exact)


def test_classes_are_greedy_in_the_order_of_the_samples():
    """ "1.5" and "3/2" are one; None and what equals nothing stand alone; nothing asks twice of one spelling."""
    asked = []

    def same(left, right):
        asked.append((left, right))
        return {left, right} <= {"1.5", "3/2", "6/4"}

    assert answer_classes(["7", None, "3/2", "1.5", "7", "6/4"], same).tolist() == [0, -1, 1, 1, 0, 1]
    assert ("7", "7") not in asked
    assert answer_classes([], same).tolist() == []


@given(st.integers(1, 9), st.data())
def test_g_pass_is_the_share_of_subsets_with_enough_right_ones(samples, data):
    right = data.draw(st.integers(0, samples))
    k = data.draw(st.integers(1, samples))
    share = data.draw(st.sampled_from([0.01, 0.25, 0.5, 0.6, 0.75, 1.0]))
    marks = [1] * right + [0] * (samples - right)
    least = max(1, math.ceil(round(share * k, 9)))
    subsets = list(itertools.combinations(marks, k))
    expected = sum(sum(subset) >= least for subset in subsets) / len(subsets)
    assert g_pass_at_k(np.array([right]), samples, k, share)[0] == pytest.approx(expected, abs=1e-12)


def test_g_pass_lies_between_worst_and_pass():
    counts = np.arange(9)
    np.testing.assert_allclose(g_pass_at_k(counts, 8, 4, 1e-6), pass_at_k(counts, 8, 4), atol=1e-12)
    np.testing.assert_allclose(
        worst_at_k(counts, 8, 3), [math.comb(c, 3) / math.comb(8, 3) for c in counts], atol=1e-12
    )
    np.testing.assert_allclose(worst_at_k(counts, 8, 1), average_at_n(counts, 8), atol=1e-12)
    assert g_pass_at_k(np.array([3]), 5, 5, 0.6)[0] == 1.0  # 0.6 x 5 asks for three, not four


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: maj_at_k(np.zeros((1, 3), int), np.zeros((1, 3), bool), 4), r"k in 1..3.*got 4"),
        (lambda: g_pass_at_k(np.array([1]), 3, 4, 0.5), r"k in 1..3.*got 4"),
        (lambda: g_pass_at_k(np.array([1]), 3, 2, 0.0), r"\(0, 1\], got 0"),
        (lambda: worst_at_k(np.array([4]), 3, 2), r"counts \[Q\] in 0..3"),
    ],
)
def test_figures_out_of_range_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
