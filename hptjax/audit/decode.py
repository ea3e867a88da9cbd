"""Which mistake explains the weights of a window's tokens: the cheapest explanation that reproduces all of them.

An explanation is a way of averaging, a common factor and a number of times that each micro-batch was added:

    weight of token t = times[group of t] * factor * base[t]

with every weight given relative to the right one, 1 / N.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

LOOSE = 0.02  # for recognising a pattern under the rounding of bfloat16, whose unit is 2^-8
ROUGH = 2.0**-8  # a pattern that is missed by more is a poor explanation
MOST_TIMES = 3  # a micro-batch added more often than this is taken for another pattern


@dataclasses.dataclass(frozen=True, eq=False)
class WindowTokens:
    """The live tokens of one window.

    Args
      ratio: [n] weight of the token relative to 1 / N.
      micro_batch, row, rank: [n] where it is. k: micro-batches. ranks: workers. slots: positions, live or not.
    """

    ratio: np.ndarray
    micro_batch: np.ndarray
    row: np.ndarray
    rank: np.ndarray
    k: int
    ranks: int
    slots: int


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """What happened to a window.

    Args
      base: "token_mean" is right. factor: common to all tokens; 1 is right. factor_code: finding code of the factor, or
        "" where it is 1 or follows from the drop.
      times: (micro-batch, rank or -1) -> how often it was added; 1 is right.
      error: largest relative deviation that the explanation leaves.
      cost: of the explanation; the cheapest wins.
    """

    base: str
    factor: float
    factor_code: str
    times: Mapping[tuple[int, int], int]
    error: float
    cost: float

    def with_times(self, wanted: int) -> tuple[int, ...]:
        """Micro-batches added so often (2 stands for more than once), on any rank."""
        return tuple(sorted({i for (i, _), times in self.times.items() if min(times, 2) == wanted}))


def explain(window: WindowTokens) -> Explanation | None:
    """The cheapest explanation; None where there is none."""
    found = [
        explanation
        for by_rank in ((False, True) if window.ranks > 1 else (False,))
        for name, base in bases(window).items()
        for factor, code, cost in factors(window, base)
        if (explanation := _try(window, name, base, factor, code, cost, by_rank)) is not None
    ]
    return min(found, key=lambda explanation: explanation.cost, default=None)


def relative(window: WindowTokens, explanation: Explanation) -> np.ndarray:
    """[n] weight of each token relative to what the explanation says; nan where it says 0."""
    by_rank = any(rank >= 0 for _, rank in explanation.times)
    groups = zip(window.micro_batch.tolist(), window.rank.tolist(), strict=True)
    times = np.asarray([explanation.times[i, rank if by_rank else -1] for i, rank in groups], np.float64)
    times[times == 0] = np.nan
    return window.ratio / (times * explanation.factor * bases(window)[explanation.base])


def common_offset(window: WindowTokens, explanation: Explanation, bound: float) -> float | None:
    """By what all weights differ alike from the explanation; None where they differ from each other, too."""
    offsets = relative(window, explanation)
    offsets = offsets[np.isfinite(offsets)]
    return float(np.median(offsets)) if np.ptp(offsets) <= 2 * bound else None


def bases(window: WindowTokens) -> dict[str, np.ndarray]:
    """Ways of averaging: [n] weight of each token relative to 1 / N."""
    total = len(window.ratio)
    micro = _sizes(window.micro_batch)
    found = {"token_mean": np.ones(total)}
    if window.k > 1:
        found["mean_of_means"] = total / (window.k * micro)
    if window.ranks > 1:
        found["rank_mean_of_means"] = total / (
            window.k * window.ranks * _sizes(window.micro_batch * window.ranks + window.rank)
        )
        found["rank_means"] = total / (window.ranks * _sizes(window.rank))
    rows = window.micro_batch * (int(window.row.max()) + 1) + window.row
    in_micro = np.asarray([len(np.unique(rows[window.micro_batch == i])) for i in window.micro_batch], np.float64)
    if len(np.unique(in_micro)) > 1:  # else the rows weigh nothing
        found["row_weighted_means"] = total * in_micro / (len(np.unique(rows)) * micro)
    found["sequence_mean"] = total / (len(np.unique(rows)) * _sizes(rows))
    return found


def factors(window: WindowTokens, base: np.ndarray) -> Iterator[tuple[float, str, float]]:
    """(factor, finding code, cost) worth trying: none, the usual mistakes, then whatever the tokens show."""
    k, ranks, total = window.k, window.ranks, len(window.ratio)
    yield 1.0, "", 0.0
    if k > 1:
        yield 1 / k, "extra_1_over_k", 1.0
        yield float(k), "missing_1_over_k", 1.0
    if ranks > 1:
        yield 1 / ranks, "extra_rank_factor", 1.0
        yield float(ranks), "missing_rank_factor", 1.0
    yield float(total), "sum_not_mean", 1.0
    yield total / window.slots, "padding_counted", 1.0
    seen = np.abs(window.ratio / base)
    kept = seen > LOOSE
    if np.any(kept) and not np.all(kept):  # dropped, and the mean taken over what was left
        yield total / int(kept.sum()), "", 0.2
        yield k / len(np.unique(window.micro_batch[kept])), "", 0.2
    for factor in _distinct(window.ratio / base):
        yield factor, "wrong_scale", 2.5


def _try(
    window: WindowTokens, name: str, base: np.ndarray, factor: float, code: str, cost: float, by_rank: bool
) -> Explanation | None:
    times = window.ratio / (base * factor)
    if not np.all(np.isfinite(times)):
        return None
    groups = np.stack([window.micro_batch, window.rank if by_rank else np.full_like(window.rank, -1)], axis=1)
    found: dict[tuple[int, int], int] = {}
    error = 0.0
    for group in np.unique(groups, axis=0):
        here = times[np.all(groups == group, axis=1)]
        count = round(float(np.median(here)))
        worst = float(np.max(np.abs(here - count)))
        if not 0 <= count <= MOST_TIMES or worst > LOOSE * max(count, 1):
            return None
        found[int(group[0]), int(group[1])] = count
        error = max(error, worst / max(count, 1))
    if 1 not in found.values():  # all twice is a factor, not a repetition
        return None
    wrong = sum(count != 1 for count in found.values())
    cost += (name != "token_mean") + (wrong > 0) + 0.01 * wrong + 0.5 * by_rank + 2.0 * (error > ROUGH)
    return Explanation(base=name, factor=factor, factor_code=code, times=found, error=error, cost=cost)


def _sizes(groups: np.ndarray) -> np.ndarray:
    """How many entries share each entry's group."""
    _, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return counts[inverse].astype(np.float64)


def _distinct(values: np.ndarray) -> list[float]:
    """The values that differ by more than rounding, zero left out."""
    found: list[float] = []
    for value in np.sort(values):
        if abs(value) > LOOSE and not any(abs(value - other) <= LOOSE * abs(other) for other in found):
            found.append(float(value))
    return found
