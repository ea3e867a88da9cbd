"""From the config's files or task to questions: disjoint splits, text, tokens, verified demonstrations."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hptjax.build.files import file_examples, files_record
from hptjax.build.prompts import PromptFormat
from hptjax.build.rewards import reward_functions
from hptjax.config import Config, TaskConfig
from hptjax.config_batch import steps_of
from hptjax.config_methods import learns_from_demonstrations, learns_from_rollouts
from hptjax.data import tokenizer as text
from hptjax.data.prepare import Judge as DemonstrationJudge
from hptjax.data.prepare import Limits, prepare_questions
from hptjax.data.split import split_by_canonical
from hptjax.hpt.plan import PrefixPlan
from hptjax.records import (
    Example,
    Judge,
    MakeRequests,
    Question,
    Request,
    RewardFunction,
    RolloutPlan,
    Sample,
    SampleId,
    Verdict,
    verdict_from_json,
    verdict_to_json,
)
from hptjax.rewards.combine import combine
from hptjax.rewards.functions import UserReward
from hptjax.rewards.pool import RewardPool
from hptjax.sharding.agree import in_shares
from hptjax.tasks.countdown import countdown
from hptjax.tasks.task import Task


@dataclasses.dataclass(frozen=True, eq=False)
class Questions:
    """The splits as questions with unique ids over all of them.

    Args
      dropped: split, or data file -> reason -> how many examples, or rows, were dropped.
      prompts: how an example becomes a question.
      record: what else is known of the data, as JSON values: files, prompt format, changed demonstrations.
    """

    train: list[Question]
    validation: list[Question]
    test: list[Question]
    dropped: Mapping[str, Mapping[str, int]]
    prompts: PromptFormat
    record: Mapping[str, Any]


def build_task(task: TaskConfig, *, corrupt: float = 0.0) -> Task:
    """The task with its knobs set; `corrupt` is the share of its demonstrations that miss the target."""
    return countdown(
        numbers=task.numbers,
        numbers_to=task.numbers_to,
        low=task.low,
        high=task.high,
        target_low=task.target_low,
        target_high=task.target_high,
        operators=task.operators,
        negative=task.negative,
        max_value=task.max_value,
        style=task.style,
        shuffle=task.shuffle,
        corrupt=corrupt,
    )


def build_splits(config: Config, task: Task) -> dict[str, list[Any]]:
    """Split name -> instances, as `train`, `validation` and `test`; they share no canonical instance.

    Which split an instance belongs to depends on itself and `data.split_seed` alone, so it does not move when another
    size changes; the base model's share (`data.fractions.base`) never meets a question of a later run.
    """
    data = config.data
    fractions = {name: share for name, share in dataclasses.asdict(data.fractions).items() if share > 0}
    limits = {"validation": data.validation_questions, "test": data.test_questions}
    if data.train_questions is not None:
        limits[data.train_split] = data.train_questions
    instances = task.generate(config.task.seed, config.task.instances)
    splits = split_by_canonical(instances, seed=data.split_seed, fractions=fractions, limits=limits)
    return {"train": splits[data.train_split], "validation": splits["validation"], "test": splits["test"]}


def build_examples(config: Config, task: Task) -> dict[str, list[Example]]:
    """The splits as text; question ids are unique over all of them."""
    corpus = build_task(config.task, corrupt=config.task.corrupt)
    written: dict[str, list[Example]] = {}
    used = 0
    for name, instances in build_splits(config, task).items():
        examples = (corpus if name == "train" else task).write(instances, config.task.seed)
        written[name] = [dataclasses.replace(e, question_id=e.question_id + used) for e in examples]
        used += len(examples)
    return written


def build_questions(config: Config, task: Task, tokenizer: Any, prompts: PromptFormat, pool: RewardPool) -> Questions:
    """The splits with tokens, their demonstrations verified; what does not fit is dropped and counted.

    The demonstrations of a corpus that is corrupt on purpose (`task.corrupt`) are taken as they are. Of data files only
    training questions need a demonstration, and those only where a stage learns from demonstrations. The answer that a
    question is judged by is needed wherever completions are sampled.
    """
    found = file_examples(config) if config.data.files else None
    examples = build_examples(config, task) if found is None else found.splits
    prepared = {
        name: prepare_questions(
            split if name != "train" or _learns(config) else [dataclasses.replace(e, demonstration="") for e in split],
            encode=prompts.encode,
            decode=functools.partial(text.decode, tokenizer),
            judge=None if name == "train" and config.task.corrupt > 0 else build_verifier(config, task, pool),
            limits=build_limits(config, name),
        )
        for name, split in examples.items()
    }
    dropped: dict[str, dict[str, int]] = {name: dict(split.dropped) for name, split in prepared.items()}
    record: dict[str, Any] = {}
    if found is not None:
        dropped = {count.name: dict(count.dropped) for count in found.files} | {
            name: {**found.left_out[name], **reasons} for name, reasons in dropped.items()
        }
        record = {
            "files": files_record(found),
            "prompt": prompts.record,
            "changed": {name: split.changed for name, split in prepared.items()},
        }
    splits = {name: split.questions for name, split in prepared.items()}
    return Questions(dropped=dropped, prompts=prompts, record=record, **splits)


def build_limits(config: Config, split: str) -> Limits:
    """What an example of a split must have. A task's own examples have everything, so a lack is a fault of theirs."""
    data = config.data
    samples = any(learns_from_rollouts(method) for _, method, _ in steps_of(config))
    return Limits(
        prompt_tokens=data.max_prompt_tokens,
        completion_tokens=config.rollout.max_completion_tokens,
        demonstration=not data.files or (split == "train" and _learns(config)),
        answer=split != "train" or samples,
        cut=data.long_demonstrations == "cut",
    )


def _learns(config: Config) -> bool:
    """Whether demonstrations of training questions are used; those of a task's own questions are always there."""
    learned = any(learns_from_demonstrations(method) for _, method, _ in steps_of(config))
    return not config.data.files or (config.data.demonstrations and learned)


def build_verifier(config: Config, task: Task, pool: RewardPool) -> DemonstrationJudge:
    """What judges demonstrations: the task's verifier, of data files the reward that decides what is solved.

    Every process verifies its share of them.
    """
    verify = functools.partial(pool.judge, _reward_functions(config, task)[0] if config.data.files else task.verify)

    def verified(
        completions: Sequence[str], answers: Sequence[Mapping[str, Any]], prompts: Sequence[str]
    ) -> list[Verdict]:
        return in_shares(
            list(zip(completions, answers, prompts, strict=True)),
            lambda own: verify([each[0] for each in own], [each[1] for each in own], [each[2] for each in own]),
            "verifying demonstrations",
            encode=verdict_to_json,
            decode=lambda _, said: verdict_from_json(said),
        )

    return verified


def build_judge(config: Config, task: Task, tokenizer: Any, pool: RewardPool) -> Judge:
    """Asks every reward function about every sample; the first one's word is what the gate counts.

    Raises
      a name in `reward.functions` that is no function, or one that workers cannot import -> ValueError.
    """
    functions = _reward_functions(config, task)
    pool.load(functions)
    weights = [function.weight for function in config.reward.functions]

    def judge(samples: Sequence[Sample], questions: Mapping[int, Question]) -> list[tuple[Sample, list[Verdict]]]:
        completions = [text.decode(tokenizer, sample.completion_tokens) for sample in samples]
        answers = [questions[sample.sample_id.question].example.answer for sample in samples]
        prompts = [questions[sample.sample_id.question].example.prompt for sample in samples]
        verdicts = pool.score(functions, completions, answers, prompts)
        rewards = combine(verdicts, weights)
        judged = [
            dataclasses.replace(sample, reward=float(total), solved=bool(solved))
            for sample, total, solved in zip(samples, rewards.total, rewards.solved, strict=True)
        ]
        return list(zip(judged, verdicts, strict=True))

    return judge


def _reward_functions(config: Config, task: Task) -> list[RewardFunction | UserReward]:
    return reward_functions(
        [function.name for function in config.reward.functions], None if config.data.files else task
    )


def build_requests(config: Config, stop_ids: frozenset[int], plan: PrefixPlan) -> RolloutPlan:
    """The requests of the groups that `plan` describes, keyed by question, visit and index."""
    rollout = config.rollout

    def requests(
        questions: Sequence[Question], visit: int, judged: Mapping[SampleId, Sample], stage_step: int
    ) -> list[Request]:
        rewards: dict[int, dict[int, float]] = {question.question_id: {} for question in questions}
        for sample_id, sample in judged.items():
            assert sample.reward is not None
            rewards[sample_id.question][sample_id.index] = sample.reward
        return [
            Request(
                sample_id=SampleId(question.question_id, visit, index),
                prompt_tokens=np.asarray(question.prompt_tokens, np.int32),
                prefix_tokens=prefix,
                max_completion_tokens=rollout.max_completion_tokens,
                stop_ids=stop_ids,
                temperature=rollout.temperature,
                top_k=rollout.top_k,
                top_p=rollout.top_p,
            )
            for question in questions
            for index, prefix in enumerate(plan(question, visit, rewards[question.question_id], stage_step))
        ]

    return requests


def request_maker(
    *,
    count: int,
    max_completion_tokens: int,
    stop_ids: frozenset[int],
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
) -> MakeRequests:
    """Questions and a round -> `count` requests for each question."""

    def make_requests(questions: Sequence[Question], visit: int) -> list[Request]:
        return [
            Request(
                sample_id=SampleId(question.question_id, visit, index),
                prompt_tokens=np.asarray(question.prompt_tokens, np.int32),
                max_completion_tokens=max_completion_tokens,
                stop_ids=stop_ids,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
            )
            for question in questions
            for index in range(count)
        ]

    return make_requests
