"""The numbers under the verifier against mpmath at 80 digits, an independent library, and against fractions."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import mpmath
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hptjax.verify import nodes
from hptjax.verify.decimals import DIGITS, Complex, arctan2, cos_sin, exp, log, pi, power, precise, square_root
from hptjax.verify.equal import equal_expressions, is_written_out, rounds_to, same_value
from hptjax.verify.evaluate import Approximate, NotExact, Undefined, approximate, exact
from hptjax.verify.nodes import Node
from hptjax.verify.parse import read

mpmath.mp.dps = 80
TOLERANCE = mpmath.mpf(10) ** (12 - DIGITS)

REALS = st.fractions(-50, 50, max_denominator=10_000)


@pytest.fixture(autouse=True)
def precision():
    with precise():
        yield


def _mp(value: Complex | Decimal) -> mpmath.mpc:
    if isinstance(value, Complex):
        return mpmath.mpc(str(value.real), str(value.imaginary))
    return mpmath.mpc(str(value))


def _close(ours: Complex | Decimal, theirs) -> bool:
    return abs(_mp(ours) - theirs) <= TOLERANCE * max(1, abs(theirs))


def _of(real: Fraction, imaginary: Fraction = Fraction(0)) -> tuple[Complex, mpmath.mpc]:
    ours = Complex(Complex.of(real).real, Complex.of(imaginary).real)
    quotients = (mpmath.mpf(part.numerator) / part.denominator for part in (real, imaginary))
    return ours, mpmath.mpc(*quotients)


def test_values_pi_is_pi():
    assert _close(pi(), mpmath.pi)


@given(REALS, REALS)
@settings(max_examples=80)
def test_values_complex_functions_agree_with_mpmath(x, y):
    with precise():
        ours, theirs = _of(x, y)
        assert _close(exp(ours), mpmath.exp(theirs))
        assert _close(square_root(ours), mpmath.sqrt(theirs))
        assert _close(ours.to_integer(5), theirs**5)
        cosine, sine = cos_sin(ours.real)
        assert _close(cosine, mpmath.cos(theirs.real))
        assert _close(sine, mpmath.sin(theirs.real))
        assume(x != 0 or y != 0)
        assert _close(log(ours), mpmath.log(theirs))
        assert _close(ours.to_integer(-3), theirs**-3)
        assert _close(arctan2(ours.imaginary, ours.real), mpmath.atan2(theirs.imag, theirs.real))
        assert _close(power(ours, Complex(Decimal("0.3"))), mpmath.power(theirs, mpmath.mpf(3) / 10))


FUNCTIONS = {
    "sin": mpmath.sin, "cos": mpmath.cos, "tan": mpmath.tan, "cot": mpmath.cot, "sec": mpmath.sec, "csc": mpmath.csc,
    "arcsin": mpmath.asin, "arccos": mpmath.acos, "arctan": mpmath.atan, "sinh": mpmath.sinh, "cosh": mpmath.cosh,
    "tanh": mpmath.tanh, "ln": mpmath.log, "lg": mpmath.log10, "exp": mpmath.exp, "abs": abs,
    "arccot": lambda x: mpmath.pi / 2 - mpmath.atan(x),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_functions_of_an_answer_agree_with_mpmath(name):
    for x in (Fraction(1, 3), Fraction(-2, 7), Fraction(9, 10), Fraction(1, 1000)):
        if name in ("ln", "lg") and x < 0:
            continue
        ours = approximate(nodes.Call(name, (nodes.Number(x),)), {}).value
        assert _close(ours, FUNCTIONS[name](mpmath.mpf(x.numerator) / x.denominator)), (name, x)


NUMBERS = st.integers(-9, 9).map(lambda n: nodes.Number(Fraction(n)))


def _grow(inner: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    return st.one_of(
        st.tuples(inner, inner).map(nodes.Add),
        st.tuples(inner, inner).map(nodes.Mul),
        st.tuples(inner, inner).map(lambda pair: nodes.Div(*pair)),
        inner.map(nodes.Neg),
        st.tuples(inner, st.integers(-3, 3)).map(lambda pair: nodes.Pow(pair[0], nodes.Number(Fraction(pair[1])))),
        inner.map(lambda node: nodes.Root(node, nodes.Number(Fraction(2)))),
    )


TREES = st.recursive(NUMBERS, _grow, max_leaves=6)


def _theirs(node: Node):
    """A second evaluation of the same tree, by mpmath."""
    match node:
        case nodes.Number(value=value):
            return mpmath.mpc(value.numerator) / value.denominator
        case nodes.Add(terms=terms):
            return mpmath.fsum(_theirs(term) for term in terms)
        case nodes.Mul(factors=factors):
            return mpmath.fprod(_theirs(factor) for factor in factors)
        case nodes.Div(top=top, bottom=bottom):
            return _theirs(top) / _theirs(bottom)
        case nodes.Neg(value=value):
            return -_theirs(value)
        case nodes.Pow(base=base, exponent=nodes.Number(value=value)):
            return _theirs(base) ** int(value)
        case nodes.Root(radicand=radicand):
            return mpmath.sqrt(_theirs(radicand))
    raise AssertionError(node)


@given(TREES)
@settings(max_examples=250)
def test_values_of_whole_expressions_agree_with_mpmath(tree):
    """Exact where it can be and approximate always; an expression with no value has none in both."""
    try:
        ours = approximate(tree, {})
    except Undefined:
        return
    try:
        theirs = _theirs(tree)
    except (ZeroDivisionError, OverflowError):
        raise AssertionError(f"mpmath finds no value in {tree}") from None
    scale = max(mpmath.mpf(str(ours.scale)), 1, abs(theirs))
    assume(abs(theirs) > scale * mpmath.mpf(10) ** -8)  # what cancels to nearly 0 may lie on either side of a branch
    assert abs(_mp(ours.value) - theirs) <= TOLERANCE * scale
    try:
        fraction = exact(tree, {})
    except (NotExact, Undefined):
        return
    assert abs(mpmath.mpf(fraction.numerator) / fraction.denominator - theirs) <= TOLERANCE * scale


@given(st.integers(0, 10**30), st.integers(2, 12), st.booleans())
@settings(max_examples=200)
def test_values_exact_roots_are_those_of_powers_and_of_nothing_else(base, index, neighbour):
    radicand = base**index + neighbour
    node = nodes.Root(nodes.Number(Fraction(radicand)), nodes.Number(Fraction(index)))
    is_power = not neighbour or radicand == 1
    try:
        assert exact(node, {}) ** index == radicand
        assert is_power
    except NotExact:
        assert not is_power


def test_values_have_bounds():
    for text, error in (
        ("1/0", Undefined),
        ("0^0", Undefined),
        ("2^{1001}", Undefined),
        (r"\binom{5}{-1}", Undefined),
        ("501!", Undefined),
        (r"\sqrt{2}", NotExact),
        ("x", NotExact),
        (r"(10^{300})^{99}", NotExact),
    ):
        with pytest.raises(error):
            exact(read(text), {})
    for text in ("1/0", r"\ln 0", r"\tan\frac{\pi}{2}", r"e^{e^{e^{e}}}", r"\arcsin 2", r"\sin(10^{13})"):
        with pytest.raises(Undefined):
            approximate(read(text), {})


def test_values_that_cancel_are_not_said_to_be_equal():
    """10^80 pi - 10^80 pi hides any number at 60 digits: the answer is "cannot tell", not "equal"."""
    hidden = read(r"\sqrt{2} + 10^{80}\pi - 10^{80}\pi")
    assert equal_expressions(read(r"\sqrt{2}"), hidden) is not True
    assert equal_expressions(read(r"\sqrt{3}"), hidden) is not True
    assert equal_expressions(read(r"10^{30}+\sqrt{2}"), read(r"10^{30}+\sqrt{3}")) is False
    tiny = Approximate(Complex(Decimal(0)), Decimal(1))
    assert same_value(tiny, Fraction(0)) is None


def test_values_too_large_or_too_small_for_a_comparison_are_not_said_to_be_equal():
    """Their squares overflow or underflow: neither raises, and no two of them become the same 0 or infinity."""
    assert equal_expressions(read(r"(\pi^{1000})^{900}(1+i)"), read(r"(\pi^{1000})^{900}(1-i)")) is not True
    for one, other in (
        (r"(\pi^{1000})^{1000}", r"(e^{1000})^{1000}"),
        (r"(\pi^{-1000})^{1000}", r"(e^{-1000})^{1000}"),
    ):
        assert equal_expressions(read(one), read(other)) is not True
    assert equal_expressions(read(r"(\pi^{-1000})^{999}"), read("0")) is not True


def test_values_near_misses_are_different():
    """Ramanujan's e^(pi sqrt 163) is an integer to 12 decimals after 18 digits, and is none."""
    assert equal_expressions(read("262537412640768744"), read(r"e^{\pi\sqrt{163}}")) is False
    assert equal_expressions(read(r"\sqrt{2}"), read("1." + str(math.isqrt(2 * 10**60))[1:])) is False


def test_values_rounding_by_hand():
    third, close, far = read(r"\frac{1}{3}"), read("0.333333"), read("0.33333")
    assert rounds_to(third, close)
    assert not rounds_to(third, far)
    assert rounds_to(read("3.14"), read(r"\pi"))
    assert not rounds_to(read("3.15"), read(r"\pi"))
    assert not rounds_to(read("3.1"), read(r"\pi"))  # one digit after the point is too little
    assert not rounds_to(read("0.000001"), read("0.000002"))  # math-verify rounds both to 0.000001 or 0.000002 at best
    assert not rounds_to(read("x"), read("0.5"))


def test_values_written_out_by_hand():
    yes = [
        r"5",
        "-5",
        "5.0",
        r"\frac{1}{2}",
        r"-\frac{1}{2}",
        r"\frac{-1}{2}",
        r"2\frac{1}{2}",
        r"1.5\times 10^{-3}",
        r"0.\overline{3}",
    ]
    no = [
        "1+2",
        r"\frac{2}{4}",
        r"\frac{4}{1}",
        r"\frac{1}{-2}",
        "2^3",
        r"\sqrt{4}",
        "3!",
        "--5",
        r"\frac{0.5}{2}",
        "x",
        "2 \\cdot 3",
        r"2\frac{2}{4}",
    ]
    assert [text for text in yes if not is_written_out(read(text))] == []
    assert [text for text in no if is_written_out(read(text))] == []
