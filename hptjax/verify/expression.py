"""Countdown as a text asks for it: one expression of the given numbers between answer tags, as TinyZero poses it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hptjax.records import Grade, Verdict
from hptjax.verify import nodes
from hptjax.verify.cursor import NotRead
from hptjax.verify.evaluate import NotExact, Undefined, exact
from hptjax.verify.extract import after_thinking, answer_of
from hptjax.verify.nodes import Node
from hptjax.verify.parse import read
from hptjax.verify.policy import LENIENT, STRICT

REASONS = ("numeric", "no_answer", "parse_error", "wrong_numbers", "wrong_target")


def countdown_expression(completion: str, answer: Mapping[str, Any]) -> Verdict:
    """Reward 1 and solved if the expression uses every number once and is worth the target; else 0.

    The strict want the expression alone in the last `<answer>`; the lenient take the last box too, and what stands
    before an equals sign. Operators are + - * / with brackets and signs; division is exact.

    Args
      answer: `numbers`, `target`; `thinking` as for `grade.question_of`.
    Example
      >>> countdown_expression("<answer>(44 - 19) * 4</answer>", {"numbers": [4, 19, 44], "target": 100}).reason
      'numeric'
    """
    text = after_thinking(completion, answer.get("thinking")) or ""
    tagged = answer_of(text, "answer_tag")
    strict = _grade(STRICT.name, tagged, answer)
    if strict.correct:
        grades = (strict, Grade(LENIENT.name, True, strict.reason, strict.status, strict.extracted, strict.canonical))
    else:
        found = tagged or answer_of(text)
        grades = (strict, _grade(LENIENT.name, found and found.partition("=")[0], answer))
    return Verdict(float(strict.correct), strict.correct, _fault(tagged, answer), grades)


def _grade(policy: str, found: str | None, answer: Mapping[str, Any]) -> Grade:
    fault = _fault(found, answer)
    status = "ok" if fault in ("numeric", "wrong_numbers", "wrong_target") else fault
    kept = found[:256] if found else None
    return Grade(policy, fault == "numeric", "numeric" if fault == "numeric" else "none", status, kept, kept)


def _fault(found: str | None, answer: Mapping[str, Any]) -> str:
    """One of `REASONS`."""
    if not found or not found.strip():
        return "no_answer"
    try:
        node = read(found, thousands=False)
        if sorted(_numbers(node)) != sorted(answer["numbers"]):
            return "wrong_numbers"
        return "numeric" if exact(node, {}) == answer["target"] else "wrong_target"
    except (NotRead, NotExact):
        return "parse_error"
    except Undefined:
        return "wrong_target"


def _numbers(node: Node) -> Iterator[int]:
    """The whole numbers of an expression, one by one as written.

    Raises NotRead for anything but these, the four operators and signs.
    """
    match node:
        case nodes.Number(value=value, places=0):
            yield int(value)
        case nodes.Add(terms=parts) | nodes.Mul(factors=parts):
            for part in parts:
                yield from _numbers(part)
        case nodes.Div(top=top, bottom=bottom):
            yield from _numbers(top)
            yield from _numbers(bottom)
        case nodes.Neg(value=value):
            yield from _numbers(value)
        case _:
            raise NotRead(f"expected numbers with + - * /, got {type(node).__name__}")
