"""What the fields of a row may hold: turns, demonstrations, answers, levels, tools; anything else is `Malformed`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

Row = Mapping[str, Any]

ROW_REASONS = {
    "not_utf8": "bytes that are no UTF-8",
    "not_json": "a line that is no JSON",
    "not_a_record": "JSON that is no object, or a line of a table with more cells than columns",
    "no_question": "no question, or an empty one",
    "malformed_turns": "turns that are no list of {role, content} with texts, or do not end with a question",
    "malformed_demonstration": "a demonstration that is neither a text nor one assistant's turn with a text",
    "malformed_answer": "an answer that is no text, number, list of these or object",
}

ROLES = ("system", "developer", "user", "assistant", "tool")  # no sets: a row may hold anything, unhashable too
ASKING = ("user", "tool")  # who may speak last before a completion
MAX_NESTING = 100  # lists and objects inside each other, in turns, tools and answers
EXACT = 2**53  # whole numbers up to here are floats of their own


class Malformed(ValueError):
    """What is wrong with a row, as a key of `ROW_REASONS`. It does not leave `data.importers`."""


def turns(value: Any, *, ends_with_question: bool = True) -> tuple[Row, ...]:
    """Turns with a role and a text each; a bare text is a user's turn.

    Raises Malformed.
    """
    if value is None or (isinstance(value, str | list | tuple) and not value):
        raise Malformed("no_question")
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list | tuple):
        raise Malformed("malformed_turns")
    found = tuple(_turn(each) for each in value)
    return ending_with_question(found) if ends_with_question else found


def ending_with_question(turns: tuple[Row, ...]) -> tuple[Row, ...]:
    """The same turns, where somebody asks last. Raises Malformed."""
    if not turns or turns[-1]["role"] not in ASKING:
        raise Malformed("malformed_turns")
    if not turns[-1]["content"].strip():
        raise Malformed("no_question")
    return turns


def _turn(value: Any) -> Row:
    if not isinstance(value, Mapping) or value.get("role") not in ROLES:
        raise Malformed("malformed_turns")
    said = {str(key): entry for key, entry in value.items() if entry is not None}  # a table's empty cells are None
    content = _text(said.get("content", "" if said.get("tool_calls") else None))
    if content is None:
        raise Malformed("malformed_turns")
    _as_json(said, "malformed_turns")
    return {**said, "content": content}


def _text(content: Any) -> str | None:
    """A turn's content: a text, or a list of text blocks; None for anything else (an image, say)."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple) or not content:
        return None
    blocks = [b.get("text") if isinstance(b, Mapping) and b.get("type") == "text" else None for b in content]
    texts = [block for block in blocks if isinstance(block, str)]
    return "".join(texts) if len(texts) == len(blocks) else None


def one_turn(value: Any) -> str:
    """The text of a demonstration: a text, or the only turn of a list, which must be an assistant's; "" for none.

    Reasoning in a field of its own goes before the text, between think tags.
    """
    if value is None or (isinstance(value, str | list | tuple) and not value):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = [value]
    try:
        (turn,) = turns(value, ends_with_question=False)
    except (Malformed, ValueError):
        raise Malformed("malformed_demonstration") from None
    if turn["role"] != "assistant" or turn.get("tool_calls"):
        raise Malformed("malformed_demonstration")
    reasoning = turn.get("reasoning_content") or turn.get("thinking")
    if reasoning is None:
        return turn["content"]
    if not isinstance(reasoning, str):
        raise Malformed("malformed_demonstration")
    return f"<think>\n{reasoning}\n</think>\n\n{turn['content']}"


def answer(value: Any) -> Mapping[str, Any]:
    """What a verifier needs: {"answer": text}, or a list of texts of which any is right; {} where there is none."""
    if value is None or (isinstance(value, str | list | tuple | Mapping) and not value):
        return {}
    if isinstance(value, Mapping):
        return _as_json(value, "malformed_answer")
    if not isinstance(value, list | tuple):
        value = [value]
    texts = [_number_or_text(each) for each in value]
    if not all(texts):
        return {}
    return {"answer": texts[0] if len(texts) == 1 else texts}


def _number_or_text(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise Malformed("malformed_answer")
    if not isinstance(value, int) and not (value.is_finite() if isinstance(value, Decimal) else math.isfinite(value)):
        raise Malformed("malformed_answer")
    whole = isinstance(value, float) and value.is_integer() and abs(value) <= EXACT  # above, digits would be made up
    try:
        return str(int(value)) if whole else str(value)
    except ValueError:  # more digits than Python writes
        raise Malformed("malformed_answer") from None


def _as_json(value: Any, reason: str) -> Any:
    """The value as JSON has it; what is none, or nested too deeply for all who will write it again, is Malformed."""
    if not _shallow(value, MAX_NESTING):
        raise Malformed(reason)
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        raise Malformed(reason) from None


def _shallow(value: Any, levels: int) -> bool:
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return levels > 0 and all(_shallow(each, levels - 1) for each in inside)


def level(row: Row) -> int:
    """A difficulty: a whole number of at least 0, or one after the word Level (MATH); 0 where there is none."""
    value = row.get("level")
    if isinstance(value, str):
        value = value.removeprefix("Level").strip()
        return int(value) if value.isascii() and value.isdigit() and len(value) < 5 else 0
    return value if type(value) is int and value >= 0 else 0


def tools(value: Any) -> tuple[Row, ...]:
    """Tools as JSON schemas, from a list or the JSON text of one."""
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Malformed("malformed_turns") from None
    if not value:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
        raise Malformed("malformed_turns")
    return tuple(_as_json(value, "malformed_turns"))


def inside(row: Row, name: str) -> Row:
    """A field that is an object; an empty one where there is none."""
    value = row.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise Malformed("malformed_answer")
    return value or {}


def first(row: Row, *names: str) -> Any:
    """The first of the fields that is there and not None."""
    return next((row[name] for name in names if row.get(name) is not None), None)
