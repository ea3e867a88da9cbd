"""The work of a point, by the product's own parts: steps of the training loop, or calls of the rollout engine.

What a run has around them is left out: evaluations, checkpoints, files. Nothing else is different.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hptjax.bench.sizes import SPECIALS
from hptjax.build.data import request_maker
from hptjax.build.frozen import let_go_of_start
from hptjax.build.parts import open_parts
from hptjax.build.policy import build_policy
from hptjax.build.stages import build_stages
from hptjax.build.world import build_cadence, build_world
from hptjax.config import Config
from hptjax.masked import mean
from hptjax.records import Example, Question, Request, Sample
from hptjax.train.loop import run
from hptjax.train.stage import Progress
from hptjax.train.telemetry import Telemetry

Mark = Callable[[], None]
"""Called once, when what comes first and compiles is done."""


def nothing(*arguments: Any, **keywords: Any) -> None:
    """What is written of a step that is only timed."""


def time_steps(config: Config, folder: Path, *, warm: int, on_warm: Mark) -> tuple[dict[str, list[float]], dict]:
    """Seconds of the steps after the first `warm` ones, by phase, and counts of the last one."""
    timed = run_steps(config, folder, warm=warm, on_warm=on_warm)[warm:]
    seconds = {"step": [float(row["perf/time_per_step"]) for row in timed]}
    for name in ("rollout", "update"):
        if f"timing_s/{name}" in timed[-1]:
            seconds[name] = [float(row[f"timing_s/{name}"]) for row in timed]
    names = {
        "parameters": "parameters",
        "micro_batches": "batch/micro_batches",
        "rollouts": "batch/rollouts",
        "trained_rows": "batch/live_rows",
        "generated_tokens": "perf/generated_tokens",
        "trained_tokens": "perf/trained_tokens",
    }
    return seconds, {name: int(timed[-1][key]) for name, key in names.items()}


def run_steps(config: Config, folder: Path, *, warm: int, on_warm: Mark) -> list[dict[str, Any]]:
    """The metrics of each step of the config's run, with `parameters`; `on_warm` is called after the first `warm`.

    No token ends a completion, so that all have `rollout.max_completion_tokens`.
    """
    rows: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def traced(step: int) -> Iterator[None]:
        if step == warm:
            on_warm()
        yield

    with open_parts(config) as parts:
        parts = dataclasses.replace(parts, policy=dataclasses.replace(parts.policy, stop_ids=frozenset()))
        stages = build_stages(config, parts.policy, parts.questions.train)
        telemetry = Telemetry(write=lambda step, row: rows.append(dict(row)), say=nothing, close=nothing)
        world = build_world(
            parts,
            folder,
            stages,
            {question.question_id: question for question in parts.questions.train},
            telemetry=telemetry,
            ledger=nothing,
            save=nothing,
            should_stop=lambda: False,
        )
        world = dataclasses.replace(world, traced=traced, evaluate=lambda step, params: {})
        state = stages[0].start({"policy": parts.policy.params}, None)
        let_go_of_start(config, parts.policy)
        run(stages, state, Progress(evaluated=0), world, build_cadence(config))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(parts.policy.params))
    return [{**row, "parameters": parameters} for row in rows if "perf/time_per_step" in row]


def time_mixed(
    config: Config, *, requests: int, stops: int, repeats: int, on_warm: Mark
) -> tuple[dict[str, list[float]], dict]:
    """Seconds of the same requests, all at once and `rollout.slots` at a time, in turn; and static / continuous.

    Raises AssertionError where the two ways draw other samples.
    """
    policy, rollout = build_policy(config), config.rollout
    questions = random_questions(requests // rollout.group_size, config.data.max_prompt_tokens, len(policy.tokenizer))
    asked = request_maker(
        count=rollout.group_size,
        max_completion_tokens=rollout.max_completion_tokens,
        stop_ids=frozenset(range(SPECIALS, SPECIALS + stops)),
        temperature=1.0,
    )(questions, 0)
    key = jax.random.key(config.seed)

    def at_once(given: Sequence[Request]) -> list[Sample]:
        return policy.sample(policy.params, given, key)

    def in_batches(given: Sequence[Request]) -> list[Sample]:
        return [one for at in range(0, len(given), rollout.slots) for one in at_once(given[at : at + rollout.slots])]

    ways = {"continuous": at_once, "static": in_batches}
    done = {name: way(asked) for name, way in ways.items()}  # compiles
    for left, right in zip(*done.values(), strict=True):
        assert np.array_equal(left.completion_tokens, right.completion_tokens), f"{left.sample_id}: other tokens"
    on_warm()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats):
        for name in sorted(ways, reverse=bool(number % 2)):
            began = time.perf_counter()
            ways[name](asked)
            seconds[name].append(time.perf_counter() - began)
    lengths = np.asarray([len(sample.completion_tokens) for sample in done["static"]])
    ratios = [slow / fast for slow, fast in zip(seconds["static"], seconds["continuous"], strict=True)]
    counts = {"requests": len(asked), "generated_tokens": int(lengths.sum()), "mean_tokens": round(mean(lengths), 2)}
    return seconds | {"ratio": ratios}, counts


def random_questions(count: int, tokens: int, vocabulary: int) -> list[Question]:
    """Questions of random tokens, without demonstrations."""
    prompts = np.random.default_rng(0).integers(SPECIALS, vocabulary, (count, tokens)).astype(np.int32)
    nothing_shown = np.zeros(0, np.int32)
    return [Question(Example(n, "", "", {}, str(n)), prompt, nothing_shown) for n, prompt in enumerate(prompts)]
