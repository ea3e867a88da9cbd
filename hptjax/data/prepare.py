"""Examples to questions: tokens attached, demonstrations verified, what does not fit dropped and counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hptjax.records import Example, Question, Verdict

# Why an example was dropped; the first that applies, in this order.
DROP_REASONS = (
    "no_demonstration",
    "not_encodable",
    "prompt_too_long",
    "demonstration_too_long",
    "demonstration_unverified",
)

Judge = Callable[[Sequence[str], Sequence[Mapping[str, Any]]], Sequence[Verdict]]


def prepare_questions(
    examples: Sequence[Example],
    *,
    encode_prompt: Callable[[str], np.ndarray],
    encode_demonstration: Callable[[str], np.ndarray],
    decode: Callable[[np.ndarray], str],
    judge: Judge,
    max_prompt_tokens: int,
    max_completion_tokens: int,
) -> tuple[list[Question], dict[str, int]]:
    """The examples that can be trained on, in their order, and how many were dropped for each of `DROP_REASONS`.

    Args
      encode_prompt, encode_demonstration, decode: text to tokens and back; a demonstration's tokens end with the stop
        token. An encoder refuses a text by ValueError.
      judge: (completions, answers) -> verdicts, the task's verifier; it sees what the tokens say, not the source text.
      max_prompt_tokens: limit on the prompt, `<bos>` included.
      max_completion_tokens: limit on demonstration and stop token together (`spec/hpt.md` section 6, property 16).
    Returns
      questions; counts with every reason as a key, 0 where nothing was dropped.
    Raises
      nothing left -> ValueError with the counts and the fields to change.
    """
    dropped = dict.fromkeys(DROP_REASONS, 0)
    fitting: list[Question] = []
    for example in examples:
        question = _encode(example, encode_prompt, encode_demonstration)
        reason = None if isinstance(question, str) else _misfit(question, max_prompt_tokens, max_completion_tokens)
        if isinstance(question, str):
            dropped[question] += 1
        elif reason is not None:
            dropped[reason] += 1
        else:
            fitting.append(question)
    texts = [decode(question.demonstration_tokens) for question in fitting]
    verdicts = judge(texts, [question.example.answer for question in fitting]) if fitting else []
    questions = [question for question, verdict in zip(fitting, verdicts, strict=True) if verdict.solved]
    dropped["demonstration_unverified"] = len(fitting) - len(questions)
    if not questions:
        raise ValueError(
            f"expected at least one of {len(examples)} examples to be usable, got none; dropped: {dropped}; change "
            f"data.max_prompt_tokens ({max_prompt_tokens}), rollout.max_completion_tokens ({max_completion_tokens}), "
            f"or the task that writes the demonstrations"
        )
    return questions, dropped


def _encode(
    example: Example, encode_prompt: Callable[[str], np.ndarray], encode_demonstration: Callable[[str], np.ndarray]
) -> Question | str:
    """The question, or the reason why there is none."""
    if not example.demonstration:
        return "no_demonstration"
    try:
        return Question(example, encode_prompt(example.prompt), encode_demonstration(example.demonstration))
    except ValueError:
        return "not_encodable"


def _misfit(question: Question, max_prompt_tokens: int, max_completion_tokens: int) -> str | None:
    if len(question.prompt_tokens) > max_prompt_tokens:
        return "prompt_too_long"
    if len(question.demonstration_tokens) > max_completion_tokens:
        return "demonstration_too_long"
    return None
