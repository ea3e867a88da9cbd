"""Where the answer stands: boxes by a second route, think tags, other formats, hostile texts in linear time."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hptjax.verify.extract import after_thinking, answer_anywhere, answer_of, boxes, last_boxed, last_boxes


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{4} wait, no. \boxed{5}.", "5"),
        (r"so $x=\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{[0, 1\}}", r"[0, 1\}"),  # an escaped brace is no brace
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{3 \text{ or } \boxed{5}}", r"3 \text{ or } \boxed{5}"),  # the outer box is what was answered
        (r"{ \boxed{5}", "5"),  # a stray brace outside
        (r"} \boxed{5} }", "5"),
        (r"\boxed{5} and \boxed{", None),  # cut off in the middle of the last answer
        (r"\boxed{5} and \boxed{\frac{1}{2}", None),
        (r"\boxed 5", None),
        (r"\boxed", None),
        ("5", None),
        ("", None),
        (r"\boxed{}", ""),
        ("\\\\boxed{5}", "5"),  # a line break before the word: what a sloppy writer means
    ],
)
def test_extract_last_box(text, answer):
    assert last_boxed(text) == answer


def test_extract_last_box_has_a_limit_on_what_follows():
    text = r"\boxed{5}" + "x" * 100
    assert last_boxed(text, max_tail=100) == "5"
    assert last_boxed(text, max_tail=99) is None


def _boxes_slowly(text: str) -> list[str]:
    """Contents of the closed boxes that lie in no other closed one, by trying every start and counting braces."""
    found, covered = [], -1
    for start in range(len(text)):
        if not text.startswith("\\boxed{", start) or start < covered:
            continue
        depth, place = 1, start + len("\\boxed{")
        while place < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            place += 1
        if depth == 0:
            found.append(text[start + len("\\boxed{") : place - 1])
            covered = place
    return found


@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "a", "5", " "]), max_size=40).map("".join))
@settings(max_examples=300)
def test_extract_boxes_are_those_that_counting_finds(text):
    closed, _ = boxes(text)
    assert [text[box.content : box.content_end] for box in closed] == _boxes_slowly(text)
    assert len(last_boxes(text, 2)) == min(2, len(closed))


@pytest.mark.parametrize(
    ("text", "thinking", "rest"),
    [
        ("<think>a</think>b", None, "b"),
        ("a</think>b", True, "b"),
        ("<think>a</think>b<think>c</think>d", None, "d"),
        ("<think>a", None, None),
        ("a", True, None),
        ("<think>a</think>b<think>c", None, None),
        ("a", None, "a"),
        ("a", False, "a"),
    ],
)
def test_extract_looks_after_the_thinking(text, thinking, rest):
    assert after_thinking(text, thinking) == rest


@pytest.mark.parametrize(
    ("text", "how", "answer"),
    [
        ("<answer> 5 </answer>", "answer_tag", "5"),
        ("<answer>4</answer> <ANSWER>\\boxed{5}</ANSWER> <answer>6", "answer_tag", "5"),
        ("\u0130" * 9 + "<answer>5</answer>", "answer_tag", "5"),  # a letter whose lower case is longer
        ("<answer>5", "answer_tag", None),
        ("3 + 4 = 7\n#### 7\n", "hash4", "7"),
        ("#### 6\n#### 7 dollars", "hash4", "7 dollars"),
        ("7", "hash4", None),
        ("I think (A).\nAnswer: C", "choice", "C"),
        ("ANSWER: (b)", "choice", "B"),
        (r"\boxed{D}", "choice", "D"),
        ("The answer is B", "choice", None),
    ],
)
def test_extract_other_formats(text, how, answer):
    assert answer_of(text, how) == answer


@pytest.mark.parametrize(
    ("text", "how", "answer"),
    [
        ("The answer is 5.", "last_boxed", "5"),
        ("The final answer is $\\frac{1}{2}$. I hope it is correct.", "last_boxed", "\\frac{1}{2}"),
        ("**Answer:** 12 apples", "last_boxed", "12 apples"),
        ("It has $3$ sides, so $x = 4$", "last_boxed", "x = 4"),
        ("we get 3, then 1,234.5", "last_boxed", "1,234.5"),
        ("\\boxed{5} and then \\boxed{", "last_boxed", "5"),
        ("\\boxed 7", "last_boxed", "7"),
        ("<answer>8</answer>", "last_boxed", "8"),
        ("#### 9", "last_boxed", "9"),
        ("no digits here", "last_boxed", None),
        ("The answer is (B) because A is wrong", "choice", "B"),
        ("The answer is a number", "choice", None),
        ("It must be (C)", "choice", "C"),
        ("so: D.", "choice", "D"),
        ("I think", "choice", None),
    ],
)
def test_extract_anywhere(text, how, answer):
    assert answer_anywhere(text, how) == answer


HOSTILE = {
    "nested braces, closed": "\\boxed{" + "{" * 10_000 + "5" + "}" * 10_000 + "}",
    "nested boxes, closed": "\\boxed{" * 10_000 + "5" + "}" * 10_000,
    "nested boxes, open": "\\boxed{" * 100_000,
    "braces, open": "\\boxed" + "{" * 1_000_000,
    "braces, closing": "\\boxed{5" + "}" * 1_000_000,
    "backslashes": "\\boxed{" + "\\" * 1_000_000,
    "spaces after the word": "\\boxed" + " " * 1_000_000,
    "one answer of a megabyte": "\\boxed{" + "9" * 1_000_000 + "}",
    "a megabyte before": "x " * 500_000 + "\\boxed{5}",
    "tags": "<answer>" * 100_000,
    "think tags": "<think></think>" * 60_000,
    "dollars": "$" * 1_000_000,
    "hashes": "#" * 1_000_000,
    "answers": "answer is " * 100_000,
    "letters": "A " * 500_000,
    "line ends": "\n" * 1_000_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_extract_takes_linear_time_and_no_recursion(text):
    """A quadratic scan of a megabyte would take hours; every form of extraction looks at every text."""
    start = time.process_time()
    after_thinking(text)
    for how in ("last_boxed", "answer_tag", "hash4", "choice"):
        answer_of(text, how, 1000)
        answer_anywhere(text, how)
    assert time.process_time() - start < 20.0


def test_extract_deep_nesting_is_read_rightly():
    assert last_boxed(HOSTILE["nested braces, closed"]) == "{" * 10_000 + "5" + "}" * 10_000
    assert last_boxed(HOSTILE["nested boxes, open"]) is None
    assert last_boxed(HOSTILE["braces, closing"]) == "5"
