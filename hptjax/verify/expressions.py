"""Expressions by operator precedence: what stands between the separators, relations and units of an answer."""

from __future__ import annotations

import re
from fractions import Fraction

from hptjax.verify import nodes
from hptjax.verify.cursor import Cursor, NotRead
from hptjax.verify.nodes import Node
from hptjax.verify.numerals import number
from hptjax.verify.scan import Token
from hptjax.verify.spellings import FUNCTIONS
from hptjax.verify.units import WORDS

MAX_FACTORS = 100  # terms or factors in a row
SET, SUM, PRODUCT, POWER, POSTFIX = range(5)  # how tightly an operator binds

_CLOSERS = {"(": (")", "]"), "[": ("]", ")"), "\\{": ("\\}",)}
_NAMED = {
    "infty": "oo",
    "pi": "pi",
    "mathbbR": "reals",
    "mathbbZ": "integers",
    "mathbbN": "naturals",
    "mathbbQ": "rationals",
}
_FUNCTIONS = FUNCTIONS | {"arccot"}
_ACCENTS = frozenset({"vec", "hat", "bar", "tilde", "overrightarrow", "overline"})
_MATRICES = frozenset({"matrix", "pmatrix", "bmatrix", "Bmatrix"})
# short words that are answers or units; other runs of up to three letters are products of variables
_WORDS = WORDS | frozenset("yes no odd all none one two six ten sun mon tue wed thu fri sat red and or not".split())


class Expressions(Cursor):
    """Reads expressions. What stands between brackets may be a list: `items` of the reader of answers reads it.

    Attributes
      thousands: whether 1,234 outside brackets is one number. bars: absolute values that are open.
    """

    def __init__(self, tokens: list[Token], thousands: bool):
        super().__init__(tokens)
        self.thousands = thousands
        self.bars = 0

    def items(self, *, top: bool = False) -> tuple[tuple[Node, ...], set[str]]:
        """One or more statements and the separators between them."""
        raise NotImplementedError

    def operators(self, floor: int, top: bool = False) -> Node:
        """An expression whose operators bind at least as tightly as `floor`."""
        left = self.prefix(top)
        for _ in range(MAX_FACTORS):
            token = self.peek()
            text = token.text if token.kind in ("sign", "command") else ""
            if text == "^" and floor <= POWER:
                left = self.power(left)
            elif text in ("!", "%") and floor <= POSTFIX:
                self.place += 1
                _only_expressions(left)
                left = nodes.Call("factorial", (left,)) if text == "!" else nodes.Quantity(left, "%")
            elif text in ("*", "/", ":") and floor <= PRODUCT:
                if self.peek(1).kind == "text" or (self.peek(1).kind == "word" and not variables(self.peek(1))):
                    return left  # a unit: 5 \cdot \text{m}
                self.place += 1
                right = self.operators(POWER)
                left = _product(left, right) if text == "*" else _quotient(left, right, text)
            elif text in ("+", "-") and floor <= SUM:
                self.place += 1
                right = self.operators(PRODUCT)
                left = _sum(left, right if text == "+" else nodes.Neg(right))
            elif text in ("pm", "mp") and floor <= SUM:
                self.place += 1
                left = nodes.PlusMinus(left, self.operators(PRODUCT), 1 if text == "pm" else -1)
            elif text in ("cup",) and floor <= SET:
                self.place += 1
                right = self.operators(SUM)
                parts = left.parts if isinstance(left, nodes.Union) else (left,)
                left = nodes.Union((*parts, right))
            elif floor <= PRODUCT and self.starts_factor(left):
                left = _product(left, self.operators(POWER))
            else:
                return left
        raise NotRead(f"expected at most {MAX_FACTORS} terms or factors in a row")

    def starts_factor(self, left: Node) -> bool:
        """Whether the next token multiplies what was read, with no sign between them."""
        token = self.peek()
        if token.kind == "name" or (token.kind == "word" and variables(token)):
            return True
        if token.kind == "number":  # x 2 is no product; \frac{1}{2} 3 is none either
            return False
        if token.kind == "command":
            return (
                token.text in _FUNCTIONS
                or token.text in _NAMED
                or token.text in ("frac", "sqrt", "binom", "lfloor", "lceil")
            )
        if token.kind == "sign":
            return token.text in ("(", "{") or (token.text == "|" and not self.bars)
        return False

    def power(self, base: Node) -> Node:
        self.place += 1
        _only_expressions(base)
        if self.degrees():
            return nodes.Quantity(base, "°")
        exponent = self.argument(signed=True)
        if self.peek().text == "^":
            raise NotRead("expected braces around a power of a power")
        return nodes.Pow(base, exponent)

    def degrees(self) -> bool:
        if self.take("circ"):
            return True
        if self.peek().text == "{" and self.peek(1).text == "circ" and self.peek(2).text == "}":
            self.place += 3
            return True
        return False

    def prefix(self, top: bool = False) -> Node:
        token = self.peek()
        if token.kind == "sign" and token.text in ("-", "+"):
            self.place += 1
            self.deeper()
            value = self.operators(PRODUCT)
            self.depth -= 1
            _only_expressions(value)
            return nodes.Neg(value) if token.text == "-" else value
        if token.kind == "command" and token.text in ("pm", "mp"):
            self.place += 1
            return nodes.PlusMinus(None, self.operators(PRODUCT), 1 if token.text == "pm" else -1)
        return self.atom(top)

    def atom(self, top: bool = False) -> Node:
        self.deeper()  # every nesting passes here, or is a sign before a sign
        value = self.atom_inside(top)
        self.depth -= 1
        return value

    def atom_inside(self, top: bool) -> Node:
        token = self.peek()
        self.place += 1
        if token.kind == "number":
            return number(self, token.text, thousands=top and self.thousands)
        if token.kind == "name":
            return self.name(token.text)
        if token.kind in ("word", "text") and variables(token):
            return self.name(token.text) if len(token.text) == 1 else _product(*map(nodes.Name, token.text))
        if token.kind == "command":
            return self.command(token.text)
        if token.kind == "sign":
            return self.bracketed(token.text)
        raise NotRead(f"expected a value, got {token.text!r}")

    def name(self, text: str) -> Node:
        if self.take("_"):
            text = f"{text}_{self.subscript()}"
        while self.take("'"):
            text += "'"
        return nodes.Name(text)

    def subscript(self) -> str:
        if not self.take("{"):
            token = self.peek()
            self.place += 1
            if token.kind not in ("name", "number"):
                raise NotRead("expected a letter or a number below")
            return token.text
        parts = []
        while not self.take("}"):
            token = self.peek()
            if token.kind == "end":
                raise NotRead("expected }")
            parts.append(token.text)
            self.place += 1
        return "".join(parts)

    def command(self, name: str) -> Node:
        if name in _NAMED:
            return nodes.Name(_NAMED[name])
        if name == "frac":
            return nodes.Div(self.argument(), self.argument())
        if name == "binom":
            return nodes.Call("binom", (self.argument(), self.argument()))
        if name == "sqrt":
            index: Node = nodes.Number(Fraction(2))
            if self.take("["):
                index = self.operators(SUM)
                self.expect("]")
            return nodes.Root(self.argument(), index)
        if name in ("lfloor", "lceil"):
            value = self.operators(SUM)
            self.expect("rfloor" if name == "lfloor" else "rceil")
            return nodes.Call("floor" if name == "lfloor" else "ceil", (value,))
        if name in _FUNCTIONS:
            return self.function(name)
        if name in _ACCENTS:
            return nodes.Name(f"{name} {self.subscript()}")
        if name == "emptyset":
            return nodes.Items("{}", ())
        if name == "{":
            return self.bracketed("\\{")
        if name == "begin":
            return self.matrix()
        raise NotRead(f"expected a known command, got {name}")

    def function(self, name: str) -> Node:
        parameter = exponent = None
        for _ in range(2):
            if self.take("_"):
                parameter = self.argument()
            elif self.take("^"):
                exponent = self.argument(signed=True)
        if exponent == nodes.Neg(nodes.Number(Fraction(1))) and name in ("sin", "cos", "tan"):
            name, exponent = f"arc{name}", None
        if self.peek().text in ("(", "{", "["):
            token = self.peek()
            self.place += 1
            inside = self.bracketed(token.text)
            arguments = inside.items if isinstance(inside, nodes.Items) else (inside,)
        else:
            value = self.operators(POWER)
            while self.starts_factor(value) and self.peek().text not in _FUNCTIONS:
                value = _product(value, self.operators(POWER))
            arguments = (value,)
        call = nodes.Call(name, arguments, parameter)
        return nodes.Pow(call, exponent) if exponent is not None else call

    def argument(self, *, signed: bool = False) -> Node:
        r"""What a command or a ^ takes: a group in braces, or one sign; `\frac12` takes one digit at a time."""
        value = self.argument_inside(signed)
        _only_expressions(value)
        return value

    def argument_inside(self, signed: bool) -> Node:
        if self.take("{"):
            return self.group("}")
        token = self.peek()
        if signed and token.kind == "sign" and token.text == "-":
            self.place += 1
            return nodes.Neg(self.argument())
        if token.kind == "number" and not signed and len(token.text) > 1 and token.text.isdigit():
            self.tokens[self.place] = Token("number", token.text[1:], False)
            return nodes.Number(Fraction(token.text[0]))
        if token.kind == "number":
            self.place += 1
            if not re.fullmatch(r"[\d.]+", token.text):  # 1e9 as an exponent
                raise NotRead("expected digits")
            return nodes.Number(Fraction(token.text), len(token.text.partition(".")[2]))
        return self.atom()

    def group(self, closing: str) -> Node:
        bars, self.bars = self.bars, 0
        value = self.operators(SUM)
        self.expect(closing)
        self.bars = bars
        return value

    def bracketed(self, opening: str) -> Node:
        if opening == "{":
            return self.group("}")
        if opening == "|":
            self.bars += 1
            value = self.operators(SUM)
            self.expect("|")
            self.bars -= 1
            return nodes.Call("abs", (value,))
        if opening not in _CLOSERS:
            raise NotRead(f"expected a value, got {opening!r}")
        if opening == "\\{" and self.take("\\}"):
            return nodes.Items("{}", ())
        bars, self.bars = self.bars, int(opening == "\\{")  # in {x | x > 3} the bar is no absolute value
        inside, _ = self.items()
        if opening == "\\{" and len(inside) == 1 and self.take("|", "mid"):
            return self.condition(inside[0], bars)
        closing = self.take(*_CLOSERS[opening])
        if closing is None:
            raise NotRead(f"expected {_CLOSERS[opening][0]}, got {self.peek().text!r}")
        self.bars = bars
        brackets = (opening + closing.text).replace("\\", "")
        return inside[0] if brackets == "()" and len(inside) == 1 else nodes.Items(brackets, inside)

    def condition(self, name: Node, bars: int) -> Node:
        """The rest of {x | x > 3}, which says what x > 3 says."""
        inside, _ = self.items()
        self.expect("\\}")
        self.bars = bars
        if len(inside) != 1 or not isinstance(inside[0], nodes.Relation) or name not in inside[0].sides:
            raise NotRead("expected one relation of the name before the bar")
        return inside[0]

    def matrix(self) -> Node:
        self.expect("{")
        kind = self.peek().text
        self.place += 1
        self.expect("}")
        if kind not in _MATRICES:
            raise NotRead(f"expected a matrix, got {kind}")
        rows: list[tuple[Node, ...]] = []
        row = [self.operators(SUM)]
        while True:
            if self.take("&"):
                row.append(self.operators(SUM))
            elif self.take("\\\\") and self.peek().text != "end":
                rows.append(tuple(row))
                row = [self.operators(SUM)]
            else:
                break
        rows.append(tuple(row))
        self.expect("end")
        self.expect("{")
        self.place += 1
        self.expect("}")
        if len({len(row) for row in rows}) != 1:
            raise NotRead("expected rows of one length")
        return nodes.Matrix(tuple(rows))


def variables(token: Token) -> bool:
    """Whether letters are variables: an upright one, or a short run that is no known word or unit."""
    if token.kind == "text":
        return len(token.text) == 1
    return token.kind == "word" and len(token.text) <= 3 and token.text.lower() not in _WORDS


def _product(*factors: Node) -> Node:
    flat: list[Node] = []
    for factor in factors:
        _only_expressions(factor)
        flat += factor.factors if isinstance(factor, nodes.Mul) else (factor,)
    return nodes.Mul(tuple(flat))


def _sum(left: Node, right: Node) -> Node:
    _only_expressions(left, right)
    terms = left.terms if isinstance(left, nodes.Add) else (left,)
    return nodes.Add((*terms, right))


def _quotient(top: Node, bottom: Node, sign: str) -> Node:
    _only_expressions(top, bottom)
    return nodes.Items(":", (top, bottom)) if sign == ":" else nodes.Div(top, bottom)


def _only_expressions(*parts: Node) -> None:
    for part in parts:
        if not isinstance(part, nodes.EXPRESSIONS) and not (isinstance(part, nodes.Quantity) and part.unit == "°"):
            raise NotRead(f"expected a value to calculate with, got {type(part).__name__}")
