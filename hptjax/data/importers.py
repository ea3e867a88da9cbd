"""Rows of published formats as examples: one pure function per format, row -> Example, or a word for why there is none.

An importer looks at one row and at nothing else. It renders nothing: what it leaves in `Example.messages` becomes a
prompt by a chat template later (`data/prompts.py`); `Example.prompt` is until then the question as a person reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hptjax.data import row_fields as fields
from hptjax.data.identity import canonical_text
from hptjax.data.row_fields import ASKING, Malformed, Row
from hptjax.records import Example

Importer = Callable[[Row], Example | str]
"""A row -> its example (question id 0, to be given by content), or one of `row_fields.ROW_REASONS`."""


def verl(row: Row) -> Example | str:
    """verl's parquet, as in OpenR1-Math-46k-8192: `prompt` turns, `reward_model.ground_truth`, `target` turns or None.

    Source: the columns as LUFFY's and HPT's `rl_dataset_with_target.py` reads them.
    """
    return _attempt(
        lambda: _example(
            turns=fields.turns(row.get("prompt")),
            demonstration=fields.one_turn(row.get("target")),
            answer=fields.answer(fields.inside(row, "reward_model").get("ground_truth")),
            level=fields.level(fields.inside(row, "extra_info")),
        )
    )


def prompt_completion(row: Row) -> Example | str:
    """TRL's prompt and completion, as texts or as turns; `answer`, `ground_truth` or `solution` beside them."""
    return _attempt(
        lambda: _example(
            turns=fields.turns(row.get("prompt")),
            demonstration=fields.one_turn(row.get("completion")),
            answer=fields.answer(fields.first(row, "answer", "ground_truth", "solution")),
            level=fields.level(row),
            tools=fields.tools(row.get("tools")),
        )
    )


def messages(row: Row) -> Example | str:
    """TRL's conversations: the last assistant's turn of `messages` is the demonstration, all before it the prompt.

    A conversation that ends with a question has no demonstration.
    """

    def read() -> Example:
        if isinstance(row.get("messages"), str):
            raise Malformed("malformed_turns")
        turns = fields.turns(row.get("messages"), ends_with_question=False)
        asked = turns[:-1] if turns[-1]["role"] == "assistant" else turns
        return _example(
            turns=fields.ending_with_question(asked),
            demonstration=fields.one_turn(turns[len(asked) :]),
            answer=fields.answer(fields.first(row, "answer", "ground_truth", "solution")),
            level=fields.level(row),
            tools=fields.tools(row.get("tools")),
        )

    return _attempt(read)


def native(row: Row) -> Example | str:
    """Our own record: `prompt` (a text or turns), `demo` (a text or null), `answer`, and if wanted `level` and `tools`.

    `answer` is a text, a number, a list of which any is right, or an object for a verifier of your own. What else a
    record holds (`id`, `task`, `meta` ...) is not read.
    """
    return _attempt(
        lambda: _example(
            turns=fields.turns(row.get("prompt")),
            demonstration=fields.one_turn(row.get("demo")),
            answer=fields.answer(row.get("answer")),
            level=fields.level(row),
            tools=fields.tools(row.get("tools")),
        )
    )


def problem_answer(row: Row) -> Example | str:
    """Evaluation sets: `problem` or `question`, and `answer` or `final_answer`; `solution` is the demonstration.

    Names may be capitalised. An answer that ends with `#### 72` (GSM8K) is a solution with its result.
    """

    def read() -> Example:
        lower = {str(key).lower(): value for key, value in row.items()}
        answer, solution = fields.first(lower, "answer", "final_answer"), lower.get("solution")
        if isinstance(answer, str) and "####" in answer:
            answer, solution = answer.rpartition("####")[2], answer
        return _example(
            turns=fields.turns(fields.first(lower, "problem", "question")),
            demonstration=fields.one_turn(solution),
            answer=fields.answer(answer),
            level=fields.level(lower),
        )

    return _attempt(read)


def alpaca(row: Row) -> Example | str:
    """`instruction` and `input` are the question, `output` the demonstration; `answer` if there is one."""

    def read() -> Example:
        asked = [row.get(name) for name in ("instruction", "input")]
        if not all(part is None or isinstance(part, str) for part in asked):
            raise Malformed("no_question")
        return _example(
            turns=fields.turns("\n\n".join(part for part in asked if part)),
            demonstration=fields.one_turn(row.get("output")),
            answer=fields.answer(row.get("answer")),
            level=fields.level(row),
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
