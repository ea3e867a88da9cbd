r"""The grader that HPT was trained with (`spec/hpt.md` 3.3, reward implementation 6), as a policy named "hpt".

The last `\boxed{...}` by plain counting of braces; right if any of three routes says so:
  (a) the texts are equal after the normalisation of Hendrycks et al. 2021 (arXiv 2103.03874);
  (b) the rules of PRM800K (Lightman et al. 2023, arXiv 2305.20050): brackets of tuples must match, a fraction must be
      written like the gold one, an integer is matched by an integer only, anything else by its value;
  (c) math-verify.
Differences: (b) finds values by our own reader where the published one gives the text to sympy, which evaluates it as
Python; (c) has the worker's deadline instead of one second, and is not asked where our own reader reads both and finds
them different for sure: that is most wrong answers, and a hundred times faster. Units and percent signs are dropped and
(c) takes 1+2 for 3: this policy repeats a published run, `strict` is the one to train with.
"""

from __future__ import annotations

import re
from fractions import Fraction

from hptjax.records import Grade
from hptjax.verify import nodes
from hptjax.verify.compare import same_answer
from hptjax.verify.equal import equal_expressions, value_at
from hptjax.verify.grade import MAX_SPELLED, LastRoute, Question
from hptjax.verify.nodes import EXPRESSIONS
from hptjax.verify.parse import MAX_CHARACTERS, readings
from hptjax.verify.policy import LENIENT
from hptjax.verify.scan import cleaned

NAME = "hpt"
MAX_LETTERS = 2  # unknowns that route (b) looks at
NEAR = Fraction(1, 100_000)  # route (c) rounds to six decimals
OVERLOOKED = (nodes.Quantity, nodes.Numeral, nodes.PlusMinus)
LONG = 128  # characters from which a repetitive answer is refused

_BOX = "\\boxed{"
_UNITS = re.compile(
    r"(?:degree|cm|centimeter|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard)(?:es)?s? *"
    r"(?:\^[0-9]+)?"
)
_INTEGER = re.compile(r"-?\d+")
_FRACTION = re.compile(r"-?\d+/\d+")
_TUPLE = re.compile(r"[(\[][^()\[\]]*,[^()\[\]]*[)\]]")
_REPEATED = re.compile(r"(.{2,40}?)\1{3}")
_TOO_HARD = re.compile(r"\^[({]|\^\d+\^|\^\d\d")


def grade(completion: str, question: Question, last_route: LastRoute | None = None) -> Grade:
    """The grade of a completion by HPT's rules. The format asked for and think tags play no part in them.

    Args
      last_route: route (c); None: it is left out.
    """
    if not question.golds:
        return Grade(NAME, False, "none", "no_gold")
    given = last_box(completion)
    if given is None:
        return Grade(NAME, False, "none", "no_answer")
    reason = next((said for gold in question.golds if (said := _reason(gold, given, last_route)) != "none"), "none")
    return Grade(
        NAME, reason != "none", reason, "ok", given[:MAX_CHARACTERS], spelled(given[:MAX_SPELLED])[:MAX_CHARACTERS]
    )


def last_box(text: str) -> str | None:
    """The content of the last box by counting braces, escaped ones too; None where it is not closed or has none."""
    start = text.rfind("\\boxed")
    if start < 0 or not text.startswith(_BOX, start):
        return None
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return text[start + len(_BOX) : match.start()]
    return None


def _reason(gold: str, given: str, last_route: LastRoute | None) -> str:
    if len(given) > MAX_SPELLED:
        return "none"
    if spelled(gold) == spelled(given):
        return "exact"
    if _by_value(gold, given):
        return "symbolic"
    if len(given) > LONG and _REPEATED.search(given):
        return "none"
    if last_route is None or _plainly_different(gold, given):
        return "none"
    return "math_verify" if last_route(cleaned(gold), cleaned(given), False) else "none"


def spelled(text: str) -> str:
    r"""Route (a)'s spelling of an answer.

    Example
      >>> spelled(r"x = \\dfrac12\\text{ cm}"), spelled("0.5")
      ('\\frac{1}{2}', '\\frac{1}{2}')
    """
    text = text.strip().replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])", "", text)
    text = re.sub(r"\^(?:\{\\circ\}|\\circ)", "", text).replace("\\$", "")
    if text.count("\\text{ ") == 1:  # a unit on the right
        text = text.partition("\\text{ ")[0]
    text = text.replace("\\%", "").replace("%", "")
    text = re.sub(r"(?<=[ {])\.", "0.", text)
    text = f"0{text}" if text.startswith(".") else text
    left, equals, right = text.partition("=")
    if equals and "=" not in right and len(left.strip()) <= 2:
        text = right
    text = re.sub(r"\\sqrt([^{\[ ])", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac(?:\{([^{}]*)\}|([^{}\\]))(?:\{([^{}]*)\}|([^{}\\]))", _braced, text)
    if text == "0.5":
        return "\\frac{1}{2}"
    slash = re.fullmatch(r"(-?\d+)/(-?\d+)", text)
    return f"\\frac{{{slash[1]}}}{{{slash[2]}}}" if slash else text


def _braced(match: re.Match[str]) -> str:
    top, bottom = match[1] or match[2] or "", match[3] or match[4] or ""
    return f"\\frac{{{top}}}{{{bottom}}}"


def _by_value(gold: str, given: str) -> bool:
    """Route (b)."""
    left, right = plain(gold), plain(given)
    if not right:
        return False
    if left == right:
        return True
    lefts, rights = _parts(left), _parts(right)
    if len(lefts) != len(rights):
        return False
    if len(lefts) > 1 and (left[0], left[-1]) != (right[0], right[-1]):
        return False
    return all(_same_part(one, other) for one, other in zip(lefts, rights, strict=True))


def plain(text: str) -> str:
    """Route (b)'s spelling: no units, percent signs, thousands or spaces; LaTeX fractions as a/b; lower case."""
    text = text.strip()
    whole = re.fullmatch(r"\\text\{(.+?)\}", text)
    text = whole[1] if whole else text
    text = re.sub(r"\\?[%$]", "", text)
    text = text.replace(" or ", " , ").replace(" and ", " , ")
    for word, power in (("million", 6), ("billion", 9), ("trillion", 12)):
        text = text.replace(word, f"*10^{power}")
    text = re.sub(r"\^ *(?:\\circ|\{\\circ\})", "", _UNITS.sub("", text))
    text = text[1:-1] if text.startswith("{") and text.endswith("}") else text
    text = re.sub(r",\\! *", "", text)
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])", "", text)
    text = re.sub(r"\\text\{[^{}]*\}|\\[,;: ]", "", text)
    text = re.sub(r"(?<=\d)\s*\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"+\1/\2", text)
    text = re.sub(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", text)
    text = re.sub(r"(?<=\d) +(?=\d+/\d)", "+", text)
    while (joined := re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)) != text and _TUPLE.fullmatch(text) is None:
        text = joined
    text = text.replace(" ", "").lower()
    return text[: -len(zeros[0])] if (zeros := re.search(r"(?<=\d)\.0+$", text)) else text


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text[1:-1].split(",")] if _TUPLE.fullmatch(text) else [text]


def _same_part(gold: str, given: str) -> bool:
    if _FRACTION.fullmatch(gold) and _FRACTION.fullmatch(given):
        return gold == given
    if bool(_INTEGER.fullmatch(gold)) != bool(_INTEGER.fullmatch(given)):
        return False
    for text in (gold, given):
        letters = set(re.sub(r"\\[a-z]+|sqrt|frac", "", text)) & set("abcdefghijklmnopqrstuvwxyz")
        if len(letters) > MAX_LETTERS or _TOO_HARD.search(text):
            return False
    golds, givens = readings(gold), readings(given)
    return any(
        equal_expressions(one, other) is True
        for one in golds
        for other in givens
        if isinstance(one, EXPRESSIONS) and isinstance(other, EXPRESSIONS)
    )


def _plainly_different(gold: str, given: str) -> bool:
    """Whether our own reader reads both and finds them different under the lenient policy, beyond any rounding of (c).

    Only where (c) could see nothing else in them: it drops units, bases and the left sides of equations.
    """
    pairs = [(_without_unit(one), _without_unit(other)) for one in readings(gold) for other in readings(given)]
    return bool(pairs) and all(
        _comparable(one, other) and same_answer(one, other, LENIENT) is False and not _near(one, other)
        for one, other in pairs
    )


def _without_unit(node: nodes.Node) -> nodes.Node:
    return node.value if isinstance(node, nodes.Quantity) and node.unit != "%" else node


def _comparable(one: nodes.Node, other: nodes.Node) -> bool:
    """Whether two answers have one shape, with nothing in it that (c) would overlook."""
    if any(isinstance(part, OVERLOOKED) for node in (one, other) for part in nodes.walk(node)):
        return False
    if isinstance(one, EXPRESSIONS) or isinstance(other, EXPRESSIONS):
        return isinstance(one, EXPRESSIONS) and isinstance(other, EXPRESSIONS)
    if isinstance(one, nodes.Items) and isinstance(other, nodes.Items):
        return one.brackets == other.brackets != ":" and len(one.items) == len(other.items)
    if isinstance(one, nodes.Relation) and isinstance(other, nodes.Relation):
        return one.operators == other.operators and len(one.operators) == 1
    return type(one) is type(other)


def _near(one: nodes.Node, other: nodes.Node) -> bool:
    values = value_at(one, {}), value_at(other, {})
    return isinstance(values[0], Fraction) and isinstance(values[1], Fraction) and abs(values[0] - values[1]) < NEAR
