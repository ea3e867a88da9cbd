"""maj@k, also called cons@k: how often the most frequent answer among k samples is right.

Answers are compared by classes (two spellings of one number are one class); a sample without an answer abstains. The
verifier's "equal" is not always transitive, so classes are built greedily in the order of the samples and kept as ids.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from hptjax.masked import ratio

ABSTAINS = -1
EXACT_SUBSETS = 20_000  # so many subsets of k samples are all looked at
DRAWN_SUBSETS = 2_000  # of more, so many are drawn


def answer_classes(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> Int[np.ndarray, " n"]:
    """The class of each sample's answer: that of the first earlier answer that it equals, or a new one.

    Args
      answers: None abstains. same: whether two answers are equal; asked of a class's first member and a new answer.
    Returns [n]; classes count from 0 in the order of their first samples, -1 abstains.
    """
    firsts: list[str] = []
    found = np.full(len(answers), ABSTAINS, np.int64)
    for place, answer in enumerate(answers):
        if answer is None:
            continue
        known = next((number for number, first in enumerate(firsts) if first == answer or same(first, answer)), None)
        if known is None:
            known = len(firsts)
            firsts.append(answer)
        found[place] = known
    return found


def maj_at_k(
    classes: Int[np.ndarray, "Q n"], solved: Bool[np.ndarray, "Q n"], k: int, *, seed: int = 0
) -> Float[np.ndarray, " Q"]:
    """Chance that the vote of k of the n samples, drawn without replacement, is right, per question.

    The class with most votes wins; classes that tie share the credit, as a uniform tie-break would on average; where
    all abstain the credit is 0. A class is right if its first sample is. All subsets are looked at where there are at
    most 20,000, otherwise 2,000 drawn ones (the same places for every question), which adds noise of their own.

    Args
      classes: as `answer_classes` gives them. solved: the verifier's word on each sample. k: in 1..n.
    Raises: shapes that differ, k out of range -> ValueError.
    Source: Wang et al. 2022, arXiv 2203.11171 (self-consistency), as an expectation over subsets.
    """
    classes, solved = np.asarray(classes, np.int64), np.asarray(solved, bool)
    if classes.ndim != 2 or classes.shape != solved.shape:
        raise ValueError(f"expected classes and solved [Q n] of one shape, got {classes.shape} and {solved.shape}")
    samples = classes.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"expected k in 1..{samples}, the samples per question, got {k}")
    chosen = _subsets(samples, k, seed)
    return np.array([_credit(row, right, chosen) for row, right in zip(classes, solved, strict=True)], np.float64)


def _subsets(samples: int, k: int, seed: int) -> Int[np.ndarray, "S k"]:
    if math.comb(samples, k) <= EXACT_SUBSETS:
        return np.array(list(itertools.combinations(range(samples), k)), np.int64)
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(np.arange(samples), (DRAWN_SUBSETS, 1)), axis=1)[:, :k]


def _credit(classes: Int[np.ndarray, " n"], solved: Bool[np.ndarray, " n"], chosen: Int[np.ndarray, "S k"]) -> float:
    names, firsts = np.unique(classes, return_index=True)
    firsts, names = firsts[names != ABSTAINS], names[names != ABSTAINS]
    if not names.size:
        return 0.0
    member = (classes[:, None] == names).astype(np.int64)  # [n C]
    votes = member[chosen].sum(axis=1)  # [S C]
    winners = (votes == votes.max(axis=1, keepdims=True)) & (votes > 0)
    won, right = winners.sum(axis=1), (winners & solved[firsts]).sum(axis=1)
    shares = np.divide(right, won, out=np.zeros(len(won)), where=won > 0)
    return ratio(float(shares.sum()), len(shares))
