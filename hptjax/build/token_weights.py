"""What one token of each part weighs, asked of the method's own route, terms and reducers on a population made up.

Every prompt has data.max_prompt_tokens and every rollout and demonstration the limit of a completion, or as many tokens
as are asked for; half of a question's rollouts are solved. No formula of a reducer stands here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hptjax.build.method import Recipe, build_recipe
from hptjax.config import Config
from hptjax.hpt.gate import demonstration_sample
from hptjax.hpt.method import CONTINUED, DEMONSTRATIONS
from hptjax.hpt.route import Judged
from hptjax.hpt.terms import term_values
from hptjax.losses.estimator import Estimator
from hptjax.records import Example, FinishReason, Question, Sample, SampleId, Source


@dataclasses.dataclass(frozen=True)
class TokenWeight:
    """The factors in the loss of one token of a part: the least and the largest of its live tokens; 0 without any.

    Args
      of: whose token: "rollout", "demonstration", "prefix" or, where a part covers several, "".
      has_advantage: whether an advantage comes on top.
    """

    part: str
    of: str
    low: float
    high: float
    has_advantage: bool


def split_weights(config: Config, *, questions: int, demonstrations: int, demo_tokens: int) -> dict[str, TokenWeight]:
    """By part, where `demonstrations` of the questions of an update leave their demonstration, and the others rollouts.

    Args
      demo_tokens: of each demonstration.
    """
    recipe = _recipe(config, questions)
    asked = _questions(config, questions, demo_tokens)
    samples = [demonstration_sample(question) for question in asked[:demonstrations]]
    for question in asked[demonstrations:]:
        samples += [_rollout(config, question, index) for index in range(recipe.method.rollouts)]
    return {each.part: each for each in _weights(recipe, samples, {})}


def routed_weights(config: Config, *, questions: int) -> list[TokenWeight]:
    """By part, in the first step of the last stage: what the method's route makes of the questions of an update."""
    recipe = _recipe(config, questions)
    asked = _questions(config, questions, config.rollout.max_completion_tokens)
    groups = {question.question_id: _group(config, recipe, question) for question in asked}
    judged = Judged(
        questions=asked,
        groups=groups,
        solved=np.asarray([sum(s.solved for s in groups[q.question_id]) for q in asked], np.int64),
        visit=0,
        demonstrations={q.question_id: dataclasses.replace(demonstration_sample(q), reward=1.0) for q in asked}
        if recipe.method.rewards_demonstrations
        else {},
        wanted=questions,
    )
    routed = recipe.method.route(judged)
    found = _weights(recipe, routed.live, routed.scales)
    if not recipe.method.apart:
        return found
    alone = _questions(config, recipe.method.apart, config.rollout.max_completion_tokens)
    apart = {each.part: each for each in _weights(recipe, [demonstration_sample(q) for q in alone], {})}
    return [each if each.high else apart[each.part] for each in found]


def _recipe(config: Config, questions: int) -> Recipe:
    return build_recipe(config, config.method, questions * config.train.updates_per_rollout_batch)


def _weights(
    recipe: Recipe, samples: Sequence[Sample], scales: Mapping[str, Mapping[SampleId, float]]
) -> list[TokenWeight]:
    ordered = sorted(samples, key=lambda sample: sample.sample_id)
    alive = np.ones(len(ordered), bool)
    partition = None if recipe.partition is None or not ordered else recipe.partition(ordered)
    found = []
    for part, term in zip(recipe.method.parts, recipe.terms(0), strict=True):
        # advantages are no part of a weight, and the rewards made up here are not meant for them
        given: dict[SampleId, Any] = {sample.sample_id: 0.0 for sample in ordered}
        values = term_values(
            term, ordered, alive, advantages=given, scales=scales.get(term.name), partition=partition
        ).token_weights
        live = values[values > 0.0]
        found.append(
            TokenWeight(
                part=part.name,
                of="prefix"
                if part.sources == CONTINUED
                else "demonstration"
                if part.sources == DEMONSTRATIONS
                else ""
                if part.sources >= DEMONSTRATIONS
                else "rollout",
                low=float(live.min(initial=np.inf)) if live.size else 0.0,
                high=float(live.max(initial=0.0)),
                has_advantage=isinstance(part.row, Estimator) and part.kind == "rl",
            )
        )
    return found


def _questions(config: Config, count: int, demo_tokens: int) -> list[Question]:
    prompt, demonstration = (np.zeros(n, np.int32) for n in (config.data.max_prompt_tokens, demo_tokens))
    return [
        Question(Example(number, prompt="", demonstration="", answer={}, canonical=str(number)), prompt, demonstration)
        for number in range(count)
    ]


def _group(config: Config, recipe: Recipe, question: Question) -> list[Sample]:
    """The question's rollouts by the method's plan, the first of every two solved."""
    plan = recipe.method.sampled()
    group: list[Sample] = []
    rewards: dict[int, float] = {}
    while len(group) < recipe.method.rollouts:
        prefixes = plan(question, 0, rewards, 0)
        for index in range(len(group), len(prefixes)):
            group.append(_rollout(config, question, index, len(prefixes[index])))
            rewards[index] = float(group[-1].solved)
    return group


def _rollout(config: Config, question: Question, index: int, prefix: int = 0) -> Sample:
    tokens = np.zeros(config.rollout.max_completion_tokens, np.int32)
    return Sample(
        sample_id=SampleId(question.question_id, 0, index),
        group_id=question.question_id,
        source=Source.PREFIX if prefix else Source.ROLLOUT,
        prompt_tokens=question.prompt_tokens,
        completion_tokens=tokens,
        sampler_logprobs=np.zeros(len(tokens), np.float32),
        prefix_len=prefix,
        reward=float(index % 2 == 0),
        solved=index % 2 == 0,
        finish_reason=FinishReason.STOP,
    )
