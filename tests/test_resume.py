"""A run stopped anywhere and started again ends with the same bits, the same metrics and the same ledger."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import hptjax.build.run as build_run
import hptjax.train.loop as loop
from hptjax.build.parts import fingerprint, open_parts
from hptjax.build.stages import build_stages
from hptjax.train.checkpoint import open_checkpoints
from tests import child, tiny

CLOCKS = ("time", "timing_s/", "perf/", "timing_per_token_ms/")  # metrics that measure the machine


class Killed(BaseException):
    """Stands for `kill -9` inside one process: nothing of the product catches it."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The config of the tiny off-policy run: every run below is the same program."""
    config = tiny.as_off_policy(tiny.tiny_config(tmp_path_factory.mktemp("shared")))
    with tiny.shared_programs(config):
        yield config


@functools.cache
def final_state(config):
    """Parameters, moments and sums of the last checkpoint, as NumPy: read once per finished run."""
    with open_parts(config) as parts:
        stages = build_stages(config, parts.policy, parts.questions.train)
        folder = Path(config.runs_dir) / config.name / "checkpoints"
        with open_checkpoints(folder, keep_last=2, keep_best=1, fingerprint=fingerprint(parts)) as saved:
            restored = saved.restore_latest(lambda host: stages[-1].start({"policy": parts.policy.params}, None))
    return [np.asarray(leaf) for leaf in jax.tree.leaves((restored.state.params, restored.state.chains))]


def rows(config, name):
    """The rows of a file without what depends on the clock."""
    path = Path(config.runs_dir) / config.name / name
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(CLOCKS)} for row in entries]


def same_run(left, right):
    """Asserts that two finished runs are one and the same."""
    assert all(map(np.array_equal, final_state(left), final_state(right)))
    for name in ("metrics.jsonl", "ledger.jsonl", "panel.jsonl"):
        assert rows(left, name) == rows(right, name), name


@pytest.fixture(scope="module")
def uninterrupted(shared):
    build_run.train(shared, quiet=True)
    return shared


@pytest.mark.slow
def test_resume_metrics_have_no_gaps_or_repeats(uninterrupted):
    steps = [row["step"] for row in rows(uninterrupted, "metrics.jsonl") if "witness/ok" in row]
    assert steps == [1, 2, 3, 4]
    evaluated = [row["step"] for row in rows(uninterrupted, "metrics.jsonl") if "validation/pass@1" in row]
    assert evaluated == [0, 2, 4]
    ledger = rows(uninterrupted, "ledger.jsonl")
    assert [(row["step"], row["update"]) for row in ledger] == [(s, u) for s in steps for u in (0, 1)]
    assert [row["optimizer_step"] for row in ledger] == list(range(1, 9))
    shares = {row["hpt/gate_sft_frac"] for row in rows(uninterrupted, "metrics.jsonl") if "witness/ok" in row}
    assert len(shares) > 1  # both objectives occur, or this test proves little


def rollout_killer(countdown):
    """Kills after rollouts have been finished so many times."""

    def wrap(sample):
        def sample_then_die(params, requests, **options):
            inner = options["on_finished"]

            def on_finished(samples):
                inner(samples)
                countdown[0] -= 1
                if countdown[0] == 0:
                    raise Killed

            return sample(params, requests, **options | {"on_finished": on_finished})

        return sample_then_die

    return wrap


def micro_killer(countdown):
    """Kills before the n-th micro-batch."""

    def wrap(micro_step):
        def step_or_die(*arguments):
            countdown[0] -= 1
            if countdown[0] == 0:
                raise Killed
            return micro_step(*arguments)

        return step_or_die

    return wrap


def save_killer(countdown):
    """Kills after the n-th save was started: its background write may or may not be committed."""

    def wrap(save):
        def save_then_die(*arguments, **options):
            save(*arguments, **options)
            countdown[0] -= 1
            if countdown[0] == 0:
                raise Killed

        return save_then_die

    return wrap


@pytest.mark.parametrize(
    ("place", "count"),
    [("rollout", 5), pytest.param("micro", 3, marks=pytest.mark.slow), ("micro", 9), ("save", 2)],
)
def test_resume_after_death_is_bitwise(uninterrupted, tmp_path, monkeypatch, place, count):
    config = dataclasses.replace(uninterrupted, runs_dir=str(tmp_path / "runs"))
    countdown = [count]
    original = loop.run

    def dying_run(stages, state, progress, world, cadence):
        if place == "rollout":
            world = dataclasses.replace(world, sample=rollout_killer(countdown)(world.sample))
        if place == "micro":
            stages = [dataclasses.replace(s, micro_step=micro_killer(countdown)(s.micro_step)) for s in stages]
        if place == "save":
            world = dataclasses.replace(world, save=save_killer(countdown)(world.save))
        return original(stages, state, progress, world, cadence)

    monkeypatch.setattr("hptjax.build.run.run", dying_run)
    with pytest.raises(Killed):
        build_run.train(config, quiet=True)
    monkeypatch.setattr("hptjax.build.run.run", original)
    build_run.train(config, quiet=True)
    same_run(uninterrupted, config)


@pytest.mark.parametrize("asked", [1, 9, 23, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 14, 37))])
def test_resume_after_a_clean_stop_keeps_samples_and_open_sums(uninterrupted, tmp_path, monkeypatch, asked):
    """SIGTERM at the n-th place where the loop asks: saved there, taken up there, nothing sampled or added twice."""
    config = dataclasses.replace(uninterrupted, runs_dir=str(tmp_path / "runs"))
    original = loop.run
    questions_asked = [0]

    def stopping_run(stages, state, progress, world, cadence):
        def should_stop():
            questions_asked[0] += 1
            return questions_asked[0] == asked

        return original(stages, state, progress, dataclasses.replace(world, should_stop=should_stop), cadence)

    monkeypatch.setattr("hptjax.build.run.run", stopping_run)
    with pytest.raises(SystemExit) as stopped:
        build_run.train(config, quiet=True)
    assert stopped.value.code == 0
    monkeypatch.setattr("hptjax.build.run.run", original)
    build_run.train(config, quiet=True)
    same_run(uninterrupted, config)


@pytest.mark.parametrize("added", [1, 4, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 5, 6, 7, 8, 9, 10))])
def test_t17_resume_between_micro_batches_keeps_the_open_sums(uninterrupted, tmp_path, monkeypatch, added):
    """SIGTERM after n micro-batches or more, inside an open window: none of it is lost or added twice."""
    config = dataclasses.replace(uninterrupted, runs_dir=str(tmp_path / "runs"))
    original = loop.run
    count = [0]
    open_windows = []

    def stopping_run(stages, state, progress, world, cadence):
        def counted(micro_step):
            def step(*arguments):
                count[0] += 1
                return micro_step(*arguments)

            return step

        def should_stop():
            inside = progress.open_step is not None and progress.open_step.micro_index > 0
            if count[0] < added or not inside or open_windows:
                return False
            open_windows.append(progress.open_step.micro_index)
            return True

        return original(
            [dataclasses.replace(stage, micro_step=counted(stage.micro_step)) for stage in stages],
            state,
            progress,
            dataclasses.replace(world, should_stop=should_stop),
            cadence,
        )

    monkeypatch.setattr("hptjax.build.run.run", stopping_run)
    with pytest.raises(SystemExit):
        build_run.train(config, quiet=True)
    assert open_windows  # the stop fell inside a window, not between two
    monkeypatch.setattr("hptjax.build.run.run", original)
    build_run.train(config, quiet=True)
    same_run(uninterrupted, config)


def start(folder: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.tiny", str(folder), *words],
        cwd=Path(__file__).resolve().parent.parent,
        env=child.with_devices(1),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(folder: Path, *words: str) -> None:
    process = start(folder, *words)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()[-2000:]


def wait_for_training(process: subprocess.Popen, folder: Path) -> None:
    """Returns when the evaluation before the first step is written: from here on there is something to lose."""
    metrics = folder / "runs" / "tiny" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None, "the run ended before its first row"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole_process(tmp_path_factory):
    """A run that nobody kills (the second one, so that its programs are cached), and the seconds that it trains."""
    finish(tmp_path_factory.mktemp("compile"))
    folder = tmp_path_factory.mktemp("process")
    process = start(folder)
    wait_for_training(process, folder)
    began = time.monotonic()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()[-2000:]
    return tiny.killed_config(folder), time.monotonic() - began


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
def test_resume_after_kill_9_is_bitwise(whole_process, tmp_path, seed):
    """Killed at a random time between the first evaluation and the end: rollouts, micro-batches, saves, evaluations."""
    whole, seconds = whole_process
    process = start(tmp_path)
    wait_for_training(process, tmp_path)
    time.sleep(random.Random(seed).uniform(0.0, 0.9) * seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().count("witness/ok")
    print(f"killed by {-process.returncode} after {kept} of 12 steps")
    finish(tmp_path)
    same_run(whole, tiny.killed_config(tmp_path))


def test_resume_refuses_a_changed_config_and_names_the_fields(uninterrupted):
    changed = dataclasses.replace(uninterrupted, hpt=dataclasses.replace(uninterrupted.hpt, gate=1))
    with pytest.raises(ValueError, match=r"hpt\.gate: 0 -> 1"):
        build_run.train(changed, quiet=True)


def test_resume_of_a_finished_run_gives_its_summary(uninterrupted):
    before = (Path(uninterrupted.runs_dir) / "tiny" / "summary.json").read_text()
    assert build_run.train(uninterrupted, quiet=True) == json.loads(before)


def test_resume_of_a_finished_run_with_more_steps_is_the_longer_run(shared, tmp_path):
    """train.steps 2 and then 4 ends with the parameters of 4, where no schedule depends on the number of steps."""
    longer = dataclasses.replace(shared, runs_dir=str(tmp_path / "runs"))
    shorter = dataclasses.replace(longer, train=dataclasses.replace(longer.train, steps=2))
    with pytest.MonkeyPatch.context() as patch:
        build = build_run.build_stages
        patch.setattr(
            build_run,
            "build_stages",
            lambda config, *rest: [dataclasses.replace(s, steps=config.train.steps) for s in build(config, *rest)],
        )
        assert build_run.train(shorter, quiet=True)["steps"] == 2
        assert build_run.train(longer, quiet=True)["steps"] == 4
        with pytest.raises(ValueError, match=r"train\.steps: 4 -> 2"):
            build_run.train(shorter, quiet=True)
    assert all(map(np.array_equal, final_state(longer), final_state(shared)))
    assert [row["step"] for row in rows(longer, "metrics.jsonl") if "witness/ok" in row] == [1, 2, 3, 4]


def test_resume_refuses_other_base_weights(tmp_path):
    """The same shapes with other numbers are another model: a checkpoint knows which it started from."""
    from hptjax.build.parts import files_digest

    (tmp_path / "model.safetensors").write_bytes(b"a" * 3_000_000)
    before = files_digest(tmp_path, "*.safetensors")
    assert files_digest(tmp_path, "*.safetensors") == before
    (tmp_path / "model.safetensors").write_bytes(b"a" * 2_999_999 + b"b")
    assert files_digest(tmp_path, "*.safetensors") != before
