"""Where the time went: phases that add up to the step, a table by hand numbers, a trace that other tools open."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from hptjax.build.profile import time_table
from hptjax.train.jsonl import read_rows
from tests import tiny
from tests.test_config import changed


def test_time_table_has_hand_numbers():
    rows = [{"step": 0, "validation/pass@1": 0.5}]
    for step, rollout, update in ((1, 90.0, 9.0), (2, 1.0, 3.0), (3, 3.0, 5.0)):
        rows.append({"perf/time_per_step": rollout + update, "timing_s/rollout": rollout, "timing_s/update": update})
        rows[-1]["step"] = step
    rows.append({"perf/time_per_step": 4.0, "timing_s/update": 4.0, "timing_s/checkpoint": 4.0})
    lines = [line.split() for line in time_table(rows).splitlines()[1:]]
    assert lines == [
        ["update", "4.000", "3.000", "5.000", "60.0%"],
        ["rollout", "1.000", "0.000", "3.000", "20.0%"],
        ["checkpoint", "0.000", "0.000", "4.000", "20.0%"],
    ]
    assert time_table(rows[:2]).startswith("no step after the first")


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 4])
def test_profiled_run_leaves_a_trace_with_its_phases(tmp_path, capsys, steps):
    config = changed(tiny.tiny_config(tmp_path), train__steps=steps, checkpoint__every_steps=1, train__eval_every=0)
    with tiny.hashed():
        from hptjax.build import train

        folder = Path(train(config, quiet=True, profile=True)["folder"])
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "perf/time_per_step" in row]
    for row in rows:
        phases = sum(value for name, value in row.items() if name.startswith("timing_s/"))
        assert row["perf/time_per_step"] == pytest.approx(phases)
    assert all("timing_s/checkpoint" in row for row in rows[1:])
    assert "update " in capsys.readouterr().out
    (trace,) = (folder / "profile").rglob("perfetto_trace.json.gz")
    assert list((folder / "profile").rglob("*.xplane.pb"))
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert {"rollout", "reward", "assemble", "update"} <= names
