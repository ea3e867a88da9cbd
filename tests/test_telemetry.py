"""Telemetry and the run folder: nothing is lost, nothing stops training, and a folder has one config."""

from __future__ import annotations

import io
import json
import subprocess

import numpy as np
import pytest
from rich.console import Console

from hptjax import rundir
from hptjax.config import Config
from hptjax.train import telemetry
from hptjax.train.jsonl import open_jsonl, read_rows
from hptjax.train.telemetry import Sink, make_telemetry, progress_line, progress_sink, rollout_row
from tests.test_config import changed


@pytest.fixture
def console():
    """A console that writes into memory, as wide as a line may be."""
    return Console(file=io.StringIO(), width=200)


def test_telemetry_metrics_file_has_texts_and_nan_and_sinks_get_finite_numbers(tmp_path, console):
    written = []
    sink = Sink("memory", lambda step, metrics: written.append((step, dict(metrics))), lambda: None)
    with open_jsonl(tmp_path / "metrics.jsonl") as file:
        metrics = {"stage": "hpt", "a": np.float32(0.5), "b": float("nan"), "c": 3}
        make_telemetry(file.write, [sink], console=console).write(3, metrics)
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert row["time_s"] > 0
    assert (row["step"], row["stage"], row["a"], row["b"], row["c"], row["nonfinite"]) == (
        3,
        "hpt",
        0.5,
        None,
        3,
        ["b"],
    )
    ((step, scalars),) = written
    assert (step, scalars) == (3, {"a": 0.5, "c": 3.0})


def test_telemetry_failing_backend_is_named_once_and_left_out(console):
    rows, written = [], []

    def fail(step, metrics):
        raise RuntimeError("no [network]")

    bad = Sink("wandb", fail, lambda: rows.append("closed"))
    good = Sink("memory", lambda step, metrics: written.append(step), lambda: None)
    out = make_telemetry(rows.append, [bad, good], console=console)
    for step in range(3):
        out.write(step, {"x": 1.0})
    out.close()
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert written == [0, 1, 2]
    text = console.file.getvalue()
    assert text.count("wandb") == 1
    assert "RuntimeError: no [network]" in text


def test_telemetry_failing_close_does_not_stop_the_run(console):
    def fail():
        raise OSError("gone")

    closed = []
    sinks = [Sink("a", lambda *_: None, fail), Sink("b", lambda *_: None, lambda: closed.append("b"))]
    make_telemetry(lambda row: None, sinks, console=console).close()
    assert closed == ["b"]
    assert "gone" in console.file.getvalue()


def test_telemetry_failing_metrics_file_is_an_error(console):
    def full(row):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make_telemetry(full, console=console).write(0, {})


def test_telemetry_tensorboard_writes_events(tmp_path):
    sink = telemetry.tensorboard_sink(tmp_path, first_step=0)
    sink.write(2, {"critic/score/mean": 0.25})
    sink.close()
    (events,) = tmp_path.iterdir()
    assert b"critic/score/mean" in events.read_bytes()


def test_telemetry_wandb_that_is_not_installed_names_the_field(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ValueError, match=r"telemetry\.wandb"):
        telemetry.wandb_sink(tmp_path, name="x", config={})


def test_telemetry_line_is_short_and_ordered():
    metrics = {"perf/throughput": 5120.4, "critic/score/mean": 0.3124, "unknown": 3.0}
    assert progress_line(metrics, 190.0) == "eta 3:10  reward 0.312  tok/s 5,120"
    assert progress_line({}, 3723.0) == "eta 1:02:03"
    assert progress_line({}, float("nan")) == ""
    evaluated = {"validation/pass@1": 0.25, "validation/pass@1_low": 0.2, "validation/pass@16": 0.5, "test/pass@1": 0.9}
    assert progress_line(evaluated, float("nan")) == "validation pass@1 0.250  pass@16 0.500"


def test_telemetry_line_shows_shares_of_questions_and_the_stage_where_there_are_several():
    metrics = {"batch/solve_none": 6.0, "batch/solved": 2.0, "hpt/gate_sft_frac": 0.75, "train/stage": 1.0}
    assert progress_line(metrics, 5.0) == "eta 0:05  none 0.75  sft 0.75"
    assert progress_line(metrics, 5.0, stages=["sft", "grpo"]) == "eta 0:05  grpo 2/2  none 0.75  sft 0.75"


def test_telemetry_alarm_speaks_when_sampler_and_trainer_begin_to_disagree():
    rows, said = [], []
    write = telemetry.watch_sampler(lambda step, metrics: rows.append(step), said.append)
    for step, gap in enumerate([1e-5, 1e-4, 2e-4, 3e-4, 1e-5, float("nan"), None]):
        write(step, {} if gap is None else {"rollout/logp_diff_max": gap})
    assert rows == list(range(7))
    assert [text.split(" by ")[0].split("step ")[1].split()[0] for text in said] == ["2", "5"]
    assert "2.0e-04 nats, expected at most 1e-04" in said[0]


def test_telemetry_eta_counts_only_the_steps_of_this_process(console):
    times = iter([100.0, 110.0, 120.0])
    sink = progress_sink(20, first_step=10, log_every=2, console=console, clock=lambda: next(times))
    sink.write(11, {})  # one step in 10 s, 9 left: 90 s
    sink.write(12, {})  # two steps in 20 s, 8 left: 80 s
    sink.close()
    assert console.file.getvalue().split("\n")[0].split() == ["step", "12/20", "eta", "1:20"]


def test_telemetry_bar_on_a_terminal_shows_the_line():
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    sink = progress_sink(4, first_step=0, console=console)
    sink.write(1, {"critic/score/mean": 0.5})
    sink.write(1, {"validation/pass@1": 0.25})
    sink.close()
    assert "reward 0.500" in console.file.getvalue()
    assert "1/4" in console.file.getvalue()
    assert "step 1/4  eta" in console.file.getvalue()  # the evaluation's own line, which stays


def test_telemetry_rollouts_of_a_step_are_written_once(tmp_path):
    row = rollout_row(
        step=7,
        sample_id="1/0/2",
        prompt="3,4=7:",
        completion="3+4=7",
        reward=1.0,
        solved=True,
        reason="correct",
        objective="RL",
        group_solved=3,
        finish_reason="stop",
    )
    for _ in range(2):  # a step that a killed run repeats replaces its file
        path = telemetry.write_rollouts(tmp_path, 7, [row, row])
    assert path == tmp_path / "rollouts" / "000007.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 2
    assert {"completion", "reward", "reason", "gate", "group_solved"} <= lines[0].keys()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def config_in(tmp_path, **fields) -> Config:
    return changed(Config(), runs_dir=str(tmp_path / "runs"), model__tokenizer="t", **fields)


def test_rundir_records_config_and_versions(tmp_path):
    config = config_in(tmp_path)
    folder = rundir.open_run_folder(config)
    assert folder == tmp_path / "runs" / "quickstart"
    assert json.loads((folder / "config.json").read_text())["train"]["steps"] == 60
    (entry,) = json.loads((folder / "versions.json").read_text())
    assert {"jax", "optax"} <= entry["packages"].keys()
    assert entry["platform"]
    rundir.open_run_folder(config)  # again: the same environment is not noted twice
    assert len(json.loads((folder / "versions.json").read_text())) == 1


def test_rundir_refuses_a_changed_config_and_names_the_fields(tmp_path):
    folder = rundir.open_run_folder(config_in(tmp_path, train__steps=59))
    folder = rundir.open_run_folder(config_in(tmp_path))  # a start that came to nothing binds nobody
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    before = (folder / "config.json").read_bytes()
    with pytest.raises(ValueError) as caught:
        rundir.open_run_folder(config_in(tmp_path, train__steps=61, hpt__gate=1))
    for word in ["train.steps: 60 -> 61", "hpt.gate: 0 -> 1", "--name", str(folder)]:
        assert word in str(caught.value)
    assert (folder / "config.json").read_bytes() == before
    rundir.open_run_folder(config_in(tmp_path, telemetry__progress=False))


def test_rundir_is_held_by_one_at_a_time_and_let_go_of(tmp_path):
    """A second process in the folder would write over the first one's metrics and checkpoints."""
    folder = tmp_path / "runs" / "a"
    refused = pytest.raises(ValueError, match=r"another process is training in; .*--name")
    with rundir.held(folder), refused, rundir.held(folder):
        pass
    with rundir.held(folder):
        pass


def test_rundir_damaged_record_is_named(tmp_path):
    folder = rundir.open_run_folder(config_in(tmp_path))
    (folder / "config.json").write_text('{"name": ')
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(ValueError, match=r"expected JSON in .*config\.json"):
        rundir.open_run_folder(config_in(tmp_path))


def test_rundir_json_is_replaced_whole(tmp_path, monkeypatch):
    """A write that dies before the replacement leaves the old file."""
    path = tmp_path / "x.json"
    rundir.write_json(path, {"a": 1})
    monkeypatch.setattr(rundir.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        rundir.write_json(path, {"a": 2})
    assert rundir.read_json(path) == {"a": 1}


def test_rundir_git_state_of_a_checkout_and_of_none(tmp_path):
    assert rundir.git_state(tmp_path) is None

    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("-c", "user.name=n", "-c", "user.email=e@example.org", "commit", "-q", "-m", "first")
    state = rundir.git_state(tmp_path.resolve())
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert rundir.git_state(tmp_path.resolve())["dirty"] is True


def test_rundir_compile_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    assert rundir.compile_cache_folder() == tmp_path
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert rundir.compile_cache_folder() == tmp_path / "hptjax" / "jax"
