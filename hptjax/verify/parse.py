r"""From tokens to what an answer is: numbers, expressions, lists, sets, intervals, relations, quantities, words.

A reader of our own by operator precedence. Nothing is evaluated and nothing is guessed: what it does not know raises
`NotRead`, and another route may look at the text. Depth, length and the size of numbers are bounded, so that any text
is read or refused at once.
"""

from __future__ import annotations

import re
from functools import lru_cache

from hptjax.verify import nodes
from hptjax.verify.cursor import NotRead
from hptjax.verify.expressions import SET, Expressions, variables
from hptjax.verify.nodes import Node
from hptjax.verify.scan import cleaned, scan
from hptjax.verify.units import unit_name

MAX_CHARACTERS = 256
MAX_GOLD_CHARACTERS = 1024

_RELATIONS = {"=": "=", "<": "<", ">": ">", "le": "<=", "ge": ">=", "<=": "<=", ">=": ">=", "ne": "!=", "in": "in"}
_WORD_ANSWER = re.compile(r"[A-Za-z][A-Za-z '.,()-]*")


@lru_cache(maxsize=4096)
def readings(text: str, limit: int = MAX_CHARACTERS) -> tuple[Node, ...]:
    """What a text can mean, the likeliest first; empty where it cannot be read.

    There are two where a comma may part thousands or items: 1,234 is a number, or a list of 1 and 234.
    """
    found: list[Node] = []
    for thousands in (True, False):
        try:
            node = read(text, thousands=thousands, limit=limit)
        except NotRead:
            continue
        if node not in found:
            found.append(node)
    return tuple(found)


def read(text: str, *, thousands: bool = True, limit: int = MAX_CHARACTERS) -> Node:
    """The answer that a text says.

    Args
      thousands: whether 1,234 outside brackets is one number. limit: characters of the text, typesetting left out.
    Raises
      a text that is empty, too long, too deep or of no known form -> NotRead.
    """
    text = cleaned(text)
    if not 0 < len(text) <= limit:
        raise NotRead(f"expected an answer of 1 to {limit} characters, got {len(text)}")
    tokens = scan(text)
    try:
        return _Reader(tokens, thousands).answer()
    except RecursionError:
        raise NotRead("nested too deep") from None
    except NotRead:
        if all(token.kind in ("word", "text", "name") for token in tokens) or _WORD_ANSWER.fullmatch(text):
            return nodes.Words(_words(" ".join(token.text for token in tokens if token.kind != "separator")))
        raise


def _words(text: str) -> str:
    return " ".join(re.sub(r"[^\w%$-]+", " ", text.lower()).split())


class _Reader(Expressions):
    """Reads what stands around expressions: relations, units, words, lists."""

    def answer(self) -> Node:
        found, separators = self.items(top=True)
        if self.peek().kind != "end":
            raise NotRead(f"expected the end, got {self.peek().text!r}")
        return found[0] if len(found) == 1 else nodes.Items("or" if separators == {"or"} else "", found)

    def items(self, *, top: bool = False) -> tuple[tuple[Node, ...], set[str]]:
        """One or more statements, and the separators between them."""
        found, separators = [self.statement(top)], set()
        while self.peek().kind == "separator":
            while self.peek().kind == "separator":  # ", and"
                separators.add(self.peek().text.strip(", ") or ",")
                self.place += 1
            found.append(self.statement(top))
        return tuple(found), separators

    def statement(self, top: bool) -> Node:
        """A side or a chain of relations, and after it what that is about; words alone are an answer too."""
        exact = None if self.at_about() else self.relation(top)
        near = None
        while self.at_about():
            self.place += 1
            near = self.side(top)
        if near is None:
            assert exact is not None
            return exact
        named = isinstance(exact, nodes.Name) and exact.name not in nodes.CONSTANTS
        return nodes.About(None if named else exact, near)

    def at_about(self) -> bool:
        return self.peek().kind == "command" and self.peek().text == "approx"

    def relation(self, top: bool) -> Node:
        sides, operators = [self.side(top)], []
        while (token := self.peek()).kind in ("sign", "command") and token.text in _RELATIONS:
            self.place += 1
            operators.append(_RELATIONS[token.text])
            sides.append(self.side(top))
        return nodes.Relation(tuple(sides), tuple(operators)) if operators else sides[0]

    def side(self, top: bool) -> Node:
        token = self.peek()
        if token.kind in ("text", "word") and not variables(token):
            return self.words()
        if token.text == "$" and token.kind == "sign":
            self.place += 1
            return nodes.Quantity(self.operators(SET, top), "$")
        node = self.operators(SET, top)
        unit = self.unit()
        return nodes.Quantity(node, unit) if unit else node

    def words(self) -> Node:
        found = []
        while self.peek().kind in ("text", "word", "name"):
            found.append(self.peek().text)
            self.place += 1
        text = _words(" ".join(found))
        if not text:
            raise NotRead("expected words")
        return nodes.Words(text)

    def unit(self) -> str:
        """The unit that follows a value, as words with powers; empty where none does."""
        start = self.place
        parts: list[str] = []
        while (token := self.peek()).kind in ("text", "word") or (parts and token.kind in ("sign", "number", "name")):
            if token.kind == "sign" and token.text not in ("/", "^", "{", "}", "-", "*", "."):
                break
            parts.append(token.text)
            self.place += 1
        name = unit_name(" ".join(parts)) if parts else ""
        if not name:
            self.place = start
        return name
