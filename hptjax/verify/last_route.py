r"""math-verify (Hugging Face, 0.9.0) for what our own reader does not know. The only module that imports it, or sympy.

It may take for ever on a short text and has no time limit here: its own uses SIGALRM, which works in a main thread
only and cannot stop long integer arithmetic. It belongs in a child of a worker of `rewards.pool` (`apart`).

Only its LaTeX reader is used. The one for plain text hands the text to sympy's `parse_expr`, which evaluates it as
Python; nothing that a model writes is ever evaluated as code.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

MAX_CHARACTERS = 256
NEVER = ("$", "\\boxed", "\\fbox", "\x00")  # what would end the formula that the text is put into
WARMING = {  # the first formula of a kind takes 50 ms, a later one 5
    r"\frac{1}{2}x^2+\sqrt{3}": r"\frac12 x^{2}-1",
    r"(0,2)\cup[3,\infty)": r"(0,1]\cup(2,\infty)",
    r"\{1,2\}": "1,2,3",
    r"\sin(2x)": r"2\cos x",
    r"\begin{pmatrix}1\\2\end{pmatrix}": r"\begin{pmatrix}1\\3\end{pmatrix}",
    "x=2y+1": "1<x<3",
    r"\text{no}": r"\triangle ABC",
}
HOPELESS = re.compile(  # 1e1000000, 2^{100000}: minutes of arithmetic; ----5: math-verify descends into every sign
    r"\d[eE][+-]?0*\d{4}|\^\s*\{?\s*-?\d{5}|(?:[+-]\s*){32}"
)


def load() -> None:
    """Imports math-verify and reads some formulas, so that no answer's deadline pays for it (0.6 s of processor time).

    Raises ImportError where it is not installed.
    """
    for gold, answer in WARMING.items():
        is_equal(gold, answer, loose=False)


def is_equal(gold: str, answer: str, *, loose: bool) -> bool | None:
    """math-verify's word on two formulas; None where it cannot read one of them.

    Args
      loose: an inequality may stand for the interval that it means, whichever of the two it is.
    """
    for text in (gold, answer):
        if len(text) > MAX_CHARACTERS or HOPELESS.search(text) or any(part in text for part in NEVER):
            return None
    math_verify = _math_verify()
    read_gold, read_answer = _read(gold), _read(answer)
    if not read_gold or not read_answer:
        return None
    said = math_verify.verify(
        list(read_gold), list(read_answer), allow_set_relation_comp=loose, strict=True, timeout_seconds=None
    )
    return bool(said)


@lru_cache(maxsize=1)
def _math_verify() -> Any:
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off, as is meant here
    return math_verify


@lru_cache(maxsize=256)
def _read(text: str) -> tuple[Any, ...]:
    math_verify = _math_verify()
    reader = math_verify.LatexExtractionConfig(boxed_match_priority=0)
    return tuple(
        math_verify.parse(
            f"${text}$", [reader], fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None
        )
    )
