r"""From the text of an answer to tokens: LaTeX, plain notation and Unicode signs in one spelling.

What only sets type (`\left`, `\,`, `\displaystyle`, fonts, dollar signs, a final full stop) leaves no token. Linear in
the length of the text.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from hptjax.verify.spellings import COMMANDS, FUNCTIONS, GREEK, PLAIN_COMMANDS, SEPARATORS, UNICODE

_TRANSLATION = str.maketrans(UNICODE)
_NOTHING = re.compile(
    r"\\(?:left|right)\s?\.|\\(?:left|right|displaystyle|textstyle|scriptstyle|limits|nolimits|rm|bf|it|tt|mathstrut|"
    r"[bB]igg?[lrm]?)(?![A-Za-z])|\\[hv]space\*?\s?\{[^{}]{0,20}\}|\\(?:label|tag)\*?\s?\{[^{}]{0,40}\}"
)
_SPACE = re.compile(r"(\\\\)|\\(?:[,;:!> ]|quad(?![A-Za-z])|qquad(?![A-Za-z])|enspace(?![A-Za-z]))|~|\s+")
_JOINED = re.compile(r"(?<=\d)\{,\}(?=\d{3}(?!\d))|(?<=\d),\\!(?=\d{3}(?!\d))")
_GROUPS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\\[,;: ]|~|[  ])\d{3})+(?![\d.]*\d|\s*/)")
_WRAPPERS = ((r"\(", r"\)"), (r"\[", r"\]"), ("$$", "$$"), ("$", "$"), ("**", "**"), ("`", "`"))
_TEXT = (
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|textup|mathrm|mathbf|mathit|mathsf|mathtt|mathbb|mathcal|operatorname|"
    r"mbox|hbox|boldsymbol|bm|emph|underline)\*?\s?\{(?P<text>[^{}]*)\}"
)
_UPRIGHT = ("\\text", "\\mathrm", "\\mbox", "\\hbox", "\\operatorname")  # a letter in these may be a unit
_TOKEN = re.compile(
    rf"(?P<space>\s+)|{_TEXT}|\\(?P<command>[A-Za-z]+)|(?P<escape>\\.)|"
    r"(?P<number>\d+\.(?=\s*\\overline)|(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+(?![A-Za-z0-9.]))?)|(?P<word>[A-Za-z]+)|(?P<sign><=|>=|!=|\*\*|.)",
    re.DOTALL,
)


class Token(NamedTuple):
    """`kind`: "number", "name", "word", "text", "command", "sign" or "separator"; `spaced`: white space before it."""

    kind: str
    text: str
    spaced: bool


def cleaned(text: str) -> str:
    """The text without what surrounds the answer and without typesetting."""
    text = text.translate(_TRANSLATION).replace("\\$", "\x01").strip()
    for _ in range(4):
        before = text
        text = text.rstrip(" \t\n").removesuffix("\\\\").rstrip(" \t\n.,;") if len(text) > 1 else text
        text = without_dollars(text)
        if text == before:
            break
    text = text.replace("$", "\x01" if text.count("$") % 2 else " ")  # an odd one out is a currency
    text = _NOTHING.sub("", text)
    text = _JOINED.sub("", text)
    text = _GROUPS.sub(lambda match: re.sub(r"\D", "", match.group()), text)
    return _SPACE.sub(lambda match: match.group(1) or " ", text).replace("\x01", "\\$").strip()


def without_dollars(text: str) -> str:
    """The text without one pair of signs around all of it that enclose a formula, or set it in bold or as code."""
    text = text.strip()
    for opening, closing in _WRAPPERS:
        inside = text[len(opening) : -len(closing)]
        if len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
            return text if opening in inside or closing in inside else inside.strip()
    return text


def scan(text: str) -> list[Token]:
    """The tokens of a cleaned text."""
    tokens: list[Token] = []
    spaced = False
    for match in _TOKEN.finditer(text):
        if match.lastgroup == "space":
            spaced = True
            continue
        tokens += [Token(kind, word, spaced and not place) for place, (kind, word) in enumerate(_tokens_of(match))]
        spaced = False
    return tokens


def normal(text: str) -> str:
    """One spelling of an answer, for comparison as a string; spaces between words or numbers are kept, others are not.

    Example
      >>> normal(r"$\\dfrac{1}{2}$.") == normal(r"\\frac {1} {2}")
      True
    """
    parts: list[str] = []
    before = ""
    for token in scan(cleaned(text)):
        words = token.kind in ("word", "text")
        if token.spaced and token.kind == before == "number":  # 3 1/2 is not 31/2
            parts.append(" ")
        parts.append(f" {' '.join(token.text.split())} " if words else token.text)
        before = token.kind
    return " ".join("".join(parts).split())


def _tokens_of(match: re.Match[str]) -> list[tuple[str, str]]:
    kind, word = match.lastgroup, match.group()
    if kind == "text":
        return _text_tokens(word, match["text"])
    if kind == "command":
        word = COMMANDS.get(match["command"], match["command"])
        if word in ("and", "or"):
            return [("separator", word)]
        if word in GREEK or word == "i":
            return [("name", word)]
        return [("command" if len(word) > 1 else "sign", word)]
    if kind == "escape":
        return [("sign", {"\\{": "\\{", "\\}": "\\}", "\\%": "%", "\\$": "$", "\\|": "|"}.get(word, word))]
    if kind == "number":
        return [("number", word)]
    if kind == "word":
        return _word_tokens(word)
    assert kind == "sign"
    if word in ",;":
        return [("separator", word)]
    return [("sign", {"**": "^"}.get(word, word))]


def _text_tokens(whole: str, inside: str) -> list[tuple[str, str]]:
    r"""`\text{...}` and its like: a separator, a letter, a number or words."""
    inside = inside.strip()
    if whole.startswith("\\mathbb"):
        return [("command", f"mathbb{inside}")]
    if inside.lower() in SEPARATORS:
        return [("separator", inside.lower())]
    if re.fullmatch(r"[A-Za-z]", inside) and (inside in "ei" or not whole.startswith(_UPRIGHT)):
        return [("name", inside)]
    if re.fullmatch(r"\d+(?:\.\d+)?", inside):
        return [("number", inside)]
    if inside in FUNCTIONS:
        return [("command", inside)]
    if inside in ("%", "$", "\\%", "\\$"):
        return [("sign", inside[-1])]
    return [("text", inside)] if inside else []


def _word_tokens(word: str) -> list[tuple[str, str]]:
    if len(word) == 1:
        return [("name", word)]
    if word in ("and", "or"):
        return [("separator", word)]
    if word in PLAIN_COMMANDS or word in FUNCTIONS:
        return [("command", PLAIN_COMMANDS.get(word, word))]
    return [("word", word)]
