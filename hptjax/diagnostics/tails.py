"""G-pass@k and worst@k: whether many of k samples are right, not one of them."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import hypergeom

from hptjax.diagnostics.passk import checked


def g_pass_at_k(solved_counts: Int[np.ndarray, " Q"], samples: int, k: int, share: float) -> Float[np.ndarray, " Q"]:
    """Chance that at least ceil(share k) of k samples, drawn without replacement from the n, are right, per question.

        sum_{j >= ceil(share k)} C(c, j) C(n - c, k - j) / C(n, k)

    Args
      solved_counts: c, in 0..n. samples: n. k: in 1..n. share: tau, in (0, 1]; so small that it asks for one sample, it
        is pass@k, and 1 is worst@k.
    Raises: k, share or a count out of range -> ValueError.
    Source: Liu et al. 2024, arXiv 2412.13147.
    """
    counts = checked(solved_counts, samples)
    if not 1 <= k <= samples:
        raise ValueError(f"expected k in 1..{samples}, the samples per question, got {k}")
    if not 0 < share <= 1:
        raise ValueError(f"expected a share of right samples in (0, 1], got {share}")
    least = math.ceil(share * k - 1e-9)  # 0.6 x 5 is 3, whatever floating point says
    return np.asarray(hypergeom.sf(max(least, 1) - 1, samples, counts, k), np.float64)


def worst_at_k(solved_counts: Int[np.ndarray, " Q"], samples: int, k: int) -> Float[np.ndarray, " Q"]:
    """Chance that all of k samples are right: C(c, k) / C(n, k), per question. Raises as `g_pass_at_k`."""
    return g_pass_at_k(solved_counts, samples, k, 1.0)
