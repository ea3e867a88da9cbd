"""What must hold of any answer: it equals itself and its rewritings and nothing else, and it always gets a grade."""

from __future__ import annotations

import itertools
import time
from fractions import Fraction

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hptjax.verify import hpt_rules
from hptjax.verify.equal import equal_expressions
from hptjax.verify.extract import answer_of
from hptjax.verify.grade import grade, grades, question_of
from hptjax.verify.parse import read, readings
from hptjax.verify.policy import LENIENT, STRICT
from hptjax.verify.scan import normal
from tests.test_verify_answers import ROWS

QUICK = settings(max_examples=60)
INTEGERS = st.integers(-10_000, 10_000)
FRACTIONS = st.fractions(-100, 100, max_denominator=400)
LATEX = st.lists(
    st.sampled_from(
        (
            r"\frac \sqrt \sin \pi \infty \pm \cup \text{ { } ( ) [ ] \{ \} | ^ _ + - * / = < > \le , ; : ! % $ \% \\ "
            r"& ' . 0 1 2 3 10 0.5 x y a e i n cm and or \boxed{ \begin{pmatrix} \end{pmatrix} \log \binom <think> "
            r"</think> ####"
        ).split()
    ),
    max_size=30,
).map(" ".join)


def _boxed(answer: str) -> str:
    return f"so it is \\boxed{{{answer}}}."


def _says(gold: str, answer: str) -> tuple[bool, bool]:
    strict, lenient = grades(_boxed(answer), question_of({"answer": gold}))
    return strict.correct, lenient.correct


def _written(value: Fraction) -> list[str]:
    """Ways to write a fraction that a teacher would take."""
    sign, top, bottom = "-" if value < 0 else "", abs(value.numerator), value.denominator
    if bottom == 1:
        return [f"{sign}{top}", f"{sign}{top}.0", f"{sign}{top:,}", f"${sign}{top}$", f"x={sign}{top}"]
    forms = [f"{sign}\\frac{{{top}}}{{{bottom}}}", f"\\dfrac{{{sign}{top}}}{{{bottom}}}", f"{sign}{top}/{bottom}"]
    whole, rest = divmod(top, bottom)
    if whole:
        forms += [f"{sign}{whole}\\frac{{{rest}}}{{{bottom}}}", f"{sign}{whole} {rest}/{bottom}"]
    places = next((n for n in range(1, 12) if 10**n % bottom == 0), None)
    if places is not None:
        digits = str(top * 10**places // bottom).rjust(places + 1, "0")
        forms.append(f"{sign}{digits[:-places]}.{digits[-places:]}")
    return forms


@given(st.one_of(st.text(max_size=40), LATEX))
@settings(max_examples=150)
def test_verify_every_answer_is_equal_to_itself(text):
    assume("#" not in text and "boxed" not in text and "<" not in text)
    assume(answer_of(_boxed(text)) == text.strip() and question_of({"answer": text}).golds and normal(text))
    assert _says(text, text) == (True, True)


@given(FRACTIONS)
@QUICK
def test_verify_a_number_rewritten_is_accepted(value):
    forms = _written(value)
    for gold, answer in zip(forms, [*forms[1:], forms[0]], strict=True):
        assert _says(gold, answer) == (True, True), (gold, answer)


@given(FRACTIONS, FRACTIONS)
@QUICK
def test_verify_another_number_is_rejected(value, other):
    assume(abs(value - other) > Fraction(1, 100_000) * max(abs(value), 1))
    for gold, answer in zip(_written(value), _written(other), strict=False):
        strict, lenient = _says(gold, answer)
        assert not strict, (gold, answer)
        rounded = "." in gold and round(other, len(gold.partition(".")[2].rstrip("$"))) == value
        assert not lenient or rounded, (gold, answer)


@given(st.lists(INTEGERS.filter(bool).map(lambda n: n % 20 - 10), min_size=1, max_size=4), st.integers(1, 5), st.data())
@QUICK
def test_verify_a_polynomial_is_its_factors_and_no_neighbour(roots, lead, data):
    """The coefficients are multiplied out here, by hand; one of them is changed for the wrong answer."""
    coefficients = [lead]
    for root in roots:
        shifted = [*coefficients, 0]
        coefficients = [a - root * b for a, b in zip(shifted, [0, *coefficients], strict=True)]
    factored = f"{lead}" + "".join(f"(x{-root:+d})" for root in roots)

    def expanded(values: list[int]) -> str:
        degree = len(values) - 1
        return "".join(f"{value:+d}x^{{{degree - place}}}" for place, value in enumerate(values)).lstrip("+")

    assert _says(expanded(coefficients), factored) == (True, True)
    assert _says(factored, expanded(coefficients)) == (True, True)
    place = data.draw(st.integers(0, len(coefficients) - 1))
    coefficients[place] += data.draw(st.sampled_from([-2, -1, 1, 3]))
    assert _says(expanded(coefficients), factored) == (False, False)
    assert _says(factored, expanded(coefficients)) == (False, False)


@given(st.integers(1, 30), st.integers(2, 60), st.integers(1, 5))
@QUICK
def test_verify_a_root_is_the_root_of_the_square(factor, radicand, off):
    gold = f"{factor}\\sqrt{{{radicand}}}"
    assert _says(gold, f"\\sqrt{{{factor * factor * radicand}}}")[1]
    assert _says(gold, f"\\frac{{{factor * radicand}}}{{\\sqrt{{{radicand}}}}}")[1]
    assert _says(gold, f"\\sqrt{{{factor * factor * radicand + off}}}") == (False, False)


@given(st.lists(FRACTIONS, min_size=2, max_size=5, unique=True), st.randoms(use_true_random=False))
@QUICK
def test_verify_sets_have_no_order_and_tuples_have_one(values, random):
    texts = [_written(value)[0] for value in values]
    shuffled = texts[:]
    random.shuffle(shuffled)
    assert _says(f"\\{{{', '.join(texts)}\\}}", f"\\{{{', '.join(shuffled)}\\}}") == (True, True)
    assert _says(", ".join(texts), ", ".join(shuffled)) == (True, True)
    same = shuffled == texts
    assert _says(f"({', '.join(texts)})", f"({', '.join(shuffled)})") == (same, same)
    assert _says(", ".join(texts), ", ".join(texts[1:]))[0] is False


@given(st.sampled_from(ROWS), st.sampled_from(ROWS))
@settings(max_examples=150)
def test_verify_equality_of_expressions_is_symmetric(first, second):
    for one, other in itertools.product(readings(first[0]), readings(second[1])):
        assert equal_expressions(one, other) == equal_expressions(other, one)


@given(st.sampled_from(ROWS), st.sampled_from(ROWS))
@settings(max_examples=150)
def test_verify_what_the_strict_accept_the_lenient_accept(first, second):
    """Each policy asked alone: the order is no mere consequence of how `grades` fills them in."""
    question = question_of({"answer": first[0]})
    strict, lenient = (grade(_boxed(second[1]), question, policy) for policy in (STRICT, LENIENT))
    assert lenient.correct or not strict.correct


@given(st.one_of(st.text(max_size=300), LATEX, LATEX.map(_boxed)), LATEX)
@settings(max_examples=200)
def test_verify_any_text_gets_a_grade_at_once(completion, gold):
    question = question_of({"answer": gold})
    start = time.process_time()
    for said in (*grades(completion, question), hpt_rules.grade(completion, question)):
        assert said.status in ("ok", "no_answer", "parse_error", "no_gold")
        assert said.reason in ("exact", "numeric", "symbolic", "set", "choice", "none")
        assert said.correct == (said.reason != "none")
    assert time.process_time() - start < 2.0


def test_verify_reads_what_it_writes():
    assert read(_written(Fraction(-7, 3))[0]) == read(_written(Fraction(-7, 3))[2])
