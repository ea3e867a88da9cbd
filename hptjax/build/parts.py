"""What every command needs of a config: model, data, verifier workers and evaluator, put together."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from hptjax.build.data import Questions, build_judge, build_questions, build_task
from hptjax.build.evaluation import Evaluator, build_evaluator
from hptjax.build.policy import Policy, build_policy
from hptjax.config import Config, resolved
from hptjax.records import Judge
from hptjax.rewards.pool import RewardPool
from hptjax.rundir import compile_cache_folder

TRAIN_KEY, EVALUATION_KEY = 0, 1  # what the run's random key is split by


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """What every command needs of a run."""

    config: Config
    policy: Policy
    questions: Questions
    judge: Judge
    evaluator: Evaluator
    key: Any


@contextlib.contextmanager
def open_parts(config: Config) -> Iterator[Parts]:
    """Model, data, verifier workers and evaluator of a config; the workers end with the block."""
    use_compile_cache()
    policy = build_policy(config)
    task = build_task(config.task)
    with RewardPool(workers=config.reward.workers, deadline_s=config.reward.deadline_s) as pool:
        questions = build_questions(config, task, policy.tokenizer, pool)
        judge = build_judge(config, task, policy.tokenizer, pool)
        key = jax.random.key(config.seed)
        evaluator = build_evaluator(config, policy, questions, judge, jax.random.fold_in(key, EVALUATION_KEY))
        yield Parts(config, policy, questions, judge, evaluator, key)


def use_compile_cache() -> None:
    """Compiled programs are kept between processes, so that a second start is quick."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(compile_cache_folder()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def fingerprint(parts: Parts) -> dict[str, Any]:
    """What a checkpoint must share with this run to be taken up."""
    config = parts.config
    return {"model": dataclasses.asdict(parts.policy.config), "config": resolved(config)["hpt"], "seed": config.seed}
