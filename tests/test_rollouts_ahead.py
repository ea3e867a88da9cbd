"""Rollouts of the next step beside this one: the schedule by hand, bitwise replay, what is refused, and mutants."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import signal
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hptjax.build.run as build_run
import hptjax.train.loop as loop
from hptjax.build.adapters import Frozen
from hptjax.build.method import build_recipe
from hptjax.build.parts import TRAIN_KEY
from hptjax.build.world import _flags, _keeper
from hptjax.config import StageConfig, changed_fields, resolved
from hptjax.config_check import check
from hptjax.config_server import ServerCall, ServerConfig
from hptjax.data.stream import QuestionStream
from hptjax.errors import SamplingFailed
from hptjax.losses.view import TokenView
from hptjax.sharding.host import to_host
from hptjax.sharding.mesh import put_micro_batch
from hptjax.train.open_step import OpenStep
from hptjax.train.phases import assemble_updates, gate_step, judge_rollouts, roll_out, varied_questions
from hptjax.train.second_look import filled
from hptjax.train.stage import Progress, progress_from_host, progress_to_host
from hptjax.train.telemetry import watch_sampler
from tests import tiny
from tests.test_config import VALID, changed
from tests.test_resume import Killed, final_state, finish, micro_killer, rows, same_run, save_killer, start
from tests.test_resume import wait_for_training as wait_for_first_row


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """(config, parts, stages) of the tiny run with two updates per step and rollouts ahead."""
    config = tiny.with_rollouts_ahead(tiny.as_off_policy(tiny.tiny_config(tmp_path_factory.mktemp("ahead"))))
    config = changed(config, eval__train_questions=0)
    with tiny.shared_programs(config) as (parts, stages):
        yield config, parts, stages


@pytest.fixture(scope="module")
def uninterrupted(shared):
    build_run.train(shared[0], quiet=True)
    return shared[0]


def simulated(parts, stage, steps, *, age):
    """The run by hand, one thing after the other: step n samples by the weights before step max(n - age, 0).

    The parameters at the end, and the digest and the norm of every update.
    """
    stream = QuestionStream(parts.questions.train, questions_per_step=6, seed=0)
    key = jax.random.fold_in(parts.key, TRAIN_KEY)
    judge = tiny.hash_judge(parts.config, None, parts.policy.tokenizer, None)
    state, weights, seen = stage.start({"policy": parts.policy.params}, None), [], []
    flag = _flags(parts.policy.mesh)
    for number in range(steps):
        weights.append(to_host(state.params["policy"]))
        batch = stream.next_batch()
        step = OpenStep(step=number, round=batch.round, questions=list(batch.questions))
        assert roll_out(
            step,
            jax.device_put(weights[max(number - age, 0)], parts.policy.shardings),
            plan=stage.plan,
            stage_step=number,
            sample=lambda params, requests, **options: parts.policy.sample(params, requests, key, **options),
            should_stop=lambda: False,
        )
        judge_rollouts(step, judge)
        updates = assemble_updates(
            gate_step(step, route=stage.route), updates=2, mask_overlong=False, assemble=stage.assemble
        )
        placed = [[put_micro_batch(parts.policy.mesh, m) for m in update.micro_batches] for update in updates]
        scored = [[filled(m, stage.score(state.params, m)) for m in part] for part in placed]
        for part in scored:
            for place, micro_batch in enumerate(part):
                state = stage.micro_step(state, micro_batch, flag(place == len(part) - 1))
            report = to_host(state.report)
            seen.append((report.digest.tolist(), float(report.grad_norm["policy"])))
    return jax.tree.leaves(to_host(state.params)), seen


def test_ahead_is_the_schedule_by_hand_to_the_bit(uninterrupted, shared):
    """Step 1 by its own weights, each later one by those before the step before; with fresh ones it is another run."""
    _, parts, stages = shared
    parameters, updates = simulated(parts, stages[-1], 4, age=1)
    found = final_state(uninterrupted)[: len(parameters)]
    assert all(map(np.array_equal, parameters, found))
    ledger = rows(uninterrupted, "ledger.jsonl")
    assert [(row["digest"], row["grad_norm"]["policy"]) for row in ledger] == updates
    fresh, _ = simulated(parts, stages[-1], 2, age=0)
    stale, _ = simulated(parts, stages[-1], 2, age=1)
    assert not all(map(np.array_equal, fresh, stale))


def test_ahead_says_how_old_its_samples_are(uninterrupted):
    steps = [row for row in rows(uninterrupted, "metrics.jsonl") if "witness/ok" in row]
    assert [row["rollout/staleness"] for row in steps] == [0, 1, 1, 1]
    assert [row["rollout/staleness_updates"] for row in steps] == [0, 2, 2, 2]
    gaps = [row["rollout/logp_diff_max"] for row in steps]
    assert gaps[0] <= 1e-4 < min(gaps[1:])  # the trainer's weights have moved, and the weights correct for that
    assert all(row["witness/ok"] == 1 for row in steps)


def test_ahead_seconds_add_up_without_what_was_hidden(uninterrupted):
    path = Path(uninterrupted.runs_dir) / uninterrupted.name / "metrics.jsonl"
    steps = [row for row in map(json.loads, path.read_text().splitlines()) if "witness/ok" in row]
    for row in steps:
        phases = sum(value for name, value in row.items() if name.startswith("timing_s/"))
        assert row["perf/time_per_step"] == pytest.approx(phases)
    assert ["perf/rollout_ahead_s" in row for row in steps] == [False, True, True, True]
    assert all(row.get("perf/rollout_ahead_s", 0.0) >= 0.0 for row in steps)


def run_with(monkeypatch, config, *, stages=lambda stage: stage, world=lambda world, progress: world):
    """`train` with the stages and the world that these make of its own."""
    original = loop.run

    def other_run(given, state, progress, around, cadence):
        return original(list(map(stages, given)), state, progress, world(around, progress), cadence)

    monkeypatch.setattr("hptjax.build.run.run", other_run)
    try:
        build_run.train(config, quiet=True)
    finally:
        monkeypatch.setattr("hptjax.build.run.run", original)
        assert not [thread for thread in threading.enumerate() if thread.name == "hptjax-rollouts"]


def beside(act):
    """A world whose sampler acts (number of samples finished in the thread so far) each time some are finished."""
    count = [0]

    def wrap(world, progress):
        def sample(params, requests, **options):
            def on_finished(samples):
                options["on_finished"](samples)
                if threading.current_thread() is not threading.main_thread():
                    count[0] += 1
                    act(count[0])

            return world.sample(params, requests, **options | {"on_finished": on_finished})

        return dataclasses.replace(world, sample=sample)

    return wrap


@pytest.mark.slow
@pytest.mark.parametrize("slow", ["training", "rollouts"])
def test_ahead_does_not_depend_on_which_thread_is_slower(uninterrupted, tmp_path, monkeypatch, slow):
    config = changed(uninterrupted, runs_dir=str(tmp_path / "runs"))

    def sleepy(stage):
        def micro_step(*arguments):
            time.sleep(0.05)
            return stage.micro_step(*arguments)

        return dataclasses.replace(stage, micro_step=micro_step) if slow == "training" else stage

    waits = beside(lambda count: time.sleep(0.05 if slow == "rollouts" else 0.0))
    run_with(monkeypatch, config, stages=sleepy, world=waits)
    same_run(uninterrupted, config)


STOPS = {
    "in the first rollouts": lambda step, progress: step.step == 0 and 0 < len(step.samples) < 24,
    "where a step begins": lambda step, progress: step.step == 2 and step.weights == (1, 2) and progress.ahead is None,
    "in the first update": lambda step, progress: step.step == 1 and step.micro_index == 1,
    "in the second update": lambda step, progress: step.step == 2 and step.update_index == 1 and step.micro_index > 0,
    "in the last step": lambda step, progress: step.step == 3 and step.micro_index > 0,
}


def stop_once(config, monkeypatch, place, drained=lambda: contextlib.nullcontext()):
    """Stops the run at the place, and takes it up again to its end."""
    stopped = []

    def asked(world, progress):
        def should_stop():
            step = progress.open_step
            if stopped or step is None or not STOPS[place](step, progress):
                return False
            stopped.append(progress)
            return True

        return dataclasses.replace(world, should_stop=should_stop)

    with drained(), pytest.raises(SystemExit):
        run_with(monkeypatch, config, world=asked)
    (progress,) = stopped
    build_run.train(config, quiet=True)
    return progress


@pytest.mark.parametrize(
    "place", [place if "first update" in place else pytest.param(place, marks=pytest.mark.slow) for place in STOPS]
)
def test_ahead_stopped_anywhere_ends_with_the_same_bits(uninterrupted, tmp_path, monkeypatch, place):
    config = changed(uninterrupted, runs_dir=str(tmp_path / "runs"))
    progress = stop_once(config, monkeypatch, place)
    assert (progress.ahead is not None) == (place in ("in the first update", "in the second update"))
    if progress.ahead is not None:  # what was under way was finished and saved
        assert len(progress.ahead.verdicts) == 24
        assert progress.ahead.weights == (progress.step, 2 * progress.step)
    same_run(uninterrupted, config)


@pytest.mark.slow
def test_ahead_mutant_that_forgets_the_rollouts_under_way_is_seen(uninterrupted, tmp_path, monkeypatch):
    config = changed(uninterrupted, runs_dir=str(tmp_path / "runs"))

    @contextlib.contextmanager
    def forgetful():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                loop,
                "progress_to_host",
                lambda progress, position: progress_to_host(dataclasses.replace(progress, ahead=None), position),
            )
            yield

    stop_once(config, monkeypatch, "in the first update", forgetful)
    with pytest.raises(AssertionError):
        same_run(uninterrupted, config)


@pytest.mark.parametrize(
    ("place", "count"),
    [
        ("rollouts", 5),
        *(pytest.param(*where, marks=pytest.mark.slow) for where in (("rollouts", 9), ("micro", 13), ("save", 2))),
    ],
)
def test_ahead_after_death_is_bitwise(uninterrupted, tmp_path, monkeypatch, place, count):
    """Dead inside the thread's sampling, inside a window with the thread at work, or after a save was begun."""
    config = changed(uninterrupted, runs_dir=str(tmp_path / "runs"))

    def die(done):
        if done == count:
            raise Killed

    def killer(world, progress):
        if place == "rollouts":
            return beside(die)(world, progress)
        return dataclasses.replace(world, save=save_killer([count])(world.save)) if place == "save" else world

    def stages(stage):
        killed = micro_killer([count])(stage.micro_step)
        return dataclasses.replace(stage, micro_step=killed) if place == "micro" else stage

    with pytest.raises(Killed):
        run_with(monkeypatch, config, stages=stages, world=killer)
    build_run.train(config, quiet=True)
    same_run(uninterrupted, config)


def test_ahead_error_of_the_thread_is_the_runs_and_costs_no_save(uninterrupted, tmp_path, monkeypatch):
    """A policy that diverges in the rollouts of step 3: raised by the run; taken up, it is the run that it was."""
    config = changed(uninterrupted, runs_dir=str(tmp_path / "runs"))

    def diverge(world, progress):
        def sample(params, requests, **options):
            if threading.current_thread() is not threading.main_thread() and progress.step == 1:
                raise FloatingPointError("expected finite sampler log-probs, got nan")
            return world.sample(params, requests, **options)

        return dataclasses.replace(world, sample=sample)

    with pytest.raises(FloatingPointError, match="finite sampler log-probs"):
        run_with(monkeypatch, config, world=diverge)
    steps = [row["step"] for row in rows(config, "metrics.jsonl") if "witness/ok" in row]
    assert steps == [1, 2]  # step 2 was done and is done again: its checkpoint would lack the rollouts of step 3
    build_run.train(config, quiet=True)
    same_run(uninterrupted, config)


@pytest.mark.slow
def test_ahead_keeps_what_came_before_an_engine_failed(uninterrupted, tmp_path, monkeypatch):
    """Not replay, which an outside engine does not promise: nothing that came is asked for twice."""
    config = changed(uninterrupted, runs_dir=str(tmp_path / "runs"))
    failing = SamplingFailed("the server is gone")
    kept, asked = [], []

    def fail(count):
        if count == 1:
            raise failing

    def failed(world, progress):
        inner = beside(fail)(world, progress)

        def save(number, state, host, arrays, **options):
            kept.append(host["ahead"])
            return world.save(number, state, host, arrays, **options)

        return dataclasses.replace(inner, save=save)

    with pytest.raises(SamplingFailed):
        run_with(monkeypatch, config, world=failed)
    came = [tuple(sample["sample_id"]) for sample in kept[-1]["samples"]]
    assert 0 < len(came) < 24
    assert kept[-1]["weights"] == [0, 0]

    def noted(world, progress):
        def sample(params, requests, **options):
            asked.append([tuple(request.sample_id) for request in requests])
            return world.sample(params, requests, **options)

        return dataclasses.replace(world, sample=sample)

    run_with(monkeypatch, config, world=noted)
    assert len(asked[0]) == 24 - len(came)
    assert not set(asked[0]) & set(came)
    steps = [row for row in rows(config, "metrics.jsonl") if "witness/ok" in row]
    assert [row["batch/rollouts"] for row in steps] == [24] * 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_ahead_after_kill_9_is_bitwise(tmp_path, seed):
    """Killed at a random time between the first evaluation and the end, by a signal that nobody can handle."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    process = start(whole, "ahead")
    wait_for_first_row(process, whole)
    began = time.monotonic()
    process.communicate(timeout=300)
    assert process.returncode == 0
    seconds = time.monotonic() - began
    process = start(killed, "ahead")
    wait_for_first_row(process, killed)
    time.sleep(random.Random(seed).uniform(0.0, 0.9) * seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finish(killed, "ahead")
    with tiny.hashed():
        same_run(*(tiny.with_rollouts_ahead(tiny.killed_config(folder)) for folder in (whole, killed)))


@pytest.mark.slow
def test_ahead_step_that_ended_with_a_pass_draws_no_more_after_a_stop(tmp_path, monkeypatch):
    """DAPO refills to the end of the pass, here 6 + 6, then 3; the next step's questions are no refill of the three."""
    config = tiny.tiny_config(tmp_path, method="dapo")
    config = changed(
        tiny.with_rollouts_ahead(config),
        data__train_questions=15,
        batch__rows=1,
        batch__max_micro_batches=64,
        train__steps=3,
        train__eval_every=0,
        eval__train_questions=0,
    )
    with tiny.shared_programs(config):
        build_run.train(config, quiet=True)
        again = changed(config, runs_dir=str(tmp_path / "again"))
        progress = stop_once(again, monkeypatch, "in the first update")
        assert len(progress.open_step.questions) == 3
        assert varied_questions(progress.open_step) < 6
        same_run(config, again)


@pytest.mark.slow
def test_ahead_of_two_stages_begins_each_with_its_own_weights(tmp_path):
    """The last step of a stage makes no rollouts for the next one; a stage of SFT alone makes none."""
    stages = (StageConfig(method="sft", steps=2), StageConfig(method="grpo", steps=2))
    config = tiny.with_rollouts_ahead(tiny.tiny_config(tmp_path, method="dr_grpo", stages=stages))
    config = changed(config, train__steps=2, train__eval_every=0, eval__train_questions=0)
    with tiny.shared_programs(config):
        build_run.train(config, quiet=True)
    steps = [row for row in rows(config, "metrics.jsonl") if "witness/ok" in row]
    assert [row.get("rollout/staleness") for row in steps] == [None, None, 0, 1, 0, 1]
    assert [row.get("rollout/staleness_updates") for row in steps] == [None, None, 0, 1, 0, 1]


def test_ahead_weighs_a_stale_token_by_the_ratio_of_trainer_to_sampler():
    """One update per step, no score pass: 1.5 of the old weights' probability counts 1.5, 4 times it counts the cap."""
    config = changed(VALID, method="dr_grpo", train__rollouts_ahead=True, hpt__sampler_correction="token_tis")
    recipe = build_recipe(config, "dr_grpo", 8)
    assert not recipe.looks  # the update's own forward pass says what a score pass would
    now = jnp.log(jnp.asarray([[0.3, 0.4, 0.1]]))
    view = TokenView(logprobs=now, sampler_logprobs=jnp.log(jnp.asarray([[0.2, 0.1, 0.2]])))
    advantages = jnp.asarray([[1.0, 1.0, -2.0]])

    def loss(logprobs):
        return jnp.sum(recipe.token_losses["rl"](dataclasses.replace(view, logprobs=logprobs), advantages))

    np.testing.assert_allclose(jax.grad(loss)(now), [[-1.5, -2.0, 2.0 * 0.5]], rtol=1e-6)


def test_ahead_in_the_config():
    """What it needs is refused where it is missing; SFT alone and DPO's pairs need no weights."""
    ahead = changed(VALID, train__rollouts_ahead=True)
    with pytest.raises(ValueError, match=r"sampler_correction 'token_tis'.*the last stage, hpt, .*got 'none'"):
        check(ahead)
    mixed = changed(ahead, method="sft", stages=(StageConfig("grpo", 3),))
    with pytest.raises(ValueError, match=r"stages\.0, grpo"):
        check(mixed)
    check(changed(ahead, hpt__sampler_correction="token_tis"))
    check(changed(ahead, method="sft"))
    check(changed(ahead, method="dpo"))
    with pytest.raises(ValueError, match=r"one device for train\.rollouts_ahead.*got mesh\.fsdp 2"):
        check(changed(ahead, hpt__sampler_correction="token_tis", mesh__fsdp=2))
    server = ServerConfig("http://here/v1", "m", "/w", updates=(ServerCall("/take", '{"path": "{folder}"}'),))
    outside = changed(ahead, hpt__sampler_correction="token_tis", mesh__fsdp=2)
    check(changed(outside, rollout__engine="server", rollout__server=server))
    # a longer run has rollouts for the step after; and a run from before the switch is as one where it is off
    corrected = changed(ahead, hpt__sampler_correction="token_tis")
    longer = changed(corrected, train__steps=61)
    assert changed_fields(resolved(corrected), resolved(longer)) == ["train.steps: 60 -> 61"]
    older = resolved(VALID)
    del older["train"]["rollouts_ahead"]
    assert changed_fields(older, resolved(VALID)) == []
    assert changed_fields(older, resolved(ahead)) == ["train.rollouts_ahead: null -> true"]


def test_ahead_progress_survives_json_and_older_checkpoints_load(shared):
    _, parts, _ = shared
    questions = {question.question_id: question for question in parts.questions.train}
    some = parts.questions.train[:2]
    progress = Progress(
        open_step=OpenStep(step=3, round=0, questions=list(some)),
        ahead=OpenStep(step=4, round=1, questions=list(some), weights=(3, 6)),
    )
    host, arrays = progress_to_host(progress, {"next_index": 5})
    host = json.loads(json.dumps(host))
    assert progress_from_host(host, arrays, questions) == progress
    del host["ahead"], host["open_step"]["weights"]
    older = progress_from_host(host, arrays, questions)
    assert older == dataclasses.replace(progress, ahead=None)
    assert older.open_step.weights is None


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_kept_weights_outlive_those_they_are_of(compute):
    """A donated array is gone; norms keep their type, as the decoder uses them."""
    params = {"final_norm": jnp.full(3, 1.001), "layers": {"q": jnp.full((2, 2), 1.001)}}
    kept = _keeper(Frozen(), jnp.dtype(compute))(params)
    jax.tree.map(lambda leaf: leaf.delete(), params)
    assert kept["final_norm"].dtype == jnp.float32
    assert kept["layers"]["q"].dtype == compute
    np.testing.assert_array_equal(np.asarray(kept["final_norm"]), np.full(3, 1.001, np.float32))
    expected = jnp.full((2, 2), 1.001).astype(compute)
    np.testing.assert_array_equal(np.asarray(kept["layers"]["q"]), np.asarray(expected))


def test_stale_samples_raise_no_alarm_about_the_sampler():
    said = []
    write = watch_sampler(lambda step, metrics: None, said.append)
    write(1, {"rollout/logp_diff_max": 0.2, "rollout/staleness": 1})
    assert said == []
    write(2, {"rollout/logp_diff_max": 0.2, "rollout/staleness": 0})
    assert len(said) == 1
