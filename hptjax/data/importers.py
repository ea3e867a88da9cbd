"""Rows of published formats as examples: one pure function per format, row -> Example, or a word for why there is none.

An importer looks at one row and at nothing else. It renders nothing: what it leaves in `Example.messages` becomes a
prompt by a chat template later (`data/prompts.py`); `Example.prompt` is until then the question as a person reads it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from hptjax.data.identity import canonical_text
from hptjax.records import Example

Row = Mapping[str, Any]
Importer = Callable[[Row], Example | str]
"""A row -> its example (question id 0, to be given by content), or one of `ROW_REASONS`."""

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
    """What is wrong with a row, as a key of `ROW_REASONS`. It does not leave this module."""


def verl(row: Row) -> Example | str:
    """verl's parquet, as in OpenR1-Math-46k-8192: `prompt` turns, `reward_model.ground_truth`, `target` turns or None.

    Source: the columns as LUFFY's and HPT's `rl_dataset_with_target.py` reads them.
    """
    return _attempt(
        lambda: _example(
            turns=_turns(row.get("prompt")),
            demonstration=_one_turn(row.get("target")),
            answer=_answer(_inside(row, "reward_model").get("ground_truth")),
            level=_level(_inside(row, "extra_info")),
        )
    )


def prompt_completion(row: Row) -> Example | str:
    """TRL's prompt and completion, as texts or as turns; `answer`, `ground_truth` or `solution` beside them."""
    return _attempt(
        lambda: _example(
            turns=_turns(row.get("prompt")),
            demonstration=_one_turn(row.get("completion")),
            answer=_answer(_first(row, "answer", "ground_truth", "solution")),
            level=_level(row),
            tools=_tools(row.get("tools")),
        )
    )


def messages(row: Row) -> Example | str:
    """TRL's conversations: the last assistant's turn of `messages` is the demonstration, all before it the prompt.

    A conversation that ends with a question has no demonstration.
    """

    def read() -> Example:
        if isinstance(row.get("messages"), str):
            raise Malformed("malformed_turns")
        turns = _turns(row.get("messages"), ends_with_question=False)
        asked = turns[:-1] if turns[-1]["role"] == "assistant" else turns
        return _example(
            turns=_ending_with_question(asked),
            demonstration=_one_turn(turns[len(asked) :]),
            answer=_answer(_first(row, "answer", "ground_truth", "solution")),
            level=_level(row),
            tools=_tools(row.get("tools")),
        )

    return _attempt(read)


def native(row: Row) -> Example | str:
    """Our own record: `prompt` (a text or turns), `demo` (a text or null), `answer`, and if wanted `level` and `tools`.

    `answer` is a text, a number, a list of which any is right, or an object for a verifier of your own. What else a
    record holds (`id`, `task`, `meta` ...) is not read.
    """
    return _attempt(
        lambda: _example(
            turns=_turns(row.get("prompt")),
            demonstration=_one_turn(row.get("demo")),
            answer=_answer(row.get("answer")),
            level=_level(row),
            tools=_tools(row.get("tools")),
        )
    )


def problem_answer(row: Row) -> Example | str:
    """Evaluation sets: `problem` or `question`, and `answer` or `final_answer`; `solution` is the demonstration.

    Names may be capitalised. An answer that ends with `#### 72` (GSM8K) is a solution with its result.
    """

    def read() -> Example:
        lower = {str(key).lower(): value for key, value in row.items()}
        answer, solution = _first(lower, "answer", "final_answer"), lower.get("solution")
        if isinstance(answer, str) and "####" in answer:
            answer, solution = answer.rpartition("####")[2], answer
        return _example(
            turns=_turns(_first(lower, "problem", "question")),
            demonstration=_one_turn(solution),
            answer=_answer(answer),
            level=_level(lower),
        )

    return _attempt(read)


def alpaca(row: Row) -> Example | str:
    """`instruction` and `input` are the question, `output` the demonstration; `answer` if there is one."""

    def read() -> Example:
        asked = [row.get(name) for name in ("instruction", "input")]
        if not all(part is None or isinstance(part, str) for part in asked):
            raise Malformed("no_question")
        return _example(
            turns=_turns("\n\n".join(part for part in asked if part)),
            demonstration=_one_turn(row.get("output")),
            answer=_answer(row.get("answer")),
            level=_level(row),
        )

    return _attempt(read)


def _attempt(read: Callable[[], Example]) -> Example | str:
    try:
        return read()
    except Malformed as reason:
        return str(reason)


def _example(
    *,
    turns: tuple[Row, ...],
    demonstration: str,
    answer: Mapping[str, Any],
    level: int = 0,
    tools: tuple[Row, ...] = (),
) -> Example:
    asked = [turn["content"] for turn in turns if turn["role"] in ASKING]
    return Example(
        question_id=0,
        prompt=asked[-1],
        demonstration=demonstration,
        answer=answer,
        canonical=canonical_text(*asked),
        level=level,
        messages=turns,
        tools=tools,
    )


def _turns(value: Any, *, ends_with_question: bool = True) -> tuple[Row, ...]:
    """Turns with a role and a text each; a bare text is a user's turn.

    Raises Malformed.
    """
    if value is None or (isinstance(value, str | list | tuple) and not value):
        raise Malformed("no_question")
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list | tuple):
        raise Malformed("malformed_turns")
    turns = tuple(_turn(each) for each in value)
    return _ending_with_question(turns) if ends_with_question else turns


def _ending_with_question(turns: tuple[Row, ...]) -> tuple[Row, ...]:
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


def _one_turn(value: Any) -> str:
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
        (turn,) = _turns(value, ends_with_question=False)
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


def _answer(value: Any) -> Mapping[str, Any]:
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


def _level(row: Row) -> int:
    """A difficulty: a whole number of at least 0, or one after the word Level (MATH); 0 where there is none."""
    value = row.get("level")
    if isinstance(value, str):
        value = value.removeprefix("Level").strip()
        return int(value) if value.isascii() and value.isdigit() and len(value) < 5 else 0
    return value if type(value) is int and value >= 0 else 0


def _tools(value: Any) -> tuple[Row, ...]:
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


def _inside(row: Row, name: str) -> Row:
    """A field that is an object; an empty one where there is none."""
    value = row.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise Malformed("malformed_answer")
    return value or {}


def _first(row: Row, *names: str) -> Any:
    """The first of the fields that is there and not None."""
    return next((row[name] for name in names if row.get(name) is not None), None)
