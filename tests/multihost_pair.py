"""One process of a real run of two: the tiny run through the command line, with a fault where a test wants one.

`test_multihost.py` starts it twice: python -m tests.multihost_pair CONFIG.toml FAULT OPTIONS...
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

import jax

import hptjax.build.data as build_data
import hptjax.build.parts as build_parts
import hptjax.train.loop as loop
from hptjax import cli
from tests import tiny

FAULTY = 1  # the process that a fault happens in


def at_step(step: int, act: Callable[[], None]) -> None:
    """Acts once, in the faulty process, when the judge is first asked in this step (0-based, in training)."""
    judge = loop.judge_rollouts

    def judge_rollouts(open_step, judged):
        if jax.process_index() == FAULTY and open_step.step == step:
            act()
        judge(open_step, judged)

    loop.judge_rollouts = judge_rollouts


def bad_row() -> None:
    """A training question of one process that cannot be read."""
    build = build_data.build_examples

    def build_examples(config, task):
        if jax.process_index() == FAULTY:
            raise ValueError("expected a row with a prompt, got row 17 of data.jsonl without one")
        return build(config, task)

    build_data.build_examples = build_examples


def fail() -> None:
    raise ValueError("expected reward.functions to answer, got a worker that cannot be started")


def hang() -> None:
    time.sleep(1000)


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


FAULTS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "bad_row": bad_row,
    "reward": lambda: at_step(1, fail),
    "hang": lambda: at_step(1, hang),
    "sigterm": lambda: at_step(1, ask_to_stop),
    "kill": lambda: at_step(2, die),
    "freeze": lambda: at_step(1, freeze),
}


if __name__ == "__main__":
    file, fault, *options = sys.argv[1:]
    FAULTS[fault]()
    build_parts.build_judge = tiny.hash_judge
    cli.main(["train", file, *options])
