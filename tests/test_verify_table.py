"""The table of `spec/diagnostics.md` 7.1: what math-verify says, what our three policies say, and why they differ."""

from __future__ import annotations

from typing import NamedTuple

import math_verify
import pytest

from hptjax.verify import last_route
from hptjax.verify.rewards import math_hpt, math_lenient, math_strict


class Row(NamedTuple):
    """A gold answer, a completion, and the four words on it: by math-verify 0.9.0 as it comes, and by our policies."""

    gold: str
    completion: str
    math_verify: bool
    strict: bool
    lenient: bool
    hpt: bool
    note: str


ROWS = [
    Row(
        "$5$",
        r"\boxed{4} wait, no. \boxed{5}",
        False,
        True,
        True,
        True,
        "several boxes are merged; the last one counts",
    ),
    Row(
        "$2,3$",
        r"\boxed{2} and \boxed{3}",
        True,
        False,
        True,
        False,
        "the last box is 3; the lenient join two for a list",
    ),
    Row("$4$", r"final answer is $5$. I hope. \boxed{4}", False, True, True, True, "the box outranks the phrase"),
    Row(r"$\frac{1}{3}$", r"\boxed{0.333}", False, False, False, False, "three digits are no third"),
    Row(
        r"$\frac{1}{3}$",
        r"\boxed{0.3333333}",
        True,
        False,
        True,
        True,
        "the strict want the number, not six digits of it",
    ),
    Row(r"$10\%$", r"\boxed{10}", True, False, True, True, "the strict want the sign"),
    Row(r"$10\%$", r"\boxed{0.1}", True, False, True, True, "likewise"),
    Row("$10$", r"\boxed{10\%}", True, False, True, True, "off by a factor of 100, or an answer in percent"),
    Row("$(1,2)$", r"\boxed{1,2}", True, False, True, True, "a point has brackets"),
    Row("$(1,2)$", r"\boxed{(2,1)}", False, False, False, False, "and an order"),
    Row(r"$\{1,2\}$", r"\boxed{(1,2)}", True, False, True, True, "a set is no point"),
    Row("$1<x<2$", r"\boxed{(1,2)}", True, True, True, True, "the gold answer says which of the two (1,2) is"),
    Row("$(1,2)$", r"\boxed{1<x<2}", False, False, True, False, "here it does not: it may be a point"),
    Row("$x=5$", r"\boxed{5}", True, True, True, True, "a name before the value"),
    Row("$5$", r"\boxed{x=5}", True, True, True, True, "likewise"),
    Row("$x+1$", r"\boxed{y+1}", False, False, False, False, "names matter"),
    Row("$10_2$", r"\boxed{10}", True, False, False, True, "digits in base two are no ten"),
    Row("$3$", "$1+2$", True, False, True, False, "no box; and a calculation left to the reader"),
    Row("$3$", r"\boxed{1+2}", True, False, True, True, "it pays for repeating the question"),
    Row("10", r"\boxed{10 \text{ cm}}", True, False, True, True, "the strict overlook no unit"),
    Row("1000", r"\boxed{1,000}", True, True, True, True, "thousands"),
    Row("100,200", r"\boxed{100200}", True, True, True, True, "a comma may part thousands or items: either is right"),
    Row("100, 200", r"\boxed{100200}", False, False, False, False, "with a space it parts items"),
    Row("$5$", r"\boxed{\approx 5}", True, False, True, False, "about the answer, says the answer"),
    Row(r"$2\sqrt{3}$", r"\boxed{2\sqrt{3} \approx 3.46}", True, True, True, True, "the value stands before the sign"),
    Row("A", r"\boxed{A}", False, True, True, True, "a letter needs no dollar signs"),
    Row("$A$", "The answer is A", False, False, True, False, "no box"),
    Row("", r"\boxed{5}", False, False, False, False, "nothing to compare with"),
    Row(r"$10 \text{ cm}$", r"\boxed{10 \text{ m}}", True, False, False, True, "two different units"),
    Row("$4$", r"\boxed{3=4}", True, False, False, True, "the last side of an equation that is false"),
    Row("$1010_2$", r"\boxed{1010_3}", True, False, False, True, "two different bases"),
    Row(
        "$1$",
        r"\boxed{1E+1000000}",
        False,
        False,
        False,
        False,
        "an exponent above 1000; math-verify needs half a minute",
    ),
]
IDS = [f"{row.gold} {row.completion[-28:]}" for row in ROWS]
SLOW_FOR_MATH_VERIFY = "1E+1000000"


@pytest.fixture(scope="module", autouse=True)
def loaded():
    last_route.load()


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_verify_table_holds_for_every_policy(row):
    answer = {"answer": row.gold}
    strict = math_strict(row.completion, answer)
    assert (strict.solved, strict.reward) == (row.strict, float(row.strict)), (row.note, strict.grades)
    assert strict.solved_by("lenient") == row.lenient, (row.note, strict.grades)
    lenient = math_lenient(row.completion, answer)
    assert (lenient.solved, lenient.solved_by("strict")) == (row.lenient, row.strict), row.note
    assert math_hpt(row.completion, answer).solved == row.hpt, row.note


@pytest.mark.parametrize("row", [row for row in ROWS if SLOW_FOR_MATH_VERIFY not in row.completion])
def test_verify_table_quotes_math_verify_rightly(row):
    """The live library, with its own two readers and defaults, except that its timers are off."""
    gold, found = (math_verify.parse(text, parsing_timeout=None) for text in (row.gold, row.completion))
    assert math_verify.verify(gold, found, timeout_seconds=None) == row.math_verify


def test_verify_table_stands_in_the_docs(repository):
    page = (repository / "docs" / "rewards.md").read_text(encoding="utf-8")
    said = {True: "yes", False: "no"}
    for row in ROWS:
        words = " | ".join(said[word] for word in (row.math_verify, row.strict, row.lenient, row.hpt))
        gold = f"`{row.gold}`" if row.gold else "(empty)"
        assert f"| {gold} | `{row.completion}` | {words} | {row.note} |\n" in page
    assert page.count(" | yes | ") + page.count(" | no | ") >= len(ROWS)


def test_verify_table_has_each_kind_of_difference():
    """We refuse what math-verify accepts and accept what it refuses, under each policy but the lenient's refusals."""
    assert {(row.math_verify, row.strict) for row in ROWS} == {(a, b) for a in (True, False) for b in (True, False)}
    lenient_refuses = [row.note for row in ROWS if row.math_verify and not row.lenient]
    assert lenient_refuses == [
        "digits in base two are no ten",
        "two different units",
        "the last side of an equation that is false",
        "two different bases",
    ]
    assert not [row for row in ROWS if row.strict and not row.lenient]
