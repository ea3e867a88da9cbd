"""pass@k without bias, from n samples per question of which c were solved.

The samples of a question must be exchangeable: tries that stop at the first success are not. "best@k" that draws with
replacement, 1 - (1 - c/n)^k, is another, smaller figure and is not here.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from hptjax.diagnostics.intervals import Estimate, estimate_mean
from hptjax.masked import ratio


def pass_at_k(solved_counts: Int[np.ndarray, " Q"], samples: int, k: int) -> Float[np.ndarray, " Q"]:
    """Chance that k of the n samples, drawn without replacement, hold a solved one, per question.

        1 - C(n - c, k) / C(n, k) = 1 - prod_{j < k} (n - c - j) / (n - j),   and 1 where n - c < k

    Args
      solved_counts: c, in 0..n. samples: n. k: in 1..n; n >= 2k is advised.
    Raises: k or a count out of range -> ValueError.
    Source: Chen et al. 2021, arXiv 2107.03374, equation 1, as a product.
    """
    counts = checked(solved_counts, samples)
    if not 1 <= k <= samples:
        raise ValueError(f"expected k in 1..{samples}, the samples per question, got {k}; change eval.ks")
    steps = np.arange(k)
    factors = (samples - counts[:, None] - steps[None, :]) / (samples - steps[None, :])  # [Q k]
    return 1.0 - np.prod(factors, axis=1)  # where n - c < k one of the factors is 0


def average_at_n(solved_counts: Int[np.ndarray, " Q"], samples: int) -> Float[np.ndarray, " Q"]:
    """c / n per question: pass@1 without bias."""
    return np.array([ratio(count, samples) for count in checked(solved_counts, samples)], np.float64)


def jackknife_variance(solved_counts: Int[np.ndarray, " Q"], samples: int, k: int) -> Float[np.ndarray, " Q"]:
    """Variance of a question's pass@k from its sampling noise, by the delete-one jackknife in closed form.

        Var = (n - 1) c (n - c) (A - B)^2 / n^2,   A = pass@k(n - 1, c - 1),   B = pass@k(n - 1, c)

    For k = 1 it is p (1 - p) / (n - 1).

    Raises: k > n - 1, or a count out of range -> ValueError.
    """
    counts = checked(solved_counts, samples)
    if not 1 <= k <= samples - 1:
        raise ValueError(f"expected k in 1..{samples - 1}, one less than the samples per question, got {k}")
    inner = np.clip(counts, 1, samples - 1)  # at c = 0 and c = n the variance is 0 whatever A and B are
    without_solved = pass_at_k(inner - 1, samples - 1, k)
    without_failed = pass_at_k(inner, samples - 1, k)
    spread = np.square(without_solved - without_failed)
    return (samples - 1) * counts * (samples - counts) * spread / np.float64(samples) ** 2


def estimate_pass_at_k(solved_counts: Int[np.ndarray, " Q"], samples: int, k: int, *, seed: int = 0) -> Estimate:
    """Mean pass@k over the questions, with its question-level 95 % interval."""
    return estimate_mean(pass_at_k(solved_counts, samples, k), samples=samples, seed=seed)


def checked(solved_counts: Int[np.ndarray, " Q"], samples: int) -> Int[np.ndarray, " Q"]:
    """The counts as int64. Raises: a count outside 0..samples -> ValueError."""
    counts = np.asarray(solved_counts, np.int64)
    if samples < 1 or counts.ndim != 1 or np.any(counts < 0) or np.any(counts > samples):
        raise ValueError(f"expected solved counts [Q] in 0..{samples}, got {counts.tolist()[:8]}")
    return counts
