"""Numbers into k sets with near-equal sums, by the largest differencing method of Karmarkar and Karp. Integers only."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

Sets = list[tuple[int, list[int]]]  # k of (sum, places), the largest sum first


def balanced_sets(sizes: Sequence[int], count: int, *, equal_counts: bool) -> list[list[int]]:
    """`count` sets of places in `sizes` whose sums differ little; every place is in one of them.

    Each number starts as a split of its own; the two splits whose sets differ most are joined, the largest set of one
    with the smallest of the other, until one split is left. Ties go to the split that was made first.

    Args
      sizes: >= 0. count: k >= 1.
      equal_counts: every set gets as many numbers, or one fewer where they do not divide: the smallest numbers then
        start together, k at a time.
    Returns the sets by descending sum, places ascending in each; sets may be empty.
    Raises count < 1 -> ValueError.
    Source Karmarkar and Karp 1982; verl's balancing of sequence lengths, as `spec/hpt.md` 2.2 reports it.
    Example
      >>> balanced_sets([8, 7, 6, 5, 4], 2, equal_counts=False)
      [[1, 3, 4], [0, 2]]
    """
    if count < 1:
        raise ValueError(f"expected at least 1 set, got {count}")
    ascending = sorted(range(len(sizes)), key=lambda place: (sizes[place], place))
    at_once = count if equal_counts else 1
    # the largest numbers are dealt in whole rounds; a rest of fewer than k starts as the smallest split
    rest = len(ascending) % at_once
    starts = [ascending[:rest], *(ascending[i : i + at_once] for i in range(rest, len(ascending), at_once))]
    heap: list[tuple[int, int, Sets]] = []
    for made, members in enumerate(start for start in starts if start):
        split: Sets = [(sizes[place], [place]) for place in members] + [(0, [])] * (count - len(members))
        _push(heap, made, split)
    made = len(heap)
    while len(heap) > 1:
        (_, _, wide), (_, _, narrow) = heapq.heappop(heap), heapq.heappop(heap)
        joined = [(a + b, [*x, *y]) for (a, x), (b, y) in zip(wide, reversed(narrow), strict=True)]
        _push(heap, made, joined)
        made += 1
    final = heap[0][2] if heap else [(0, [])] * count
    return [sorted(places) for _, places in final]


def _push(heap: list[tuple[int, int, Sets]], made: int, split: Sets) -> None:
    ordered = sorted(split, key=lambda entry: -entry[0])  # stable
    heapq.heappush(heap, (ordered[-1][0] - ordered[0][0], made, ordered))
