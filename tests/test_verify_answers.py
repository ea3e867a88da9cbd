r"""Pairs of a gold answer and another, labelled by hand: what a strict and what a lenient reader should say.

Also the shapes that the reader finds in a text, HPT's rules, and golds in the forms that data sets have.
"""

from __future__ import annotations

from fractions import Fraction

import pytest

from hptjax.verify import hpt_rules, nodes
from hptjax.verify.grade import canonical, grade, grades, question_of
from hptjax.verify.last_route import is_equal
from hptjax.verify.parse import NotRead, read, readings
from hptjax.verify.policy import LENIENT, STRICT

# what our own routes decide: gold, answer, "both" policies say yes, only the "lenient" one, or "none"
PAIRS = r"""
\frac{9}{7} | \dfrac{9}{7} | both
\frac{9}{7} | \frac97 | both
-\frac{1}{3} | \frac{-1}{3} | both
\frac{5}{2} | 2\frac{1}{2} | both
\frac{5}{2} | 2.5 | both
\frac{1}{2} | .5 | both
0.5 | \frac{1}{2} | both
0.\overline{3} | \frac{1}{3} | both
0.1\overline{6} | \frac{1}{6} | both
50 | 50.0 | both
14{,}916 | 14916 | both
1,234,567 | 1234567 | both
50,\!000 | 50000 | both
1 000 000 | 1000000 | both
150000 | 1.5\times 10^5 | both
-3 | 3 | none
\frac{31}{2} | 3 1/2 | none
31/2 | 3 1/2 | none
3 1/2 | 31/2 | none
3 1/2 | 3.5 | both
12 | 12. | both
12 | $12$ | both
12 | \mathbf{12} | both
12 | twelve | none
5 | \frac{10}{2} | lenient
5 | 2+3 | lenient
8 | 2^3 | lenient
3 | \sqrt{9} | lenient
120 | \binom{10}{3} | lenient
3628800 | 10! | lenient
\frac{1}{2} | \frac{2}{4} | lenient
2^{10} | 1024 | both
\binom{10}{3} | 120 | both
\frac{2}{4} | \frac{1}{2} | both
3.14 | \pi | lenient
\pi | 3.141593 | lenient
\pi | 3.14 | none
0.333 | \frac{1}{3} | lenient
0.33 | \frac{1}{3} | none
0.33 | 0.333 | none
\frac{2}{3} | 0.666667 | lenient
\frac{2}{3} | 0.66667 | none
3\sqrt{13} | \sqrt{117} | both
\frac{1}{\sqrt{2}} | \frac{\sqrt2}{2} | both
\sqrt{3+2\sqrt{2}} | 1+\sqrt{2} | both
\sqrt{3+2\sqrt{2}} | 2+\sqrt{2} | none
\sqrt[3]{2} | 2^{1/3} | both
\sqrt[3]{-8} | -2 | both
\log_2 3 | \frac{\ln 3}{\ln 2} | both
\ln 2 | \log 2 | both
\lg 2 | \log 2 | both
\lg 2 | \ln 2 | none
\tan 15^\circ | 2-\sqrt{3} | both
\cos\frac{\pi}{9} | \cos 20^\circ | both
e^{i\pi/4} | \frac{\sqrt2}{2}+\frac{\sqrt2}{2}i | both
6-5i | -5i+6 | both
6-5i | 6+5i | none
x^2+7x+10 | (x+2)(x+5) | both
x^2+7x+10 | x^2+7x+11 | none
\frac{x+2}{7} | \frac{1}{7}x+\frac{2}{7} | both
\sin^2 x | 1-\cos^2 x | both
\frac{1}{2}\sin 2x | \sin x\cos x | both
|x| | \sqrt{x^2} | both
x | \sqrt{x^2} | none
2\ln x | \ln x^2 | none
n! | n\cdot(n-1)! | both
\frac{n!}{k!(n-k)!} | \binom{n}{k} | both
2^n-1 | 2^{n}-1 | both
2^n-1 | 2^{n-1} | none
ab | ba | both
x_1+x_2 | x_{2}+x_{1} | both
x+1 | y+1 | none
(-1,6) | (-1, 6) | both
(-1,6) | [-1,6] | none
(1,2,3) | (1,3,2) | none
1,2,3 | 3,2,1 | both
1,2,3 | 1,2 | none
1,2 | 1,2,2 | lenient
4 | 4,5 | none
4,5 | 4 \text{ and } 5 | both
4,5 | \{5,4\} | both
4,5 | (4,5) | lenient
\{1,2\} | \{2,1\} | both
\{5\} | 5 | lenient
\emptyset | \{\} | both
\emptyset | \varnothing | both
3:4 | 3 : 4 | both
3:4 | \frac{3}{4} | lenient
3:4 | 4:3 | none
\pm 5 | 5,-5 | both
x = 3 \pm \sqrt{2} | 3-\sqrt{2}, 3+\sqrt{2} | both
5 | \pm 5 | none
1,234 | 1, 234 | both
x=5 | 5 | both
x=5 | 5=x | both
x=5 | y=5 | none
x=5 | x=2+3 | lenient
x=1, x=2 | 1,2 | both
1,2 | x=2 \text{ or } x=1 | both
x=1, y=2 | (1,2) | lenient
(x,y)=(1,2) | (1,2) | both
4 | 3=4 | none
4 | 1+3=4 | lenient
y=2x+3 | 2x-y+3=0 | both
y=2x+3 | 2y=4x+6 | both
y=2x+3 | x=2y+3 | none
y=2x+3 | 2x+3 | lenient
2x+3 | y=2x+3 | both
x^2+y^2=4 | x^2+y^2=5 | none
x>5 | 5<x | both
2x>10 | x>5 | both
-x>5 | x>5 | none
x>5 | x\ge 5 | none
x \ne 3 | 3 \neq x | both
x>5 | (5,\infty) | both
(5,\infty) | x>5 | both
x \in (5,\infty) | x>5 | both
[-2,7] | -2\le x\le 7 | both
(-2,7) | -2<x<7 | lenient
-2<x<7 | 7>x>-2 | both
(-\infty,2)\cup(3,\infty) | (3,\infty)\cup(-\infty,2) | both
(-\infty,2)\cup(3,\infty) | (-\infty,2)\cup[3,\infty) | none
x<2 \text{ or } x>3 | (-\infty,2)\cup(3,\infty) | both
\{x \mid x>3\} | (3,\infty) | both
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{bmatrix}1\\2\end{bmatrix} | both
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{pmatrix} 1 & 2 \end{pmatrix} | none
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | (1,2) | lenient
\text{Evelyn} | Evelyn | both
\text{yes} | Yes | both
\text{east} | west | none
\text{4:30 p.m.} | \text{4:30 p.m.} | both
C | \textbf{(C)} | both
C | (C) | both
C | D | none
C | (C)\ 12 | lenient
\text{(C)} | C | both
10\text{ cm} | 10\,\mathrm{cm} | both
10\text{ cm} | 10 centimeters | both
10\text{ cm}^2 | 10 \text{ square centimeters} | both
10\text{ cm}^2 | 10\text{ cm} | none
5 \text{ m/s} | 5\ \mathrm{m}/\mathrm{s} | both
5\text{ m} | 5m | both
10 | 10\text{ cm} | lenient
10\text{ cm} | 10 | lenient
10\text{ cm} | 10\text{ m} | none
\$36 | 36 dollars | both
\$36 | 36 | lenient
60^\circ | 60^{\circ} | both
60^\circ | 60 degrees | both
7\% | 7 percent | both
7\% | 0.07 | lenient
7\% | 8\% | none
10_2 | 10_{2} | both
10_2 | 2 | none
\infty | -\infty | none
5 | \approx 5 | lenient
5 | x \approx 5 | lenient
5 | ≈5 | lenient
2\sqrt{3} | 2\sqrt{3} \approx 3.46 | both
2\sqrt{3} | x = 2\sqrt{3} \approx 3.46 | both
2\sqrt{3} | 3.46 \approx 2\sqrt{3} | lenient
3.46 | 2\sqrt{3} \approx 3.46 | lenient
5 | 5 \approx 7 | none
5 | 6 \approx 6.1 | none
\approx 3.14 | 3.14 | both
\approx 3.14 | \approx 3.15 | none
\pi \approx 3.14 | \pi | both
\pi \approx 3.14 | 3.14 | lenient
\pm\sqrt{2} | \pm\sqrt{2} \approx \pm 1.41 | both
x=1, y=2\sqrt{3} | x=1, y=2\sqrt{3}\approx 3.46 | both
100,200 | 100200 | both
100,200 | 100, 200 | both
100, 200 | 100200 | none
1 | 1E+1000000 | none
"""
ROWS = [tuple(cell.strip() for cell in line.rsplit(" | ", 2)) for line in PAIRS.strip().splitlines()]


@pytest.mark.parametrize(("gold", "answer", "who"), ROWS)
def test_answers_pairs_are_judged_as_a_reader_would(gold, answer, who):
    """Without math-verify: these are decided by our own routes, and so is every "no" among them."""
    asked = []

    def last_route(*texts):
        asked.append(texts)

    completion = f"\\boxed{{{answer}}}"
    strict, lenient = grades(completion, question_of({"answer": gold}), last_route)
    assert (strict.correct, lenient.correct) == (who == "both", who in ("both", "lenient")), (strict, lenient)
    assert not asked or answer == "1E+1000000"
    assert {strict.policy, lenient.policy} == {"strict", "lenient"}
    assert (strict.reason == "none") == (not strict.correct)


# where our own reader knows too little, math-verify decides
LAST = [
    (r"\mathbb{R}", r"(-\infty,\infty)", True),
    (r"3^{2024}", r"9^{1012}", True),
    (r"(0,1)\cup(1,2)", r"(0,2)\setminus\{1\}", True),
    (r"\int_0^1 x\,dx", r"\frac{1}{2}", True),
    (r"\sum_{k=1}^{3} k", "7", False),
]


@pytest.mark.parametrize(("gold", "answer", "equal"), LAST)
def test_answers_go_to_math_verify_last(gold, answer, equal):
    question = question_of({"answer": gold})
    ours = grade(f"\\boxed{{{answer}}}", question, STRICT, None)
    both = grade(f"\\boxed{{{answer}}}", question, STRICT, lambda one, other, loose: is_equal(one, other, loose=loose))
    assert (ours.correct, both.correct) == (False, equal)
    assert both.reason == ("math_verify" if equal else "none")


def test_answers_with_two_signs_inside_a_root_are_left_to_math_verify():
    question = question_of({"answer": r"\sqrt{\pm 5}"})
    for answer, last, correct in (
        (r"\sqrt{\pm 6}", None, False),
        (r"\sqrt{\pm 5}", None, True),
        (r"1+\sqrt{\pm 6}", True, True),
    ):
        said = grade(f"\\boxed{{{answer}}}", question, STRICT, lambda *_, last=last: last)
        assert said.correct == correct, answer


@pytest.mark.parametrize(
    ("gold", "answer"),
    [("5", r"\int_0^5 1\,dx"), ("5", r"5 \triangle"), (r"10\text{ cm}", r"\vec{AB}\text{ m}"), ("10_2", r"\vec{AB}")],
)
def test_answers_strict_policy_does_not_ask_where_math_verify_would_overlook(gold, answer):
    def last_route(*texts):
        raise AssertionError(f"asked about {texts}")

    assert not grade(f"\\boxed{{{answer}}}", question_of({"answer": gold}), STRICT, last_route).correct


@pytest.mark.parametrize(
    ("answer", "golds"),
    [
        ({"answer": r"$\boxed{204}$"}, ("204",)),
        ({"answer": 204}, ("204",)),
        ({"answer": 2.5}, ("2.5",)),
        ({"answer": ["5", r"\frac{10}{2}"]}, ("5", r"\frac{10}{2}")),
        ({"answer": "He has 3 + 4 = 7.\n#### 7"}, ("7",)),
        ({"answer": None}, ()),
        ({"answer": " "}, ()),
        ({"answer": []}, ()),
    ],
)
def test_answers_gold_in_the_forms_of_data_sets(answer, golds):
    assert question_of(answer).golds == golds


def test_answers_read_signs_of_unicode():
    for text, same in (
        ("\u22123", "-3"),
        ("2\u00d73", r"2\times 3"),
        ("x\u00b2", "x^2"),
        ("\u221a2", r"\sqrt2"),
        ("\uff08\u03c0\uff09", r"\pi"),
    ):
        assert read(text) == read(same)


def test_answers_do_not_see_characters_that_show_nothing():
    for sign in "\u200b\ufeff\u2060\u200e\u00ad\u2062\ufe0f":
        question = question_of({"answer": f"{sign}1{sign}2"})
        assert question.golds == ("12",)
        strict, lenient = grades(f"so \\boxed{sign}{{{sign}1{sign}2}}{sign}", question)
        assert (strict.correct, strict.extracted, lenient.correct) == (True, "12", True), hex(ord(sign))
        assert grade(f"Answer:{sign} {sign}B", question_of({"answer": "B", "how": "choice"}), STRICT).correct
        assert grade(f"\\boxed{{{sign}}}", question, LENIENT).status == "no_answer"
    assert not grade("\\boxed{1\u00a02}", question_of({"answer": "12"}), STRICT).correct  # a space is seen


def test_answers_any_of_several_golds_counts():
    question = question_of({"answer": [r"\frac{1}{3}", "0.33"]})
    for text in (r"\boxed{\frac{1}{3}}", r"\boxed{0.33}"):
        assert grade(text, question, STRICT).correct
    assert not grade(r"\boxed{0.34}", question, STRICT).correct


@pytest.mark.parametrize(
    "answer",
    [{}, {"answer": {"a": 1}}, {"answer": "5", "how": "boxed"}, {"answer": "5", "thinking": "yes"}],
)
def test_answers_malformed_question_is_an_error(answer):
    with pytest.raises((KeyError, TypeError, ValueError)):
        question_of(answer)


def test_answers_status_says_what_was_missing():
    question = question_of({"answer": "5"})
    for text, status in (
        ("no box", "no_answer"),
        ("<think>\\boxed{5}", "no_answer"),
        ("\\boxed{ }", "no_answer"),
        ("\\boxed{5^^^}", "parse_error"),
        ("\\boxed{6}", "ok"),
        ("\\boxed{5}", "ok"),
    ):
        assert grade(text, question, STRICT).status == status, text
    assert grade("\\boxed{5}", question_of({"answer": ""}), STRICT).status == "no_gold"


def test_answers_extracted_and_canonical_are_kept():
    found = grade(r"\boxed{\dfrac{2}{4}}", question_of({"answer": "0.5"}), LENIENT)
    assert (found.extracted, found.canonical, found.reason) == (r"\dfrac{2}{4}", "1/2", "symbolic")
    assert [canonical(text) for text in (r"\approx 0.50", r"\frac{1}{2}\approx 0.5")] == ["1/2"] * 2
    long = grade("\\boxed{" + "9" * 5000 + "}", question_of({"answer": "0.5"}), LENIENT)
    assert long.extracted is not None
    assert len(long.extracted) == 256


@pytest.mark.parametrize(
    ("gold", "completion", "how", "strict", "lenient"),
    [
        ("B", "Answer: B", "choice", True, True),
        ("B", r"\boxed{\text{(B) } 12}", "choice", False, True),
        ("B", "The answer is (B).", "choice", False, True),
        ("B", "The answer is (C).", "choice", False, False),
        ("J", "ANSWER: J", "choice", True, True),
        ("72", "so 72\n#### 72", "hash4", True, True),
        ("72", "<answer>72</answer>", "answer_tag", True, True),
        ("72", r"\boxed{72}", "answer_tag", False, True),
    ],
)
def test_answers_in_other_formats(gold, completion, how, strict, lenient):
    said = grades(completion, question_of({"answer": gold, "how": how}))
    assert (said[0].correct, said[1].correct) == (strict, lenient)


def test_reader_shapes_by_hand():
    one, two, three = (nodes.Number(Fraction(value)) for value in (1, 2, 3))
    x = nodes.Name("x")
    assert read(r"\frac{1}{2}") == read(r"\dfrac12") == read("1/2") == nodes.Div(one, two)
    assert read("-x^2") == nodes.Neg(nodes.Pow(x, two))
    assert read("1-2-3") == nodes.Add((one, nodes.Neg(two), nodes.Neg(three)))
    assert read("1/2/3") == nodes.Div(nodes.Div(one, two), three)
    assert read("1/2x") == nodes.Mul((nodes.Div(one, two), x))
    assert read("2x^3") == nodes.Mul((two, nodes.Pow(x, three)))
    assert read(r"\sin 2x + 1") == nodes.Add((nodes.Call("sin", (nodes.Mul((two, x)),)), one))
    assert read(r"\sin x \cos x") == nodes.Mul((nodes.Call("sin", (x,)), nodes.Call("cos", (x,))))
    assert read("2 1/3") == read(r"2\frac{1}{3}") == nodes.Mixed(two, nodes.Div(one, three))
    assert read("1<x<=2") == nodes.Relation((one, x, two), ("<", "<="))
    assert read("[1,2)") == nodes.Items("[)", (one, two))
    assert read("(x)") == x
    assert readings("1,234") == (nodes.Number(Fraction(1234)), nodes.Items("", (one, nodes.Number(Fraction(234)))))
    assert read("(1,234)") == nodes.Items("()", (one, nodes.Number(Fraction(234))))
    assert read(r"5 \text{ km} / \text{h}") == nodes.Quantity(nodes.Number(Fraction(5)), "km/h")
    assert read("0.10") == nodes.Number(Fraction(1, 10), 2)


@pytest.mark.parametrize(
    "text",
    ["", "$", "(", "(1", "1)", "{1", "1+", "^2", "2^3^4", "1/", r"\frac{1}", r"\sqrt", r"\unknown{1}", "1..2", "|x",
     "x=", r"\begin{pmatrix} 1 & 2 \\ 3 \end{pmatrix}", "(" * 65 + "1" + ")" * 65, "-" * 65 + "1", "9" * 257, "1e1001",
     "2^1e9", "+".join(["x"] * 102), r"\{1,2\}+1", "{(1,2)}^2", r"\sqrt{(1,2)}"],
)  # fmt: skip
def test_reader_refuses_what_it_does_not_know(text):
    with pytest.raises(NotRead):
        read(text)


def test_reader_has_room_for_what_is_allowed():
    assert read("(" * 30 + "1" + ")" * 30) == nodes.Number(Fraction(1))
    assert read("9" * 256) == nodes.Number(Fraction(10**256 - 1))
    assert readings("9" * 300) == ()
    assert readings("9" * 300, 1024) != ()


HPT_ROWS = [
    # (a) texts after Hendrycks' normalisation
    (r"\frac{1}{2}", r"\dfrac{1}{2}", "exact"),
    (r"\frac{1}{2}", "0.5", "exact"),
    (r"\frac{3}{4}", "3/4", "exact"),
    ("5", r"5\text{ cm}", "exact"),
    ("5", "x = 5", "exact"),
    ("50", r"50\%", "exact"),
    ("90", r"90^\circ", "exact"),
    (r"\sqrt{3}", r"\sqrt3", "exact"),
    # (b) PRM800K's rules
    ("1000", "1,000", "symbolic"),
    ("x+1", "1+x", "symbolic"),
    ("(1, 2)", r"\left(1,2\right)", "exact"),
    ("(1,2)", "(1.0,2.0)", "none"),  # an integer is matched by an integer only
    ("(1,2)", "[1,2]", "none"),
    (r"\frac{1}{2}", r"\frac{2}{4}", "none"),  # a fraction as it is written
    ("4", r"\frac{8}{2}", "none"),
    ("2", "3", "none"),
]


@pytest.mark.parametrize(("gold", "answer", "reason"), HPT_ROWS)
def test_answers_hpt_rules_without_their_last_route(gold, answer, reason):
    assert hpt_rules.grade(f"\\boxed{{{answer}}}", question_of({"answer": gold})).reason == reason


def test_answers_hpt_rules_take_math_verify_as_their_third_route():
    for gold, answer, equal in ((r"\frac{1}{2}", r"\frac{2}{4}", True), ("3", "1+2", True), ("x^2", "x^3", False)):
        said = hpt_rules.grade(
            f"\\boxed{{{answer}}}",
            question_of({"answer": gold}),
            lambda one, other, _: is_equal(one, other, loose=False),
        )
        assert (said.correct, said.reason) == (equal, "math_verify" if equal else "none")


def test_answers_hpt_rules_do_not_ask_about_two_plain_numbers():
    def last_route(*texts):
        raise AssertionError(f"asked about {texts}")

    for gold, answer in (("5", "6"), ("0.5", "0.51"), (r"\frac{1}{3}", r"\frac{2}{3}")):
        assert not hpt_rules.grade(f"\\boxed{{{answer}}}", question_of({"answer": gold}), last_route).correct


def test_answers_hpt_rules_extract_as_published():
    for text, box in (
        (r"\boxed{4} \boxed{5}", "5"),
        (r"\boxed{4} \boxed{5", None),
        (r"\boxed 5", None),
        (r"\boxed{\boxed{5}}", "5"),
        ("<think>\\boxed{5}", "5"),  # think tags play no part
        ("5", None),
    ):
        assert hpt_rules.last_box(text) == box
    repeated = "\\boxed{" + "x+1 and then " * 20 + "}"
    assert not hpt_rules.grade(repeated, question_of({"answer": "5"}), lambda *_: True).correct
