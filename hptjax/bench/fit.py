"""How a cost grows, as one number: a share of two points, a slope, an exponent."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hptjax.masked import ratio


def per_unit(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Cost per unit at the last point over that at the first: `(y_n / x_n) / (y_1 / x_1)`; 1 where y is c x.

    Raises fewer than two points, or one that is not above 0 -> ValueError; likewise below.
    """
    _check(xs, ys)
    return ratio(ys[-1] * xs[0], ys[0] * xs[-1])


def growth(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Cost at the last point over that at the first, `y_n / y_1`; 1 where nothing grows."""
    _check(xs, ys)
    return ratio(ys[-1], ys[0])


def last(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The figure at the last point."""
    return ys[-1]


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """What one unit adds, between the first point and the last: `(y_n - y_1) / (x_n - x_1)`."""
    _check(xs, ys)
    return ratio(ys[-1] - ys[0], xs[-1] - xs[0])


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The b of `y = a x^b` by least squares on logarithms.

    sum (u - mean u) (v - mean v) / sum (u - mean u)^2, with u = log x, v = log y
    """
    _check(xs, ys)
    us, vs = [math.log(x) for x in xs], [math.log(y) for y in ys]
    u0, v0 = ratio(math.fsum(us), len(us)), ratio(math.fsum(vs), len(vs))
    both = math.fsum((u - u0) * (v - v0) for u, v in zip(us, vs, strict=True))
    return ratio(both, math.fsum((u - u0) ** 2 for u in us))


def _check(xs: Sequence[float], ys: Sequence[float]) -> None:
    if len(xs) != len(ys) or len(set(xs)) < 2 or min(*xs, *ys) <= 0:
        raise ValueError(
            f"expected two points or more, all above 0, got {list(zip(xs, ys, strict=False))}; measure more points"
        )
