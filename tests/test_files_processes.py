"""Two processes that train on data files read the same questions, or say that they do not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hptjax.config import DistributedConfig, MeshConfig
from tests import tiny
from tests.child import with_devices
from tests.test_bad_input import config_file
from tests.test_files import HELD_OUT, ROWS, on_files, write_rows
from tests.test_multihost import REPOSITORY, free_port, rows, same_numbers

pytestmark = pytest.mark.slow


def pair(folder, files, **changes):
    """(statuses, last words) of two processes, each of which finds its own `train.jsonl`."""
    port, processes = free_port(), []
    for index, lines in enumerate(files):
        here = folder / f"process_{index}"
        here.mkdir()
        write_rows(here / "train.jsonl", lines)
        joined = DistributedConfig(
            mode="explicit", coordinator=f"localhost:{port}", processes=2, process=index, timeout_s=120.0
        )
        config = on_files(folder, data__files=("train.jsonl",), mesh=MeshConfig(data=2), distributed=joined, **changes)
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "hptjax.cli", "train", config_file(config, here / "run.toml")],
                cwd=here,
                env=with_devices(1) | {"PYTHONPATH": str(REPOSITORY)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    words = [process.communicate(timeout=300)[1] for process in processes]
    return [process.returncode for process in processes], words


def test_two_processes_train_on_files_as_one_does(tmp_path, monkeypatch):
    """Their rows stand in different orders."""
    statuses, words = pair(tmp_path, [ROWS, ROWS[::-1]], name="pair")
    assert statuses == [0, 0], words
    (tmp_path / "alone").mkdir()
    monkeypatch.chdir(tmp_path / "alone")
    write_rows(Path("train.jsonl"), ROWS)
    config = on_files(tmp_path, data__files=("train.jsonl",), mesh=MeshConfig(devices=1), name="alone")
    tiny.build_run.train(config, quiet=True)
    same_numbers(rows(tmp_path, "pair", "ledger.jsonl"), rows(tmp_path, "alone", "ledger.jsonl"))
    records = [json.loads((tmp_path / "runs" / name / "data.json").read_text()) for name in ("pair", "alone")]
    assert records[0] == records[1]


def test_two_processes_that_read_other_rows_are_refused(tmp_path):
    statuses, words = pair(tmp_path, [ROWS, [*ROWS[:-1], HELD_OUT[0]]], name="pair")
    assert all(statuses)
    assert all("expected the questions to be the same in every process" in said for said in words), words
