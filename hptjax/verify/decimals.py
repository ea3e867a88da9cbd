"""Complex numbers of 60 digits on Python's decimal, with the functions that answers are written with.

All functions are to be called inside the `precise` context.
"""

from __future__ import annotations

import contextlib
import decimal
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

DIGITS = 60
MAX_ARGUMENT = 10**12  # of a sine: beyond it, too few digits are left


def precise() -> contextlib.AbstractContextManager[decimal.Context]:
    """A decimal context of `DIGITS` digits in which what is too large or too small for it raises ArithmeticError."""
    traps = [decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow, decimal.Underflow]
    return decimal.localcontext(decimal.Context(prec=DIGITS, Emax=999_999, Emin=-999_999, traps=traps))


class Complex(NamedTuple):
    """real + i x imaginary."""

    real: Decimal
    imaginary: Decimal = Decimal(0)

    @classmethod
    def of(cls, value: Fraction) -> Complex:
        return cls(Decimal(value.numerator) / Decimal(value.denominator))

    def is_real(self) -> bool:
        return self.imaginary == 0

    def size(self) -> Decimal:
        """Its distance from 0."""
        if self.imaginary == 0:
            return abs(self.real)
        return (self.real * self.real + self.imaginary * self.imaginary).sqrt()

    def __add__(self, other: Complex) -> Complex:  # type: ignore[override]  # numbers, not tuples
        return Complex(self.real + other.real, self.imaginary + other.imaginary)

    def __sub__(self, other: Complex) -> Complex:
        return Complex(self.real - other.real, self.imaginary - other.imaginary)

    def __neg__(self) -> Complex:
        return Complex(-self.real, -self.imaginary)

    def __mul__(self, other: Complex) -> Complex:  # type: ignore[override]
        if self.imaginary == 0 == other.imaginary:
            return Complex(self.real * other.real)
        return Complex(
            self.real * other.real - self.imaginary * other.imaginary,
            self.real * other.imaginary + self.imaginary * other.real,
        )

    def __truediv__(self, other: Complex) -> Complex:
        if other.imaginary == 0:
            return Complex(self.real / other.real, self.imaginary / other.real)
        norm = other.real * other.real + other.imaginary * other.imaginary
        product = self * Complex(other.real, -other.imaginary)
        return Complex(product.real / norm, product.imaginary / norm)

    def to_integer(self, exponent: int) -> Complex:
        """The power, by squaring. 0 to the 0 and below raises ZeroDivisionError."""
        if self.real == 0 == self.imaginary and exponent <= 0:
            raise ZeroDivisionError
        if self.imaginary == 0:
            return Complex(self.real**exponent)
        result, square, left = Complex(Decimal(1)), self, abs(exponent)
        while left:
            if left & 1:
                result = result * square
            square, left = square * square, left >> 1
        return Complex(Decimal(1)) / result if exponent < 0 else result


@lru_cache(maxsize=2)
def pi() -> Decimal:
    """Machin: pi = 16 arctan(1/5) - 4 arctan(1/239)."""
    return 16 * _arctan_series(Decimal(1) / 5) - 4 * _arctan_series(Decimal(1) / 239)


def _arctan_series(x: Decimal) -> Decimal:
    """x - x^3/3 + x^5/5 - ..., for |x| well below 1."""
    total = term = x
    square, n, smallest = x * x, 1, Decimal(10) ** (-DIGITS - 4)
    while abs(term) > smallest:
        term, n = -term * square, n + 2
        total += term / n
    return total


def arctan2(y: Decimal, x: Decimal) -> Decimal:
    """The angle of the point (x, y), in (-pi, pi]. Raises ZeroDivisionError at the origin."""
    if x == 0 == y:
        raise ZeroDivisionError
    if x < 0:
        return arctan2(-y, -x) + (pi() if y >= 0 else -pi())
    if abs(y) > x:
        angle = pi() / 2 - arctan2(x, abs(y))
        return angle if y > 0 else -angle
    ratio = y / x  # |ratio| <= 1; halving the angle three times brings it below 0.1
    for _ in range(3):
        ratio = ratio / (1 + (1 + ratio * ratio).sqrt())
    return 8 * _arctan_series(ratio)


def cos_sin(x: Decimal) -> tuple[Decimal, Decimal]:
    """Cosine and sine of an angle in radians, by their series after reduction to [-pi, pi] and four halvings."""
    if abs(x) > MAX_ARGUMENT:
        raise OverflowError
    x = x - (x / (2 * pi())).to_integral_value() * 2 * pi()
    x /= 16
    cosine = total = Decimal(1)
    sine = term = x
    square, n, smallest = x * x, 1, Decimal(10) ** (-DIGITS - 4)
    while abs(total) > smallest or abs(term) > smallest:
        total = -total * square / (n * (n + 1))
        term = -term * square / ((n + 1) * (n + 2))
        cosine, sine, n = cosine + total, sine + term, n + 2
    for _ in range(4):
        cosine, sine = cosine * cosine - sine * sine, 2 * sine * cosine
    return cosine, sine


def exp(z: Complex) -> Complex:
    """e to the z."""
    if abs(z.real) > 100_000:
        raise OverflowError
    size = z.real.exp()
    if z.is_real():
        return Complex(size)
    cosine, sine = cos_sin(z.imaginary)
    return Complex(size * cosine, size * sine)


def log(z: Complex) -> Complex:
    """The principal logarithm. Raises ZeroDivisionError at 0."""
    if z.is_real() and z.real > 0:
        return Complex(z.real.ln())
    if z.size() == 0:
        raise ZeroDivisionError
    return Complex(z.size().ln(), arctan2(z.imaginary, z.real))


def square_root(z: Complex) -> Complex:
    """The principal square root."""
    if z.is_real():
        return Complex(z.real.sqrt()) if z.real >= 0 else Complex(Decimal(0), (-z.real).sqrt())
    return power(z, Complex(Decimal("0.5")))


def power(base: Complex, exponent: Complex) -> Complex:
    """The principal power, exp(exponent log base); 0 to a positive real power is 0."""
    if base.size() == 0:
        if exponent.is_real() and exponent.real > 0:
            return base
        raise ZeroDivisionError
    return exp(exponent * log(base))
