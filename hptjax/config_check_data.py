"""What is asked of the questions, of how they are sampled and of what rewards them."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator

from hptjax.config import Config, flatten, resolved
from hptjax.config_batch import steps_of
from hptjax.config_data import PromptConfig
from hptjax.config_methods import learns_from_rollouts
from hptjax.config_problem import Problem
from hptjax.config_rollout import RewardConfig
from hptjax.config_server import server_problems


def task_problems(config: Config) -> Iterator[Problem]:
    """What is wrong with `[task]`."""
    task, data = config.task, config.data
    if not 2 <= task.numbers <= 5:
        yield "task.numbers in 2..5", f"{task.numbers}", "task.numbers"
    if task.numbers_to is not None and not task.numbers <= task.numbers_to <= 5:
        yield "task.numbers_to in task.numbers..5", f"{task.numbers_to}", "task.numbers_to"
    if not 0 <= task.corrupt < 1 or (task.corrupt and data.train_split != "base"):
        yield 'task.corrupt in [0, 1), and 0 unless data.train_split is "base"', f"{task.corrupt}", "task.corrupt"
    if not task.operators or set(task.operators) - set("+-*/"):
        yield "task.operators made of + - * /", repr(task.operators), "task.operators"
    for low, first, high, second in (
        ("low", task.low, "high", task.high),
        ("target_low", task.target_low, "target_high", task.target_high),
    ):
        if first > second:
            yield f"task.{low} <= task.{high}", f"{first} and {second}", f"task.{low} or task.{high}"


def data_problems(config: Config) -> Iterator[Problem]:
    """What is wrong with `[data]` and `[prompt]`."""
    data = config.data
    shares = flatten(resolved(config)["data"]["fractions"])
    if min(shares.values()) < 0 or sum(shares.values()) > 1 + 1e-9:
        yield "data.fractions of at least 0 that sum to at most 1", f"{shares}", "data.fractions"
    apart = {"validation": data.validation_files, "test": data.test_files}
    for name in (data.train_split, "validation", "test"):
        if shares[name] == 0 and not apart.get(name):
            yield f"a {name} split that is not empty", "a fraction of 0", f"data.fractions.{name}"
    for name, files in apart.items():
        if files and not data.files:
            yield f"data.files beside data.{name}_files", "none", f"data.files or data.{name}_files"
    if data.files and data.train_split != "train":
        yield ('data.train_split "train" where data.files are learned from', repr(data.train_split), "data.train_split")
    largest = max([data.questions_per_step, *(stage.questions_per_step or 0 for stage in config.stages)])
    if data.train_questions is not None and largest > data.train_questions:
        yield (
            "at least as many training questions as one step takes, or no batch can be filled",
            f"data.train_questions {data.train_questions} for {largest} per step",
            "data.train_questions or data.questions_per_step",
        )
    yield from prompt_problems(config.prompt)


def prompt_problems(prompt: PromptConfig) -> Iterator[Problem]:
    """What is wrong with `[prompt]`."""
    if "{question}" not in prompt.plain:
        yield "prompt.plain to hold {question}", repr(prompt.plain), "prompt.plain"
    if not _is_day(prompt.date):
        yield "prompt.date as a day such as 2024-07-26", repr(prompt.date), "prompt.date"


def _is_day(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


def rollout_problems(config: Config) -> Iterator[Problem]:
    """What is wrong with `[rollout]` and `[reward]`, and with how evaluations sample."""
    rollout, data = config.rollout, config.data
    buckets = rollout.prompt_buckets
    if not buckets or min(buckets) < 1 or list(buckets) != sorted(set(buckets)):
        yield (
            "rollout.prompt_buckets as ascending lengths of at least 1",
            f"{list(buckets)}",
            "rollout.prompt_buckets",
        )
    if buckets[-1] < data.max_prompt_tokens:
        yield (
            f"a last prompt bucket that holds data.max_prompt_tokens ({data.max_prompt_tokens})",
            f"{buckets[-1]}",
            "rollout.prompt_buckets or data.max_prompt_tokens",
        )
    needed = max(buckets[-1], data.max_prompt_tokens + rollout.max_completion_tokens)
    if rollout.cache_capacity < needed:
        yield (
            f"rollout.cache_capacity of at least {needed} (the last prompt bucket, {buckets[-1]}, and "
            f"data.max_prompt_tokens {data.max_prompt_tokens} + rollout.max_completion_tokens "
            f"{rollout.max_completion_tokens})",
            f"{rollout.cache_capacity}",
            "rollout.cache_capacity",
        )
    pages = -(-rollout.cache_capacity // rollout.cache_page)
    if rollout.cache_positions is not None and rollout.cache_positions // rollout.cache_page < pages:
        yield (
            f"rollout.cache_positions of at least {pages * rollout.cache_page} (rollout.cache_capacity "
            f"{rollout.cache_capacity} in pages of rollout.cache_page {rollout.cache_page}: room for one sample)",
            f"{rollout.cache_positions}",
            "rollout.cache_positions",
        )
    if rollout.top_p > 1:
        yield "rollout.top_p in (0, 1]", f"{rollout.top_p}", "rollout.top_p"
    yield from server_problems(
        rollout.server,
        used=rollout.engine == "server",
        correction=config.hpt.sampler_correction,
        learns=any(learns_from_rollouts(method) for _, method, _ in steps_of(config)),
    )
    if config.eval.top_p > 1:
        yield "eval.top_p in (0, 1]", f"{config.eval.top_p}", "eval.top_p"
    yield from reward_problems(config.reward)


def reward_problems(reward: RewardConfig) -> Iterator[Problem]:
    """What is wrong with `[reward]`."""
    functions = reward.functions
    names = [function.name for function in functions]
    if not functions or len(set(names)) != len(names):
        yield "one or more reward functions with distinct names", f"{names}", "reward.functions"
    if not all(math.isfinite(function.weight) for function in functions) or not any(f.weight for f in functions):
        weights = [function.weight for function in functions]
        yield "finite reward weights, not all 0", f"{weights}", "reward.functions"
