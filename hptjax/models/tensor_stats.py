"""What the entries of a stored tensor are like, read a few MiB at a time; sums in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hptjax.masked import ratio

READ_AT_ONCE = 1 << 22  # entries


class TensorStats(NamedTuple):
    """Of the finite entries: least, largest, mean (`middle`), and root of the sum of squares; NaN where there are none.

    Args
      entries: all of them. nonfinite: NaN and infinite ones. zeros: those that are exactly 0.
    """

    least: float
    largest: float
    middle: float
    norm: float
    entries: int
    nonfinite: int
    zeros: int


def tensor_stats(shape: tuple[int, ...], read: Callable[[slice], np.ndarray]) -> TensorStats:
    """The statistics of a tensor.

    Args
      read: a slice of the first axis -> that part, float32. A tensor without axes is asked for as a whole.
    """
    rows = shape[0] if shape else 1
    step = max(1, READ_AT_ONCE // max(1, math.prod(shape[1:])))
    least, largest, total, squares, finite, zeros = math.inf, -math.inf, 0.0, 0.0, 0, 0
    for first in range(0, rows, step):
        part = np.ravel(read(slice(first, min(first + step, rows))))
        good = part[np.isfinite(part)]
        if good.size:
            least, largest = min(least, float(good.min())), max(largest, float(good.max()))
            wide = good.astype(np.float64)
            total += float(wide.sum())
            squares += float(wide @ wide)
            finite += good.size
            zeros += int(np.count_nonzero(good == 0))
    entries = math.prod(shape)
    if not finite:
        return TensorStats(math.nan, math.nan, math.nan, math.nan, entries, entries, 0)
    return TensorStats(least, largest, ratio(total, finite), math.sqrt(squares), entries, entries - finite, zeros)
