"""`hptjax data check`: its counts against a count by hand, its statuses, and every kind of fault it is to find."""

from __future__ import annotations

import json

import pytest

from hptjax import cli
from hptjax.build.data_check import quantiles
from hptjax.data.tokenizer import load_tokenizer
from tests.chat_templates import BAD, CHAT, byte_tokenizer
from tests.test_bad_input import config_file
from tests.test_files import HELD_OUT, ROWS, SAME_PROBLEMS, on_files, write_rows


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    byte_tokenizer(tmp_path / "bytes", CHAT)
    return tmp_path


def checked(folder, *arguments):
    """(status, report) of the command."""
    status = cli.run(["data", "check", *arguments, "--json", "report.json"])
    return status, json.loads((folder / "report.json").read_text())


TOKENIZER = ("--model.tokenizer", "bytes", "--rollout.stop_ids", "4")


def test_data_check_counts_what_a_count_by_hand_finds(folder, capsys):
    wrong = {**ROWS[7], "demo": "1+1=2"}
    long = {**ROWS[8], "prompt": "please " * 1000}
    write_rows(folder / "a.jsonl", [*ROWS, *ROWS[:3], *SAME_PROBLEMS, {"prompt": ""}, wrong, long])
    status, report = checked(folder, "a.jsonl", *TOKENIZER, "--reward.functions", '[{name = "countdown"}]')
    assert status == 0
    (file,) = report["files"]
    assert (file["rows"], file["kept"], file["dropped"], file["first"]) == (
        68,
        67,
        {"no_question": 1},
        {"no_question": 66},
    )
    train = report["splits"]["train"]
    assert (train["examples"], train["left_out"]) == (64, {"duplicate": 3})
    assert report["repeated_problems"] == 3  # two of SAME_PROBLEMS and `wrong`; `long` is a problem of its own
    assert train["dropped"] == {"prompt_too_long": 1, "demonstration_unverified": 2}
    assert train["kept"] == 64 - 3
    assert (train["demonstrations"]["judged"], train["demonstrations"]["unverified"]) == (63, 2)
    ends = {first["ends"] for first in train["demonstrations"]["first"]}
    assert ends == {"1+1=2", SAME_PROBLEMS[0]["demo"]}  # the second ends with a space
    tokenizer = load_tokenizer(folder / "bytes")
    sizes = sorted(len(tokenizer.encode(row["demo"])) + 1 for row in [*ROWS, *SAME_PROBLEMS, wrong, long])
    assert train["tokens"]["demonstration"]["min"] == sizes[0]
    assert train["tokens"]["demonstration"]["max"] == sizes[-1]
    assert train["tokens"]["demonstration"]["50%"] == sizes[31]
    assert train["tokens"]["prompt"]["max"] > 1024
    assert report["shown"]["demonstration"].endswith("[end]")
    text = capsys.readouterr()
    assert "68 rows as native, 67 kept; dropped: 1 no_question (first: row 66)" in text.out
    assert "63 judged, 2 do not verify" in text.out
    assert "encoding 64 examples" in text.err


def test_data_check_quantiles_by_hand():
    assert quantiles([3, 1, 2, 4]) == {"min": 1, "50%": 2, "90%": 4, "99%": 4, "max": 4}
    assert quantiles(range(1, 101)) == {"min": 1, "50%": 50, "90%": 90, "99%": 99, "max": 100}
    assert quantiles([]) is None


def test_data_check_of_a_config_is_split_as_its_run(folder, capsys):
    held_out = {
        "data__test_files": (write_rows(folder / "test.jsonl", [*HELD_OUT[:9], ROWS[4]]),),
        "data__validation_files": (write_rows(folder / "validation.jsonl", HELD_OUT[9:]),),
    }
    config = on_files(folder, **held_out)
    status, report = checked(folder, config_file(config, folder / "run.toml"))
    assert status == 0
    assert {name: split["kept"] for name, split in report["splits"].items()} == {
        "train": 59,
        "validation": 6,
        "test": 6,
    }
    assert report["splits"]["train"]["left_out"]["also_in_test"] == 1
    assert report["splits"]["test"]["left_out"]["over_limit"] == 4
    assert "1 also in test" in capsys.readouterr().out


def test_data_check_of_questions_alone_asks_for_no_demonstration(folder):
    write_rows(folder / "a.jsonl", [{"problem": row["prompt"], "answer": "5"} for row in ROWS])
    status, report = checked(folder, "a.jsonl", *TOKENIZER)
    assert (status, report["splits"]["train"]["kept"]) == (0, 60)
    assert report["splits"]["train"]["tokens"]["demonstration"] is None


def test_data_check_without_a_tokenizer_counts_rows_only(folder, capsys):
    write_rows(folder / "a.jsonl", ROWS)
    status, report = checked(folder, "a.jsonl")
    assert (status, report["splits"]["train"]) == (0, {"examples": 60, "left_out": {"duplicate": 0}})
    assert "no tokenizer was named" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["no generation prompt", "no prefix property", "raises"])  # test_chat.py has all
def test_data_check_finds_what_is_wrong_with_a_template(folder, capsys, name):
    template, words = BAD[name]
    byte_tokenizer(folder / "bytes", template)
    write_rows(folder / "a.jsonl", ROWS)
    status, report = checked(folder, "a.jsonl", *TOKENIZER)
    assert status == 2
    assert all(word in report["problems"][0] for word in words)
    assert f"problem: {report['problems'][0]}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "absent.jsonl"], ["found no 'absent.jsonl'"]),
        (["check", "b.jsonl"], ["known format in 'b.jsonl'"]),
        (["check"], ["expected data files", "got []"]),
        (["look", "a.jsonl"], ["hptjax data check FILE"]),
        (["check", "run.toml"], ["expected data.files in run.toml"]),
        (["check", "a.jsonl", "--data.max_prompt_tokens", "0"], ["data.max_prompt_tokens at least 1", "got 0"]),
        (["check", "a.jsonl", "--prompt.date", "today"], ["prompt.date as a day", "'today'"]),
        (["check", "a.jsonl", "--prompt.plain", "Solve:"], ["prompt.plain to hold {question}"]),
        (["check", "a.jsonl", "--reward.deadline_s", "nan"], ["finite reward.deadline_s"]),
    ],
)
def test_data_check_of_what_no_run_could_use_ends_with_status_2(folder, capsys, arguments, words):
    write_rows(folder / "b.jsonl", [{"a": 1}])
    (folder / "run.toml").write_text('[model]\ntokenizer = "bytes"\n')
    assert cli.run(["data", *arguments]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("hptjax data: expected")
    assert all(word in told for word in words)


def test_data_check_where_nothing_is_left_ends_with_status_2(folder):
    write_rows(folder / "a.jsonl", [{**row, "demo": "1+1=2"} for row in ROWS])
    status, report = checked(folder, "a.jsonl", *TOKENIZER)
    assert status == 2
    assert report["problems"] == ["no question of the train split is left: {'demonstration_unverified': 60}"]


def test_data_check_of_conversations_alone_asks_for_no_answer(folder):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    write_rows(folder / "a.jsonl", [{"messages": turns}])
    status, report = checked(folder, "a.jsonl", *TOKENIZER)
    assert (status, report["splits"]["train"]["kept"]) == (0, 1)
    assert report["splits"]["train"]["demonstrations"]["judged"] == 0
