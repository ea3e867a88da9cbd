"""Samples into rows of a fixed token budget, and rows into micro-batches. Integers only; no sample is looked into."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def pack(
    lengths: Int[np.ndarray, " N"],
    bundle_ids: Int[np.ndarray, " N"],
    *,
    row_tokens: int,
    max_segments: int,
    names: Sequence[object] | None = None,
) -> list[list[int]]:
    """Rows of sample indices, by first-fit-decreasing: the longest bundle first, into the first row with room for it.

    Ties keep the order of the arguments; a caller that sorts them by sample id has rows that do not depend on the
    order in which its samples arrived.

    Args
      lengths: target positions of each sample; [N], >= 1.
      bundle_ids: samples with the same id >= 0 share a row; -1: alone.
      row_tokens, max_segments: room of a row, in target positions and in samples.
      names: what an error calls the samples; their places without it.
    Returns rows; every index appears exactly once; within a row in the order of placing.
    Raises ValueError naming the sample (or bundle) that no row can hold, and the config field that limits it.
    Example
      >>> pack(np.array([5, 4, 3, 2]), np.array([-1, -1, -1, -1]), row_tokens=7, max_segments=4)
      [[0, 3], [1, 2]]
    """
    if row_tokens < 1 or max_segments < 1:
        raise ValueError(f"expected batch.row_tokens and batch.max_segments >= 1, got {row_tokens} and {max_segments}")
    bundles = _bundles(bundle_ids)
    sizes = lengths.tolist()
    needs = [sum(sizes[i] for i in members) for members in bundles]
    for members, need in zip(bundles, needs, strict=True):
        _check_fits(members, need, sizes, row_tokens, max_segments, names)
    room = np.full(len(bundles), row_tokens, np.int64)
    seats = np.full(len(bundles), max_segments, np.int64)
    rows: list[list[int]] = []
    for b in sorted(range(len(bundles)), key=lambda b: -needs[b]):  # sorted() is stable
        candidates = len(rows) + 1  # the last one is a fresh row, where every bundle fits
        fits = (room[:candidates] >= needs[b]) & (seats[:candidates] >= len(bundles[b]))
        row = int(fits.argmax())
        if row == len(rows):
            rows.append([])
        rows[row].extend(bundles[b])
        room[row] -= needs[b]
        seats[row] -= len(bundles[b])
    return rows


def group_rows(row_live_tokens: Int[np.ndarray, " R"], *, rows: int) -> list[list[int]]:
    """Micro-batches of at most `rows` row indices, as few as possible, with near-equal live tokens.

    The row with the most live tokens goes first, to the micro-batch with the fewest so far that has a free place.
    Free of charge: the number of micro-batches and their shape are the same for any grouping.
    """
    if rows < 1:
        raise ValueError(f"expected batch.rows >= 1, got {rows}")
    count = -(-len(row_live_tokens) // rows)
    micro_batches: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, m) for m in range(count)]
    for row in sorted(range(len(row_live_tokens)), key=lambda r: -int(row_live_tokens[r])):
        tokens, m = heapq.heappop(heap)
        micro_batches[m].append(row)
        if len(micro_batches[m]) < rows:
            heapq.heappush(heap, (tokens + int(row_live_tokens[row]), m))
    return [sorted(micro_batch) for micro_batch in micro_batches]


def _bundles(bundle_ids: Int[np.ndarray, " N"]) -> list[list[int]]:
    """Lists of sample indices that stay together, in the order of their first members."""
    bundles: list[list[int]] = []
    place: dict[int, int] = {}
    for index, bundle_id in enumerate(bundle_ids.tolist()):
        if bundle_id >= 0 and bundle_id in place:
            bundles[place[bundle_id]].append(index)
            continue
        if bundle_id >= 0:
            place[bundle_id] = len(bundles)
        bundles.append([index])
    return bundles


def _check_fits(
    members: list[int],
    need: int,
    sizes: list[int],
    row_tokens: int,
    max_segments: int,
    names: Sequence[object] | None,
) -> None:
    """Raises ValueError if no row can ever hold this bundle."""
    if need <= row_tokens and len(members) <= max_segments and all(sizes[i] >= 1 for i in members):
        return
    called = ", ".join(str(i if names is None else names[i]) for i in members)
    what = f"sample {called}" if len(members) == 1 else f"the bundle of samples {called}"
    if any(sizes[i] < 1 for i in members):
        raise ValueError(f"{what}: expected lengths of at least 1, got {[sizes[i] for i in members]}")
    if need > row_tokens:
        raise ValueError(
            f"{what} has {need} target positions, but a row holds {row_tokens}: "
            "raise batch.row_tokens, or lower the limits on prompt and completion tokens"
        )
    raise ValueError(f"{what} has {len(members)} segments, but a row holds {max_segments}: raise batch.max_segments")
