"""The packer: nothing lost, nothing split, rows full."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hptjax.hpt.pack import group_rows, pack


def pack_lists(lengths: list[int], bundles: list[int] | None = None, **limits: Any) -> list[list[int]]:
    bundles = [-1] * len(lengths) if bundles is None else bundles
    return pack(np.asarray(lengths, np.int64), np.asarray(bundles, np.int64), **limits)


def test_pack_golden() -> None:
    """By hand, rows of 10: 7 opens row 0; 6 opens row 1; 4 goes to row 1 (10); 3 to row 0 (10); 2 and 2 open row 2."""
    assert pack_lists([2, 6, 3, 7, 2, 4], row_tokens=10, max_segments=9) == [[3, 2], [1, 5], [0, 4]]


def test_pack_golden_segment_limit() -> None:
    """By hand, two segments a row: [5, 1], then [1, 1]; there is room for tokens, not for segments."""
    assert pack_lists([5, 1, 1, 1], row_tokens=100, max_segments=2) == [[0, 1], [2, 3]]


def test_pack_golden_bundle() -> None:
    """Bundle 4 needs 3 + 5 = 8 positions, so it comes before the 6 and stays in one row."""
    assert pack_lists([3, 6, 5, 4], [4, -1, 4, -1], row_tokens=10, max_segments=9) == [[0, 2], [1, 3]]


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(-1, 4)), max_size=30),
    st.integers(1, 8),
)
def test_pack_places_every_sample_once_within_limits(samples: list[tuple[int, int]], max_segments: int) -> None:
    lengths, bundles = [s[0] for s in samples], [s[1] for s in samples]
    row_tokens = 20
    try:
        rows = pack_lists(lengths, bundles, row_tokens=row_tokens, max_segments=max_segments)
    except ValueError:
        sizes = [[n for n, b in samples if b == bundle] for bundle in set(bundles) - {-1}]
        assert any(sum(size) > row_tokens or len(size) > max_segments for size in sizes)
        return
    assert sorted(i for row in rows for i in row) == list(range(len(samples)))
    for row in rows:
        assert 1 <= len(row) <= max_segments
        assert sum(lengths[i] for i in row) <= row_tokens
    for bundle in set(bundles) - {-1}:
        assert sum(any(bundles[i] == bundle for i in row) for row in rows) == 1


@settings(max_examples=40)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_pack_rows_do_not_depend_on_order(lengths: list[int], rng: Any) -> None:
    def as_lengths(values: list[int]) -> list[list[int]]:
        return [[values[i] for i in row] for row in pack_lists(values, row_tokens=16, max_segments=40)]

    rows = as_lengths(lengths)
    shuffled = list(lengths)
    rng.shuffle(shuffled)
    assert as_lengths(shuffled) == rows
    assert sum(2 * sum(row) <= 16 for row in rows) <= 1  # first fit: two half-empty rows would have been one


@pytest.mark.parametrize(
    ("lengths", "bundles", "message"),
    [
        ([3, 9], [-1, -1], r"sample b has 9 target positions, but a row holds 8.*batch\.row_tokens"),
        ([5, 4], [2, 2], r"bundle of samples a, b has 9 target positions.*batch\.row_tokens"),
        ([1, 1, 1], [2, 2, 2], r"bundle of samples a, b, c has 3 segments, but a row holds 2.*batch\.max_segments"),
        ([1, 0], [-1, -1], r"sample b: expected lengths of at least 1"),
    ],
)
def test_pack_refuses_what_no_row_holds(lengths: list[int], bundles: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_lists(lengths, bundles, row_tokens=8, max_segments=2, names=["a", "b", "c"])


def test_pack_refuses_empty_limits() -> None:
    with pytest.raises(ValueError, match=r"batch\.row_tokens and batch\.max_segments"):
        pack_lists([1], row_tokens=0, max_segments=1)
    with pytest.raises(ValueError, match=r"batch\.rows"):
        group_rows(np.asarray([1]), rows=0)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 6))
def test_pack_groups_rows_evenly(tokens: list[int], rows: int) -> None:
    groups = group_rows(np.asarray(tokens, np.int64), rows=rows)
    assert sorted(r for group in groups for r in group) == list(range(len(tokens)))
    assert len(groups) == -(-len(tokens) // rows)
    assert all(1 <= len(group) <= rows for group in groups)


def test_pack_groups_balance_live_tokens() -> None:
    """By hand: 9, 8, 2, 1 in pairs. In the given order 17 and 3; balanced 10 and 10."""
    groups = group_rows(np.asarray([9, 8, 2, 1]), rows=2)
    assert groups == [[0, 3], [1, 2]]
