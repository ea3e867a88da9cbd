"""Which questions an arm solves that another does not, and what a run knew once and has lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import fisher_exact

from hptjax.masked import mean

FALSE_DISCOVERIES = 0.05


def transitions(
    before: Int[np.ndarray, " Q"], after: Int[np.ndarray, " Q"], samples: int, levels: Int[np.ndarray, " Q"]
) -> dict[str, Any]:
    """Questions kept, gained, lost and never solved between two evaluations of the same questions.

    Solved means at least one of the n samples. With n samples a change can be luck: `certain` counts the gains and
    losses whose Fisher p on (c_before, c_after), both of n, passes Benjamini and Hochberg's procedure at 5 %.

    Returns counts over all questions and by level.
    """
    had, has = before > 0, after > 0
    kinds = {"kept": had & has, "gained": ~had & has, "lost": had & ~has, "never": ~had & ~has}
    real = discoveries(fisher_p(before, after, samples))
    counts: dict[str, Any] = {name: int(kind.sum()) for name, kind in kinds.items()}
    counts["certain"] = {"gained": int((real & (after > before)).sum()), "lost": int((real & (after < before)).sum())}
    counts["by_level"] = {
        str(level): {name: int((kind & (levels == level)).sum()) for name, kind in kinds.items()}
        for level in np.unique(levels).tolist()
    }
    return counts


def exclusive(counts: Mapping[str, Int[np.ndarray, " Q"]]) -> dict[str, int]:
    """Per arm, the questions that it alone solves at least once."""
    solved = {arm: of_arm > 0 for arm, of_arm in counts.items()}
    times = np.sum(list(solved.values()), axis=0)
    return {arm: int((mask & (times == 1)).sum()) for arm, mask in solved.items()}


def fisher_p(before: Int[np.ndarray, " Q"], after: Int[np.ndarray, " Q"], samples: int) -> Float[np.ndarray, " Q"]:
    """Two-sided p of Fisher's exact test on solved and unsolved samples, per question."""
    found: dict[tuple[int, int], float] = {}
    for pair in {*zip(before.tolist(), after.tolist(), strict=True)}:
        table = [[pair[0], samples - pair[0]], [pair[1], samples - pair[1]]]
        found[pair] = float(fisher_exact(table).pvalue)
    return np.asarray([found[pair] for pair in zip(before.tolist(), after.tolist(), strict=True)])


def discoveries(p: Float[np.ndarray, " Q"], rate: float = FALSE_DISCOVERIES) -> Bool[np.ndarray, " Q"]:
    """True where the p-value passes: all up to the largest one with p_(i) <= rate i / Q.

    Source Benjamini and Hochberg 1995.
    """
    if not p.size:
        return np.zeros(0, bool)
    ordered = np.sort(p)
    passing = np.flatnonzero(ordered * p.size <= rate * np.arange(1, p.size + 1))
    return p <= ordered[passing[-1]] if passing.size else np.zeros(p.size, bool)


def forgetting(first: Sequence[Int[np.ndarray, " Q"]], second: Sequence[Int[np.ndarray, " Q"]], half: int) -> float:
    """What the best earlier solve rate of a question exceeded the last one by, in the mean over questions.

    The best evaluation is chosen on the first half of the samples and measured on the second, so that luck in the
    choice does not count as knowledge that was lost; a question at its best in the end gives 0. Single differences may
    be negative: cutting them at 0 would be biased upwards again.

    Args
      first, second: solved counts of either half, [evaluations][Q], in the order of the steps. half: samples of each.
    Source `spec/diagnostics.md` 6.2.
    """
    choose, measure = np.stack(first), np.stack(second)  # [E Q]
    latest_best = len(choose) - 1 - np.argmax(choose[::-1], axis=0)  # of equals the last
    best = np.take_along_axis(measure, latest_best[None, :], axis=0)[0]
    return mean((best - measure[-1]).astype(np.float64)) / half
