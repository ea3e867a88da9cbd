"""Rows of published formats, written here by the libraries that write them: kept, or counted with the reason."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
from decimal import Decimal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hptjax.build.files import FORMATS, choose_importer
from hptjax.data import importers
from hptjax.data.identity import canonical_text, content_ids
from hptjax.data.imported import read_examples
from hptjax.data.prepare import DROP_REASONS
from hptjax.data.row_fields import ROW_REASONS
from hptjax.data.rows import Unreadable, open_rows
from hptjax.records import Example
from tests.openr1 import parquet, verl_row


def rows_of(name):
    return list(open_rows(str(name)))


def nested(levels):
    """Lists inside lists: Python's own JSON reads such rows and fails to write them, as it stands deeper by then."""
    return json.loads("[" * levels + "]" * levels)


@pytest.fixture(autouse=True)
def _no_progress_bars():
    datasets.disable_progress_bars()


# Reading


def test_rows_of_verl_parquet_come_back_whole_and_in_order(tmp_path):
    rows = [verl_row(i, target=i % 3 != 0) for i in range(700)]
    assert rows_of(parquet(tmp_path / "a.parquet", rows)) == rows


def test_rows_are_the_same_from_every_container(tmp_path):
    """Parquet, JSON Lines, a JSON list, gzip, a folder of the hub's layout, one saved by `datasets`, CSV, Arrow."""
    rows = [{"problem": f"2+{i}?", "answer": str(2 + i)} for i in range(5)]
    data = datasets.Dataset.from_list(rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    data.to_parquet(str(tmp_path / "a.parquet"))
    data.to_csv(str(tmp_path / "a.csv"))
    data.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines + "\n\n", encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.json").write_text(lines)
    (tmp_path / "hub" / "data").mkdir(parents=True)
    data.to_parquet(str(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet"))
    for name in ("a.parquet", "saved", "a.jsonl", "a.jsonl.gz", "list.json", "lines.json", "hub", "hub@train"):
        assert rows_of(tmp_path / name) == rows, name
    assert [str(row["answer"]) for row in rows_of(tmp_path / "a.csv")] == [row["answer"] for row in rows]


def test_rows_of_a_folder_with_several_splits_ask_which(tmp_path):
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for split, count in (("train", 3), ("test", 2)):
        rows = [{"problem": str(i), "answer": split} for i in range(count)]
        parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet", rows)
    assert len(rows_of(tmp_path / "hub@test")) == 2
    for name in ("hub", "hub@dev"):
        with pytest.raises(ValueError, match=r"one of the splits \['test', 'train'\].*hub@test"):
            rows_of(tmp_path / name)


def test_rows_that_cannot_be_read_are_told_apart_and_the_rest_goes_on(tmp_path):
    good = b'{"prompt": "a", "answer": "1"}'
    bad = {
        b'{"prompt": "\xff\xfe"}': "not_utf8",
        b'{"prompt": "\\ud800", "answer": 1}': "not_utf8",  # half of a surrogate pair
        b'{"prompt": ': "not_json",
        b"[" * 100_000: "not_json",
        b'{"answer": ' + b"9" * 5000 + b"}": "not_json",  # Python refuses such a number
        b'["a"]': "not_a_record",
        b"null": "not_a_record",
    }
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, *bad, b'{"prompt": "\\ud83d\\ude42"}', good]))
    found = rows_of(tmp_path / "a.jsonl")
    assert found[0] == found[-1] == json.loads(good)
    assert found[-2] == {"prompt": "🙂"}
    assert [row.reason for row in found[1:-2]] == list(bad.values())
    assert set(bad.values()) < set(ROW_REASONS)


def test_rows_of_parquet_with_bytes_that_are_no_text_lose_only_these(tmp_path):
    problems = pa.array([b"one", b"\xff\xfe", b"three"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"problem": problems, "answer": ["1", "2", "3"]}), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == [
        {"problem": "one", "answer": "1"},
        Unreadable("not_utf8"),
        {"problem": "three", "answer": "3"},
    ]


def test_rows_of_a_broken_file_are_one_clear_error(tmp_path):
    whole = parquet(tmp_path / "a.parquet", [verl_row(i) for i in range(600)]).read_bytes()
    (tmp_path / "short.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "garbled.parquet").write_bytes(whole[:300] + bytes(300) + whole[600:])
    (tmp_path / "short.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 5000)[:-20])
    (tmp_path / "text.jsonl.gz").write_bytes(b"no gzip at all")
    (tmp_path / "list.json").write_text('[{"prompt": "a"}, {')
    (tmp_path / "rows.xlsx").write_text("")
    for name in ("short.parquet", "garbled.parquet", "short.jsonl.gz", "text.jsonl.gz", "list.json", "rows.xlsx"):
        with pytest.raises(ValueError, match="expected") as refused:
            rows_of(tmp_path / name)
        assert name in str(refused.value)


def test_rows_of_csv_are_texts_as_written_and_only_bad_lines_are_lost(tmp_path):
    """Numbers of a table in text, as `datasets` makes them, round, lose zeros, and take None for an empty cell."""
    answers = ["007", "12345678901234567890123", "0.12345678901234567890", "None", "NA", "True", "1e5", "1/2"]
    lines = [f"{place}?,{answer}" for place, answer in enumerate(answers)]
    (tmp_path / "a.csv").write_text("\ufeffproblem,answer\r\n" + "\r\n".join(lines) + "\r\n", encoding="utf-8")
    assert [row["answer"] for row in rows_of(tmp_path / "a.csv")] == answers
    bad = b'problem,answer\n"two\nlines, a ""word""",1\nq,1,2\n\xff,1\n\nq\nq,\n' + b"x" * 200_000 + b",3\n"
    (tmp_path / "b.csv").write_bytes(bad)
    assert rows_of(tmp_path / "b.csv") == [
        {"problem": 'two\nlines, a "word"', "answer": "1"},
        Unreadable("not_a_record"),
        Unreadable("not_utf8"),
        {"problem": "q", "answer": None},
        {"problem": "q", "answer": None},
        {"problem": "x" * 200_000, "answer": "3"},
    ]
    (tmp_path / "open.csv").write_text('problem,answer\nq,1\n"q,2\nq,3\n')
    (tmp_path / "twice.csv").write_text("answer,answer\nq,1\n")
    for name, words in (("open.csv", "line 4.*correct the quotes"), ("twice.csv", "rename them")):
        with pytest.raises(ValueError, match=words):
            rows_of(tmp_path / name)


def test_rows_of_csv_in_a_folder_are_texts_as_written(tmp_path):
    answers = ["007", "12345678901234567890123", "0.12345678901234567890", "None", "NA", "True", "1e5", ""]
    lines = [f'"{place}, then?",{answer}' for place, answer in enumerate(answers)]
    wanted = [{"problem": f"{place}, then?", "answer": answer or None} for place, answer in enumerate(answers)]
    for folder, name in (("one", "a.csv"), ("several", "test.csv"), ("several", "train.csv")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text("\ufeffproblem,answer\r\n" + "\r\n".join(lines), encoding="utf-8")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "one" / "a.csv").read_bytes()))
    for name in ("one", "packed", "several@test", "one/a.csv"):
        assert rows_of(tmp_path / name) == wanted, name
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.csv").write_text("problem,answer\n")
    assert rows_of(tmp_path / "none") == []
    (tmp_path / "none" / "a.csv").write_text("problem,answer\nq,1\nq,1,2\n")
    with pytest.raises(ValueError, match="none"):
        rows_of(tmp_path / "none")


def test_rows_of_empty_files_are_none_and_no_name_is_no_file(tmp_path, monkeypatch):
    empty = pa.table({"problem": pa.array([], pa.string()), "answer": pa.array([], pa.string())})
    pq.write_table(empty, tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.json"):
        (tmp_path / name).write_text("")
    for name in ("a.parquet", "a.jsonl", "a.csv", "a.json"):
        assert rows_of(tmp_path / name) == []
    with pytest.raises(FileNotFoundError, match=r"expected a data file.*change data\.files"):
        rows_of("")
    (tmp_path / "one").mkdir()
    parquet(tmp_path / "one" / "a.parquet", [{"problem": "q", "answer": "1"}])
    monkeypatch.chdir(tmp_path / "one")
    assert rows_of(".") == [{"problem": "q", "answer": "1"}]


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e23, "1e+23"), (2.0**53, "9007199254740992"), (-0.0, "0"), (10**30, "1" + 30 * "0"), (Decimal("1.50"), "1.50")],
)
def test_importer_writes_a_number_with_the_digits_it_has(value, text):
    """int(1e23) is 99999999999999991611392: an answer that nobody gave."""
    assert FORMATS["native"]({"prompt": "q", "answer": value}).answer == {"answer": text}


def test_rows_that_are_nowhere_say_where_was_looked_and_how_to_fetch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no 'absent\.jsonl' from .*change data\.files"):
        rows_of("absent.jsonl")
    with pytest.raises(FileNotFoundError, match="no 'x"):
        rows_of("x" * 5000)
    with pytest.raises(ValueError, match=r"hf download openai/gsm8k --repo-type dataset --local-dir gsm8k.*hf auth"):
        rows_of("openai/gsm8k:main@test")  # there is no network in tests


# Importers


QUESTION = {"role": "user", "content": "What is 2+3?"}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "5"}


@pytest.mark.parametrize(
    ("format", "row", "expected"),
    [
        (
            "verl",
            {**verl_row(3), "prompt": [SYSTEM, QUESTION]},
            ((SYSTEM, QUESTION), verl_row(3)["target"][0]["content"], {"answer": "5"}),
        ),
        ("verl", {**verl_row(3, target=False), "prompt": [QUESTION]}, ((QUESTION,), "", {"answer": "5"})),
        (
            "verl",
            {"prompt": [QUESTION], "reward_model": {"ground_truth": ["5", "five"]}},
            ((QUESTION,), "", {"answer": ["5", "five"]}),
        ),
        ("verl", {"prompt": [QUESTION], "target": [], "reward_model": None}, ((QUESTION,), "", {})),
        ("prompt_completion", {"prompt": "What is 2+3?", "completion": "5"}, ((QUESTION,), "5", {})),
        (
            "prompt_completion",
            {"prompt": [SYSTEM, QUESTION], "completion": [ANSWER], "solution": 5},
            ((SYSTEM, QUESTION), "5", {"answer": "5"}),
        ),
        (
            "messages",
            {"messages": [QUESTION, ANSWER, QUESTION, {**ANSWER, "reasoning_content": "hm"}], "answer": "5"},
            ((QUESTION, ANSWER, QUESTION), "<think>\nhm\n</think>\n\n5", {"answer": "5"}),
        ),
        ("messages", {"messages": [SYSTEM, QUESTION]}, ((SYSTEM, QUESTION), "", {})),
        (
            "messages",  # empty cells of a table are None
            {"messages": [{**QUESTION, "name": None}, {**ANSWER, "tool_calls": None}]},
            ((QUESTION,), "5", {}),
        ),
        ("native", {"prompt": "What is 2+3?", "demo": "5", "answer": 5.0}, ((QUESTION,), "5", {"answer": "5"})),
        (
            "native",
            {"prompt": [SYSTEM, QUESTION], "demo": None, "answer": {"numbers": [2, 3], "target": 5}, "id": "a"},
            ((SYSTEM, QUESTION), "", {"numbers": [2, 3], "target": 5}),
        ),
        ("problem_answer", {"Problem": "What is 2+3?", "Answer": 5}, ((QUESTION,), "", {"answer": "5"})),
        (
            "problem_answer",
            {"problem": "What is 2+3?", "solution": "It is $\\boxed{5}$.", "answer": " 5 ", "level": 4},
            ((QUESTION,), "It is $\\boxed{5}$.", {"answer": "5"}),
        ),
        ("problem_answer", {"question": "What is 2+3?", "final_answer": ["5"]}, ((QUESTION,), "", {"answer": "5"})),
        (
            "problem_answer",
            {"question": "What is 2+3?", "answer": "Two and three make 5.\n#### 5"},
            ((QUESTION,), "Two and three make 5.\n#### 5", {"answer": "5"}),
        ),
        (
            "alpaca",
            {"instruction": "What is", "input": "2+3?", "output": "5"},
            (({"role": "user", "content": "What is\n\n2+3?"},), "5", {}),
        ),
    ],
)
def test_importer_reads_its_format(format, row, expected):
    example = FORMATS[format](row)
    assert isinstance(example, Example)
    assert (example.messages, example.demonstration, dict(example.answer)) == expected
    assert example.prompt == expected[0][-1]["content"]
    assert choose_importer("auto", row) == (format, FORMATS[format])


@pytest.mark.parametrize(
    ("format", "changes", "reason"),
    [
        ("verl", {"prompt": None}, "no_question"),
        ("verl", {"prompt": []}, "no_question"),
        ("verl", {"prompt": [SYSTEM]}, "malformed_turns"),
        ("verl", {"prompt": [QUESTION, ANSWER]}, "malformed_turns"),
        ("verl", {"prompt": [{"role": "user"}]}, "malformed_turns"),
        ("verl", {"prompt": [{"role": "User", "content": "a"}]}, "malformed_turns"),
        ("verl", {"prompt": [{"role": "user", "content": "  "}]}, "no_question"),
        ("verl", {"prompt": {"role": "user", "content": "a"}}, "malformed_turns"),
        ("verl", {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "malformed_turns"),
        ("verl", {"target": "text of a demonstration"}, None),
        ("verl", {"target": [QUESTION]}, "malformed_demonstration"),
        ("verl", {"target": [ANSWER, ANSWER]}, "malformed_demonstration"),
        ("verl", {"target": 3}, "malformed_demonstration"),
        ("verl", {"reward_model": "5"}, "malformed_answer"),
        ("verl", {"reward_model": {"ground_truth": True}}, "malformed_answer"),
        ("verl", {"reward_model": {"ground_truth": [None]}}, "malformed_answer"),
        ("verl", {"reward_model": {"ground_truth": float("nan")}}, "malformed_answer"),
        ("verl", {"reward_model": {"ground_truth": float("inf")}}, "malformed_answer"),  # what JSON makes of 1e400
        ("verl", {"reward_model": {"ground_truth": Decimal("sNaN")}}, "malformed_answer"),
        ("verl", {"reward_model": {"ground_truth": 10**5000}}, "malformed_answer"),  # Python refuses to write it
        ("verl", {"extra_info": 3}, "malformed_answer"),
        ("native", {"answer": {"x": nested(200)}}, "malformed_answer"),
        ("native", {"tools": [{"x": nested(200)}]}, "malformed_turns"),
        ("messages", {"messages": [{**QUESTION, "x": nested(200)}]}, "malformed_turns"),
        ("messages", {"messages": "text"}, "malformed_turns"),
        ("messages", {"messages": None}, "no_question"),
        ("messages", {"messages": [ANSWER]}, "malformed_turns"),
        ("messages", {"messages": [QUESTION, {"role": "assistant", "tool_calls": [1]}]}, "malformed_demonstration"),
        ("native", {"prompt": 3}, "malformed_turns"),
        ("native", {"tools": "{"}, "malformed_turns"),
        ("alpaca", {"instruction": 3}, "no_question"),
    ],
)
def test_importer_says_why_a_row_is_no_example(format, changes, reason):
    base = {"verl": verl_row(3), "messages": {}, "native": {"prompt": "a", "answer": "1"}, "alpaca": {"output": "5"}}
    found = FORMATS[format]({**base[format], **changes})
    if reason is None:
        assert isinstance(found, Example)
    else:
        assert found == reason
        assert reason in ROW_REASONS


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "ground_truth", "level"]), inner, max_size=3
        )
        | st.just(QUESTION)
        | st.just(ANSWER)
    ),
    max_leaves=8,
)
FIELDS = """prompt target reward_model extra_info completion answer solution messages tools demo level problem question
final_answer instruction input output""".split()


@settings(max_examples=400)
@given(st.sampled_from(sorted(FORMATS)), st.dictionaries(st.sampled_from(FIELDS), JSON))
@example("problem_answer", {"problem": [{"role": []}]})
def test_importer_never_raises_whatever_a_row_holds(format, row):
    found = FORMATS[format](row)
    if isinstance(found, str):
        assert found in ROW_REASONS
    else:
        json.dumps([found.messages, found.tools, dict(found.answer)])  # it travels to another process
        assert found.messages[-1]["content"].strip()
        assert isinstance(found.demonstration, str)


def test_importer_counts_say_what_was_dropped_and_where_it_was_first(tmp_path):
    rows = [verl_row(0), {"prompt": None, "reward_model": {}}, {**verl_row(2), "target": 3}, verl_row(3)]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(["{", *lines[:2], "", *lines[2:], lines[1]]))
    examples, (count,) = read_examples([str(tmp_path / "a.jsonl")], lambda row: choose_importer("auto", row))
    assert [example.answer["answer"] for example in examples] == ["2", "5"]
    assert dataclasses.asdict(count) == {
        "name": str(tmp_path / "a.jsonl"),
        "format": "verl",
        "rows": 6,
        "kept": 2,
        "dropped": {"not_json": 1, "no_question": 2, "malformed_demonstration": 1},
        "first": {"not_json": 1, "no_question": 3, "malformed_demonstration": 4},
    }


def test_importer_by_columns_looks_past_bad_rows_and_refuses_what_it_does_not_know(tmp_path):
    def read(*rows):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_examples([str(tmp_path / "a.jsonl")], lambda row: choose_importer("auto", row))

    examples, (count,) = read({}, {"prompt": "b"}, {"prompt": "a", "demo": "1"}, {"other": 1})
    assert (len(examples), count.format, count.dropped) == (2, "native", {"no_question": 2})
    with pytest.raises(ValueError, match=r"known format in '.*a\.jsonl'.*got \['a', 'b'\].*data\.format"):
        read({"a": 1}, {"b": 2})
    assert read([])[1][0].format is None  # one row, which is no record
    assert choose_importer("native", {"a": 1}) == ("native", importers.native)


# Identity


def test_canonical_text_joins_what_is_the_same_problem():
    assert canonical_text("What is\n 2+3? ") == canonical_text("what is 2+3?") == canonical_text("What is 2\uff0b3?")
    assert canonical_text("What is 2+3?") != canonical_text("What is 2+4?")


def test_content_ids_depend_on_what_rows_say_and_not_on_their_place():
    examples = [FORMATS["verl"](verl_row(i)) for i in range(200)]
    ids = content_ids(examples)
    assert len(set(ids)) == 200
    assert all(0 <= number < 2**31 for number in ids)
    order = list(range(200))
    random.Random(0).shuffle(order)
    assert content_ids([examples[i] for i in order]) == [ids[i] for i in order]
    assert content_ids(examples[50:60]) == ids[50:60]
    assert content_ids([examples[3], examples[3]]) == [ids[3], ids[3]]
    for change in ({"demonstration": "x"}, {"answer": {"answer": "x"}}, {"messages": (QUESTION,)}, {"prompt": "x"}):
        assert content_ids([dataclasses.replace(examples[3], **change)]) != [ids[3]]


def test_content_ids_that_collide_are_told_apart_in_any_order(monkeypatch):
    """With ids of 4 bits, 12 contents nearly always collide."""
    monkeypatch.setattr("hptjax.data.identity.ID_BITS", 4)
    examples = [FORMATS["verl"](verl_row(i)) for i in range(12)]
    ids = content_ids(examples)
    assert len(set(ids)) == 12
    assert max(ids) < 16
    assert content_ids(examples[::-1]) == ids[::-1]


def test_reasons_for_which_rows_are_left_out_stand_in_the_docs(repository):
    text = (repository / "docs" / "data.md").read_text()
    left_out = ["duplicate", "also_in_test", "also_in_validation", "outside_fractions", "over_limit"]
    assert [reason for reason in (*ROW_REASONS, *DROP_REASONS, *left_out) if reason not in text] == []
    assert [name for name in FORMATS if f"| {name} |" not in text] == []
