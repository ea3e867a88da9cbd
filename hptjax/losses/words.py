"""What a component of a row is, in a few words that stand beside the function: `hptjax methods` prints them.

Masks, denominators, advantages, weights and schedules are functions, and a made one knows its constants. Whoever makes
it says them here, so that the table is printed from the rows themselves and cannot differ from them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def said(words: str) -> Callable[[F], F]:
    """Makes a decorator that writes `words` on a function, which it returns."""

    def mark(function: F) -> F:
        vars(function)["words"] = words
        return function

    return mark


def words_of(function: Callable[..., Any], otherwise: str | None = None) -> str:
    """The words of a component, or `otherwise`. Raises neither of them -> ValueError."""
    words = vars(function).get("words", otherwise)
    if words is None:
        raise ValueError(f"{function!r} has no words for `hptjax methods`; expected it to be marked with said(...)")
    return words
