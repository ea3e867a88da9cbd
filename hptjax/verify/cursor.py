"""A place in a list of tokens, and how deep the reader stands in it."""

from __future__ import annotations

from hptjax.verify.scan import Token

MAX_NESTING = 64


class NotRead(ValueError):
    """The text is no answer that this reader knows."""


class Cursor:
    """A place in a list of tokens.

    Attributes
      tokens: may be changed ahead of the place. place: of the next token. depth: parts that are open.
    """

    def __init__(self, tokens: list[Token]):
        self.tokens = tokens
        self.place = 0
        self.depth = 0

    def peek(self, ahead: int = 0) -> Token:
        place = self.place + ahead
        return self.tokens[place] if place < len(self.tokens) else Token("end", "", False)

    def take(self, *texts: str) -> Token | None:
        """The next token if it is one of these signs or commands; else None."""
        token = self.peek()
        if token.kind in ("sign", "command", "separator") and token.text in texts:
            self.place += 1
            return token
        return None

    def expect(self, text: str) -> None:
        if self.take(text) is None:
            raise NotRead(f"expected {text}, got {self.peek().text!r}")

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise NotRead(f"expected at most {MAX_NESTING} nested parts")
