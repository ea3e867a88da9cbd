r"""Where the answer stands in a completion. Pure functions of text, in time linear in its length, without recursion.

The text is a policy's: braces may nest ten thousand deep or never close, and anything may follow anything.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

How = Literal["last_boxed", "answer_tag", "hash4", "choice"]
LETTERS = "ABCDEFGHIJ"  # of multiple choice; MMLU-Pro has ten options
NEAR_END = 4000  # characters at the end of a text that the lenient phrases are looked for in
MAX_UNWRAPPED = 16  # boxes directly inside boxes

_OPEN, _CLOSE = "<think>", "</think>"
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufe00-\ufe0f\ufeff]")
_BRACES = re.compile(r"\\(?:boxed|fbox)\s{0,8}\{|\\[\\{}]|[{}]")
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,8}([^\s{}$\\,.;]{1,64})")
_WHOLE_BOX = re.compile(r"\s*\\(?:boxed|fbox)\s{0,8}\{")
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_CHOICE_LINE = re.compile(r"(?:^|\n)[ \t*_]*answer[ \t*_]*:[ \t*_]*\(?([A-J])\)?[ \t*_.]*(?=\n|$)", re.IGNORECASE)
_CHOICE_PHRASE = re.compile(
    r"(?i:answer|option|choice)(?i:\s+(?:is|would be|should be))?\s*:?\s*[*_$]{0,4}"
    r"(?:\\text(?:bf)?\{)?\(?([A-J])(?![A-Za-z'])"
)
_CHOICE_ALONE = re.compile(r"\(([A-J])\)|(?<![A-Za-z\\])([A-J])[.*_$\s]{0,8}$")
_PHRASE = re.compile(r"(?:final\s+answer|answer|result)\s*(?:is|are|=|:)\s*:?", re.IGNORECASE)
_MATH = re.compile(r"\$\$([^$]{1,1000})\$\$|\$([^$\n]{1,1000})\$|\\\((.{1,1000}?)\\\)|\\\[(.{1,1000}?)\\\]", re.DOTALL)
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d{1,200})(?:\.\d{1,200})?(?:/\d{1,200})?%?")


class Box(NamedTuple):
    r"""A closed `\boxed{...}` of a text: where it begins, where its content is, where it ends."""

    start: int
    content: int
    content_end: int
    end: int


def visible(text: str) -> str:
    """The text without characters that show nothing: of no width, joiners, marks of direction, a soft hyphen."""
    return text if text.isascii() else _INVISIBLE.sub("", text)


def after_thinking(text: str, thinking: bool | None = None) -> str | None:
    """What can be seen of the text after the last closing think tag; None where thinking was not ended.

    Args
      thinking: True: the completion starts inside a think section (the prompt opened it), so a text without a closing
        tag is all thought. None: only an opening tag of its own says so.
    Example
      >>> after_thinking("<think>\\boxed{4}</think>\\boxed{5}")
      '\\\\boxed{5}'
    """
    end = text.rfind(_CLOSE)
    tail = text[end + len(_CLOSE) :] if end >= 0 else text
    if _OPEN in tail or (thinking and end < 0):
        return None
    return visible(tail)


def boxes(text: str) -> tuple[list[Box], int]:
    r"""The closed boxes that lie in no other closed box, in order, and where the last unclosed box begins (-1: none).

    Braces written `\{` and `\}` do not count; a closing brace too many is passed over.
    """
    first = min((place for place in (text.find("\\boxed"), text.find("\\fbox")) if place >= 0), default=-1)
    if first < 0:
        return [], -1
    closed: list[Box] = []
    stack: list[tuple[int, int]] = []  # (start of a box or -1 for a plain brace, start of the content)
    for match in _BRACES.finditer(text, first):
        sign = match.group()
        if sign == "{":
            stack.append((-1, match.end()))
        elif sign == "}":
            start, content = stack.pop() if stack else (-1, 0)
            if start >= 0:
                while closed and closed[-1].start > start:
                    closed.pop()
                closed.append(Box(start, content, match.start(), match.end()))
        elif sign[-1] == "{" and len(sign) > 2:
            stack.append((match.start(), match.end()))
    return closed, max((start for start, _ in stack), default=-1)


def last_boxed(text: str, max_tail: int | None = None) -> str | None:
    r"""The content of the last box; None where there is none, the last one never closes, or too much follows it.

    Args
      max_tail: characters that may follow the box; None: any number.
    Example
      >>> last_boxed(r"\boxed{4} wait, no. \boxed{\frac{5}{2}}.")
      '\\frac{5}{2}'
    """
    closed, unclosed = boxes(text)
    if not closed or unclosed > closed[-1].start:
        return None
    last = closed[-1]
    if max_tail is not None and len(text) - last.end > max_tail:
        return None
    return unwrapped(text[last.content : last.content_end])


def last_boxes(text: str, count: int) -> list[str]:
    """The contents of the last `count` boxes, in order; fewer where there are fewer."""
    return [unwrapped(text[box.content : box.content_end]) for box in boxes(text)[0][-count:]]


def unwrapped(content: str) -> str:
    """The content without boxes around all of it."""
    for _ in range(MAX_UNWRAPPED):
        if not _WHOLE_BOX.match(content):
            break
        closed, _unclosed = boxes(content)
        if len(closed) != 1 or content[closed[0].end :].strip() or content[: closed[0].start].strip():
            break
        content = content[closed[0].content : closed[0].content_end]
    return content.strip()


def answer_of(text: str, how: How = "last_boxed", max_tail: int | None = None) -> str | None:
    """The answer where its format asks for it, or None.

    Args
      how: "last_boxed"; "answer_tag": the last <answer>...</answer>; "hash4": after the last ####, as in GSM8K;
        "choice": a letter, in the last box or on a line `ANSWER: B`.
      max_tail: as for `last_boxed`; the other forms have no limit.
    """
    if how == "answer_tag":
        return _tagged(text)
    if how == "hash4":
        place = text.rfind("####")
        found = _HASHES.match(text, place) if place >= 0 else None
        return found.group(1).strip() if found else None
    if how == "choice":
        lines = _CHOICE_LINE.findall(text[-NEAR_END:])
        return last_boxed(text, max_tail) or (lines[-1].upper() if lines else None)
    return last_boxed(text, max_tail)


def answer_anywhere(text: str, how: How = "last_boxed") -> str | None:
    """The answer in the format asked for, or else in any form that a reader would find; for evaluation only.

    In this order: the format; a closed box; an answer tag; a box without braces; "the answer is"; a number after
    ####; the last formula; the last number. A letter of multiple choice is looked for by its own phrases.
    """
    found = answer_of(text, how)
    if found:
        return found
    closed, _ = boxes(text)
    if closed:
        return unwrapped(text[closed[-1].content : closed[-1].content_end])
    tail = text[-NEAR_END:]
    if how == "choice":
        for pattern in (_CHOICE_LINE, _CHOICE_PHRASE, _CHOICE_ALONE):
            found_letters = [next(filter(None, match.groups())) for match in pattern.finditer(tail)]
            if found_letters:
                return found_letters[-1].upper()
        return None
    for other in ("answer_tag", "hash4"):
        found = answer_of(text, other)
        if found:
            return found
    return _bare_box(tail) or _after_phrase(tail) or _last_formula(tail) or _last_number(tail)


def _tagged(text: str) -> str | None:
    """Between the last closing answer tag and the opening one before it."""
    found, opened = None, -1
    for tag in _TAG.finditer(text):
        if not tag.group(1):
            opened = tag.end()
        elif opened >= 0:
            found, opened = (opened, tag.start()), -1
    return unwrapped(text[found[0] : found[1]]) if found else None


def _bare_box(text: str) -> str | None:
    found = _BARE_BOX.findall(text)
    return found[-1] if found else None


def _after_phrase(text: str) -> str | None:
    """What follows the last "answer is": a formula, or the rest of the sentence."""
    places = [match.end() for match in _PHRASE.finditer(text)]
    if not places:
        return None
    rest = text[places[-1] :].lstrip(" \t\n*_:")
    formula = _MATH.match(rest)
    if formula:
        return next(group for group in formula.groups() if group is not None).strip()
    sentence = re.split(r"\n|\.(?:\s|$)|\s(?:I hope|because|since)\b", rest, maxsplit=1)[0]
    return sentence.strip(" \t*_.") or None


def _last_formula(text: str) -> str | None:
    found = _MATH.findall(text)
    return next((group.strip() for group in found[-1] if group), None) if found else None


def _last_number(text: str) -> str | None:
    found = _NUMBER.findall(text)
    return found[-1] if found else None
