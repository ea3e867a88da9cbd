"""Rows written once each, whatever kills the writer; NaN recorded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from hptjax.train.jsonl import encode_row, keep_rows, open_jsonl, read_rows, truncate_after


def write(path, steps, **fields):
    with open_jsonl(path) as writer:
        for step in steps:
            writer.write({"step": step, **fields})


def steps_of(path):
    return [row["step"] for row in read_rows(path)]


def test_jsonl_writes_one_object_per_line_and_flushes_each(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    with open_jsonl(path) as writer:
        writer.write({"step": 0, "text": "two\nlines\u2028é", "loss": np.float32(0.5), "hist": np.arange(3)})
        assert read_rows(path) == [
            {"step": 0, "text": "two\nlines\u2028é", "loss": 0.5, "hist": [0, 1, 2]}
        ]  # not closed
        writer.write({"step": np.int64(1), "ok": np.True_})
    write(path, [2])
    assert path.read_bytes().count(b"\n") == 3
    assert steps_of(path) == [0, 1, 2]


def test_jsonl_records_nan_as_null_with_its_name():
    row = {"step": 3, "a": float("nan"), "b": {"c": [1.0, np.inf], "d": np.array([[np.nan, 2.0]])}, "e": 1.5}
    assert json.loads(encode_row(row)) == {
        "step": 3,
        "a": None,
        "b": {"c": [1.0, None], "d": [[None, 2.0]]},
        "e": 1.5,
        "nonfinite": ["a", "b.c[1]", "b.d[0][0]"],
    }
    named = json.loads(encode_row({"step": 3, "a": None, "b": np.nan, "nonfinite": ["a"]}))
    assert named == {"step": 3, "a": None, "b": None, "nonfinite": ["a", "b"]}
    assert "nonfinite" not in json.loads(encode_row({"step": 3, "a": 0.0}))


def test_jsonl_floats_survive_to_the_bit():
    value = 0.1 + 0.2
    assert json.loads(encode_row({"step": 0, "v": value}))["v"] == value


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"loss": 1.0}, "an integer 'step', got None"),
        ({"step": True}, "an integer 'step', got True"),
        ({"step": 1, "nonfinite": True}, "'nonfinite' to be a list of names, got True"),
        ({"step": 1, "a": {"b": {1, 2}}}, r"'a\.b': expected a JSON value, got set"),
        ({"step": 1, "a": {2: 1}}, "'a': expected string keys, got 2"),
    ],
)
def test_jsonl_refuses_what_is_not_json(row, message):
    with pytest.raises(ValueError, match=message):
        encode_row(row)


def test_truncate_after_drops_later_rows_and_keeps_the_bytes_of_the_rest(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step":0,  "a":1}\n{"step":1}\n{"step":1,"update":1}\n{"step":2}\n{"step":3}\n')
    assert truncate_after(path, 1) == 2
    assert path.read_bytes() == b'{"step":0,  "a":1}\n{"step":1}\n{"step":1,"update":1}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]
    assert truncate_after(path, 1) == 0
    assert truncate_after(tmp_path / "absent.jsonl", 1) == 0
    assert truncate_after(path, -1) == 3
    assert path.read_bytes() == b""


def test_keep_rows_takes_any_rule(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with open_jsonl(path) as writer:
        for step in range(3):
            for update in range(2):
                writer.write({"step": step, "update": update})
    assert keep_rows(path, lambda row: (row["step"], row["update"]) <= (1, 0)) == 3
    assert [(row["step"], row["update"]) for row in read_rows(path)] == [(0, 0), (0, 1), (1, 0)]


@pytest.mark.parametrize("cut", range(1, len(b'{"step": 2, "loss": 0.25}\n') + 1))
def test_jsonl_every_half_written_last_line_is_repaired(tmp_path, cut):
    path = tmp_path / "m.jsonl"
    write(path, range(3), loss=0.25)
    path.write_bytes(path.read_bytes()[:-cut])
    if cut < len(b'{"step": 2, "loss": 0.25}\n'):
        with pytest.raises(ValueError, match="half-written"):
            open_jsonl(path)
    truncate_after(path, 2)
    # only the line feed is missing: the row is whole and stays
    assert steps_of(path) == ([0, 1, 2] if cut == 1 else [0, 1])
    write(path, range(3 if cut == 1 else 2, 5), loss=0.25)
    assert steps_of(path) == [0, 1, 2, 3, 4]


def test_jsonl_damage_before_the_last_line_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 0}\n{"ste\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2: expected a JSON object"):
        truncate_after(path, 5)
    assert path.read_bytes() == b'{"step": 0}\n{"ste\n{"step": 2}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]
    path.write_bytes(b'{"step": 0}\n{"a": 1}\n')
    with pytest.raises(ValueError, match="line 2: expected a JSON object with a 'step'"):
        read_rows(path)


WRITE_UNTIL_KILLED = """
import itertools, sys
from hptjax.train.jsonl import open_jsonl
with open_jsonl(sys.argv[1]) as writer:
    for step in itertools.count(int(sys.argv[2])):
        writer.write({"step": step, "pad": "x" * (step % 7000)})
        if step % 50 == 49:
            print(step, flush=True)
"""


def test_jsonl_killed_and_resumed_has_no_gaps_or_repeats(tmp_path):
    path = tmp_path / "m.jsonl"
    start = 0
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", WRITE_UNTIL_KILLED, str(path), str(start)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ,
        ) as process:
            assert process.stdout is not None
            flushed = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
        assert steps_of(path)[-1] >= flushed  # a flushed row survives the kill
        start = flushed - 10  # the checkpoint is older than the last row
        truncate_after(path, start - 1)
    write(path, [start])
    assert steps_of(path) == list(range(start + 1))
