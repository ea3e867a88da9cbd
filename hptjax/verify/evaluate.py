"""What an expression is worth: exactly as a fraction where it can be, else to 60 digits as a complex number.

Time and memory are bounded by the size limits here; what passes them has no value that this module finds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

from hptjax.verify import nodes
from hptjax.verify.decimals import DIGITS, Complex, arctan2, cos_sin, exp, log, pi, power, precise, square_root
from hptjax.verify.nodes import Node

MAX_BITS = 20_000  # of a numerator or denominator
MAX_POWER = 1000
MAX_FACTORIAL = 500
MAX_INDEX = 100  # of a root


class Undefined(ArithmeticError):
    """No value: a division by zero, a function outside its domain, or a number too large."""


class NotExact(ArithmeticError):
    """The value is no fraction, as far as this module can tell."""


class Approximate(NamedTuple):
    """A value to about 60 digits, and the largest number that was added to get it (what cancelled is lost)."""

    value: Complex
    scale: Decimal


def exact(node: Node, at: Mapping[str, Fraction]) -> Fraction:
    """The value as a fraction, with variables as in `at`.

    Raises Undefined; NotExact where it takes a root, a logarithm, pi and so on.
    """
    match node:
        case nodes.Number(value=value):
            return value
        case nodes.Name(name=name):
            if name in at:
                return at[name]
            raise NotExact(name)
        case nodes.Add(terms=terms):
            return _small(sum((exact(term, at) for term in terms), Fraction(0)))
        case nodes.Mul(factors=factors):
            product = Fraction(1)
            for factor in factors:
                product = _small(product * exact(factor, at))
            return product
        case nodes.Div(top=top, bottom=bottom):
            divisor = exact(bottom, at)
            if divisor == 0:
                raise Undefined("division by zero")
            return _small(exact(top, at) / divisor)
        case nodes.Neg(value=value):
            return -exact(value, at)
        case nodes.Mixed(whole=whole, part=part):
            return exact(whole, at) + exact(part, at)
        case nodes.Pow(base=base, exponent=exponent):
            return _exact_power(exact(base, at), exact(exponent, at))
        case nodes.Root(radicand=radicand, index=index):
            return _exact_root(exact(radicand, at), exact(index, at))
        case nodes.Call(function=function, arguments=arguments):
            if function not in _EXACT_FUNCTIONS:
                raise NotExact(function)
            return _EXACT_FUNCTIONS[function]([exact(argument, at) for argument in arguments])
    raise NotExact(type(node).__name__)


def approximate(node: Node, at: Mapping[str, Fraction], *, log_base_ten: bool = False) -> Approximate:
    """The value to about 60 digits.

    Args
      log_base_ten: what a logarithm without a base means: base ten, or e.
    Raises Undefined.
    """
    with precise():
        evaluation = _Evaluation(at, log_base_ten)
        try:
            value = evaluation.of(node)
            return Approximate(value, max(evaluation.scale, value.size()))
        except ArithmeticError as error:
            raise Undefined(type(error).__name__) from None


class _Evaluation:
    """One walk over an expression; `scale` grows to the largest number added on the way."""

    def __init__(self, at: Mapping[str, Fraction], log_base_ten: bool):
        self.at = at
        self.log_base_ten = log_base_ten
        self.scale = Decimal(0)

    def of(self, node: Node) -> Complex:
        match node:
            case nodes.Number(value=value):
                return Complex.of(value)
            case nodes.Name(name=name):
                return self.name(name)
            case nodes.Add(terms=terms):
                total = Complex.of(Fraction(0))
                for term in terms:
                    total = total + self.added(self.of(term))
                return total
            case nodes.Mul(factors=factors):
                product = Complex.of(Fraction(1))
                for factor in factors:
                    product = product * self.of(factor)
                return product
            case nodes.Div(top=top, bottom=bottom):
                return self.of(top) / self.of(bottom)
            case nodes.Neg(value=value):
                return -self.of(value)
            case nodes.Mixed(whole=whole, part=part):
                return self.of(whole) + self.of(part)
            case nodes.Pow(base=base, exponent=exponent):
                return self.power(base, exponent)
            case nodes.Root(radicand=radicand, index=index):
                return self.power(radicand, nodes.Div(nodes.Number(Fraction(1)), index))
            case nodes.Quantity(value=value, unit="°"):
                return self.of(value) * Complex(pi() / 180)
            case nodes.Call():
                return self.call(node)
        raise Undefined(type(node).__name__)

    def added(self, value: Complex) -> Complex:
        self.scale = max(self.scale, value.size())
        return value

    def name(self, name: str) -> Complex:
        if name in self.at:
            return Complex.of(self.at[name])
        if name == "pi":
            return Complex(pi())
        if name == "e":
            return Complex(Decimal(1).exp())
        if name == "i":
            return Complex(Decimal(0), Decimal(1))
        raise Undefined(name)

    def power(self, base: Node, exponent: Node) -> Complex:
        """Real roots of negative numbers where the exponent is a fraction with an odd denominator; else principal."""
        value = self.of(base)
        try:
            fraction = exact(exponent, self.at)
        except NotExact:
            return power(value, self.of(exponent))
        if abs(fraction) > MAX_POWER:
            raise Undefined("exponent too large")
        if fraction.denominator == 1:
            return value.to_integer(int(fraction))
        if fraction.denominator == 2:
            return square_root(value).to_integer(fraction.numerator)
        if value.is_real() and value.real < 0 and fraction.denominator % 2:
            root = power(-value, Complex.of(fraction))
            return -root if fraction.numerator % 2 else root
        return power(value, Complex.of(fraction))

    def call(self, node: nodes.Call) -> Complex:
        function = node.function
        if function in _EXACT_FUNCTIONS and function != "abs":
            return Complex.of(_EXACT_FUNCTIONS[function]([exact(argument, self.at) for argument in node.arguments]))
        if len(node.arguments) != 1:
            raise Undefined(function)
        value = self.of(node.arguments[0])
        if function == "abs":
            return Complex(value.size())
        if function == "exp":
            return exp(value)
        self.scale = max(self.scale, Decimal(1))  # an argument's last digit moves the result by as much, however small
        if function in ("ln", "log", "lg"):
            return log(value) / log(self.base(node))
        if not value.is_real():
            raise Undefined(f"{function} of a complex number")
        return Complex(_real_function(function, self.added(value).real))

    def base(self, node: nodes.Call) -> Complex:
        if node.parameter is not None:
            return self.of(node.parameter)
        ten = node.function == "lg" or (node.function == "log" and self.log_base_ten)
        return Complex(Decimal(10)) if ten else Complex(Decimal(1).exp())


def _real_function(name: str, x: Decimal) -> Decimal:
    one = Decimal(1)
    match name:
        case "sin" | "cos" | "tan" | "cot" | "sec" | "csc":
            cosine, sine = cos_sin(x)
            top, bottom = {
                "sin": (sine, one), "cos": (cosine, one), "tan": (sine, cosine),
                "cot": (cosine, sine), "sec": (one, cosine), "csc": (one, sine),
            }[name]  # fmt: skip
            if abs(bottom) < Decimal(10) ** (10 - DIGITS):
                raise Undefined(f"{name} at a pole")
            return top / bottom
        case "arcsin" | "arccos":
            if abs(x) > 1:
                raise Undefined(name)
            other = (1 - x * x).sqrt()
            return arctan2(x, other) if name == "arcsin" else arctan2(other, x)
        case "arctan":
            return arctan2(x, one)
        case "arccot":
            return arctan2(one, x)
        case "sinh" | "cosh" | "tanh":
            grown, shrunk = x.exp(), (-x).exp()
            return {
                "sinh": (grown - shrunk) / 2,
                "cosh": (grown + shrunk) / 2,
                "tanh": (grown - shrunk) / (grown + shrunk),
            }[name]
    raise Undefined(name)


def _small(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise NotExact("too large")
    return value


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        return _exact_root(_exact_power(base, Fraction(exponent.numerator)), Fraction(exponent.denominator))
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) > MAX_POWER:
        raise Undefined("exponent too large")
    if size * abs(exponent) > MAX_BITS:
        raise NotExact("too large")
    if base == 0 and exponent <= 0:
        raise Undefined("zero to a power below one")
    return base ** int(exponent)


def _exact_root(value: Fraction, index: Fraction) -> Fraction:
    """The real root, where it is a fraction."""
    if index.denominator != 1 or not 1 <= index <= MAX_INDEX:
        raise Undefined("index of a root")
    if value < 0 and index % 2 == 0:
        raise NotExact("complex root")
    top, bottom = _integer_root(abs(value.numerator), int(index)), _integer_root(value.denominator, int(index))
    return Fraction(top if value >= 0 else -top, bottom)


def _integer_root(value: int, index: int) -> int:
    if index == 1 or value < 2:
        return value
    if index == 2:
        root = math.isqrt(value)
    else:
        root = 1 << -(-value.bit_length() // index)  # from above, by Newton's method
        while (smaller := ((index - 1) * root + value // root ** (index - 1)) // index) < root:
            root = smaller
    if root**index != value:
        raise NotExact("irrational root")
    return root


def _natural(value: Fraction, most: int) -> int:
    if value.denominator != 1 or not 0 <= value <= most:
        raise Undefined(f"expected a whole number up to {most}")
    return int(value)


def _factorial(values: list[Fraction]) -> Fraction:
    (value,) = _of_number(values, 1)
    return Fraction(math.factorial(_natural(value, MAX_FACTORIAL)))


def _binom(values: list[Fraction]) -> Fraction:
    top, bottom = _of_number(values, 2)
    return Fraction(math.comb(_natural(top, MAX_POWER), _natural(bottom, MAX_POWER)))


def _of_number(values: list[Fraction], count: int) -> list[Fraction]:
    if len(values) != count:
        raise Undefined(f"expected {count} arguments")
    return values


_EXACT_FUNCTIONS: dict[str, Callable[[list[Fraction]], Fraction]] = {
    "abs": lambda values: abs(_of_number(values, 1)[0]),
    "floor": lambda values: Fraction(math.floor(_of_number(values, 1)[0])),
    "ceil": lambda values: Fraction(math.ceil(_of_number(values, 1)[0])),
    "factorial": _factorial,
    "binom": _binom,
    "gcd": lambda values: Fraction(math.gcd(*(int(_small(value)) for value in _whole(values)))),
    "lcm": lambda values: _small(Fraction(math.lcm(*(int(value) for value in _whole(values))))),
    "max": max,
    "min": min,
}


def _whole(values: list[Fraction]) -> list[Fraction]:
    if any(value.denominator != 1 for value in values):
        raise Undefined("expected whole numbers")
    return values
