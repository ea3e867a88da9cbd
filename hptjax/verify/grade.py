r"""From a completion and a gold answer to grades: extraction, the routes in their order, one grade per policy.

The routes, cheapest first; the first that can tell decides:
  exact: the two texts in one spelling are the same;
  choice: both are the same letter of multiple choice;
  numeric, symbolic, set: both are read (`parse`) and have the same value or shape (`compare`);
  math_verify: only where our own reader does not know one of them, or cannot tell.
A "no" of ours is final, so that math-verify's known false positives do not come back by the last route.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, get_args

from hptjax.records import Grade
from hptjax.verify import nodes
from hptjax.verify.compare import reason_for, same_answer
from hptjax.verify.equal import is_written_out
from hptjax.verify.evaluate import NotExact, Undefined, exact
from hptjax.verify.extract import How, after_thinking, answer_anywhere, answer_of, last_boxes, unwrapped, visible
from hptjax.verify.parse import MAX_CHARACTERS, MAX_GOLD_CHARACTERS, readings
from hptjax.verify.policy import LENIENT, STRICT, Policy
from hptjax.verify.scan import cleaned, normal, without_dollars

MAX_SPELLED = 10_000  # characters of an answer as it was written; a longer one is not read
LastRoute = Callable[[str, str, bool], bool | None]
"""(gold, answer, loose) -> equal or not, or None where it cannot tell."""

_LETTER = re.compile(
    r"\s*(?:\\text(?:bf|rm|it)?\s*\{|\\math(?:bf|rm)\s*\{|\*\*)?\s*\(?([A-J])\)?[.:]?\s*(?:\}|\*\*)?\s*[.:]?\s*"
)
_LETTER_FIRST = re.compile(r"\s*(?:\\text(?:bf|rm|it)?\s*\{|\\math(?:bf|rm)\s*\{|\*\*)?\s*(?:\(([A-J])\)|([A-J])[).:])")
_TWO_SIDED = re.compile(r"[<>∈≤≥]|\\(?:l|g)(?:e|t)q?(?![a-z])|\\in(?![a-z])")


class Question(NamedTuple):
    """What an example's answer asks of a completion.

    Args
      golds: any of them counts as the answer.
      how: the format that the prompt asks for. thinking: as for `extract.after_thinking`.
    """

    golds: tuple[str, ...]
    how: How = "last_boxed"
    thinking: bool | None = None


class _Match(NamedTuple):
    """Whether an answer is right, by which route, and whether it was read; `correct` None: nobody can tell."""

    correct: bool | None
    reason: str = "none"
    read: bool = True


def question_of(answer: Mapping[str, Any]) -> Question:
    """The question in an example's `answer`.

    Args
      answer: "answer": the gold text or number, or a list of them; and, where they are not the usual,
        "how": one of `extract.How`; "thinking": True where the prompt opens a think section.
    Raises
      no "answer", or another value under a key -> KeyError, TypeError or ValueError.
    """
    given = answer["answer"]
    golds = given if isinstance(given, list | tuple) else [given]
    if not all(isinstance(gold, str | int | float) or gold is None for gold in golds):
        raise TypeError(f"expected a text or a number as answer, got {type(given).__name__}")
    how, thinking = answer.get("how", "last_boxed"), answer.get("thinking")
    if how not in get_args(How) or thinking not in (None, True, False):
        raise ValueError(f"expected how as one of {get_args(How)} and thinking as true or false, got {how}, {thinking}")
    texts = [_gold_text(str(gold)) for gold in golds if gold is not None]
    return Question(tuple(text for text in texts if text), how, thinking)


def grades(completion: str, question: Question, last_route: LastRoute | None = None) -> tuple[Grade, Grade]:
    """The strict and the lenient grade of a completion. What is right for the strict is right for the lenient.

    Args
      last_route: asked where our own routes cannot tell; None: nobody is.
    """
    strict = grade(completion, question, STRICT, last_route)
    if strict.correct:
        return strict, Grade(LENIENT.name, True, strict.reason, strict.status, strict.extracted, strict.canonical)
    return strict, grade(completion, question, LENIENT, last_route)


def grade(completion: str, question: Question, policy: Policy, last_route: LastRoute | None = None) -> Grade:
    """The grade of a completion under one policy. Total: any text gets one."""
    if not question.golds:
        return Grade(policy.name, False, "none", "no_gold")
    text = after_thinking(completion, question.thinking)
    find = answer_anywhere if policy.anywhere else answer_of
    found = (
        (find(text, question.how) if policy.anywhere else answer_of(text, question.how, policy.max_tail))
        if text
        else None
    )
    if not found or not found.strip():
        return Grade(policy.name, False, "none", "no_answer")
    match = _best(question, found, policy, last_route)
    if match.correct is not True and policy.anywhere and question.how == "last_boxed":
        several = _several_boxes(text or "", question.golds)
        if several is not None:
            other = _best(question, several, policy, None)
            found, match = (several, other) if other.correct else (found, match)
    return Grade(
        policy.name,
        match.correct is True,
        match.reason,
        "ok" if match.read else "parse_error",
        found[:MAX_CHARACTERS],
        canonical(found)[:MAX_CHARACTERS],
    )


@lru_cache(maxsize=4096)
def canonical(text: str) -> str:
    """The form in which an answer is compared: a fraction for a number, else one spelling of the text."""
    if len(text) > MAX_SPELLED:
        return ""
    read = [node.exact or node.near if isinstance(node, nodes.About) else node for node in readings(text)]
    if read and isinstance(read[0], nodes.EXPRESSIONS) and not nodes.variables(read[0]):
        try:
            return str(exact(read[0], {}))
        except (NotExact, Undefined, RecursionError, ValueError):
            pass
    return normal(text)


def _gold_text(gold: str) -> str:
    """A gold answer without a solution before it (GSM8K's ####), without boxes around it, as it can be seen."""
    gold = visible(gold)
    if "####" in gold:
        gold = answer_of(gold, "hash4") or gold
    if "\\boxed" in gold or "\\fbox" in gold:
        gold = answer_of(gold) or gold
    return without_dollars(unwrapped(gold))


def _best(question: Question, found: str, policy: Policy, last_route: LastRoute | None) -> _Match:
    """The match with any of the gold answers; else the first that says most about the answer."""
    matches = []
    for gold in question.golds:
        match = _match(gold, found, policy, last_route, choice=question.how == "choice")
        if match.correct:
            return match
        matches.append(match)
    return next((match for match in matches if match.read), matches[0])


def _match(gold: str, found: str, policy: Policy, last_route: LastRoute | None, *, choice: bool) -> _Match:
    letter = _LETTER.fullmatch(gold)
    if letter:
        said = _letter(found, policy)
        if said is not None or choice or _LETTER_FIRST.match(found):
            return _Match(said == letter[1], "choice" if said == letter[1] else "none", said is not None)
    if len(found) > MAX_SPELLED:
        return _Match(None, read=False)
    if normal(found) == _normal_gold(gold) != "":
        return _Match(True, "exact")
    golds, answers = readings(gold, MAX_GOLD_CHARACTERS), readings(found)
    undecided = not golds or not answers
    for one in golds:
        for other in answers:
            same = same_answer(one, other, policy)
            if same:
                return _Match(True, reason_for(one, other))
            undecided = undecided or same is None
    if not undecided:
        return _Match(False)
    if last_route is not None and _may_ask(golds, answers, policy):
        same = last_route(cleaned(gold), cleaned(found), policy.brackets and bool(_TWO_SIDED.search(gold + found)))
        if same is not None:
            return _Match(same, "math_verify" if same else "none")
    return _Match(None, read=bool(answers))


def _letter(found: str, policy: Policy) -> str | None:
    whole = _LETTER.fullmatch(found)
    if whole:
        return whole[1]
    first = _LETTER_FIRST.match(found) if policy.anywhere else None  # (B) 12
    return (first[1] or first[2]) if first else None


def _may_ask(golds: Sequence[nodes.Node], answers: Sequence[nodes.Node], policy: Policy) -> bool:
    """Whether math-verify's word would count: under the strict policy it must not overlook units or calculations."""
    if policy.final_form and any(is_written_out(gold) for gold in golds):
        return False
    kinds = (nodes.Quantity, nodes.Numeral) if not policy.units else (nodes.Numeral,)
    return not any(isinstance(node, kinds) for node in (*golds, *answers))


@lru_cache(maxsize=4096)
def _normal_gold(gold: str) -> str:
    return normal(gold) if len(gold) <= MAX_SPELLED else ""


def _several_boxes(text: str, golds: Sequence[str]) -> str | None:
    """The last boxes as one list, where a gold answer is a list of as many items and there are several boxes."""
    counts = [
        len(read[0].items)
        for read in (readings(gold, MAX_GOLD_CHARACTERS) for gold in golds)
        if read and isinstance(read[0], nodes.Items) and read[0].brackets in ("", "or", "{}")
    ]
    count = max(counts, default=0)
    found = last_boxes(text, count) if count > 1 else []
    return ", ".join(found) if len(found) == count > 1 else None
