"""The evaluation sets: rows in their published columns, made here, become questions with right answers."""

from __future__ import annotations

import pytest

from hptjax.eval.suites import GROUPS, SUITES, choice, chosen_suites, fetch_words, read_rows

BY_NAME = {suite.name: suite for suite in SUITES}
GPQA = {
    "Question": "Which is prime?",
    "Correct Answer": "7",
    "Incorrect Answer 1": "4",
    "Incorrect Answer 2": "6",
    "Incorrect Answer 3": "9",
}
ROWS = {
    "aime24": ({"problem": "p", "answer": "025", "url": "u", "year": "2024"}, ("p", "025")),
    "amc23": ({"question": "p", "answer": 27.0}, ("p", "27.0")),
    "math500": ({"problem": "p", "answer": r"\frac{1}{2}", "solution": "s", "level": 5}, ("p", r"\frac{1}{2}")),
    "olympiadbench": ({"question": "p", "final_answer": ["$2$"]}, ("p", "$2$")),
    "gsm8k": ({"question": "p", "answer": "a #### b\n#### 1,234"}, ("p", "1234")),
    "arc_c": (
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        ("q\nA. x\nB. y", "B"),
    ),
    "mmlu_pro": (
        {"question": "q", "options": ["x", "y", "z"], "answer_index": 2, "answer": "C"},
        ("q\nA. x\nB. y\nC. z", "C"),
    ),
    "countdown": ({"nums": [44, 19, 35], "target": 98}, ("19,35,44=98", "98")),
}


@pytest.mark.parametrize("name", ROWS)
def test_suite_reads_its_published_columns(name):
    row, (problem, gold) = ROWS[name]
    item = BY_NAME[name].read(row)
    assert (item.problem, item.gold) == (problem, gold)


def test_gpqa_options_are_in_an_order_of_the_questions_own():
    item = BY_NAME["gpqa_diamond"].read(GPQA)
    lines = dict(line.split(". ") for line in item.problem.splitlines()[1:])
    assert sorted(lines.values()) == ["4", "6", "7", "9"]
    assert lines[item.gold] == "7"
    assert BY_NAME["gpqa_diamond"].read(GPQA) == item
    golds = {BY_NAME["gpqa_diamond"].read(GPQA | {"Question": f"Which is prime, {n}?"}).gold for n in range(40)}
    assert golds == set("ABCD")


def test_rows_of_a_suite_are_counted():
    row = ROWS["amc23"][0]
    assert len(read_rows(BY_NAME["amc23"], [row] * 40)) == 40
    with pytest.raises(ValueError, match=r"expected 40 rows of amc23 .* got 39; .* --data"):
        read_rows(BY_NAME["amc23"], [row] * 39)
    with pytest.raises(ValueError, match=r"row 1 of amc23 .*KeyError\('answer'\)"):
        read_rows(BY_NAME["amc23"], [row, {"problem": "p"}])
    assert len(read_rows(BY_NAME["gsm8k"], [ROWS["gsm8k"][0]] * 3)) == 3  # nobody has counted it


def test_countdown_is_the_part_of_its_file_that_tinyzero_tests():
    rows = [{"nums": [1, 2], "target": n} for n in range(328_704 + 5)]
    items = read_rows(BY_NAME["countdown"], rows)
    assert [items[0].gold, items[-1].gold, len(items)] == ["327680", "328703", 1024]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"problem": "", "answer": "1"}, "aime24"),
        ({"problem": None, "answer": "1"}, "aime24"),
        ({"question": "p", "final_answer": ["1", "2"]}, "olympiadbench"),
        ({"question": "p", "answer": "no mark"}, "gsm8k"),
        ({"question": "q", "choices": {"text": ["x"], "label": ["A"]}, "answerKey": "B"}, "arc_c"),
        ({"question": "q", "options": ["x"], "answer_index": 0}, "mmlu_pro"),
        ({"question": "q", "options": ["x", "y"], "answer_index": -1}, "mmlu_pro"),
    ],
)
def test_row_of_another_form_is_refused(row, name):
    with pytest.raises((ValueError, KeyError, TypeError)):
        BY_NAME[name].read(row)


def test_suites_by_group_and_name():
    assert [suite.name for suite in chosen_suites("math")] == list(GROUPS["math"])
    assert chosen_suites("gsm8k") == [BY_NAME["gsm8k"]]
    with pytest.raises(ValueError, match=r"got 'maths'; use one of math, other, aime24"):
        chosen_suites("maths")
    assert "load_dataset('openai/gsm8k', 'main', split='test')" in fetch_words([BY_NAME["gsm8k"]], "data")
    assert {suite.kind for suite in [choice("q", ["a", "b"], 0)]} == {"choice"}
    assert {name for names in GROUPS.values() for name in names} <= set(BY_NAME)
