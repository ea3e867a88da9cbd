"""What an answer can be once it is read: expressions, and the shapes that hold them. Frozen, compared by `compare`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from fractions import Fraction


@dataclasses.dataclass(frozen=True)
class Number:
    """A number as written. `places`: digits after the decimal point; 0 for an integer; -1: repeating decimals."""

    value: Fraction
    places: int = 0


@dataclasses.dataclass(frozen=True)
class Name:
    """A variable, or a constant: "pi", "e", "i", "oo", "reals" and so on are names like any other until evaluated."""

    name: str


@dataclasses.dataclass(frozen=True)
class Add:
    terms: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class Mul:
    factors: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class Div:
    top: Node
    bottom: Node


@dataclasses.dataclass(frozen=True)
class Neg:
    value: Node


@dataclasses.dataclass(frozen=True)
class Mixed:
    """A whole number and a proper fraction, added: two and a half."""

    whole: Number
    part: Div


@dataclasses.dataclass(frozen=True)
class Pow:
    base: Node
    exponent: Node


@dataclasses.dataclass(frozen=True)
class Root:
    radicand: Node
    index: Node


@dataclasses.dataclass(frozen=True)
class Call:
    """A function of its arguments; `parameter` is the base of a logarithm."""

    function: str
    arguments: tuple[Node, ...]
    parameter: Node | None = None


@dataclasses.dataclass(frozen=True)
class PlusMinus:
    """Two values at once: left + right and left - right; `sign` -1 turns them round."""

    left: Node | None
    right: Node
    sign: int = 1


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A value with a unit: "%", "°", "$" or a name."""

    value: Node
    unit: str


@dataclasses.dataclass(frozen=True)
class Numeral:
    """Digits in a stated base, as written; not the number they stand for."""

    digits: str
    base: int


@dataclasses.dataclass(frozen=True)
class Items:
    """Several answers.

    Args
      brackets: "()", "[]", "[)", "(]", "{}"; ":" for a ratio; "" for a bare list, "or" where an or parts all of it.
    """

    brackets: str
    items: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class Union:
    parts: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class Relation:
    """A chain: sides[0] operators[0] sides[1] ... Operators are = < > <= >= != and "in"."""

    sides: tuple[Node, ...]
    operators: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class About:
    r"""`exact \approx near`. `exact` is None where nothing stands before the sign, or a name alone."""

    exact: Node | None
    near: Node


@dataclasses.dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[Node, ...], ...]


@dataclasses.dataclass(frozen=True)
class Words:
    """An answer in words, lower case."""

    text: str


Node = (
    Number
    | Name
    | Add
    | Mul
    | Div
    | Neg
    | Mixed
    | Pow
    | Root
    | Call
    | PlusMinus
    | Quantity
    | Numeral
    | Items
    | Union
    | Relation
    | About
    | Matrix
    | Words
)
EXPRESSIONS = (Number, Name, Add, Mul, Div, Neg, Mixed, Pow, Root, Call, PlusMinus)
CONSTANTS = frozenset({"pi", "e", "i", "oo"})
SETS = frozenset({"reals", "integers", "naturals", "rationals"})  # names too; what they hold is not known here


def children(node: Node) -> Iterator[Node]:
    """The nodes directly inside a node."""
    match node:
        case (
            Add(terms=inside) | Mul(factors=inside) | Items(items=inside) | Union(parts=inside) | Relation(sides=inside)
        ):
            yield from inside
        case Div(top=first, bottom=second) | Pow(base=first, exponent=second) | Root(radicand=first, index=second):
            yield first
            yield second
        case Neg(value=value) | Quantity(value=value):
            yield value
        case Mixed(whole=whole, part=part):
            yield whole
            yield part
        case Call(arguments=inside, parameter=parameter):
            yield from inside
            if parameter is not None:
                yield parameter
        case PlusMinus(left=first, right=second) | About(exact=first, near=second):
            if first is not None:
                yield first
            yield second
        case Matrix(rows=rows):
            for row in rows:
                yield from row


def walk(node: Node) -> Iterator[Node]:
    """The node and all nodes inside it."""
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(children(node))


def variables(node: Node) -> frozenset[str]:
    """The names in a node that are no constants."""
    return frozenset(part.name for part in walk(node) if isinstance(part, Name)) - CONSTANTS
