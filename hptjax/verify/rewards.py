"""Rewards for completions that end in an answer: `records.RewardFunction`s that a worker imports by name.

An example's `answer` is {"answer": gold text}, with more keys where its prompt asks for another format
(`grade.question_of`). Every verdict carries its grades, so that an evaluation has the strict and the lenient word.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import Any

from hptjax.records import Grade, Verdict
from hptjax.verify import hpt_rules, last_route
from hptjax.verify.apart import Overdue, asked_apart
from hptjax.verify.extract import after_thinking, answer_of
from hptjax.verify.grade import LastRoute, grades, question_of
from hptjax.verify.policy import STRICT

FORM_REASONS = ("well_formed", "ill_formed")
TIMEOUT = Verdict(0.0, False, "timeout")
LIMIT = 0.9  # of the worker's deadline, for the last route

_limit_s: float | None = None  # set in a worker; elsewhere math-verify runs in this process, without a limit


def prepare_worker(deadline_s: float) -> None:
    """Called by a worker when it loads a function of this module.

    The slow import is paid before any deadline, and from now on math-verify runs in children of the worker, which are
    killed a little before the worker would be (`apart`).
    """
    global _limit_s
    last_route.load()
    _limit_s = LIMIT * deadline_s


def math_strict(completion: str, answer: Mapping[str, Any]) -> Verdict:
    r"""Reward 1 and solved if the last boxed answer is the gold one, in final form, with its unit; else 0.

    The reason is that of the strict grade, or "wrong", or why nothing could be compared.

    Example
      >>> math_strict(r"so it is \\boxed{0.5}", {"answer": r"\\frac{1}{2}"})
      Verdict(reward=1.0, solved=True, reason='numeric')
    """
    said = _graded(completion, answer)
    return TIMEOUT if said is None else _verdict(*said)


def math_lenient(completion: str, answer: Mapping[str, Any]) -> Verdict:
    """Reward 1 and solved if a well-meaning reader would call the answer right; for evaluation."""
    said = _graded(completion, answer)
    return TIMEOUT if said is None else _verdict(*said[::-1])


def math_hpt(completion: str, answer: Mapping[str, Any]) -> Verdict:
    """Reward 1 and solved by the rules that HPT was trained with (`hpt_rules`)."""
    try:
        return _verdict(hpt_rules.grade(completion, question_of(answer), _make_last_route()))
    except Overdue:
        return TIMEOUT


def math_format(completion: str, answer: Mapping[str, Any]) -> Verdict:
    """Reward 1 if there is an answer in the format asked for, right or wrong; else 0."""
    question = question_of(answer)
    text = after_thinking(completion, question.thinking)
    formed = bool(text and answer_of(text, question.how, STRICT.max_tail))
    return Verdict(1.0 if formed else 0.0, formed, FORM_REASONS[0] if formed else FORM_REASONS[1])


def _graded(completion: str, answer: Mapping[str, Any]) -> tuple[Grade, Grade] | None:
    """The strict and the lenient grade; None where the time was up."""
    try:
        return grades(completion, question_of(answer), _make_last_route())
    except Overdue:
        return None


def _make_last_route() -> LastRoute:
    """math-verify for one completion, which is asked the same question once, within the time that is left."""
    end = None if _limit_s is None else time.monotonic() + _limit_s

    @functools.cache
    def ask(gold: str, answer: str, loose: bool) -> bool | None:
        question = functools.partial(last_route.is_equal, gold, answer, loose=loose)
        return question() if end is None else asked_apart(question, end - time.monotonic())

    return ask


def _verdict(decides: Grade, *others: Grade) -> Verdict:
    fault = "wrong" if decides.status == "ok" else decides.status
    reward = 1.0 if decides.correct else 0.0
    return Verdict(reward, decides.correct, decides.reason if decides.correct else fault, (decides, *others))
