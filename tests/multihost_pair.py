"""One of the processes of a real run of two: tiny runs one after the other, with a fault where a test wants one.

`test_multihost.py` starts it twice: python -m tests.multihost_pair FOLDER PORT PROCESS ACT...
Each act is a run of its own name. What became of it is written to FOLDER/outcome_<process>.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import hptjax.build.data as build_data
import hptjax.build.parts as build_parts
import hptjax.build.run as build_run
import hptjax.train.loop as loop
import hptjax.train.rounds as rounds
from hptjax import cli
from hptjax.build.policy import Policy
from hptjax.config import Config, DistributedConfig, MeshConfig
from hptjax.config_model import ShapeConfig
from hptjax.data.stream import QuestionStream
from hptjax.errors import exit_status
from hptjax.rewards.pool import RewardPool
from hptjax.sharding.host import to_host
from hptjax.sharding.peers import HERE, is_first, waiting
from hptjax.train.checkpoint import Checkpoints
from hptjax.train.stage import Stage
from hptjax.types import MicroBatch
from tests import recorded, tiny
from tests.proofs.test_resumed_windows import checkpoints
from tests.proofs.two_processes import added
from tests.test_bad_input import config_file

STEPS = 3
INSIDE = 2  # micro-batches of the window that is open in a checkpoint
FAULTY = 1  # the process that a fault happens in
SHAPE = ShapeConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=32)


def pair_config(folder: Path, name: str, **distributed) -> Config:
    """Three steps over two devices, evaluated at their ends, saved after each."""
    config = tiny.tiny_config(folder, name=name, mesh=MeshConfig(data=2))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, shape=SHAPE),
        train=dataclasses.replace(config.train, steps=STEPS, eval_every=0, rollouts_every=1),
        eval=dataclasses.replace(config.eval, train_questions=0),
        distributed=DistributedConfig(**distributed),
    )


@contextlib.contextmanager
def at_step(step: int, act: Callable[[], None], process: int = FAULTY) -> Iterator[None]:
    """Acts in one process before it judges the rollouts of a step, counted from 0."""
    judge = rounds.judge_rollouts

    def judge_rollouts(open_step, *rest):
        if jax.process_index() == process and open_step.step == step:
            act()
        judge(open_step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "judge_rollouts", judge_rollouts)
        yield


@contextlib.contextmanager
def before_last_micro_batch(step: int, act: Callable[[], None]) -> Iterator[None]:
    """Acts in the faulty process past all meetings of a step: the other is inside the program, and then reads it."""
    apply = loop._apply_updates

    def apply_updates(stage, state, progress, *rest):
        def micro_step(now, micro_batch, is_last):
            if jax.process_index() == FAULTY and progress.step == step and to_host(is_last):
                act()
            return stage.micro_step(now, micro_batch, is_last)

        return apply(dataclasses.replace(stage, micro_step=micro_step), state, progress, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_apply_updates", apply_updates)
        yield


@contextlib.contextmanager
def bad_row() -> Iterator[None]:
    """A row of one process's data that cannot be read."""
    build = build_data.build_examples

    def build_examples(config, task):
        if jax.process_index() == FAULTY:
            raise ValueError("expected a row with a prompt, got row 17 without one")
        return build(config, task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_data, "build_examples", build_examples)
        yield


@contextlib.contextmanager
def dead_worker(call: int) -> Iterator[None]:
    """The reward worker of one process dies before its n-th call: the first is the first that it is used for."""
    score, calls = RewardPool.score, []

    def killed(pool, *arguments):
        calls.append(pool)
        if jax.process_index() == FAULTY and len(calls) == call:
            os.kill(pool.process_ids[0], signal.SIGKILL)
        return score(pool, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RewardPool, "score", killed)
        yield


def oversleep() -> None:
    """Comes late: by then the other has waited for longer than it may."""
    time.sleep(6)


@contextlib.contextmanager
def full_disk(step: int) -> Iterator[None]:
    """From a step on no file of one process grows past some bytes; writes fail, as they do on a full disk.

    The save that is still being written then is seen to its end before.
    """
    save, saved = Checkpoints.save, []

    def noted(checkpoints, *arguments, **options):
        saved.append(checkpoints.folder / str(len(saved)))
        save(checkpoints, *arguments, **options)

    def fill() -> None:
        while not saved[-1].exists():
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))

    with pytest.MonkeyPatch.context() as patch, at_step(step, fill):
        patch.setattr(Checkpoints, "save", noted)
        yield


@contextlib.contextmanager
def endless_save() -> Iterator[None]:
    """The last save of process 0 never ends, as where the other froze inside it: nor does the closing of its files."""

    close = Checkpoints.close

    def never_close(checkpoints):
        with waiting():
            time.sleep(1000 * is_first())
        close(checkpoints)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "close", never_close)
        yield


@contextlib.contextmanager
def short_limit() -> Iterator[None]:
    """From the second step on, nobody is waited for longer than two seconds; compiling is over by then."""
    make_step = loop._step

    def step(stage, state, progress, *rest):
        HERE.timeout_s = 2.0 if progress.step == 1 else HERE.timeout_s
        return make_step(stage, state, progress, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_step", step)
        yield


FAULTS: dict[str, Callable[[], list[contextlib.AbstractContextManager]]] = {
    "bad_row": lambda: [bad_row()],
    "worker": lambda: [dead_worker(1)],
    "late": lambda: [short_limit(), at_step(1, oversleep)],
    "stop": lambda: [dead_worker(2), at_step(1, lambda: os.kill(os.getpid(), signal.SIGTERM))],
    "kill": lambda: [at_step(2, lambda: os.kill(os.getpid(), signal.SIGKILL))],
    "full": lambda: [full_disk(1)],
    "stuck": lambda: [short_limit(), before_last_micro_batch(1, lambda: time.sleep(1000))],
    "kill_inside": lambda: [before_last_micro_batch(1, lambda: os.kill(os.getpid(), signal.SIGKILL))],
    "freeze": lambda: [short_limit(), at_step(1, lambda: os.kill(os.getpid(), signal.SIGSTOP))],
    "freeze_saving": lambda: [
        short_limit(),
        endless_save(),
        at_step(1, lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    ],
    "freeze_first": lambda: [short_limit(), at_step(1, lambda: os.kill(os.getpid(), signal.SIGSTOP), process=0)],
}


def outcome(config: Config, fault: str) -> dict[str, object]:
    """What a run ends with: its error in words and the status that a shell would see."""
    try:
        with contextlib.ExitStack() as faults:
            for entry in FAULTS.get(fault, list)():
                faults.enter_context(entry)
            summary = tiny.train(config)
    except SystemExit as stop:
        return {"status": stop.code, "message": "stopped"}
    except Exception as error:
        return {"status": exit_status(error), "message": f"{type(error).__name__}: {error}"}
    return {"status": 0, "message": "", "summary": summary}


def dropped(folder: Path, name: str) -> dict[str, dict[str, int]]:
    """How many questions a run has dropped, by split and reason; nothing where it did not get so far."""
    record = folder / "runs" / name / "data.json"
    return json.loads(record.read_text())["dropped"] if record.exists() else {}


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """Inside the block all runs share the compiled programs of the first; their configs differ by their names alone."""
    build_policy, build_stages = build_parts.build_policy, build_run.build_stages
    policies: list[Any] = []
    stages: list[Any] = []

    def same_policy(config):
        policies.extend([] if policies else [build_policy(config)])
        return policies[0]

    def same_stages(config, policy, questions):
        stages.extend([] if stages else build_stages(config, policy, questions))
        stream = QuestionStream(questions, questions_per_step=config.data.questions_per_step, seed=config.seed)
        return [dataclasses.replace(stages[0], stream=stream)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_parts, "build_policy", same_policy)
        patch.setattr(build_run, "build_stages", same_stages)
        patch.setattr(build_run, "let_go_of_start", lambda config, policy: None)  # the next run begins with them too
        yield


def window_of(stage: Stage, visit: int) -> list[MicroBatch]:
    """The micro-batches of a recorded update: questions of both kinds."""
    return stage.assemble(recorded.mixed(5, 6, visit=visit), frozenset()).micro_batches


def save_inside_a_window(policy: Policy, stage: Stage, folder: Path) -> None:
    """A checkpoint of a fresh run after the first micro-batches of a recorded update."""
    state = added(policy, stage, window_of(stage, 0)[:INSIDE], flush=False)
    with checkpoints(folder) as saved:
        saved.save(0, state, {"next": INSIDE}, metric=None, wait=True)


def taken_up(policy: Policy, stage: Stage, folder: Path) -> dict[str, np.ndarray]:
    """The counts of the window that was open in a checkpoint, and the losses of it and of the next five."""
    with checkpoints(folder) as saved:
        state = saved.restore_latest(stage.start({"policy": policy.params}, None)).state
    found: dict[str, np.ndarray] = {}
    losses = []
    for visit in range(6):
        rest = window_of(stage, visit)[INSIDE if visit == 0 else 0 :]
        state = added(policy, stage, rest, flush=True, state=state)
        report = to_host(state.report)
        found = found or {name: getattr(report, name) for name in ("status", "tokens", "micro_batches", "witness")}
        losses.append([float(report.stats[name].total) for name in ("loss/sft", "loss/rl")])
    return found | {"losses": np.asarray(losses)}


def move(folder: Path, process: str, config: Config) -> None:
    """Takes up FOLDER/one, which one process has saved, and saves FOLDER/two for it."""
    policy = build_parts.build_policy(config)
    stage = build_run.build_stages(config, policy, recorded.questions())[0]
    save_inside_a_window(policy, stage, folder / "two")
    np.savez(folder / f"moved_{process}.npz", **taken_up(policy, stage, folder / "one"))


def main(folder: Path, port: str, process: str, acts: list[str]) -> None:
    """All acts, each NAME or NAME:FAULT; or, after "cli", one of them through the command line."""
    joined = {"mode": "explicit", "coordinator": f"localhost:{port}", "processes": 2, "process": int(process)}
    if acts[0] == "cli":
        name, _, fault = acts[1].partition(":")
        file = config_file(pair_config(folder, name, **joined), folder / f"{name}_{process}.toml")
        with contextlib.ExitStack() as faults:
            for entry in FAULTS.get(fault, list)():
                faults.enter_context(entry)
            with tiny.hashed():
                cli.main(["train", file])
    found = {}
    with compiled_once():
        for act in acts:
            name, _, fault = act.partition(":")
            config = pair_config(folder, name, **joined)
            found[act] = outcome(config, fault) | {"dropped": dropped(folder, name)}
        move(folder, process, config)
    (folder / f"outcome_{process}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
