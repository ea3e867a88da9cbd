"""Texts that nobody meant: through every reward function, and through the pool where one of them hangs."""

from __future__ import annotations

import time

import pytest

from hptjax.records import Verdict
from hptjax.rewards.pool import RewardPool
from hptjax.verify import last_route
from hptjax.verify.rewards import math_format, math_hpt, math_lenient, math_strict

FUNCTIONS = (math_strict, math_lenient, math_hpt, math_format)
HANGS = (r"\boxed{(10^9)!}", {"answer": "x+1"})  # math-verify computes it
DEADLINE_S = 1.0

HOSTILE = {
    "empty": "",
    "spaces": " " * 10_000,
    "nothing in the box": r"\boxed{}",
    "a space in the box": r"\boxed{ }",
    "NUL": "\x00\\boxed{\x005\x00}\x00",
    "lone surrogates": "\ud800\\boxed{\udfff5}\ud800",
    "bytes read as latin-1": bytes(range(256)).decode("latin-1") + r"\boxed{5}",
    "right to left": "\u202e\\boxed{\u0665}",
    "combining marks": "\\boxed{" + "a" + "\u0301" * 200 + "}",
    "a megabyte of digits": "\\boxed{" + "9" * 1_000_000 + "}",
    "a megabyte of words": "x " * 500_000 + r"\boxed{5}",
    "a megabyte after": r"\boxed{5}" + " y" * 500_000,
    "braces 10,000 deep": "\\boxed{" + "{" * 10_000 + "5" + "}" * 10_000 + "}",
    "brackets 10,000 deep": "\\boxed{" + "(" * 10_000 + "5" + ")" * 10_000 + "}",
    "fractions 10,000 deep": "\\boxed{" + "\\frac{1}{" * 10_000 + "5" + "}" * 10_000 + "}",
    "mixed numbers nested": "\\boxed{" + "2\\frac{" * 20 + "1" + "}{3}" * 20 + "}",
    "roots of roots": "\\boxed{" + "\\sqrt" * 40 + "2}",
    "signs": "\\boxed{" + "-" * 200 + "5}",
    "exponents": "\\boxed{" + "9^{" * 60 + "9" + "}" * 60 + "}",
    "exponent in a number": r"\boxed{1E+1000000}",
    "exponent behind zeros": r"\boxed{1e+00000000009999999}",
    "exponent under a power": r"\boxed{2^1e999999999}",
    "factorials": "\\boxed{9" + "!" * 100 + "}",
    "factorial of a power": r"\boxed{(10^9)!}",
    "a list of everything": "\\boxed{" + ",".join("abcdefghijklmnopqrstuvwxyz") * 4 + "}",
    "commas": "\\boxed{" + "," * 200 + "}",
    "thousands": "\\boxed{1" + ",000" * 60 + "}",
    "not a number": r"\boxed{\text{nan}}",
    "infinity": r"\boxed{\infty-\infty}",
    "division by zero": r"\boxed{\frac{1}{0}}",
    "code": r"\boxed{__import__('os').system('true')}",
    "percent signs": "\\boxed{5" + "\\%" * 100 + "}",
    "half a command": "\\boxed{\\",
    "a matrix without end": "\\boxed{\\begin{pmatrix}" + "1 & " * 50 + "}",
    "think tags": "<think>" * 1000 + "</think>" * 999 + "<think>" + r"\boxed{5}",
}


@pytest.fixture(scope="module")
def pool():
    with RewardPool(workers=2, deadline_s=DEADLINE_S) as opened:
        opened.load(FUNCTIONS)
        yield opened


@pytest.mark.parametrize("gold", ["5", r"\frac{1}{0}", "\x00", "\ud800", "9" * 300, "(" * 10_000, "A", r"10\text{ cm}"])
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_gets_a_verdict_at_once(text, gold, monkeypatch):
    """Our own routes, in this process; what they leave to math-verify is looked at in the pool."""
    monkeypatch.setattr(last_route, "is_equal", lambda *_, **__: None)
    start = time.process_time()
    for function in FUNCTIONS:
        verdict = function(text, {"answer": gold})
        assert type(verdict) is Verdict
        assert verdict.reward in (0.0, 1.0)
        assert (verdict.reward == 1.0) == verdict.solved
        assert all(len(grade.extracted or "") <= 256 for grade in verdict.grades)
    assert time.process_time() - start < 10.0


def test_hostile_texts_that_hold_the_answer_are_read(monkeypatch):
    monkeypatch.setattr(last_route, "is_equal", lambda *_, **__: None)
    five = [name for name, text in HOSTILE.items() if math_lenient(text, {"answer": "5"}).solved]
    assert five == ["bytes read as latin-1", "right to left", "a megabyte of words", "a megabyte after"]
    strict = [name for name, text in HOSTILE.items() if math_strict(text, {"answer": "5"}).solved]
    assert strict == ["bytes read as latin-1", "right to left", "a megabyte of words"]


def test_hostile_length_is_not_read_and_signs_are_not_asked_about():
    """Neither can be a verdict that matters, and both took a good part of the second that a completion has."""
    padded = {count: r"\boxed{5" + r"\quad" * count + "}" for count in (10, 1999, 2001)}
    assert [math_strict(text, {"answer": "5"}).reason for text in padded.values()] == [
        "exact",
        "exact",
        "parse_error",
    ]
    assert last_route.is_equal("5", "-" * 30 + "5", loose=False) is True
    assert last_route.is_equal("5", "- " * 32 + "5", loose=False) is None


@pytest.mark.timed
def test_hostile_texts_pass_through_the_pool(pool):
    """Each text stands beside a plain one; all plain ones get their verdict. Numbers without bounds take too long."""
    completions = [text for hostile in HOSTILE.values() for text in (hostile, r"\boxed{5}")]
    verdicts = pool.judge(math_strict, completions, [{"answer": "5"}] * len(completions))
    assert all(verdict.solved for verdict in verdicts[1::2])
    reasons = {name: verdict.reason for name, verdict in zip(HOSTILE, verdicts[::2], strict=True)}
    slow = {name for name, reason in reasons.items() if reason == "timeout"}
    assert "factorial of a power" in slow <= {"factorial of a power", "factorials", "exponents"}
    assert set(reasons.values()) <= {"exact", "numeric", "wrong", "no_answer", "parse_error", "timeout"}
    assert all(type(verdict.reward) is float for verdict in verdicts)


@pytest.mark.timed
def test_hostile_sums_in_sympy_cost_their_deadline_only(pool):
    """P15: the hanging one is cut off within its deadline and a second; everyone else's verdict is as alone."""
    completions, answers = [r"\boxed{5}"] * 300, [{"answer": "5"}] * 300
    completions[7], answers[7] = HANGS
    start = time.monotonic()
    verdicts = pool.judge(math_strict, completions, answers)
    assert time.monotonic() - start < DEADLINE_S + 1.0 + 5.0  # and a machine that is busy with other work
    assert verdicts[7] == Verdict(0.0, False, "timeout")
    assert all(verdict.solved for place, verdict in enumerate(verdicts) if place != 7)
    assert pool.judge(math_strict, completions[:5], answers[:5]) == verdicts[:5]


def test_hostile_answer_of_an_example_is_a_counted_failure(pool):
    verdicts = pool.judge(math_strict, [r"\boxed{5}"] * 3, [{}, {"answer": {"a": 1}}, {"answer": "5", "how": "guess"}])
    assert [verdict.reason for verdict in verdicts] == ["raised: KeyError", "raised: TypeError", "raised: ValueError"]


@pytest.mark.slow
def test_hostile_one_in_a_hundred_hangs_and_ten_thousand_finish():
    """100 hanging answers of 10,000 cost about 100 deadlines on two workers."""
    completions = [rf"so it is \boxed{{{index % 97}}}" for index in range(10_000)]
    answers = [{"answer": str(index % 89)} for index in range(10_000)]
    for place in range(50, 10_000, 100):
        completions[place], answers[place] = HANGS
    with RewardPool(workers=2, deadline_s=DEADLINE_S) as pool:
        start = time.monotonic()
        verdicts = pool.judge(math_strict, completions, answers)
        seconds = time.monotonic() - start
    hanging = [place for place, verdict in enumerate(verdicts) if verdict.reason == "timeout"]
    assert hanging == list(range(50, 10_000, 100))
    right = [index for index in range(10_000) if index % 97 == index % 89 and index not in hanging]
    assert [index for index, verdict in enumerate(verdicts) if verdict.solved] == right
    assert seconds < 100 * DEADLINE_S / 2 + 120.0
