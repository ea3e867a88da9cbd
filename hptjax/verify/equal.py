"""Whether two expressions are worth the same: True, False, or None where this module cannot tell.

Both are evaluated at fixed points, as fractions where that is exact and else to 60 digits. One point where they differ
refutes them. They are equal if they agree at every point: for polynomials of degree d the chance that a wrong answer
does is below d / 10^6 a point (Schwartz 1980), and nobody who could write such an answer needs to. Negative points are
among them, so that sqrt(x^2) is not x.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache

from hptjax.verify import nodes
from hptjax.verify.decimals import DIGITS, Complex, precise
from hptjax.verify.evaluate import Approximate, NotExact, Undefined, approximate, exact
from hptjax.verify.nodes import Node

POINTS = 10  # fractions, and as many whole numbers
ENOUGH = 5  # points at which both have a value and agree
SAME = Decimal(10) ** (15 - DIGITS)  # relative to the largest number added on the way
DIFFERENT = Decimal(10) ** (20 - DIGITS)  # between the two nothing is said
CANCELLED = Decimal(10) ** 12  # so much larger than the result were its parts: nothing is said
NEAR = 20  # values this part of the larger apart, or less, may stand on both sides of an approximation
MIN_DIGITS = 6  # of a decimal that may stand for a fraction or a root

Value = Fraction | Approximate


def equal_expressions(gold: Node, answer: Node) -> bool | None:
    """Whether two expressions have the same value for all values of their variables.

    A logarithm without a base may mean base e or base ten, in both expressions alike.
    """
    plain_log = any(
        isinstance(part, nodes.Call) and part.function == "log" and part.parameter is None
        for node in (gold, answer)
        for part in nodes.walk(node)
    )
    said = [_equal(gold, answer, log_base_ten) for log_base_ten in ((False, True) if plain_log else (False,))]
    return True if True in said else None if None in said else False


def _equal(gold: Node, answer: Node, log_base_ten: bool) -> bool | None:
    names = nodes.variables(gold) | nodes.variables(answer)
    agreed = 0
    certain = True
    for at in points(names):
        left, right = value_at(gold, at, log_base_ten), value_at(answer, at, log_base_ten)
        same = same_value(left, right) if left is not None and right is not None else None
        if same is False:
            return False
        agreed += same is True
        whole = bool(at) and all(value.denominator == 1 for value in at.values())  # binom(2, 5) is 0, 2!/(-3)! nothing
        certain = certain and (same is True or whole or (left is None and right is None))
    return True if certain and agreed >= (ENOUGH if names else 1) else None


def points(names: frozenset[str]) -> Iterator[Mapping[str, Fraction]]:
    """Where expressions are compared: one empty point without variables, else positive, signed and whole values."""
    if not names:
        yield {}
        return
    for place in range(POINTS):
        at = {}
        for name in sorted(names):
            noise = _noise(f"{place}/{name}")
            at[name] = Fraction(noise % 3_000_000 + 1000, 999_983)
            if place >= POINTS // 2 and noise >> 40 & 1:
                at[name] = -at[name]
        yield at
    for place in range(POINTS):
        yield {name: Fraction(_noise(f"whole/{place}/{name}") % 5 + 1 + place) for name in names}


@lru_cache(maxsize=1024)
def _noise(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def value_at(node: Node, at: Mapping[str, Fraction], log_base_ten: bool = False) -> Value | None:
    """The value at a point, or None where there is none."""
    try:
        return exact(node, at)
    except NotExact:
        pass
    except (Undefined, RecursionError):
        return None
    try:
        return approximate(node, at, log_base_ten=log_base_ten)
    except (Undefined, RecursionError):
        return None


def same_value(left: Value, right: Value) -> bool | None:
    """Whether two values are equal; None where too many digits cancelled to tell."""
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    with precise(), contextlib.suppress(ArithmeticError):
        first, second = _approximate(left), _approximate(right)
        size = max(first.value.size(), second.value.size())
        scale = max(first.scale, second.scale)
        if scale > size * CANCELLED or size == 0:
            return True if size == 0 == scale else None
        gap = (first.value - second.value).size()
        return True if gap <= scale * SAME else False if gap > scale * DIFFERENT else None
    return None


def divided(first: Value, second: Value) -> Value | None:
    """The quotient of two values to 60 digits; None where the second is 0, or nearly, or much of either cancelled."""
    with precise(), contextlib.suppress(ArithmeticError):
        top, bottom = _approximate(first), _approximate(second)
        if any(one.scale > one.value.size() * CANCELLED for one in (top, bottom)):
            return None
        ratio = top.value / bottom.value
        return Approximate(ratio, ratio.size() * CANCELLED)
    return None


def rounds_to(gold: Node, answer: Node) -> bool:
    """Whether the answer is the gold value to the digits that one of them is written with.

    A decimal answer must be within a millionth of the gold value. A gold decimal of three digits or more, at least two
    of them after the point, stands for any value that is no decimal itself and rounds to it.
    """
    left, right = value_at(gold, {}), value_at(answer, {})
    if left is None or right is None:
        return False
    with precise(), contextlib.suppress(ArithmeticError):
        first, second = _approximate(left).value, _approximate(right).value
        if not (first.is_real() and second.is_real()):
            return False
        gap = abs(first.real - second.real)
        if _places(answer) > 0:
            return gap <= abs(first.real) * Decimal(10) ** -MIN_DIGITS
        places = _places(gold)
        if places < 2 or abs(first.real) < Decimal(10) ** (2 - places):
            return False
        return gap <= Decimal(10) ** -places / 2
    return False


def close(exact: Node, near: Node) -> bool:
    """Whether the second can be called about the first: within a twentieth; nothing is said of what has no value."""
    left, right = value_at(exact, {}), value_at(near, {})
    if left is None or right is None:
        return True
    with precise(), contextlib.suppress(ArithmeticError):
        first, second = _approximate(left).value, _approximate(right).value
        return (first - second).size() <= max(first.size(), second.size()) / NEAR
    return True


def _places(node: Node) -> int:
    """Digits after the point of a decimal with or without a sign; 0 for anything else."""
    node = node.value if isinstance(node, nodes.Neg) else node
    return max(node.places, 0) if isinstance(node, nodes.Number) else 0


def _approximate(value: Value) -> Approximate:
    if isinstance(value, Approximate):
        return value
    number = Complex.of(value)
    return Approximate(number, number.size())


def is_written_out(node: Node) -> bool:
    """Whether a number needs no calculation: an integer, a decimal, a fraction in lowest terms, a mixed number, or
    scientific notation; with or without a sign.
    """
    match node:
        case nodes.Number():
            return True
        case nodes.Mixed(part=part):
            return is_written_out(part)
        case nodes.Neg(value=value):
            return not isinstance(value, nodes.Neg) and is_written_out(value)
        case nodes.Div(top=top, bottom=bottom):
            top = top.value if isinstance(top, nodes.Neg) else top
            if not (isinstance(top, nodes.Number) and isinstance(bottom, nodes.Number)):
                return False
            if top.places or bottom.places or top.value == 0 or bottom.value <= 1:
                return False
            return (top.value / bottom.value).denominator == bottom.value
        case nodes.Mul(factors=(nodes.Number(), nodes.Pow(base=nodes.Number(value=base), exponent=exponent))):
            exponent = exponent.value if isinstance(exponent, nodes.Neg) else exponent
            return base == 10 and isinstance(exponent, nodes.Number) and exponent.places == 0
    return False
