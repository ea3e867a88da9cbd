"""Numbers as they are written: thousands, decimals, repeating decimals, mixed numbers, numerals in a stated base."""

from __future__ import annotations

import re
from fractions import Fraction

from hptjax.verify import nodes
from hptjax.verify.cursor import Cursor, NotRead
from hptjax.verify.nodes import Node

MAX_EXPONENT = 1000  # of 1e1000


def number(at: Cursor, text: str, *, thousands: bool) -> Node:
    """The number that begins with the digits `text`, which were just taken.

    Args
      thousands: whether a comma and three digits go on with it.
    """
    if thousands and re.fullmatch(r"\d{1,3}", text):
        text = _thousands(at, text)
    mantissa, _, exponent = text.lower().partition("e")
    if len(exponent.lstrip("+-0")) > 4 or abs(int(exponent or 0)) > MAX_EXPONENT:
        raise NotRead(f"expected exponents up to {MAX_EXPONENT}")
    places = len(mantissa.partition(".")[2])
    value = Fraction(mantissa) * Fraction(10) ** int(exponent or 0)
    if "." in mantissa and at.take("overline"):
        return _repeating(at, value, places)
    if at.take("_"):
        return _in_base(at, text)
    written = nodes.Number(value, places)
    return written if "." in mantissa or exponent else _mixed(at, written)


def _thousands(at: Cursor, text: str) -> str:
    """1,234,567.8 joined, where every group after the first has three digits and no space is before it."""
    place, joined = at.place, text
    while at.peek().text == "," and not at.peek().spaced:
        digits = at.peek(1)
        if digits.kind != "number" or digits.spaced or not re.fullmatch(r"\d{3}(\.\d+)?", digits.text):
            at.place = place  # 1,234,5: a list
            return text
        joined += digits.text
        at.place += 2
        if "." in digits.text:
            break
    return joined


def _repeating(at: Cursor, value: Fraction, places: int) -> Node:
    r"""The rest of `0.1\overline{6}`."""
    at.expect("{")
    digits = at.peek().text
    at.place += 1
    if not re.fullmatch(r"\d+", digits):
        raise NotRead("expected digits under the line")
    at.expect("}")
    return nodes.Number(value + Fraction(int(digits), 10**places * (10 ** len(digits) - 1)), -1)


def _in_base(at: Cursor, digits: str) -> Node:
    braced = at.take("{")
    base = at.peek().text
    at.place += 1
    if not re.fullmatch(r"\d{1,2}", base) or not 2 <= int(base) <= 36:
        raise NotRead("expected a base of 2 to 36")
    if braced:
        at.expect("}")
    return nodes.Numeral(digits.lstrip("0") or "0", int(base))


def _mixed(at: Cursor, whole: nodes.Number) -> Node:
    r"""`2\frac{1}{3}` and `2 1/3`: a whole number and a proper fraction of digits are added."""
    found = _fraction_of_digits(at)
    if found is None or not 0 < found[0] < found[1]:
        return whole
    top, bottom, length = found
    at.place += length
    return nodes.Mixed(whole, nodes.Div(nodes.Number(Fraction(top)), nodes.Number(Fraction(bottom))))


def _fraction_of_digits(at: Cursor) -> tuple[int, int, int] | None:
    """Top, bottom and number of tokens of a fraction that stands next, looked at and not taken."""
    ahead = [at.peek(place) for place in range(7)]
    texts = [token.text for token in ahead]
    if ahead[0].kind == "number" and ahead[0].spaced and texts[1] == "/":
        top, bottom, length = texts[0], texts[2], 3
    elif ahead[0].kind != "command" or texts[0] != "frac":
        return None
    elif [texts[place] for place in (1, 3, 4, 6)] == ["{", "}", "{", "}"]:
        top, bottom, length = texts[2], texts[5], 7
    elif re.fullmatch(r"\d\d", texts[1]):
        top, bottom, length = texts[1][0], texts[1][1], 2
    else:
        top, bottom, length = texts[1], texts[2], 3
    return (int(top), int(bottom), length) if re.fullmatch(r"\d+", top) and re.fullmatch(r"\d+", bottom) else None
