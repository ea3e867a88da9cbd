"""Judges a countdown completion. The text is a policy's: any string gets a verdict, in time linear in its length.

The reasons form a closed set, `REASONS`. The first fault in reading order decides, after the form of the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hptjax.records import Verdict

OPERATORS = "+-*/"
REASONS = (
    "correct",
    "unparsable",  # not a chain of steps `a+b=c`, or a number of more than nine digits
    "forbidden",  # a negative value or an operator that the rules exclude
    "bad_arithmetic",  # a step whose result is wrong, or a division that is not exact
    "wrong_numbers",  # a value that is not at hand, or numbers left over
    "wrong_target",  # a right chain to another number
)
FORM_REASONS = ("well_formed", "ill_formed")

Step = tuple[int, str, int, int]  # left operand, operator, right operand, result

# Ten-digit numbers are not read: the longest honest value has far fewer, and arithmetic stays cheap.
_NUMBER = "(0|-?[1-9][0-9]{0,8})"
_STEP = re.compile(f"{_NUMBER}([-+*/]){_NUMBER}={_NUMBER}")
_LONGEST_STEP = 3 * 10 + 2


def verify(completion: str, answer: Mapping[str, Any]) -> Verdict:
    """Reward 1 and solved if the chain is legal, uses every number once and ends in the target; else 0.

    Args
      completion: the text after the prompt, without special tokens.
      answer: `numbers`, `target`; `operators` (default "+-*/") and `negative` (default False) are the rules.
    Example
      >>> verify("12/3=4,7-4=3", {"numbers": [3, 7, 12], "target": 3})
      Verdict(reward=1.0, solved=True, reason='correct')
      >>> verify("12/3=4,7+4=11", {"numbers": [3, 7, 12], "target": 3}).reason
      'wrong_target'
    """
    reason = _judge(completion, answer)
    solved = reason == "correct"
    return Verdict(1.0 if solved else 0.0, solved, reason)


def well_formed(completion: str, answer: Mapping[str, Any]) -> Verdict:
    """Reward 1 if the text is a chain with one step fewer than there are numbers, right or wrong; else 0."""
    steps = parse_chain(completion, len(answer["numbers"]) - 1)
    formed = steps is not None and len(steps) == len(answer["numbers"]) - 1
    return Verdict(1.0 if formed else 0.0, formed, FORM_REASONS[0] if formed else FORM_REASONS[1])


def parse_chain(completion: str, max_steps: int) -> list[Step] | None:
    """The steps of a chain, or None if the text is not a chain.

    One step more than `max_steps` is still read, so that a chain that goes on too long is told from one that is
    ill-formed; beyond that the text is refused by its length alone.
    """
    if len(completion) > (max_steps + 1) * (_LONGEST_STEP + 1):
        return None
    steps = []
    for text in completion.split(","):
        match = _STEP.fullmatch(text)
        if match is None:
            return None
        left, operator, right, result = match.groups()
        steps.append((int(left), operator, int(right), int(result)))
    return steps


def apply(left: int, operator: str, right: int) -> int | None:
    """The exact integer result, or None where a division has none."""
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    if right == 0 or left % right:
        return None
    return left // right


def _judge(completion: str, answer: Mapping[str, Any]) -> str:
    at_hand = list(answer["numbers"])
    steps = parse_chain(completion, len(at_hand) - 1)
    if steps is None:
        return "unparsable"
    operators = answer.get("operators", OPERATORS)
    negative = answer.get("negative", False)
    for left, operator, right, result in steps:
        if operator not in operators or (not negative and min(left, right, result) < 0):
            return "forbidden"
        if apply(left, operator, right) != result:
            return "bad_arithmetic"
        for operand in (left, right):
            if operand not in at_hand:
                return "wrong_numbers"
            at_hand.remove(operand)
        at_hand.append(result)
    if len(at_hand) != 1:
        return "wrong_numbers"
    return "correct" if at_hand[0] == answer["target"] else "wrong_target"
