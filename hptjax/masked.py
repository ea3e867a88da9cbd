"""Means, in the one module that divides by a count.

Sums and counts travel apart everywhere else; they meet here, once, where a figure is shown or a weight is fixed for
a whole update.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

Number = float | int | np.number


def ratio(total: Number, count: Number) -> float:
    """The mean `total / count`, or NaN where nothing was counted. Host side, float64."""
    return float(total) / float(count) if count else float("nan")


def inverse_count(count: Number) -> float:
    """`1 / count`, the weight that makes a sum a mean; 0 where nothing was counted, so an empty term contributes 0."""
    return 1.0 / float(count) if count else 0.0


def mean(values: np.ndarray) -> float:
    """Mean of a host array over all its entries; NaN of an empty one."""
    values = np.asarray(values, np.float64)
    return ratio(values.sum(), values.size)


def inverse_counts(counts: Float[Any, "..."]) -> Float[Any, "..."]:
    """`1 / count` entry by entry, 0 where nothing was counted; for host and device arrays of any float type."""
    empty = (counts == 0).astype(counts.dtype)
    return (1 - empty) / (counts + empty)
