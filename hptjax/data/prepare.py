"""Examples to questions: tokens attached, demonstrations verified, what does not fit dropped and counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hptjax.data.prompts import Encode
from hptjax.records import Example, Question, Verdict

# Why an example was dropped; the first that applies, in this order.
DROP_REASONS = (
    "no_demonstration",
    "no_answer",
    "not_encodable",
    "several_turns",
    "template_refused",
    "template_prefix",
    "template_changed",
    "prompt_too_long",
    "demonstration_too_long",
    "demonstration_unverified",
)
CHUNK = 256  # examples encoded together

Judge = Callable[[Sequence[str], Sequence[Mapping[str, Any]], Sequence[str]], Sequence[Verdict]]
"""Completions, answers and prompts -> verdicts."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an example must have to be used.

    Args
      prompt_tokens: of the prompt, everything before the completion included.
      completion_tokens: of demonstration and stop token together (`spec/hpt.md` section 6, property 16).
      demonstration: whether a question without one is of no use. Where it is, one that does not fit is left out, and
        the question stays.
      answer: whether a question without one, which cannot be judged, is of no use.
      cut: a demonstration that is too long loses its end, stop token included, instead of being dropped.
    """

    prompt_tokens: int
    completion_tokens: int
    demonstration: bool = True
    answer: bool = False
    cut: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """What became of some examples.

    Args
      dropped: by `DROP_REASONS`, 0 where nothing was.
      changed: of the kept ones: "demonstration_cut", "without_demonstration".
    """

    questions: list[Question]
    dropped: dict[str, int]
    changed: dict[str, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """One example: its question as encoded, whole, and why it is dropped; None where there is none."""

    example: Example
    question: Question | None
    reason: str | None


def prepare_questions(
    examples: Sequence[Example],
    *,
    encode: Encode,
    decode: Callable[[np.ndarray], str],
    judge: Judge | None,
    limits: Limits,
) -> Prepared:
    """The examples that can be used, in their order.

    Args
      encode: examples to questions; a demonstration's tokens end with the stop token. decode: tokens to text.
      judge: verdicts on the demonstrations. None: they are taken as they are, like those
        that are not needed, and those without an answer.
    Raises
      nothing left -> ValueError with the counts and the fields to change.
    """
    dropped = dict.fromkeys(DROP_REASONS, 0)
    fitting: list[Question] = []
    for outcome in outcomes(examples, encode, limits):
        if outcome.reason is not None:
            dropped[outcome.reason] += 1
        else:
            assert outcome.question is not None
            fitting.append(outcome.question)
    wrong: set[int] = set()
    if judge is not None and limits.demonstration:
        wrong = {q.question_id for q, verdict in judged(fitting, decode, judge) if not verdict.solved}
    questions = [question for question in fitting if question.question_id not in wrong]
    dropped["demonstration_unverified"] = len(fitting) - len(questions)
    if not questions:
        raise ValueError(
            f"expected at least one of {len(examples)} examples to be usable, got none; dropped: {dropped}; change "
            f"data.max_prompt_tokens ({limits.prompt_tokens}), rollout.max_completion_tokens "
            f"({limits.completion_tokens}), data.files, or the task that writes the demonstrations"
        )
    limit = limits.completion_tokens
    changed = {
        "demonstration_cut": sum(len(question.demonstration_tokens) > limit for question in questions),
        "without_demonstration": sum(len(question.demonstration_tokens) == 0 for question in questions),
    }
    questions = [dataclasses.replace(q, demonstration_tokens=q.demonstration_tokens[:limit]) for q in questions]
    return Prepared(questions, dropped, changed)


def outcomes(examples: Sequence[Example], encode: Encode, limits: Limits) -> Iterator[Outcome]:
    """What becomes of each example before its demonstration is judged, in their order."""
    for first in range(0, len(examples), CHUNK):
        chunk = examples[first : first + CHUNK]
        lacking = [_lacks(example, limits) for example in chunk]
        whole = iter(_encoded([e for e, reason in zip(chunk, lacking, strict=True) if reason is None], encode, limits))
        for example, reason in zip(chunk, lacking, strict=True):
            question = None if reason is not None else next(whole)
            if isinstance(question, Question):
                yield Outcome(example, question, _misfit(question, limits))
            else:
                yield Outcome(example, None, reason or question)


def judged(
    questions: Sequence[Question], decode: Callable[[np.ndarray], str], judge: Judge
) -> list[tuple[Question, Verdict]]:
    """The questions with an answer to judge by, each with the verifier's word on its demonstration.

    It sees what the tokens say, not the source text.
    """
    known = [question for question in questions if question.example.answer]
    if not known:
        return []
    texts = [decode(question.demonstration_tokens) for question in known]
    answers, prompts = [q.example.answer for q in known], [q.example.prompt for q in known]
    return list(zip(known, judge(texts, answers, prompts), strict=True))


def _lacks(example: Example, limits: Limits) -> str | None:
    if limits.demonstration and not example.demonstration:
        return "no_demonstration"
    return "no_answer" if limits.answer and not example.answer else None


def _encoded(examples: Sequence[Example], encode: Encode, limits: Limits) -> list[Question | str]:
    """The examples encoded; where a demonstration is not needed, without one that stands in the way."""
    found = encode(examples)
    if limits.demonstration:
        return found
    again = [place for place, each in enumerate(found) if isinstance(each, str) and examples[place].demonstration]
    bare = encode([dataclasses.replace(examples[place], demonstration="") for place in again])
    for place, each in zip(again, bare, strict=True):
        found[place] = each
    return [_without_long(each, limits) if isinstance(each, Question) else each for each in found]


def _without_long(question: Question, limits: Limits) -> Question:
    if len(question.demonstration_tokens) <= limits.completion_tokens:
        return question
    return dataclasses.replace(question, demonstration_tokens=question.demonstration_tokens[:0])


def _misfit(question: Question, limits: Limits) -> str | None:
    if len(question.prompt_tokens) > limits.prompt_tokens:
        return "prompt_too_long"
    if len(question.demonstration_tokens) > limits.completion_tokens and not limits.cut:
        return "demonstration_too_long"
    return None
