"""How much an answer may differ from the gold one: strict for rewards, lenient for evaluation."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Policy:
    """One way to judge.

    Args
      anywhere: an answer outside the format asked for counts too (`extract.answer_anywhere`).
      max_tail: characters that may follow the last box; None: any number.
      final_form: where the gold answer is a number written out, so must the other be: 1+2 is no 3, 2/4 is no 1/2 and
        2^3 no 8, or a model is paid for repeating the question.
      units: whether a unit or percent sign that one side lacks is overlooked, and 10% is 0.1. Two different units never
        agree.
      rounding: whether a decimal of six correct digits, or a value that rounds to the gold decimal, is close enough.
      brackets: whether a list, a tuple and a set of the same items agree, and an interval a relation that may mean it.
    """

    name: str
    anywhere: bool
    max_tail: int | None
    final_form: bool
    units: bool
    rounding: bool
    brackets: bool


STRICT = Policy("strict", False, max_tail=1000, final_form=True, units=False, rounding=False, brackets=False)
LENIENT = Policy("lenient", True, max_tail=None, final_form=False, units=True, rounding=True, brackets=True)
