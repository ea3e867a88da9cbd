"""A whole run at the smallest size: a random decoder, a few questions, and a verifier whose word is a hash.

A random model solves nothing, so the verdict here is a function of the completion's text instead: about a third of
the completions count as solved, and every branch of a step is taken. Used by tests, and as a script by the tests that
kill a process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax

import hptjax.build.parts as build_parts
import hptjax.build.run as build_run
from hptjax.build.data import build_task
from hptjax.build.evaluation import build_evaluator
from hptjax.build.stages import build_stages
from hptjax.config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    TaskConfig,
    TelemetryConfig,
    TrainConfig,
)
from hptjax.config_model import ShapeConfig
from hptjax.data import tokenizer as text
from hptjax.data.stream import QuestionStream
from hptjax.records import Verdict
from hptjax.train.stage import Stage

SYMBOLS = "0123456789+-*/=,:"


def hash_judge(config: Any, task: Any, tokenizer: Any, pool: Any) -> Any:
    """A judge that calls a third of all completions solved, by their text."""

    def judge(samples, questions):
        judged = []
        for sample in samples:
            digest = hashlib.sha256(text.decode(tokenizer, sample.completion_tokens).encode()).digest()
            solved = digest[0] % 3 == 0
            verdict = Verdict(float(solved), solved, "hash")
            judged.append((dataclasses.replace(sample, reward=verdict.reward, solved=solved), [verdict]))
        return judged

    return judge


def tiny_config(folder: Path, **changes: Any) -> Config:
    """A run of a few seconds in `folder`; `changes` replace top-level fields of the config."""
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        text.make_character_tokenizer(SYMBOLS, tokenizer)
    config = Config(
        name="tiny",
        runs_dir=str(folder / "runs"),
        model=ModelConfig(
            tokenizer=str(tokenizer),
            shape=ShapeConfig(hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=32),
        ),
        task=TaskConfig(instances=200, high=9),
        data=DataConfig(train_questions=40, validation_questions=8, test_questions=8, questions_per_step=6),
        rollout=RolloutConfig(
            group_size=4, slots=16, prefill_rows=4, max_completion_tokens=20, cache_capacity=44, tokens_per_call=5
        ),
        batch=BatchConfig(rows=2, row_tokens=48, max_segments=4, max_micro_batches=32),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        train=TrainConfig(steps=4, eval_every=2, probe_every=0, rollouts_every=2, panel_questions=2),
        eval=EvalConfig(questions=4, samples_per_question=2, train_questions=4, ks=(1, 2)),
        checkpoint=CheckpointConfig(every_steps=1, keep_last=2, keep_best=1),
        telemetry=TelemetryConfig(tensorboard=False, progress=False, plot=False),
    )
    config = dataclasses.replace(config, **changes)
    build_task(config.task)
    return config


@contextlib.contextmanager
def hashed() -> Iterator[None]:
    """Inside the block every run has the hash for a verifier."""
    before = build_parts.build_judge
    build_parts.build_judge = hash_judge
    try:
        yield
    finally:
        build_parts.build_judge = before


def train(config: Config) -> dict[str, Any]:
    """The product's own `train`, with the hash for a verifier."""
    with hashed():
        return build_run.train(config, quiet=True)


@contextlib.contextmanager
def shared_programs(config: Config) -> Iterator[tuple[build_parts.Parts, list[Stage]]]:
    """Inside the block every run of this config, in any folder, has these compiled programs, and streams of its own."""
    with build_parts.open_parts(config) as parts:
        stages = build_stages(config, parts.policy, parts.questions.train)  # not the run's: blocks may be nested

        @contextlib.contextmanager
        def same_parts(config: Config) -> Iterator[build_parts.Parts]:
            judge = hash_judge(config, None, parts.policy.tokenizer, None)
            evaluator = build_evaluator(config, parts.policy, parts.questions, judge, jax.random.key(1))
            yield dataclasses.replace(parts, config=config, judge=judge, evaluator=evaluator)

        def same_stages(config: Config, policy: Any, questions: Any) -> list[Stage]:
            size = config.data.questions_per_step
            return [
                dataclasses.replace(s, stream=QuestionStream(questions, questions_per_step=size, seed=0))
                for s in stages
            ]

        kept = {"let_go_of_start": lambda config, policy: None}  # the next run begins with these weights too
        with mock.patch.multiple(build_run, open_parts=same_parts, build_stages=same_stages, **kept):
            yield parts, stages


def as_off_policy(config: Config) -> Config:
    """Two updates per rollout batch with a clip: the later one needs the score pass."""
    return dataclasses.replace(
        config,
        hpt=dataclasses.replace(config.hpt, clip_low=0.2, clip_high=0.2),
        train=dataclasses.replace(config.train, updates_per_rollout_batch=2),
    )


def with_rollouts_ahead(config: Config) -> Config:
    """Rollouts of the next step beside this one, with weights that correct for it."""
    return dataclasses.replace(
        config,
        hpt=dataclasses.replace(config.hpt, sampler_correction="token_tis"),
        train=dataclasses.replace(config.train, rollouts_ahead=True),
    )


def killed_config(folder: Path) -> Config:
    """The run that is killed by signal: off-policy, and long enough that a kill falls into its steps."""
    config = as_off_policy(tiny_config(folder))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=12))


if __name__ == "__main__":
    chosen = killed_config(Path(sys.argv[1]))
    train(with_rollouts_ahead(chosen) if "ahead" in sys.argv[2:] else chosen)
