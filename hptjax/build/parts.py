"""What every command needs of a config: model, data, verifier workers and evaluator, put together."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hptjax.build.data import Questions, build_judge, build_questions, build_task
from hptjax.build.evaluation import Evaluator, build_evaluator
from hptjax.build.frozen import with_author_logprobs
from hptjax.build.heap import trimmed_after_compilations
from hptjax.build.policy import Policy, build_policy
from hptjax.build.prompts import build_prompts
from hptjax.config import Config, resolved
from hptjax.model_shape import asked_adapter
from hptjax.records import Judge, Question, Sample, Verdict, verdict_from_json, verdict_to_json
from hptjax.rewards.pool import RewardPool
from hptjax.rundir import compile_cache_folder
from hptjax.sharding.agree import check_same, in_shares
from hptjax.sharding.peers import phase, several

TRAIN_KEY, EVALUATION_KEY = 0, 1  # what the run's random key is split by
DIGEST_BYTES = 1 << 20
WORTH_KEEPING_S, JAX_KEEPS_S = 0.1, 1.0  # of a compilation; by jax's own choice


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
    phase("loading the model")
    policy = build_policy(config)
    phase("preparing the questions")
    task = build_task(config.task)
    with (
        RewardPool(workers=config.reward.workers, deadline_s=config.reward.deadline_s) as pool,
        trimmed_after_compilations(),
    ):
        prompts = build_prompts(config, policy.tokenizer, policy.stop_ids)
        questions = build_questions(config, task, policy.tokenizer, prompts, pool)
        if config.model.demonstration_author is not None:
            phase("scoring the demonstrations")
            questions = dataclasses.replace(questions, train=with_author_logprobs(config, policy, questions.train))
        if several():
            _check_same_questions(questions)
        judge = _judge_in_shares(build_judge(config, task, policy.tokenizer, pool))
        key = jax.random.key(config.seed)
        evaluator = build_evaluator(config, policy, questions, judge, jax.random.fold_in(key, EVALUATION_KEY))
        yield Parts(config, policy, questions, judge, evaluator, key)


def _judge_in_shares(judge: Judge) -> Judge:
    """The judge with the samples dealt to the processes: each asks its own workers about every n-th of them."""

    def encode(result: tuple[Sample, list[Verdict]]) -> list[Any]:
        sample, verdicts = result
        return [sample.reward, sample.solved, [verdict_to_json(verdict) for verdict in verdicts]]

    def decode(sample: Sample, said: list[Any]) -> tuple[Sample, list[Verdict]]:
        reward, solved, verdicts = said
        return dataclasses.replace(sample, reward=reward, solved=solved), [
            verdict_from_json(entry) for entry in verdicts
        ]

    def shared(samples: Sequence[Sample], questions: Mapping[int, Question]) -> list[tuple[Sample, list[Verdict]]]:
        return in_shares(samples, lambda own: judge(own, questions), "judging samples", encode=encode, decode=decode)

    return shared


def _check_same_questions(questions: Questions) -> None:
    """Raises ValueError where the processes have read different data."""
    read = {split: _questions_digest(getattr(questions, split)) for split in ("train", "validation", "test")}
    check_same(read, "the questions", "give every process the same data and tokenizer")


def _questions_digest(questions: Sequence[Question]) -> str:
    """Of ids, problems and tokens, in their order."""
    digest = hashlib.sha256()
    for question in questions:
        tokens = [question.prompt_tokens, question.demonstration_tokens]
        sizes = " ".join(str(len(each)) for each in tokens)
        digest.update(f"{question.question_id} {sizes} {question.example.canonical}\x00".encode())
        for each in tokens:
            digest.update(np.asarray(each, np.int32).tobytes())
    return digest.hexdigest()


def use_compile_cache() -> None:
    """Compiled programs are kept between processes, so that a second start is quick.

    What the environment or jax.config says of jax's cache stands: its folder, and how long a compilation has to take.
    """
    least_s = "jax_persistent_cache_min_compile_time_secs"
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(compile_cache_folder()))
    if least_s.upper() not in os.environ and jax.config.values[least_s] == JAX_KEEPS_S:
        jax.config.update(least_s, WORTH_KEEPING_S)


def fingerprint(parts: Parts) -> dict[str, Any]:
    """What a checkpoint must share with this run: model, base weights, adapters, tokenizer, objective, seed."""
    config = parts.config
    tokenizer = config.model.tokenizer or config.model.path or ""
    adapters = adapter_record(config)
    return ({} if adapters is None else {"lora": adapters}) | {
        "model": dataclasses.asdict(parts.policy.config),
        "base_weights": base_digest(config),
        "tokenizer": files_digest(Path(tokenizer), "tokenizer.json"),
        "config": {name: resolved(config)[name] for name in ("hpt", "methods")},
        "seed": config.seed,
    }


def adapter_record(config: Config) -> dict[str, Any] | None:
    """What tells a run's adapters from others: rank, alpha, targets, and the digest of those that it starts from."""
    lora = asked_adapter(config)
    if lora is None:
        return None
    record = dataclasses.asdict(lora) | {"targets": list(lora.targets)}
    if config.lora.adapter is not None:
        record["start"] = files_digest(Path(config.lora.adapter), "*.safetensors")
    return record


def base_digest(config: Config) -> str | None:
    """The digest of the weights in `model.path`; None without one."""
    return None if config.model.path is None else files_digest(Path(config.model.path), "*.safetensors")


def files_digest(folder: Path, pattern: str) -> str:
    """A digest of the matching files: their names, sizes, and first and last MiB, so that 15 GB cost no minute."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(DIGEST_BYTES))
            file.seek(max(size - DIGEST_BYTES, 0))
            digest.update(file.read(DIGEST_BYTES))
    return digest.hexdigest()[:16]
